"""The command that serves the page: its options, what it tells visitors of a model, who may come in."""

from __future__ import annotations

import shutil
import socket
import sys

import pytest
import torch
from safetensors.torch import save_file

from autoencoder.common.config import UserError
from svg_t2i import app


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
