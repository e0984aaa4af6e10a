"""The page in a real headless browser: fill, click, wait, an image appears, no console errors."""

from __future__ import annotations

import os
import re
import shutil
import time
from importlib import metadata
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from svg_t2i.web.requests import fitting_size
from tests.svg_t2i.web.requesting import wait_for

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


DRIVER = shutil.which("chromedriver")


SELECT_ALL = "\ue009a\ue000"  # control + a, release


FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1200,1000"
)


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


def press(browser, selector):
    """A click, once the page stands still: while it builds itself, what comes later moves in front."""
    from selenium.common.exceptions import ElementClickInterceptedException

    def pressed():
        try:
            find(browser, selector).click()
        except ElementClickInterceptedException:
            return False
        return True

    wait_for(pressed, f"{selector} to be free")


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


def open_tab(browser, title):
    tabs = browser.find_elements("css selector", "button[role=tab]")
    next(tab for tab in tabs if tab.text == title).click()


def value_of(browser, label):
    return find(browser, f"input[aria-label='number input for {label}']").get_attribute("value")


def images_of(browser, gallery):
    """Sources of a gallery's images, once they are there."""
    script = "return [...document.querySelectorAll(arguments[0])].map(i => i.src)"
    return wait_for(lambda: browser.execute_script(script, f"#{gallery} img"), f"images in {gallery}")


def screenshots(browser, name):
    """Of the whole page, at a desk and on a phone, light and dark; where SVG_T2I_SCREENSHOTS names a folder."""
    if not (folder := os.environ.get("SVG_T2I_SCREENSHOTS")):
        return
    for width, device in ((1300, ""), (390, "_phone")):
        for dark in (False, True):
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            browser.execute_script(f"document.body.classList.toggle('dark', {str(dark).lower()})")
            time.sleep(0.7)
            tall = browser.execute_script("return document.body.scrollHeight")
            metrics["height"] = min(tall, 1500)
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            time.sleep(0.3)
            browser.save_screenshot(os.path.join(folder, f"{name}{device}{'_dark' if dark else ''}.png"))
    browser.execute_script("document.body.classList.remove('dark')")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_draw_and_redraw_in_the_browser(address, studio, browser, tmp_path):
    options = studio.pipeline.options
    browser.get(address)
    find(browser, "input[aria-label='number input for Images']").send_keys(SELECT_ALL, "2\ue004")  # tab
    line_break = "\ue008\ue007\ue000"  # Shift+Enter, then neither is held
    find(browser, "#prompt textarea").send_keys("a red circle", line_break, "inside a blue square", "\ue007")  # Enter
    text, sizes = finished_image(browser, "draw")
    assert "a red circle inside a blue square" in text  # a browser shows a line break of JSON as a blank
    assert f"{options.width}x{options.height}" in sizes
    assert wait_for(lambda: re.search(r"2 finished; seed \d{3}", find(browser, "#draw_status").text), "a random seed")
    sides = [find(browser, f"input[aria-label='number input for {side}']") for side in ("Width", "Height")]
    before = [side.get_attribute("value") for side in sides]
    press(browser, "#swap")
    wait_for(lambda: [side.get_attribute("value") for side in sides] == before[::-1], "the swapped sides")
    press(browser, "#swap")
    screenshots(browser, "app")
    find(browser, "#prompt textarea").send_keys(SELECT_ALL, "\ue003")  # backspace
    press(browser, "#draw")
    wait_for(lambda: "write a prompt first" in find(browser, "body").text, "the message")

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(tmp_path / "upload.png")
    open_tab(browser, "Image to image")
    find(browser, "#image input[type=file]").send_keys(str(tmp_path / "upload.png"))
    wait_for(lambda: browser.find_elements("css selector", "#image img"), "the upload")
    find(browser, "#image_prompt textarea").send_keys("noise")
    press(browser, "#redraw")
    text, sizes = finished_image(browser, "redraw")
    assert "strength" in text
    assert "{}x{}".format(*fitting_size((96, 64), options.width * options.height)) in sizes
    assert console_errors(browser) == []


def gradio_version():
    return tuple(map(int, metadata.version("gradio").split(".")[:2]))


