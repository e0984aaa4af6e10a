"""Text models of strangers: nothing that they bring along is run, and no message advises to run it."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from autoencoder.common.config import UserError
from autoencoder.common.hub import announce
from svg_t2i.evaluation.clip_score import CLIPScorer
from svg_t2i.text.encoder import TextEncoder
from svg_t2i.text.loading import load_tokenizer
from svg_t2i.text.toy import make_toy_text_encoder
from tests.attack import Attack


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return make_toy_text_encoder(["a red square"], tmp_path_factory.mktemp("toy"), hidden_size=32)


def assert_no_bad_advice(error):
    for advice in ("weights_only", "trust_remote_code", "[y/N]", "TRUST"):
        assert advice not in str(error.value)


def with_code(folder, file, tmp_path):
    """A copy whose `file` names code in the folder."""
    copy = shutil.copytree(folder, tmp_path / "m")
    (copy / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass C: pass\n")
    targets = {"AutoConfig": "evil.C", "AutoModel": "evil.C", "AutoTokenizer": ["evil.C", "evil.C"]}
    content = json.loads((copy / file).read_text())
    content |= {"auto_map": targets, "model_type": "unheard_of", "tokenizer_class": "Evil"}
    (copy / file).write_text(json.dumps(content))
    return copy


@pytest.fixture
def nobody_is_asked(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))


def test_a_model_with_code_of_its_own_is_refused(toy_folder, tmp_path, nobody_is_asked):
    with pytest.raises(UserError, match="code of its own, which is never run here") as error:
        TextEncoder.from_pretrained(with_code(toy_folder, "config.json", tmp_path))
    assert_no_bad_advice(error)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_is_not_run(toy_folder, tmp_path, nobody_is_asked):
    """transformers 5 reads tokenizer.json without it; older ones refuse."""
    try:
        encoder = TextEncoder.from_pretrained(with_code(toy_folder, "tokenizer_config.json", tmp_path))
    except UserError as error:
        assert "code of its own" in str(error)  # noqa: PT017
    else:
        assert encoder.tokenize(["a red square"]) == load_tokenizer(toy_folder)(["a red square"])["input_ids"]
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_read_without_what_could_run(toy_folder, tmp_path):
    folder = shutil.copytree(toy_folder, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    same = TextEncoder.from_pretrained(folder).fingerprint()
    assert same == TextEncoder.from_pretrained(toy_folder).fingerprint()

    torch.save(weights | {"x": Attack(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read as a Hugging Face model.*get safetensors") as error:
        TextEncoder.from_pretrained(folder)
    assert_no_bad_advice(error)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    with pytest.raises(UserError, match="cannot be read as a Hugging Face model") as error:
        TextEncoder.from_pretrained(folder)
    assert_no_bad_advice(error)
    assert not (tmp_path / "ran").exists()


def test_safetensors_come_first(toy_folder, tmp_path):
    folder = shutil.copytree(toy_folder, tmp_path / "m")
    torch.save({"x": Attack(tmp_path / "ran")}, folder / "pytorch_model.bin")
    TextEncoder.from_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")  # still no reason to read the pickle
    with pytest.raises(UserError, match="model.safetensors"):
        TextEncoder.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_the_same_holds_for_clip(toy_folder, tmp_path, nobody_is_asked):
    with pytest.raises(UserError, match="code of its own") as error:
        CLIPScorer(with_code(toy_folder, "config.json", tmp_path))
    assert_no_bad_advice(error)
    with pytest.raises(UserError, match="no such folder .the nearest: .*svg_t2i/text"):
        CLIPScorer("svg_t2i/txt")


def test_the_hub_is_announced_and_a_missing_path_is_not_asked(monkeypatch, capsys):
    asked = []

    def refuse(name, **_):
        asked.append(name)
        raise OSError("no network")

    announce.cache_clear()
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(UserError, match="no such folder .the nearest: .*svg_t2i/text"):
        load_tokenizer("svg_t2i/txt")
    assert asked == []
    with pytest.raises(UserError, match="could not be had from the Hugging Face Hub .no network"):
        load_tokenizer("someone/something")
    assert asked == ["someone/something"]
    assert "someone/something: taken from the Hugging Face Hub" in capsys.readouterr().err
