"""Training an adapter: what is trained, saved and read, against peft, diffusers and arithmetic."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from autoencoder.common.config import UserError
from autoencoder.common.durable import sha256
from svg_t2i import export
from svg_t2i.checkpoints.adapters import FILE, LoraSettings, add_adapter
from svg_t2i.checkpoints.run import newest_checkpoint, stored_tensors
from svg_t2i.checkpoints.weights import load_transformer, read_meta, read_transformer
from svg_t2i.loading.adapters import parse_adapter
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.train import main
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.transformer.packing import TextFeatures

QKV = "layers.0.attention.qkv"


@pytest.fixture
def train(tune):
    return lambda name, *overrides: tune(name, "lora.rank=2", *overrides)


def stored(folder, part="ema"):
    """A part of the newest checkpoint, as it is there."""
    newest = newest_checkpoint(folder / "checkpoints")
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored_tensors(newest).items()
        if name.startswith(f"{part}.")
    }
    dcp.load(state, checkpoint_id=newest, no_dist=True)
    return {name.removeprefix(f"{part}."): tensor for name, tensor in state.items()}


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 2.0}
    return np.asarray(pipeline("a picture of noise", seed=0, **settings).images[0], dtype=int)


def test_only_the_adapter_is_trained_and_saved(train, base, capsys):
    folder = train("lora", "lora.alpha=6")
    assert "0.00 M of them trained" in capsys.readouterr().out
    names = [name for name in stored_tensors(newest_checkpoint(folder / "checkpoints")) if name.startswith("model.")]
    assert names
    assert all("lora_" in name for name in names)
    layers = {name.split(".lora_")[0].removeprefix("model.") for name in names}
    assert {layer.split(".", 2)[-1] for layer in layers if layer.startswith("layers.0.")} == {
        "attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.1",
    }  # fmt: skip
    before, after = load_transformer(base).state_dict(), read_transformer(folder).state
    adapter = stored(folder)
    change = 6 / 2 * adapter[f"{QKV}.lora_B.default.weight"] @ adapter[f"{QKV}.lora_A.default.weight"]
    assert change.abs().max() > 1e-4
    torch.testing.assert_close(after[f"{QKV}.weight"], before[f"{QKV}.weight"] + change, rtol=1e-5, atol=1e-6)
    assert torch.equal(after["x_embedder.weight"], before["x_embedder.weight"])
    assert read_meta(folder)["base"]["folder"] == str(newest_checkpoint(base / "checkpoints"))


@pytest.mark.parametrize("settings", [[], ["lora.use_dora=true"], ["lora.target_modules=[qkv, final_layer.linear]"]])
def test_the_file_gives_the_pictures_of_the_run(train, base, settings):
    """The run itself (merged), diffusers with the file (not merged), and fused."""
    folder = train("lora", *settings)
    run, plain = SVGT2IPipeline.from_pretrained(folder), SVGT2IPipeline.from_pretrained(base)
    wanted, without = draw(run), draw(plain)
    plain.load_lora_weights(folder, weight_name=FILE)
    assert np.abs(draw(plain) - wanted).max() <= 1
    assert np.abs(wanted - without).max() > 3
    plain.fuse_lora()
    plain.unload_lora_weights()
    assert np.abs(draw(plain) - wanted).max() <= 1
    with safe_open(folder / FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.r"] == 2
    assert all(name.startswith("transformer.") for name in load_file(folder / FILE))


def test_any_folder_with_a_model_can_be_adapted(train, base, tmp_path, toy_parts):
    """A saved pipeline, whose parts are in folders, and a folder around an only one."""
    pipeline = SVGT2IPipeline.from_pretrained(base)
    pipeline.save_pretrained(tmp_path / "saved")
    wanted = read_transformer(train("of run")).state
    found = read_transformer(train("of pipeline", f"init_from={tmp_path / 'saved'}")).state
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_a_run_s_folder_stands_for_its_file(train, base):
    folder = train("lora")
    (folder / "latent_stats.safetensors").write_bytes((folder / FILE).read_bytes())
    assert parse_adapter(f"{folder}:0.5") == (folder / FILE, 0.5)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_shipped_configs_of_fine_tuning(toy_parts, base, tmp_path, kind):
    """At toy size, but for sizes and names of files as they are."""
    small, autoencoder = yaml.safe_load((toy_parts / "train.yaml").read_text()), toy_parts / "autoencoder"
    changes = {
        "model": "tiny",
        "model_overrides": small["model_overrides"],
        "init_from": base,
        "results_dir": tmp_path / "my_lora",
        "data": {"path": small["data"]["path"], "resolution": 64, "num_workers": 0},
        "train.max_steps": 2,
        "autoencoder": {"config": str(autoencoder), "checkpoint": None, "stats": None},
        "text_encoder.path": toy_parts / "text_encoder",
    }
    settings = [f"{name}={json.dumps(v) if isinstance(v, dict) else v}" for name, v in changes.items()]
    main(["--config", f"configs/svg_t2i/finetune_{kind}.yaml", *settings])
    adapted = kind == "lora"
    assert (tmp_path / "my_lora" / FILE).is_file() == adapted
    assert all(("lora_" in name) == adapted for name in stored(tmp_path / "my_lora"))
    if adapted:
        export.main([str(tmp_path / "my_lora"), str(tmp_path / "exported")])
        exported = load_transformer(tmp_path / "exported").state_dict()
        assert torch.equal(exported[f"{QKV}.weight"], read_transformer(tmp_path / "my_lora").state[f"{QKV}.weight"])


def test_the_python_of_the_docs(train, base, repo_root):
    (code,) = re.findall(r"```python\n(.*?)```", (repo_root / "docs/finetuning.md").read_text(), flags=re.DOTALL)
    pipeline, folder = SVGT2IPipeline.from_pretrained(base), train("my_lora")
    before = pipeline.transformer.layers[0].attention.qkv.weight.clone()
    exec(code.replace("results/my_lora", str(folder)), {"pipeline": pipeline})
    pipeline.unload_lora_weights()
    change = read_transformer(folder).state[f"{QKV}.weight"] - before
    now = pipeline.transformer.layers[0].attention.qkv.weight
    torch.testing.assert_close(now - before, 0.8 * change, rtol=1e-4, atol=1e-6)


def test_resume_is_exact_and_wants_the_same_model_and_adapter(train, base, tmp_path):
    straight = train("straight", "train.ckpt_every=2", "lora.dropout=0.2")
    train("broken", "train.max_steps=2", "lora.dropout=0.2")
    broken = train("broken", "train.max_steps=4", "lora.dropout=0.2")
    for part in ("model", "ema", "optimizer"):
        before, after = stored(straight, part), stored(broken, part)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = load_file(straight / FILE), load_file(broken / FILE)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for settings, message in ((["lora.rank=4"], "lora.rank was 2 and is 4"), (["lora=null"], "and is None")):
        with pytest.raises(UserError, match=f"0000004 was trained otherwise: .*{message}.*another results_dir"):
            train("broken", "train.max_steps=5", *settings)


def test_dropout_changes_the_result_and_survives_checkpointing(train):
    plain, dropped = train("plain"), train("dropped", "lora.dropout=0.5")
    again = train("again", "lora.dropout=0.5", "parallel.activation_checkpointing=full")
    name = f"{QKV}.lora_B.default.weight"
    assert not torch.equal(stored(plain)[name], stored(dropped)[name])
    torch.testing.assert_close(stored(dropped)[name], stored(again)[name])


def test_a_gradient_is_that_of_the_merged_weight():
    """dL/dB of an adapter follows from dL/dW of the plain layer, which is tested elsewhere."""
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "axes_dims": (4, 6, 6), "in_channels": 8, "cap_feat_dim": 16}
    plain = SVGDiT(DiTConfig(**sizes))
    for weight in plain.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    adapted = SVGDiT(DiTConfig(**sizes))
    adapted.load_state_dict(plain.state_dict())
    add_adapter(adapted, LoraSettings(rank=3, alpha=6))
    latents, text = torch.randn(2, 8, 4, 4), TextFeatures(torch.randn(5, 16), (2, 3))
    outputs = [model(latents, torch.tensor([0.2, 0.7]), text) for model in (plain, adapted)]
    torch.testing.assert_close(*outputs)  # an untrained adapter changes nothing
    for output in outputs:
        output.square().sum().backward()
    layer = adapted.layers[1].attention.qkv
    expected = 2 * plain.layers[1].attention.qkv.weight.grad @ layer.lora_A["default"].weight.T
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, expected, rtol=1e-4, atol=1e-5)
    assert layer.base_layer.weight.grad is None


def test_bf16_keeps_the_model_in_bf16_and_the_adapter_in_fp32(train, base):
    folder = train("lora", "train.precision=bf16", "samples.every=2", "samples.prompts=[noise]")
    assert all(tensor.dtype == torch.float32 for tensor in stored(folder).values())
    assert len(list((folder / "samples").iterdir())) == 2
    loaded = read_transformer(folder).state["x_embedder.weight"]
    assert torch.equal(loaded, load_transformer(base).state_dict()["x_embedder.weight"])  # not rounded


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lora.rank=0"], "lora: rank=0 must be at least 1"),
        (["lora.rang=3"], "unknown key 'lora.rang' (did you mean 'rank'?)"),
        (["init_from=null"], "init_from=None must be given with lora"),
        (["lora.target_modules=[attention.query]"], "'attention.query' is no linear layer of this model; give"),
        (["model_overrides.n_layers=2"], "n_layers is 1 there and 2 here; give model and model_overrides"),
        (["autoencoder.stats=measure"], "was trained with other frozen networks than those loaded now"),
    ],
)
def test_mistakes_are_told(train, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        train("lora", *settings)


def test_a_library_that_peft_refuses_is_named(monkeypatch):
    """As torchao 0.14 beside peft 0.19, though no weight is quantised."""

    def refuse(*_):
        raise ImportError("Found an incompatible version of torchao. Found version 0.14.0")

    monkeypatch.setattr("peft.inject_adapter_in_model", refuse)
    transformer = SVGDiT(DiTConfig(dim=32, n_layers=1, n_heads=2, axes_dims=(4, 6, 6), axes_lens=(32, 16, 16)))
    with pytest.raises(UserError, match="lora: peft cannot work here: Found an incompatible version of torchao"):
        add_adapter(transformer, LoraSettings(2))


def test_a_model_that_is_gone_or_changed(train, base, tmp_path):
    moved, folder = tmp_path / "moved", train("lora")
    base.rename(moved)
    try:
        with pytest.raises(UserError, match="is an adapter without the model it was trained on: .*--lora RUN/pytorch"):
            read_transformer(folder)
        with pytest.raises(UserError, match="no DiT here"):
            train("lora", "train.max_steps=5")
    finally:
        moved.rename(base)
    other = train("other", "lora=null", "init_from=null", "train.seed=5")
    newest, theirs = (newest_checkpoint(run / "checkpoints") for run in (base, other))
    newest.rename(moved)
    shutil.copytree(theirs, newest)
    try:
        with pytest.raises(UserError, match="holds other weights than then"):
            train("lora", "train.max_steps=5")
    finally:
        shutil.rmtree(newest)
        moved.rename(newest)


@pytest.mark.parametrize("base_of", ["itself", "each other", "a number", "nothing"])
def test_a_checkpoint_of_a_stranger_leads_nowhere(train, tmp_path, base_of):
    """Bases in a circle, or what is none, are one error."""
    folders = [newest_checkpoint(train(name, "train.max_steps=1") / "checkpoints") for name in ("one", "two")]
    bases = {
        "itself": [{"folder": str(folders[0]), "digest": "x"}] * 2,
        "each other": [{"folder": str(folder), "digest": "x"} for folder in folders[::-1]],
        "a number": [7, 7],
        "nothing": [{}, {}],
    }[base_of]
    for folder, base in zip(folders, bases, strict=True):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | {"base": base}))
        (folder / "COMMITTED").write_text(sha256(folder / "meta.json"))
    with pytest.raises(UserError, match="names no model that an adapter could be of"):
        read_transformer(folders[0])


def test_an_adapter_of_an_adapter(train):
    """The base of the second is the first with its base."""
    first = train("first")
    second = train("second", f"init_from={first}")
    change = read_transformer(second).state[f"{QKV}.weight"] - read_transformer(first).state[f"{QKV}.weight"]
    adapter = stored(second)
    wanted = adapter[f"{QKV}.lora_B.default.weight"] @ adapter[f"{QKV}.lora_A.default.weight"]
    torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-6)