@pytest.mark.skipif(
    find_spec("gradio") and gradio_version() < (6, 18),
    reason="before Gradio 6.18 an editor in a tab that was never open takes no image",
)
def test_the_history_survives_a_reload_and_leads_on(address, studio, browser):
    """An image that was drawn is found again, its settings too, and it can be redrawn, painted over and varied."""
    browser.get(address)
    press(browser, "#forget")
    find(browser, "#prompt textarea").send_keys("a large green square at the centre", "\ue007")
    finished_image(browser, "draw")
    kept = [source.rsplit("/", 1)[1] for source in images_of(browser, "history")]
    assert len(kept) == 1
    browser.get(address)
    assert [source.rsplit("/", 1)[1] for source in images_of(browser, "history")] == kept
    press(browser, "#use")
    wait_for(lambda: "choose an image below the tabs first" in find(browser, "body").text, "the message")

    press(browser, "#history button:has(img)")
    time.sleep(0.5)
    open_tab(browser, "Interpolation")
    press(browser, "#use")
    prompt = wait_for(
        lambda: (field := find(browser, "#prompt textarea")).is_displayed() and field.get_attribute("value"),
        "the prompt",
    )
    assert prompt == "a large green square at the centre"
    assert int(value_of(browser, "Width")) == studio.pipeline.options.width

    press(browser, "#send_vary")
    wait_for(lambda: browser.find_elements("css selector", "#vary_image img"), "the image in its tab")
    press(browser, "#vary")
    text, _ = finished_image(browser, "vary")
    assert "likeness" not in text  # its name in files is t
    assert len(images_of(browser, "history")) == 3

    press(browser, "#send_inpaint")
    canvas = wait_for(lambda: browser.find_elements("css selector", "#drawing canvas"), "the canvas")[0]
    wait_for(canvas.is_displayed, "the canvas to be shown")
    time.sleep(1)
    brush = browser.find_elements("css selector", "#drawing button[aria-label='Brush']")
    if brush:
        brush[0].click()
    from selenium.webdriver import ActionChains

    stroke = ActionChains(browser).move_to_element(canvas).click_and_hold().move_by_offset(15, 10)
    stroke.move_by_offset(10, 15).release().perform()
    time.sleep(1)
    find(browser, "#inpaint_prompt textarea").send_keys("a large red square at the centre", "\ue007")
    text, _ = finished_image(browser, "inpaint")
    assert "a large red square at the centre" in text
    screenshots(browser, "inpainting")
    assert console_errors(browser) == []


def test_a_way_between_two_prompts_in_the_browser(address, browser):
    browser.get(address)
    open_tab(browser, "Interpolation")
    find(browser, "#first_prompt textarea").send_keys("a small green circle")
    find(browser, "#second_prompt textarea").send_keys("a large red square", "\ue007")
    text, _ = finished_image(browser, "interpolate")
    assert "second_prompt" in text
    assert len(images_of(browser, "interpolate_gallery")) >= 5
    assert console_errors(browser) == []


def test_a_dropped_image_gives_its_settings_back(address, studio, browser):
    *_, finished = studio.draw("a green triangle", "noise", 32, 48, 3, 1.5, 11, 1, "heun")
    browser.get(address)
    find(browser, "#prompt textarea")
    opened = [button for button in browser.find_elements("css selector", "button") if "of an image" in button.text]
    opened[0].click()
    find(browser, "#restore input[type=file]").send_keys(finished.items[0][0])
    prompt = find(browser, "#prompt textarea")
    wait_for(lambda: prompt.get_attribute("value") == "a green triangle", "the prompt")
    assert find(browser, "#negative textarea").get_attribute("value") == "noise"
    assert [value_of(browser, label) for label in ("Width", "Height", "Steps", "Guidance")] == ["32", "48", "3", "1.5"]
    assert console_errors(browser) == []


def test_stop_ends_within_a_step_and_says_so(address, studio, browser, monkeypatch):
    calls, original = [], studio.pipeline.transformer.forward_packed

    def slow(*arguments):
        calls.append(time.sleep(0.3))
        return original(*arguments)

    monkeypatch.setattr(studio.pipeline.transformer, "forward_packed", slow)
    browser.get(address)
    find(browser, "input[aria-label='number input for Steps']").send_keys(SELECT_ALL, "20\ue004")
    find(browser, "#prompt textarea").send_keys("noise", "\ue007")
    status = find(browser, "#draw_status")
    wait_for(lambda: re.search(r"step \d+ of 20, \d+ s left", status.text), "a step")
    assert browser.find_elements("css selector", "#draw_status progress")
    press(browser, "#draw_stop")
    wait_for(lambda: status.text == "stopped", "the word")
    time.sleep(1)
    stopped_at = len(calls)
    assert stopped_at < 20
    time.sleep(1)
    assert len(calls) == stopped_at
    *_, finished = studio.draw("noise", "", 32, 32, 2, 1.0, 0, 1, "dpm")  # the next visitor is served
    assert finished.items
