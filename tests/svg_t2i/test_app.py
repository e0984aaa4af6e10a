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
import torch
from PIL import Image
from safetensors.torch import save_file

from autoencoder.common.config import UserError
from svg_t2i import app
from svg_t2i.loading.adapters import AdapterShelf
from svg_t2i.web.limits import Limits
from svg_t2i.web.requests import Studio, fitting_size

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


def test_what_visitors_are_told_of_a_model(saved_pipeline, toy_parts, tmp_path):
    """Its name, its licence and prompts to begin with, from its folder; and adapters from another."""
    folder = tmp_path / "models" / "mine"
    shutil.copytree(saved_pipeline, folder)
    (tmp_path / "loras").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "loras" / "style.safetensors")
    words = ["--checkpoint", str(folder), "--loras", str(tmp_path / "loras")]
    studio = app.load_studio(app.parse_arguments(words))
    assert (studio.name, studio.licence, list(studio.adapters.files)) == ("models/mine", None, ["style"])
    assert len(studio.examples) == 4
    with pytest.raises(UserError, match="style.safetensors' is no adapter of this model"):
        list(studio.draw("noise", "", 32, 32, 2, 2.0, 0, 1, "dpm", "style", 1.0))
    (folder / "LICENSE").write_text("\n  Some Licence 1.0\nmore\n")
    assert app.stated_licence(folder) == "Some Licence 1.0"
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert app.stated_licence(folder) == "apache-2.0"
    assert app.load_studio(app.parse_arguments([*words, "--licence", "mine"])).licence == "mine"

    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(toy_parts / "train.yaml", run / "config.yaml")
    prompts = app.example_prompts(run)
    assert len(set(prompts)) == 4
    assert all("noise number" in prompt for prompt in prompts)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("manifest.jsonl", "gone.jsonl"))
    assert app.example_prompts(run) == []


def test_a_page_with_adapters_and_a_licence(toy_pipeline, tmp_path):
    """Two fields more for every request, by name and in order, and the licence at its top."""
    pytest.importorskip("gradio")
    from gradio_client import Client

    from svg_t2i.web.page import launch

    save_file({"x": torch.zeros(1)}, tmp_path / "style.safetensors")
    limits, shelf = Limits(side=64, steps=20), AdapterShelf(tmp_path)
    studio = Studio(toy_pipeline, limits, licence="apache-2.0", adapters=shelf, examples=["much noise"])
    page = launch(studio, prevent_thread_lock=True, quiet=True)
    try:
        for name, found in (
            Client(page.local_url, verbose=False).view_api(return_format="dict")["named_endpoints"].items()
        ):
            names = [parameter["parameter_name"] for parameter in found["parameters"]]
            assert names == list(inspect.signature(getattr(studio, name[1:])).parameters)
            assert names[-2:] == ["adapter", "adapter_weight"]
        with request.urlopen(page.local_url, timeout=30) as answer:
            assert "Licence of the model: apache-2.0" in answer.read().decode()
        answer = call(page.local_url, "draw", ["x", "", 32, 32, 2, 2.0, 0, 1, "dpm", "other", 1.0])
        assert "there is no adapter" in answer
    finally:
        page.close()


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
        ("inpaint", [None] * 7, "choose an image first"),
        ("vary", [None] * 5, "choose an image first"),
        ("interpolate", [None] * 6, "write a prompt first"),
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
    assert set(described) == {"/draw", "/redraw", "/inpaint", "/vary", "/interpolate"}
    names = [parameter["parameter_name"] for parameter in described["/draw"]["parameters"]]
    assert names == list(inspect.signature(studio.draw).parameters)[:-2]  # no adapters here
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
    find(browser, "#prompt textarea").send_keys("a large blue square", line_break, "at the right", "\ue007")  # Enter
    text, sizes = finished_image(browser, "draw")
    assert "a large blue square at the right" in text  # a browser shows a line break of JSON as a blank
    assert f"{options.width}x{options.height}" in sizes
    assert wait_for(lambda: re.search(r"2 finished; seed \d{3}", find(browser, "#draw_status").text), "a random seed")
    sides = [find(browser, f"input[aria-label='number input for {side}']") for side in ("Width", "Height")]
    before = [side.get_attribute("value") for side in sides]
    find(browser, "#swap").click()
    wait_for(lambda: [side.get_attribute("value") for side in sides] == before[::-1], "the swapped sides")
    find(browser, "#swap").click()
    screenshots(browser, "app")
    find(browser, "#prompt textarea").send_keys(SELECT_ALL, "\ue003")  # backspace
    find(browser, "#draw").click()
    wait_for(lambda: "write a prompt first" in find(browser, "body").text, "the message")

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(tmp_path / "upload.png")
    open_tab(browser, "Image to image")
    find(browser, "#image input[type=file]").send_keys(str(tmp_path / "upload.png"))
    wait_for(lambda: browser.find_elements("css selector", "#image img"), "the upload")
    find(browser, "#image_prompt textarea").send_keys("noise")
    find(browser, "#redraw").click()
    text, sizes = finished_image(browser, "redraw")
    assert "strength" in text
    assert "{}x{}".format(*fitting_size((96, 64), options.width * options.height)) in sizes
    assert console_errors(browser) == []


def test_the_history_survives_a_reload_and_leads_on(address, studio, browser):
    """An image that was drawn is found again, its settings too, and it can be redrawn, painted over and varied."""
    browser.get(address)
    find(browser, "#forget").click()
    find(browser, "#prompt textarea").send_keys("a small green circle", "\ue007")
    finished_image(browser, "draw")
    kept = [source.rsplit("/", 1)[1] for source in images_of(browser, "history")]
    assert len(kept) == 1
    browser.get(address)
    assert [source.rsplit("/", 1)[1] for source in images_of(browser, "history")] == kept
    find(browser, "#use").click()
    wait_for(lambda: "choose an image below the tabs first" in find(browser, "body").text, "the message")

    find(browser, "#history button:has(img)").click()
    time.sleep(0.5)
    open_tab(browser, "Interpolation")
    find(browser, "#use").click()
    prompt = wait_for(
        lambda: (field := find(browser, "#prompt textarea")).is_displayed() and field.get_attribute("value"),
        "the prompt",
    )
    assert prompt == "a small green circle"
    assert int(value_of(browser, "Width")) == studio.pipeline.options.width

    find(browser, "#send_vary").click()
    wait_for(lambda: browser.find_elements("css selector", "#vary_image img"), "the image in its tab")
    find(browser, "#vary").click()
    text, _ = finished_image(browser, "vary")
    assert "likeness" not in text  # its name in files is t
    assert len(images_of(browser, "history")) == 3

    find(browser, "#send_inpaint").click()
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
    find(browser, "#inpaint_prompt textarea").send_keys("a small red circle", "\ue007")
    text, _ = finished_image(browser, "inpaint")
    assert "a small red circle" in text
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
    find(browser, "#draw_stop").click()
    wait_for(lambda: status.text == "stopped", "the word")
    time.sleep(1)
    stopped_at = len(calls)
    assert stopped_at < 20
    time.sleep(1)
    assert len(calls) == stopped_at
    *_, finished = studio.draw("noise", "", 32, 32, 2, 1.0, 0, 1, "dpm")  # the next visitor is served
    assert finished.items
