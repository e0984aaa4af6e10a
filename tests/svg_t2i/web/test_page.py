"""The page as an interface, over HTTP: names, bad values, passwords, files."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import subprocess
import sys
from urllib import error, request

import pytest
import torch
from safetensors.torch import save_file

from svg_t2i.loading.adapters import AdapterShelf
from svg_t2i.web.limits import Limits
from svg_t2i.web.requests import Studio
from tests.svg_t2i.web.requesting import call, wait_for


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

    def at_a_terminal() -> None:  # what runs in the background of a script ignores Ctrl-C, and so do its children
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with open(tmp_path / "log", "w") as log:
        page = subprocess.Popen(command, env=environment, stdout=log, stderr=log, preexec_fn=at_a_terminal)
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
