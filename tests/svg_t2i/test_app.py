"""The page in a real headless browser: fill, click, wait, an image appears, no console errors."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from urllib import error, request

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
    for port in ("0", "70000"):
        with pytest.raises(UserError, match=f"--port {port}: ports go from 1 to 65535"):
            app.main(["--checkpoint", str(saved_pipeline), "--port", port])
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with pytest.raises(UserError, match=f"--port {port}: cannot be used .Address already in use"):
            app.main(["--checkpoint", "nowhere", "--port", port])  # before any model is looked for


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


def test_who_may_come_in(tmp_path, monkeypatch):
    monkeypatch.delenv(app.AUTH_VARIABLE, raising=False)
    assert app.read_auth(None) is None
    monkeypatch.setenv(app.AUTH_VARIABLE, "ann:a:b")
    assert app.read_auth(None) == [("ann", "a:b")]
    file = tmp_path / "auth"
    file.write_text("bob:x\n\ncara:y\n")
    assert app.read_auth(file) == [("bob", "x"), ("cara", "y")]
    for content, message in (("bob:x\nh1dden\n", "line 2 is not of the form"), (":h1dden", "line 1"), ("\n", "empty")):
        file.write_text(content)
        with pytest.raises(UserError, match=message) as refused:
            app.read_auth(file)
        assert "h1dden" not in str(refused.value)
    with pytest.raises(UserError, match="--auth .*cannot be read"):
        app.read_auth(tmp_path / "none")


def call(address, name, data, **options):
    """One request of the page's interface, as anyone can send it. -> what it answers."""
    post = request.Request(f"{address}gradio_api/call/{name}", json.dumps({"data": data}).encode(), **options)
    post.add_header("Content-Type", "application/json")
    with request.urlopen(post, timeout=30) as answer:
        event = json.load(answer)["event_id"]
    with request.urlopen(f"{address}gradio_api/call/{name}/{event}", timeout=30) as answer:
        return answer.read().decode()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("draw", [None] * 9, "write a prompt first"),
        ("draw", ["x", None, None, None, None, None, None, None, None], "width = None: whole numbers"),
        ("draw", ["x", "", 32, 32, 10**9, 2.0, 0, 1, "dpm"], "steps = 1000000000"),
        ("draw", ["x", "", 32, 32, 4, 2.0, 0, 1, "magic"], "choose one of dpm"),
        ("draw", [{"a": 1}, "", 32, 32, 4, 2.0, 0, 1, "dpm"], "must be a text"),
        ("redraw", [None] * 7, "choose an image first"),
    ],
)
def test_bad_values_get_a_message_and_leave_no_traceback(address, capfd, name, data, message):
    answer = call(address, name, data)
    assert "event: error" in answer
    assert message in answer
    assert "Traceback" not in "".join(capfd.readouterr())


def test_the_page_is_an_interface_with_names(address, studio):
    """As docs/sampling.md shows it, in Python and for curl."""
    from gradio_client import Client

    client = Client(address, verbose=False)
    described = client.view_api(return_format="dict")["named_endpoints"]
    assert set(described) == {"/draw", "/redraw"}
    names = [parameter["parameter_name"] for parameter in described["/draw"]["parameters"]]
    assert names == list(inspect.signature(studio.draw).parameters)
    gallery, parameters, status = client.predict(
        prompt="noise", negative_prompt="", width=48, height=32, num_inference_steps=3, guidance_scale=2.0, seed=7,
        images=1, solver="dpm", api_name="/draw",
    )  # fmt: skip
    assert (status, parameters["seed"], len(gallery)) == ("1 finished; seed 7", 7, 1)
    answer = call(address, "draw", ["noise", "", 48, 32, 3, 2.0, None, 1, "dpm"])
    assert "event: complete" in answer


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_no_file_outlives_the_page(saved_pipeline, tmp_path, ending):
    """The command itself, with what Gradio keeps of requests in the same folder."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "svg_t2i.app", "--checkpoint", str(saved_pipeline), "--port", port]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    environment.pop("GRADIO_TEMP_DIR", None)
    with open(tmp_path / "log", "w") as log:
        page = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: "Running on" in (tmp_path / "log").read_text(), "the page", 60)
        assert "event: complete" in call(f"http://127.0.0.1:{port}/", "draw", ["x", "", 32, 32, 4, 2.0, 0, 1, "dpm"])
        (folder,) = tmp_path.glob("svg_t2i_app_*")
        assert [path for path in (folder / "gradio").rglob("*") if path.is_file()]
        page.send_signal(ending)
        page.wait(20)
    finally:
        page.kill()
    assert not folder.exists()
    assert not [path for path in (tmp_path / "gradio").rglob("*") if path.is_file()]
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_page_with_a_password(toy_pipeline):
    pytest.importorskip("gradio")
    from svg_t2i.web.page import launch

    page = launch(Studio(toy_pipeline), auth=[("ann", "right")], prevent_thread_lock=True, quiet=True)
    try:
        with pytest.raises(error.HTTPError, match="401"):
            call(page.local_url, "redraw", [None] * 7)
        login = request.Request(f"{page.local_url}login", b"username=ann&password=wrong")
        with pytest.raises(error.HTTPError, match="400"):
            request.urlopen(login, timeout=30)
        login.data = b"username=ann&password=right"
        with request.urlopen(login, timeout=30) as answer:
            assert answer.status == 200
    finally:
        page.close()


# ------------------------------------------------------------------------------------------------------- the browser


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
    find(browser, "input[aria-label='number input for Images']").send_keys(SELECT_ALL, "2\ue004")  # tab
    line_break = "\ue008\ue007\ue000"  # Shift+Enter, then neither is held
    find(browser, "#prompt textarea").send_keys("a large blue square", line_break, "at the right", "\ue007")  # Enter
    text, sizes = finished_image(browser, "draw")
    assert "a large blue square at the right" in text  # a browser shows a line break of JSON as a blank
    assert f"{options.width}x{options.height}" in sizes
    assert wait_for(lambda: re.search(r"2 finished; seed \d{3}", find(browser, "#draw_status").text), "a random seed")
    sides = [find(browser, f"input[aria-label='number input for {side}']") for side in ("Width", "Height")]
    before = [side.get_attribute("value") for side in sides]
    find(browser, "#swap").click()
    wait_for(lambda: [side.get_attribute("value") for side in sides] == before[::-1], "the swapped sides")
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
