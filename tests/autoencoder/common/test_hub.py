"""Which names are worth asking the Hub for, and which are paths that are not there."""

import pytest

from autoencoder.common import hub
from autoencoder.common.config import REPO_ROOT, UserError
from autoencoder.common.hub import announce, could_be_hub_name, folder_or_hub_name, nearest


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "outputs" / "quickstart" / "transformer").mkdir(parents=True)
    (tmp_path / "outputs" / "other").mkdir()
    (tmp_path / "model.yaml").write_text("a: 1\n")
    monkeypatch.chdir(tmp_path)
    announce.cache_clear()
    return tmp_path


@pytest.mark.parametrize("name", ["google/gemma-2-2b", "Qwen/Qwen2.5-0.5B", "me/a_b.c", "gpt2", "openai/clip-v1.5"])
def test_names_of_the_hub(here, name):
    assert folder_or_hub_name(name, "model", "a model") == name


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("outputs/quickstat", "outputs/quickstart"),  # begins with a folder of the working directory
        ("outputs/quickstart/transformr", "outputs/quickstart/transformer"),
        ("configs/svg_t2", "configs/svg_t2i"),  # begins with one of the repository
        ("a/b/c", None),
        ("./outputs-of-nobody", None),
        ("../quickstart/", None),
        ("/nowhere/model", None),
        ("~/models/gemma", None),
        ("me/model.safetensors", None),
        ("me/config.yaml", None),
        ("model.yml", "model.yaml"),
        ("me/two words", None),
        ("", None),
    ],
)
def test_paths_that_are_not_there(here, path, near):
    with pytest.raises(UserError) as error:
        folder_or_hub_name(path, "model", "a model")
    message = str(error.value)
    assert f"model = {path!r}: no such folder" in message
    assert message.endswith("give a model")
    assert near is None or near in message


def test_folders_are_found_from_everywhere_and_files_are_no_folders(here):
    assert folder_or_hub_name("outputs/quickstart", "model", "a model") == "outputs/quickstart"
    assert folder_or_hub_name("configs/svg_t2i", "model", "a model") == str(REPO_ROOT / "configs" / "svg_t2i")
    with pytest.raises(UserError, match=r"'model\.yaml' is a file"):
        folder_or_hub_name("model.yaml", "model", "a model")


def test_beside_an_installed_package_lie_other_ones(here, monkeypatch):
    """site-packages often holds a folder `google`: no reason to take google/gemma-2-2b for a path."""
    (here / "site-packages" / "google").mkdir(parents=True)
    monkeypatch.setattr(hub, "REPO_ROOT", here / "site-packages")
    assert could_be_hub_name("google/gemma-2-2b")
    (here / "site-packages" / "pyproject.toml").touch()
    assert not could_be_hub_name("google/gemma-2-2b")


def test_nothing_near(here):
    assert nearest("xyz/abc") == ""
    assert nearest("outputs/zzzz") == ""
    assert nearest(here / "outputs" / "othr") == f" (the nearest: {here / 'outputs' / 'other'})"


def test_the_line_comes_once_and_from_the_first_process(here, capsys, monkeypatch):
    announce("a/b")
    announce("a/b")
    assert capsys.readouterr().err.count("a/b: taken from the Hugging Face Hub") == 1
    monkeypatch.setenv("RANK", "1")
    announce("a/c")
    assert capsys.readouterr().err == ""
