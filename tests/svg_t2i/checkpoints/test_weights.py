"""Checkpoints: round trips, atomicity, broken ones passed over, published folders, refused pickles."""

import argparse
import copy
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import sys

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from autoencoder.common.config import UserError, to_dict
from autoencoder.common.weights import folded
from benchmarks.loading import main as time_loading
from svg_t2i import export as export_command
from svg_t2i.checkpoints import weights
from svg_t2i.checkpoints.published import export_published
from svg_t2i.checkpoints.run import COMMITTED, META, clean, load_checkpoint, newest_checkpoint, save_checkpoint
from svg_t2i.checkpoints.weights import (
    check_fingerprints,
    export,
    export_as_published,
    find_checkpoint,
    init_from,
    load_transformer,
    read_meta,
    read_transformer,
    save_transformer,
)
from svg_t2i.data.settings import DataConfig
from svg_t2i.features.settings import AutoencoderSource
from svg_t2i.training.settings import LoopConfig, OptimConfig, TrainConfig
from svg_t2i.training.step import TrainState
from svg_t2i.transformer.config import MODELS, DiTConfig
from svg_t2i.transformer.model import SVGDiT
from tests.attack import Attack

SIZES = DiTConfig(
    dim=16, n_layers=1, n_heads=2, n_kv_heads=1, n_refiner_layers=1, axes_dims=(4, 2, 2), in_channels=4,
    cap_feat_dim=8, multiple_of=16,
)  # fmt: skip
CONFIG = TrainConfig(
    model="tiny",
    results_dir="unused",
    data=DataConfig(path="unused"),
    train=LoopConfig(max_steps=1, global_batch_size=1, micro_batch_size=1),
    autoencoder=AutoencoderSource(config="unused"),
    optim=OptimConfig(lr=0.1),
)
FINGERPRINTS = {"autoencoder": {"encoder": "e1", "stats": "s1", "channels": 4}, "text_encoder": "t1"}


def randomise(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    return model


@pytest.fixture
def state():
    """A state with moments, and an average that differs from the weights."""
    state = TrainState.start(randomise(SVGDiT(SIZES)), CONFIG)
    for weight in state.transformer.parameters():
        weight.grad = torch.randn_like(weight)
    state.optimizer.step()
    return state


@pytest.fixture
def meta():

    return {"model_args": to_dict(SIZES), "fingerprints": FINGERPRINTS, "config": {}}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_every_tensor_comes_back(tmp_path, state, meta):
    folder = save_checkpoint(tmp_path, 12, state.tensors(), meta)
    assert folder == tmp_path / "0000012"
    assert read_meta(folder)["step"] == 12
    fresh = TrainState.start(SVGDiT(SIZES), CONFIG)
    load_checkpoint(folder, fresh.tensors())
    for part, tensors in state.tensors().items():
        assert_equal(fresh.tensors()[part], tensors)
    assert next(iter(fresh.optimizer.state.values()))["step"] == 1


def test_raw_and_averaged_weights_are_told_apart(tmp_path, state, meta):
    folder = save_checkpoint(tmp_path / "checkpoints", 1, state.tensors(), meta)
    for source in (folder, tmp_path):  # the checkpoint, and the run it belongs to
        assert_equal(load_transformer(source, ema=False).state_dict(), state.transformer.state_dict())
        assert_equal(load_transformer(source, ema=True).state_dict(), state.ema)
    assert not load_transformer(folder).training
    assert find_checkpoint(tmp_path) == folder


@pytest.mark.parametrize("content", ["garbage", "malicious", "malicious entry"])
def test_untrusted_index_is_not_executed(tmp_path, state, meta, content):
    folder, marker = save_checkpoint(tmp_path, 1, state.tensors(), meta), tmp_path / "executed"
    index = folder / ".metadata"
    if content == "garbage":
        index.write_bytes(b"\0" * 100)
    elif content == "malicious":
        index.write_bytes(pickle.dumps(Attack(marker)))
    else:  # an entry that says it is no tensor would be unpickled by torch
        stored = pickle.loads(index.read_bytes())
        stored.state_dict_metadata["ema.x_embedder.bias"] = BytesStorageMetadata()
        index.write_bytes(pickle.dumps(stored))
    facts = json.loads((folder / "meta.json").read_text())
    facts["files"][".metadata"]["size"] = index.stat().st_size
    (folder / META).write_text(json.dumps(facts))
    (folder / COMMITTED).write_text(hashlib.sha256((folder / META).read_bytes()).hexdigest())
    for load in (load_transformer, lambda folder: load_checkpoint(folder, state.tensors())):
        with pytest.raises(UserError, match="0000001.*cannot be loaded here"):
            load(folder)
    assert not marker.exists()


def test_interrupted_save_leaves_no_checkpoint(tmp_path, state, meta, monkeypatch):
    first = save_checkpoint(tmp_path, 1, state.tensors(), meta)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, state.tensors(), meta)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path) == first
    assert (tmp_path / ".tmp-0000002").exists()
    clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0000001"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "no meta", "broken meta", "newer format"])
