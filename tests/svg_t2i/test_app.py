"""The page in a real headless browser: fill, click, wait, an image appears, no console errors."""

from __future__ import annotations

import os
import shutil
import sys
import time

import numpy as np
import pytest
from PIL import Image

from autoencoder.common.config import UserError
from svg_t2i import app
from svg_t2i.web.requests import Limits, Studio, fitting_size

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
SELECT_ALL = "\ue009a\ue000"  # control + a, release
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1200,1000"
)


def test_without_weights_it_says_how_to_make_some(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "REPO_ROOT", tmp_path)
    with pytest.raises(UserError, match="quickstart.sh --short"):
        app.load_studio(app.parse_arguments([]))
    (tmp_path / app.QUICKSTART).mkdir(parents=True)
    assert app.find_quickstart() == app.QUICKSTART


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "svg_t2i.web.page", raising=False)
    with pytest.raises(UserError, match="pip install 'gradio"):
        app.main([])


def test_command_line(saved_pipeline):
    studio = app.load_studio(app.parse_arguments(["--checkpoint", str(saved_pipeline), "--max_side", "128"]))
    assert studio.limits.side == 128
    assert studio.pipeline.options.height == 32
    pytest.importorskip("gradio")
    with pytest.raises(UserError, match="--queue 0"):
        app.main(["--checkpoint", str(saved_pipeline), "--queue", "0"])


# ------------------------------------------------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def studio(toy_pipeline):
    """A model of four steps; or the one in SVG_T2I_APP_CHECKPOINT, for screenshots with good pictures."""
    if checkpoint := os.environ.get("SVG_T2I_APP_CHECKPOINT"):
        return app.load_studio(app.parse_arguments(["--checkpoint", checkpoint, "--preset", "quickstart"]))
    return Studio(toy_pipeline, Limits(side=64, steps=20, images=2, prompt_characters=60))


@pytest.fixture(scope="module")
def address(studio):
    """The page, served on a free port."""
    pytest.importorskip("gradio", reason="gradio is not installed (pip install 'svg-t2i[app]')")
    from svg_t2i.web.page import launch

    page = launch(studio, max_waiting=4, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (the extra 'browser')")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium or chromedriver here (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.implicitly_wait(20)
    yield driver
    driver.quit()


def find(browser, selector):
    return browser.find_element("css selector", selector)


def wait_for(condition, what, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s for {what}")


def finished_image(browser, name):
    """Parameters and image sizes, once the parameters are there: they come with the finished file."""
    box = find(browser, f"#{name}_parameters")
    wait_for(lambda: "prompt" in box.text, "parameters")
    script = "return [...document.querySelectorAll(arguments[0])].map(i => i.naturalWidth + 'x' + i.naturalHeight)"
    selector = f"#{name}_gallery img"
    sizes = wait_for(lambda: set(browser.execute_script(script, selector)) - {"0x0"}, "a loaded image")
    return box.text, sizes


def console_errors(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_draw_and_redraw_in_the_browser(address, studio, browser, tmp_path):
    options = studio.pipeline.options
    browser.get(address)
    find(browser, "#prompt textarea").send_keys("a large blue square at the right")
    find(browser, "input[aria-label='number input for Images']").send_keys(SELECT_ALL, "2\ue004")  # tab
    find(browser, "#draw").click()
    text, sizes = finished_image(browser, "draw")
    assert "a large blue square at the right" in text
    assert f"{options.width}x{options.height}" in sizes
    if folder := os.environ.get("SVG_T2I_SCREENSHOTS"):
        browser.save_screenshot(os.path.join(folder, "app.png"))
    find(browser, "#prompt textarea").send_keys(SELECT_ALL, "\ue003")  # backspace
    find(browser, "#draw").click()
    wait_for(lambda: "write a prompt first" in find(browser, "body").text, "the message")

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(tmp_path / "upload.png")
    tabs = browser.find_elements("css selector", "button[role=tab]")
    next(tab for tab in tabs if tab.text == "Image to image").click()
    find(browser, "#image input[type=file]").send_keys(str(tmp_path / "upload.png"))
    wait_for(lambda: browser.find_elements("css selector", "#image img"), "the upload")
    find(browser, "#image_prompt textarea").send_keys("noise")
    find(browser, "#redraw").click()
    text, sizes = finished_image(browser, "redraw")
    assert "strength" in text
    assert "{}x{}".format(*fitting_size((96, 64), options.width * options.height)) in sizes
    assert console_errors(browser) == []
