"""The step and the run: independence of micro-batches, resume, averages, guards."""

import json
import math
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from autoencoder.common.config import UserError, load_config
from svg_t2i.checkpoints.weights import read_meta, read_transformer
from svg_t2i.features.frozen import CaptionCache, MicroBatch
from svg_t2i.flow.paths import draw_timesteps, flux_shift_factor, random_keys, random_normal, shift_time
from svg_t2i.training.settings import (
    FlowConfig,
    TrainConfig,
)
from svg_t2i.training.sharding import World
from svg_t2i.training.step import FlowObjective, TrainState, train_step
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.transformer.packing import TextFeatures
from tests.svg_t2i.training.runs import largest_difference, weights


def logged_losses(output):
    """The losses of the console lines."""
    return [float(line.split("loss ")[1].split()[0]) for line in output.splitlines() if line.startswith("step ")]


def test_training_changes_the_weights_and_reports(train, capsys, repo_root):
    folder = train("run")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    for field in ("loss", "grad", "lr", "images/s", "data"):
        assert field in lines[0]
    raw, averaged = weights(folder, 4), weights(folder, 4, ema=True)
    assert raw["final_layer.linear.weight"].abs().max() > 1e-4  # starts at zero
    assert 0 < averaged["final_layer.linear.weight"].abs().max() < raw["final_layer.linear.weight"].abs().max()
    assert list((folder / "tensorboard").iterdir())
    meta = read_meta(folder)
    assert meta["step"] == 4
    assert meta["fingerprints"].keys() == {"autoencoder", "text_encoder"}
    assert meta["config"]["train"]["seed"] == 0
    head = subprocess.run(["git", "-C", repo_root, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert (meta["code"] or "").removesuffix("-dirty") == head.stdout.strip()
    assert load_config(TrainConfig, folder / "config.yaml").train.max_steps == 4


def test_result_does_not_depend_on_the_micro_batch_size(train, capsys):
    whole = train("whole", "optim.eps=1e-8")  # Adam divides rounding by eps where gradients vanish
    losses = logged_losses(capsys.readouterr().out)
    for size in (3, 2, 1):
        split = train(f"split{size}", "optim.eps=1e-8", f"train.micro_batch_size={size}")
        assert logged_losses(capsys.readouterr().out) == pytest.approx(losses, abs=1e-4)  # as printed
        assert largest_difference(weights(whole, 4), weights(split, 4)) <= 1e-6


def test_result_does_not_depend_on_how_several_resolutions_are_packed(train, toy_parts):
    sources = [f"{{path: {toy_parts / 'manifest.jsonl'}, resolution: {side}}}" for side in (64, 128)]
    settings = ["data.path=null", f"data.sources=[{', '.join(sources)}]", "optim.eps=1e-8"]
    whole = train("whole", *settings)
    for name, dealt in (("single", "train.micro_batch_size=1"), ("tokens", "data.micro_batch_tokens=130")):
        assert largest_difference(weights(whole, 4), weights(train(name, *settings, dealt), 4)) <= 1e-6


def test_result_does_not_depend_on_worker_count(train):
    assert largest_difference(weights(train("a"), 4), weights(train("b", "data.num_workers=2"), 4)) == 0


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(train):
    straight = train("straight", "train.ckpt_every=2", "text_encoder.cache_tokens=64")
    broken = train("broken", "train.max_steps=2", "text_encoder.cache_tokens=64")
    train("broken", "train.max_steps=4", "text_encoder.cache_tokens=64")
    for ema in (False, True):
        assert largest_difference(weights(straight, 4, ema), weights(broken, 4, ema)) == 0


def test_seed_changes_the_result(train):
    assert largest_difference(weights(train("a"), 4), weights(train("b", "train.seed=1"), 4)) > 1e-5


def test_bf16_follows_fp32(train, capsys):
    train("fp32")
    fp32 = logged_losses(capsys.readouterr().out)
    folder = train("bf16", "train.precision=bf16")
    bf16 = logged_losses(capsys.readouterr().out)
    assert bf16 == pytest.approx(fp32, rel=0.02)
    assert bf16 != fp32
    assert all(weight.dtype == torch.float32 for weight in weights(folder, 4).values())


def test_fresh_run_does_not_touch_a_folder_in_use(train):
    folder = train("run", "train.max_steps=1")
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    with pytest.raises(UserError, match=r"results_dir=.*not empty; nothing was overwritten.*resume=true"):
        train("run", "resume=false")
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_a_folder_of_odd_files_trains_and_resumes_past_the_damaged_one(train, odd_images, capsys):
    settings = (f"data.path={odd_images}", "data.max_aspect=1", "train.global_batch_size=12")
    straight = train("straight", *settings, "train.max_steps=2")
    broken = train("broken", *settings, "train.max_steps=1")
    train("broken", *settings, "train.max_steps=2")
    assert largest_difference(weights(straight, 2), weights(broken, 2)) == 0
    assert capsys.readouterr().out.count("1 unusable samples were replaced: 1 × not a readable image; all") == 3
    for folder in (straight, broken):
        (line,) = (folder / "unusable.jsonl").read_text().splitlines()
        assert "damaged.jpg: not a readable image" in json.loads(line)["reason"]
    with pytest.raises(UserError, match=r"more than 0 unusable samples .*1 × not a readable image"):
        train("strict", *settings, "data.max_errors=0")


def test_a_resume_on_other_data_says_so(train, toy_parts, tmp_path, capsys):
    manifest = tmp_path / "manifest.jsonl"
    lines = [json.loads(line) for line in (toy_parts / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        line["path"] = str(toy_parts / line["path"])
    manifest.write_text("\n".join(map(json.dumps, lines)))
    train("run", f"data.path={manifest}", "train.max_steps=1")
    train("run", f"data.path={manifest}", "train.max_steps=2")
    assert "THE DATA CHANGED" not in capsys.readouterr().out
    lines[1]["prompt"] = "something else"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    train("run", f"data.path={manifest}", "train.max_steps=3")
    assert f"THE DATA CHANGED: {manifest} lists other samples or captions" in capsys.readouterr().out


def test_finished_run_stays_as_it_is(train, capsys):
    folder = train("run", "train.max_steps=1")
    state = weights(folder, 1)
    train("run", "train.max_steps=1")
    assert "is done" in capsys.readouterr().out
    assert largest_difference(weights(folder, 1), state) == 0


def test_non_finite_gradients_skip_their_update(train, monkeypatch, capsys):
    """Step 2 gets an infinite loss: weights stay put, moments stay clean, and the run goes on."""
    forward, calls = FlowObjective.forward, []

    def spoiled(self, batch):
        losses, *rest = forward(self, batch)
        calls.append(1)
        return (losses * math.inf if len(calls) == 2 else losses), *rest

    monkeypatch.setattr(FlowObjective, "forward", spoiled)
    folder = train("run", "train.ckpt_every=1")
    assert "1 updates skipped" in capsys.readouterr().out
    assert largest_difference(weights(folder, 1), weights(folder, 2)) == 0
    assert largest_difference(weights(folder, 1, ema=True), weights(folder, 2, ema=True)) == 0
    assert largest_difference(weights(folder, 2, ema=True), weights(folder, 3, ema=True)) > 0
    assert largest_difference(weights(folder, 2), weights(folder, 3)) > 0
    assert all(weight.isfinite().all() for weight in weights(folder, 4).values())
    calls.clear()
    with pytest.raises(UserError, match=r"1 updates had non-finite gradients, more than train.max_nonfinite=0"):
        train("strict", "train.max_nonfinite=0")


class CountingEncoder:
    """Encodes a text to as many rows as it has letters, and keeps count."""

    def __init__(self):
        self.encoded = []

    def encode(self, texts):
        self.encoded += texts
        return TextFeatures.cat([TextFeatures(torch.full((len(t), 2), float(ord(t[0]))), (len(t),)) for t in texts])


def test_caption_cache_encodes_once_and_stays_within_its_bound():
    encoder = CountingEncoder()
    cache = CaptionCache(encoder, max_tokens=5)
    features = cache(["aa", "b", "aa"])
    assert features.lengths == (2, 1, 2)
    assert features.features[:, 0].tolist() == [97.0, 97, 98, 97, 97]
    assert encoder.encoded == ["aa", "b"]
    cache(["ccc", "aa"])  # "b" has waited longest and goes
    assert encoder.encoded == ["aa", "b", "ccc"]
    cache(["aa", "ccc"])
    assert encoder.encoded == ["aa", "b", "ccc"]
    cache(["b"])
    assert encoder.encoded[-1] == "b"
    cache.clear()
    cache(["aa"])
    assert encoder.encoded[-1] == "aa"


def test_spikes_are_skipped_where_asked_for(train, monkeypatch, capsys):
    forward, calls = FlowObjective.forward, []

    def spoiled(self, batch):
        losses, *rest = forward(self, batch)
        calls.append(1)
        return (losses * 100 if len(calls) == 3 else losses), *rest

    monkeypatch.setattr(FlowObjective, "forward", spoiled)
    folder = train("run", "train.spike_factor=5", "train.ckpt_every=1")
    assert "1 updates skipped" in capsys.readouterr().out
    assert largest_difference(weights(folder, 2), weights(folder, 3)) == 0
    assert largest_difference(weights(folder, 3), weights(folder, 4)) > 0


def test_another_average_starts_from_the_weights(train, capsys):
    train("run", "train.max_steps=2")
    folder = train("run", "train.max_steps=3", "train.ema_decay=[0.9999,0.0]", "train.ckpt_every=1")
    assert "has no ema_0: it starts from the weights" in capsys.readouterr().out
    now = read_transformer(folder, ema=0.0).state  # decay 0: the weights themselves
    assert largest_difference(now, weights(folder, 3)) == 0


def test_shift_rules():
    sides = torch.tensor([256, 1024])
    assert FlowConfig(shift=False).factor(sides, 384) == 1.0
    constant = FlowConfig(shift_rule="constant", shift_factor=3.0)
    assert constant.factor(sides, 384) == 3.0
    torch.testing.assert_close(FlowConfig().factor(sides, 384).log(), torch.tensor([0.5, 1.15]))
    by_dimension = FlowConfig(shift_rule="dimension").factor(sides, 384)
    torch.testing.assert_close(by_dimension, torch.tensor([24.0, 384.0]).sqrt())  # 256 · 384 / 4096
    for settings in ({"shift_rule": "constant"}, {"shift_factor": 3.0}):
        with pytest.raises(UserError, match="shift_factor"):
            FlowConfig(**settings)


def test_loss_of_patches_is_that_of_their_samples(toy_parts):
    """A fresh model predicts 0, so the loss is the mean square of clean − noise, with the noise of each position."""
    config = load_config(TrainConfig, toy_parts / "train.yaml", ["train.seed=5"])
    sizes = DiTConfig(dim=32, n_layers=1, n_heads=2, axes_dims=(4, 6, 6), in_channels=3, cap_feat_dim=8, patch_size=2)
    objective = FlowObjective(SVGDiT(sizes), config)
    latents, positions = [torch.randn(3, 4, 6), torch.randn(3, 2, 4)], torch.tensor([7, 10**6])
    tokens, grids = objective.transformer.pack(latents)
    text = TextFeatures(torch.randn(5, 8), (2, 3))
    resolutions = torch.tensor([64, 64])
    losses, timesteps, aux = objective(MicroBatch(tokens, grids, positions, resolutions, text))
    assert aux is None
    keys = random_keys(5, positions)
    for i, clean in enumerate(tokens.split([6, 2])):
        noise = random_normal(keys[i : i + 1], clean.shape)[0]
        torch.testing.assert_close(losses[i], (clean - noise).square().mean())
    torch.testing.assert_close(timesteps, shift_time(draw_timesteps(keys), flux_shift_factor(16)))


def test_a_step_takes_the_gradient_of_the_mean_loss_over_all_micro_batches(toy_parts):
    """AdamW hardly notices the scale of a gradient, but its clipping, the guard and the log do."""
    overrides = ["train.global_batch_size=3", "train.micro_batch_size=1", "train.ema_decay=[0.5,0.0]"]
    config = load_config(TrainConfig, toy_parts / "train.yaml", overrides)
    sizes = DiTConfig(dim=32, n_layers=1, n_heads=2, axes_dims=(4, 6, 6), in_channels=3, cap_feat_dim=8)
    transformer = SVGDiT(sizes)
    for weight in transformer.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    objective, state, updates = FlowObjective(transformer, config), TrainState.start(transformer, config), []
    latents, lengths = [torch.randn(3, 2, 3), torch.randn(3, 4, 2), torch.randn(3, 2, 2)], (2, 4, 1)
    text = TextFeatures(torch.randn(7, 8), lengths)

    def micro_batch(*rows):
        tokens, grids = transformer.pack([latents[row] for row in rows])
        return MicroBatch(tokens, grids, torch.tensor(rows), torch.full((len(rows),), 64), text.select(rows))

    losses, _, _ = objective(micro_batch(0, 1, 2))
    gradients = torch.autograd.grad(losses.mean(), transformer.parameters())
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    before = [weight.detach().clone() for weight in state.weights]
    idle = replace(micro_batch(1), counted=False)
    frozen = SimpleNamespace(prepare=lambda *_: iter([micro_batch(0, 1), idle, micro_batch(2)]))
    meter = SimpleNamespace(
        phase=lambda name: None, add_losses=lambda *_: None, add_update=lambda *values: updates.append(values)
    )
    train_step(state, objective, [None] * 3, frozen, config, World(0, 0, 1, torch.device("cpu")), meter)
    torch.testing.assert_close(updates, [(norm, torch.tensor(0.0))])
    assert state.step == 1
    assert state.optimizer.param_groups[0]["lr"] == config.optim.lr / 2  # the first of two steps of warm-up
    for half, newest, old, new in zip(*(ema.values() for ema in state.emas.values()), before, state.weights):
        torch.testing.assert_close(half, (old + new) / 2)
        assert torch.equal(newest, new)
    assert all(weight.grad is None for weight in state.weights)