def test_broken_checkpoint_is_passed_over(tmp_path, state, meta, damage, caplog):
    good, bad = (save_checkpoint(tmp_path, step, state.tensors(), meta) for step in (5, 10))
    shard, facts = bad / "__0_0.distcp", bad / "meta.json"
    if damage == "truncated":
        os.truncate(shard, shard.stat().st_size - 1)
    elif damage == "missing":
        shard.unlink()
    elif damage == "no meta":
        facts.unlink()
    elif damage == "broken meta":
        facts.write_text("{")
    else:
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"format": 99}))
        (bad / COMMITTED).write_text(hashlib.sha256(facts.read_bytes()).hexdigest())
    assert newest_checkpoint(tmp_path) == good
    assert str(bad) in caplog.text
    save_checkpoint(tmp_path, 10, state.tensors(), meta)  # the run comes by again and replaces it
    assert newest_checkpoint(tmp_path) == bad
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000005", "0000010"]


def test_other_shapes_are_refused_by_name(tmp_path, state, meta):
    folder = save_checkpoint(tmp_path, 1, state.tensors(), meta)
    tensors = state.tensors()
    tensors["model"] = {"x_embedder.weight": torch.zeros(3, 3), "unknown": torch.zeros(1)}
    with pytest.raises(UserError, match=r"0000001: cannot be loaded here: .*unknown|x_embedder"):
        load_checkpoint(folder, tensors)


