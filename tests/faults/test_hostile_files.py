"""Files that a stranger made, given to the real commands: refused in one line, and nothing of theirs runs.

Every kind of file has tests of its own in the room that reads it; here the commands meet them.
"""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from autoencoder import reconstruct
from autoencoder.common.config import UserError
from svg_t2i import sample
from tests.attack import Attack

pytestmark = pytest.mark.filterwarnings("ignore")


def seal(folder):
    """Sizes and hashes that fit, as who exchanges a file would also write them."""
    facts = json.loads((folder / "meta.json").read_text())
    for name in facts["files"]:
        content = (folder / name).read_bytes()
        facts["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(facts))
    (folder / "COMMITTED").write_text(hashlib.sha256((folder / "meta.json").read_bytes()).hexdigest() + "\n")


def use(stage, folder, path, picture, output):
    """Sample from the run, or reconstruct by its checkpoint."""
    if stage.name == "dit":
        sample.main(["--checkpoint", str(folder), "--prompt", "a", "--output", str(output)])
    else:
        config = stage.results(folder) / "config.yaml"
        reconstruct.main([str(config), str(picture), "--checkpoint", str(path), "--output", str(output)])


@pytest.mark.parametrize("form", ["pickle", "torch file"])
def test_a_checkpoint_that_would_run_code(stage, toy_parts, tmp_path, form):
    """Continuing, reconstructing and sampling all refuse it."""
    folder, marker = tmp_path / "run", tmp_path / "executed"
    stage.main(folder, stage.steps(1))
    path = stage.path(folder, 1)
    target = path if stage.name == "autoencoder" else path.with_name(".metadata")
    if form == "pickle":
        target.write_bytes(pickle.dumps(Attack(marker)))
    else:
        with target.open("wb") as file:
            torch.save({"state_dict": {}, "hyper_parameters": Attack(marker)}, file)
    if stage.name == "dit":
        seal(path.parent)
    else:
        (path.parent / "last.ckpt").unlink()
    refused = "cannot be loaded here|none of the checkpoints there is whole|could run code|not a torch file"
    with pytest.raises(UserError, match=refused):
        stage.main(folder, stage.steps(2))
    with pytest.raises(UserError, match=refused):
        use(stage, folder, path, next(toy_parts.rglob("*.png")), tmp_path / "images")
    assert not marker.exists()


@pytest.mark.parametrize("stage", ["dit"], indirect=True)
def test_a_run_that_wants_secrets_of_the_environment(stage, tmp_path, monkeypatch, capfd):
    """The configuration beside its checkpoint names one: it is neither resolved nor said."""
    monkeypatch.setenv("SVG_SECRET", "hush-hush")
    folder = tmp_path / "run"
    stage.main(folder, stage.steps(1))
    (meta,) = folder.glob("checkpoints/*/meta.json")
    facts = json.loads(meta.read_text())
    facts["config"]["text_encoder"]["path"] = "owner/${oc.env:SVG_SECRET}"
    meta.write_text(json.dumps(facts))
    seal(meta.parent)
    with pytest.raises(UserError, match=r"owner/\$\{oc.env:SVG_SECRET\}"):
        sample.main(["--checkpoint", str(folder), "--prompt", "a", "--output", str(tmp_path / "samples")])
    assert "hush" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("stage", ["dit"], indirect=True)
def test_a_text_model_that_brings_code(toy_parts, stage, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    model = shutil.copytree(toy_parts / "text_encoder", tmp_path / "model")
    (model / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\nclass Own: pass\n")
    content = json.loads((model / "config.json").read_text())
    content |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (model / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="code of its own, which is never run here"):
        stage.main(tmp_path / "run", f"text_encoder.path={model}")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("stage", ["autoencoder"], indirect=True)
def test_a_configuration_that_names_any_class(stage, tmp_path):
    """Published ones say `target:`; it is looked up in a list, never imported."""
    config = yaml.safe_load(Path(f"{stage.base[1]}.yaml").read_text())
    config["model"]["target"] = "subprocess.Popen"
    path = tmp_path / "hostile.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="subprocess.Popen"):
        stage.main(tmp_path / "run", "--config", str(path))