def test_export_round_trip(tmp_path, state, meta):
    folder = save_checkpoint(tmp_path / "checkpoints", 1, state.tensors(), meta)
    out = export(tmp_path, tmp_path / "out")
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # safetensors would keep them to their owner
    assert_equal(load_transformer(out).state_dict(), state.ema)
    assert read_meta(out)["fingerprints"] == FINGERPRINTS
    raw = export(folder, tmp_path / "raw", ema=False)
    assert_equal(load_transformer(raw).state_dict(), state.transformer.state_dict())
    with pytest.raises(UserError, match="not empty; nothing was overwritten"):
        export(folder, out)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "not the config.json of an exported DiT"), ("{}", "names no model_args"), ("{", "not valid JSON")],
)
def test_config_of_something_else_is_no_export(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    for read in (read_meta, load_transformer):
        with pytest.raises(UserError, match=message):
            read(tmp_path)


def test_fingerprints_must_agree_and_are_named(tmp_path):
    folder = save_transformer(
        SVGDiT(SIZES), tmp_path, autoencoder_fingerprint=FINGERPRINTS["autoencoder"], text_fingerprint="t1"
    )
    check_fingerprints(folder, FINGERPRINTS["autoencoder"], "t1")
    with pytest.raises(UserError, match="text encoder was t1 and is t2"):
        check_fingerprints(folder, FINGERPRINTS["autoencoder"], "t2")
    with pytest.raises(UserError, match="autoencoder's stats was s1 and is s2"):
        check_fingerprints(folder, FINGERPRINTS["autoencoder"] | {"stats": "s2"}, "t1")
    anonymous = save_transformer(SVGDiT(SIZES), tmp_path / "anonymous")
    check_fingerprints(anonymous, {"encoder": "any"}, "any")


# ------------------------------------------------------------------------------------------- published folders


@pytest.fixture
def published(tmp_path, state, monkeypatch):
    monkeypatch.setitem(MODELS, "published-like", SIZES)
    ema = SVGDiT(SIZES)
    ema.load_state_dict(state.ema)
    return export_published(state.transformer, ema, tmp_path / "published")


def test_published_folder_loads(published, state):
    stored = torch.load(published / "consolidated.00-of-01.pth", weights_only=True)
    assert "norm_final.weight" in stored
    assert_equal(load_transformer(published, ema=False).state_dict(), state.transformer.state_dict())
    assert_equal(load_transformer(published, ema=True).state_dict(), state.ema)
    assert read_transformer(published).config == SIZES
    assert read_meta(published) == {}


def test_weights_stay_in_their_file_until_they_are_changed(published, monkeypatch):
    """At full size a copy is ten gigabytes, and as many seconds."""
    file = read_transformer(published)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "read_transformer", lambda *_: file)
        loaded = load_transformer(published)
    assert all(weight.data_ptr() == file.state[name].data_ptr() for name, weight in loaded.named_parameters())
    before = copy.deepcopy(loaded).parameters()
    with torch.no_grad():
        for weight in loaded.parameters():
            assert weight.requires_grad
            weight.add_(1)
    assert all(map(torch.equal, load_transformer(published).parameters(), before))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_benchmark_of_loading(capsys):
    time_loading(["--model", "tiny"])
    lines = capsys.readouterr().out.splitlines()
    sources = ("the release's files", "an export", "a run's checkpoint")
    assert [line[:60].strip() for line in lines[1:5]] == [*sources, "Lumina2Transformer2DModel"]
    assert [re.fullmatch(r"ratio \d+\.\d\d for (.*) \(above 1: ours is faster\)", line)[1] for line in lines[5:]] == [
        *sources
    ]


def test_weights_of_half_precision_are_loaded_in_fp32(published, state):
    path = published / "consolidated.00-of-01.pth"
    half = {name: weight.bfloat16() for name, weight in torch.load(path, weights_only=True).items()}
    torch.save(half, path)
    loaded = load_transformer(published, ema=False).state_dict()
    assert_equal(loaded, {name: weight.bfloat16().float() for name, weight in state.transformer.state_dict().items()})


def test_a_run_is_published_with_raw_and_averaged_weights(tmp_path, state, meta, monkeypatch):
    monkeypatch.setitem(MODELS, "published-like", SIZES)
    save_checkpoint(tmp_path / "checkpoints", 1, state.tensors(), meta)
    folder = export_as_published(tmp_path, tmp_path / "published")
    assert_equal(load_transformer(folder, ema=False).state_dict(), state.transformer.state_dict())
    assert_equal(load_transformer(folder, ema=True).state_dict(), state.ema)
    with pytest.raises(UserError, match="not empty; nothing was overwritten"):
        export_as_published(tmp_path, tmp_path / "published")


def test_published_flags_and_widths_are_taken_from_the_files(tmp_path, monkeypatch):
    plain = SVGDiT(DiTConfig(**{**vars(SIZES), "qk_norm": False, "in_channels": 6, "cap_feat_dim": 10}))
    monkeypatch.setitem(MODELS, "published-like", SIZES)
    folder = export_published(plain, plain, tmp_path)
    assert load_transformer(folder).config == plain.config


@pytest.mark.parametrize("name", ["model_args.pth", "consolidated_ema.00-of-01.pth"])
@pytest.mark.parametrize("plain_pickle", [True, False])
def test_malicious_pickles_are_refused_unexecuted(published, tmp_path, name, plain_pickle):
    marker = tmp_path / "executed"
    if plain_pickle:
        (published / name).write_bytes(pickle.dumps(Attack(marker)))
    else:
        torch.save(argparse.Namespace(model=Attack(marker)), published / name)
    with pytest.raises(UserError, match=rf"{name}.*(refused|can run code)"):
        load_transformer(published)
    assert not marker.exists()


def test_namespace_is_allowed_only_while_arguments_are_read(published):
    load_transformer(published)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(published / "model_args.pth", weights_only=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "consolidated_ema.00-of-01.pth").unlink(),
            r"no averaged weights \(consolidated_ema.*\), only raw ones \(consolidated\.00.*--raw_weights",
        ),
        (lambda f: [path.unlink() for path in f.glob("consolidated*")], r"there is no file .*consolidated_ema"),
        (lambda f: (f / "model_args.pth").write_bytes(b"\x80\x02"), r"model_args.pth"),
        (
            lambda f: torch.save(argparse.Namespace(model="NextDiT_9B"), f / "model_args.pth"),
            r"unknown model 'NextDiT_9B'",
        ),
        (lambda f: torch.save({"model": "x"}, f / "model_args.pth"), r"expected an argparse.Namespace, found dict"),
        (
            lambda f: torch.save({"a": torch.zeros(1)}, f / "consolidated_ema.00-of-01.pth"),
            r"x_embedder.weight is missing",
        ),
        (lambda f: shutil.rmtree(f), r"published: no DiT here"),
    ],
)
def test_spoilt_published_folders_are_named(published, spoil, message):
    spoil(published)
    with pytest.raises(UserError, match=message):
        load_transformer(published)


def test_averaged_weights_alone_are_not_taken_for_raw_ones(published):
    (published / "consolidated.00-of-01.pth").unlink()
    with pytest.raises(UserError, match="has no raw weights .* only averaged ones"):
        load_transformer(published, ema=False)


# --------------------------------------------------------------------------------------------------- init_from


def test_init_from_takes_what_fits_and_names_the_rest(published, state, caplog):
    wider = randomise(SVGDiT(DiTConfig(**{**vars(SIZES), "in_channels": 6})))
    before = copy.deepcopy(wider.state_dict())
    init_from(wider, published)
    own, source = wider.state_dict(), state.transformer.state_dict()
    assert torch.equal(own["layers.0.attention.qkv.weight"], source["layers.0.attention.qkv.weight"])  # raw, not EMA
    for key in ("x_embedder.weight", "final_layer.linear.weight"):
        assert torch.equal(own[key], before[key])
        assert key in caplog.text
    assert "norm_final" not in caplog.text


def test_a_command_says_what_it_loaded(published, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr("sys.argv", ["svg_t2i.export", str(published), str(tmp_path / "out")])
    export_command.main()
    number = len(SVGDiT(SIZES).state_dict())
    lines = capsys.readouterr().err.splitlines()
    assert f"DiT {published} (averaged weights): {number} tensors loaded" in lines
    assert f"DiT {published} (averaged weights): 1 not used: norm_final.weight" in lines
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("sys.argv", ["svg_t2i.export", str(published), str(tmp_path / "other")])
    export_command.main()
    assert "loaded" not in capsys.readouterr().err
    monkeypatch.delenv("RANK")
    with caplog.at_level(logging.INFO):
        load_transformer(published)  # a library says nothing of a load that took all
    assert [record for record in caplog.records if record.name == "autoencoder.loads"] == []


def test_many_names_are_folded():
    assert folded(["a.b", "c"]) == "a.b, c"
    assert folded([f"loss.{i}" for i in range(40)] + ["head.weight"]) == "loss.* (40), head.weight"


def test_init_from_needs_something_in_common(published):
    sizes = {"dim": 12, "n_layers": 1, "n_heads": 1, "axes_dims": (4, 4, 4), "in_channels": 1, "cap_feat_dim": 2}
    with pytest.raises(UserError, match="not one of its"):
        init_from(SVGDiT(DiTConfig(**sizes, multiple_of=8)), published)
