"""The step and the run: independence of micro-batches, resume, EMA, guard, settings, messages."""

import json
import math
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from autoencoder.common.config import UserError, load_config, to_dict
from autoencoder.latents.statistics import LatentStats
from autoencoder.model import SVGAutoencoder
from svg_t2i import export
from svg_t2i.checkpoints.weights import read_meta, read_transformer
from svg_t2i.data.settings import CaptionMix, DataConfig
from svg_t2i.features.frozen import CaptionCache, MicroBatch
from svg_t2i.flow.paths import draw_timesteps, flux_shift_factor, random_keys, random_normal, shift_time
from svg_t2i.train import main
from svg_t2i.training.settings import (
    FlowConfig,
    LoopConfig,
    MonitorConfig,
    OptimConfig,
    ParallelConfig,
    SamplesConfig,
    TrainConfig,
    changed_settings,
)
from svg_t2i.training.sharding import World
from svg_t2i.training.step import FlowObjective, TrainState, train_step
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.transformer.packing import TextFeatures


@pytest.fixture
def train(toy_parts, tmp_path):
    """Run the training entry into tmp_path/NAME with overrides; returns that folder."""

    def run(name, *overrides):
        main(["--config", str(toy_parts / "train.yaml"), f"results_dir={tmp_path / name}", *overrides])
        return tmp_path / name

    return run


def weights(folder, step, ema=False):
    return read_transformer(folder / "checkpoints" / f"{step:07d}", ema=ema).state


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


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


def test_resume_refuses_other_frozen_networks_and_other_models(train, toy_parts, tmp_path):
    train("run", "train.max_steps=1")
    stats = toy_parts / "autoencoder" / "latent_stats.safetensors"
    other = LatentStats.load(stats, 32)
    LatentStats(other.mean + 1, other.std, encoder=other.encoder).save(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"autoencoder's stats was \w{16} and is \w{16}"):
        train("run", "train.max_steps=2", f"autoencoder.stats={tmp_path / 'other.safetensors'}")
    with pytest.raises(UserError, match=r"another model: dim was 32 and is 64"):
        train("run", "train.max_steps=2", "model_overrides.dim=64", "model_overrides.axes_dims=[8,12,12]")


def test_init_from_takes_fitting_weights_and_names_the_others(train, capsys):
    source = train("source")
    capsys.readouterr()
    folder = train("next", f"init_from={source}", "train.max_steps=1", "optim.lr=1e-12")
    assert largest_difference(weights(source, 4), weights(folder, 1)) < 1e-9
    wider = "model_overrides.multiple_of=96"
    train("wider", f"init_from={source}", wider, "train.max_steps=1")
    output = capsys.readouterr().out
    assert "of another shape" in output
    assert "layers.0.feed_forward.w1.weight" in output


def test_measured_statistics_and_random_text_encoder_are_made_once(train, toy_parts):
    asked = ("autoencoder.stats=measure", "text_encoder.path=random", "train.max_steps=1")
    folder = train("run", *asked)
    stats = folder / "latent_stats.safetensors"
    made = stats.stat().st_mtime_ns
    recorded = load_config(TrainConfig, folder / "config.yaml")
    assert recorded.autoencoder.stats == str(stats)
    assert recorded.text_encoder.path == str(folder / "text_encoder")
    train("run", *asked, "train.max_steps=2")
    assert stats.stat().st_mtime_ns == made


def test_statistics_of_another_resolution_are_warned_of_with_numbers(train, tmp_path, capsys):
    """The toy has fewer images than are compared, so that the numbers are known."""

    def warnings(name, stats, *overrides):
        capsys.readouterr()
        train(name, f"autoencoder.stats={stats}", "train.max_steps=1", *overrides)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("the latent statistics")]

    at_32 = ["data.resolution=32"]
    assert warnings("measured", "measure", *at_32) == []
    own = LatentStats.load(tmp_path / "measured" / "latent_stats.safetensors", 32)
    assert own.resolutions == (32,)
    shifted = own.mean + own.std, 2 * own.std  # seen through these, images of 32 px have means of -1/2
    LatentStats(*shifted, own.encoder, (64,)).save(tmp_path / "shifted.safetensors")
    (line,) = warnings("other", tmp_path / "shifted.safetensors", *at_32)
    assert line.startswith(f"the latent statistics {tmp_path}/shifted.safetensors were measured at 64 px, ")
    assert "training is at 32 px: on a few training images" in line
    assert "means of 0.500 rms (at most 0.50" in line
    assert "deviations from 0.50 to 0.50 instead of 1" in line
    assert warnings("trusted", tmp_path / "shifted.safetensors") == []  # at 64 px, as they say
    for file, mean in (("near", own.mean + 0.1 * own.std), ("far", own.mean + 3 * own.std)):
        torch.save({"mean": mean[None], "std": own.std[None]}, tmp_path / f"{file}.pt")  # no resolution is recorded
    assert warnings("near", tmp_path / "near.pt", *at_32) == []
    (line,) = warnings("far", tmp_path / "far.pt", *at_32)
    assert "far.pt do not fit the images, training is at 32 px" in line
    assert "means of 3.000 rms" in line


def test_statistics_are_measured_at_the_resolutions_of_all_sources(train, toy_parts, capsys):
    manifest = toy_parts / "manifest.jsonl"
    sources = ", ".join(f"{{path: {manifest}, resolution: {side}}}" for side in (32, 64))
    settings = ["data.path=null", f"data.sources=[{sources}]", "train.max_steps=1"]
    folder = train("both", *settings, "autoencoder.stats=measure")
    stats = LatentStats.load(folder / "latent_stats.safetensors", 32)
    assert stats.resolutions == (32, 64)
    alone = train("alone", "autoencoder.stats=measure", "train.max_steps=1") / "latent_stats.safetensors"
    assert not torch.equal(LatentStats.load(alone, 32).mean, stats.mean)
    capsys.readouterr()
    train("mixed", *settings, f"autoencoder.stats={alone}")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "were measured at" in line]
    assert "alone/latent_stats.safetensors were measured at 64 px, training is at 32 px" in line


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_stepz=3", r"unknown key 'train.max_stepz' \(did you mean 'max_steps'"),
        ("train.micro_batch_size=0", r"micro_batch_size=0"),
        ("train.grad_clip=0", r"grad_clip=0"),
        ("train.precision=fp8", r"train.precision = 'fp8'; choose one of fp32, tf32, bf16"),
        ("flow.snr_type=lognormal", r"snr_type 'lognormal'"),
        ("model=huge", r"unknown name 'huge'; known: NextDiT"),
        ("model_overrides.width=3", r"unknown key 'width'"),
        ("data.path=nowhere.jsonl", r"nowhere.jsonl"),
        ("data.resolution=100", r"100"),
        ("init_from=nowhere", r"nowhere: no DiT here"),
        ("text_encoder.path=no/where/at/all", r"no/where/at/all"),
        ("autoencoder.encoder_weights=random", r"autoencoder.encoder_weights is for a YAML config"),
    ],
)
def test_mistakes_are_named(train, override, message):
    with pytest.raises(UserError, match=message):
        train("run", override)


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


def test_changed_settings_are_listed(toy_parts):
    config = load_config(TrainConfig, toy_parts / "train.yaml")
    before = to_dict(replace(config, optim=OptimConfig(lr=5.0, warmup_steps=2)))
    assert changed_settings(to_dict(config), config) == []
    assert changed_settings(before, config) == ["optim.lr: 5.0 → 0.001"]
    del before["samples"]["cfg_trunc"]  # as if it was newer than the checkpoint
    assert changed_settings(before, config) == ["optim.lr: 5.0 → 0.001"]
    assert "gone: 1 → None" in changed_settings(before | {"gone": 1}, config)


def test_every_shipped_config_is_valid(repo_root):
    for path in sorted((repo_root / "configs" / "svg_t2i").glob("*.yaml")):
        config = load_config(TrainConfig, path)
        assert config.model_config(384, 2304).dim % 2 == 0
        assert isinstance(config.train, LoopConfig)
        if path.name.startswith("stage"):
            number = int(path.name[5])
            assert config.train.global_batch_size == (1536 if number == 1 else 768)
            assert config.optim.lr == 2e-4
            assert config.text_encoder.max_length == (256 if number < 3 else 512)
            assert config.data.resolution == (256, 512, 1024, 1024)[number - 1]
            mix = config.data.caption_mix
            assert mix.short + mix.middle + mix.long == pytest.approx(1)


def test_residual_latents_train_and_export(train, tmp_path):
    """An R autoencoder has 8 channels more; the published file names carry the model away and back."""
    vit = {"overrides": {"embed_dim": 32, "depth": 1, "num_heads": 1}, "outnorm": "per_image"}
    encoder = {"model_name": "dinov3_vits16plus", "weights": "random"}
    encoder["overrides"] = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    decoder = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 40}
    params = {"embed_dim": 32, "ddconfig": decoder, "dinoconfig": encoder, "extra_vit_config": vit}
    stats = LatentStats(torch.zeros(40), torch.ones(40))
    SVGAutoencoder.from_config({"model": {"params": params}}, stats=stats).save_pretrained(tmp_path / "residual")
    tiny = ["model_overrides.dim=64", "model_overrides.n_layers=3", "model_overrides.axes_dims=[8,12,12]"]
    tiny += ["model_overrides.multiple_of=256"]
    folder = train("run", f"autoencoder.config={tmp_path / 'residual'}", "train.max_steps=1", *tiny)
    assert read_transformer(folder).config.in_channels == 40
    export.main([str(folder), str(tmp_path / "out"), "--published"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "consolidated.00-of-01.pth", "consolidated_ema.00-of-01.pth", "model_args.pth",
    ]  # fmt: skip
    again, before = (read_transformer(source, ema=False) for source in (tmp_path / "out", folder))
    assert again.config == before.config
    assert largest_difference({k: v for k, v in again.state.items() if k != "norm_final.weight"}, before.state) == 0


def test_export_needs_a_name_to_look_published(train, tmp_path):
    folder = train("run", "train.max_steps=1", "train.ema_decay=[0.9,0.5]")
    with pytest.raises(UserError, match="export it without --published"):
        export.main([str(folder), str(tmp_path / "out"), "--published"])
    with pytest.raises(UserError, match="--raw"):
        export.main([str(folder), str(tmp_path / "out"), "--published", "--raw"])
    export.main([str(folder), str(tmp_path / "fast"), "--ema_decay", "0.5"])
    export.main([str(folder), str(tmp_path / "slow")])
    fast, slow, raw = (read_transformer(f, ema=e) for f, e in ((tmp_path / "fast", 0), (tmp_path / "slow", 0),
                                                               (folder, False)))  # fmt: skip
    assert 0 < largest_difference(fast.state, raw.state) < largest_difference(slow.state, raw.state)
    with pytest.raises(UserError, match=r"no average with decay 0.7, only 0.9, 0.5"):
        export.main([str(folder), str(tmp_path / "none"), "--ema_decay", "0.7"])


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


LOOP = {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
MIX = {"short": 1.0, "middle": 1.0, "long": 1.0}
WSD = {"schedule": "wsd", "lr": 0.5}


@pytest.mark.parametrize(
    ("section", "others", "name", "allowed", "refused"),
    [
        (LoopConfig, LOOP, "max_steps", [1], [0]),
        (LoopConfig, LOOP, "global_batch_size", [1], [0]),
        (LoopConfig, LOOP, "micro_batch_size", [1], [0]),
        (LoopConfig, LOOP, "log_every", [1], [0]),
        (LoopConfig, LOOP, "ckpt_every", [1], [0]),
        (LoopConfig, LOOP, "keep_last", [1], [0]),
        (LoopConfig, LOOP, "keep_every", [None, 1], [0]),
        (LoopConfig, LOOP, "grad_clip", [0.5, math.inf], [0.0, math.nan]),
        (LoopConfig, LOOP, "ema_decay", [0.0, 0.5, (0.5, 0.0)], [1.0, -0.1, (0.5, 0.5), (), (0.5, 1.0)]),
        (LoopConfig, LOOP, "spike_factor", [None, 1.5], [1.0]),
        (DataConfig, {"path": "x"}, "crops_per_image", [None, 1], [0]),
        (DataConfig, {"path": "x"}, "micro_batch_tokens", [None, 1], [0]),
        (DataConfig, {"path": "x"}, "prefetch", [1], [0]),
        (CaptionMix, MIX, "short", [0.0, 0.5], [-0.1]),
        (CaptionMix, MIX, "long", [0.0, 0.5], [-0.1]),
        (CaptionMix, {"middle": 0, "long": 0}, "short", [0.5], [0.0]),
        (OptimConfig, {}, "lr", [0.5], [0.0]),
        (OptimConfig, {"lr": 0.5}, "final_lr", [0.0, 0.5], [-0.1, 0.6]),
        (OptimConfig, {}, "warmup_steps", [0], [-1]),
        (OptimConfig, WSD, "decay_steps", [1], [0]),
        (OptimConfig, {}, "decay_steps", [0], [1]),
        (FlowConfig, {"shift_rule": "constant"}, "shift_factor", [0.5], [0.0, None]),
        (ParallelConfig, {"data_parallel": "hsdp"}, "shard_size", [None, 1], [0]),
        (MonitorConfig, {}, "loss_bins", [1], [0]),
        (MonitorConfig, {}, "profile_steps", [0], [-1]),
        (SamplesConfig, {"prompts": ("x",)}, "every", [0, 1], [-1]),
        (SamplesConfig, {}, "every", [0], [1]),  # without prompts
    ],
)
def test_bounds_are_allowed_and_what_lies_beyond_is_refused(section, others, name, allowed, refused):
    for value in allowed:
        assert getattr(section(**others | {name: value}), name) == value
    for value in refused:
        with pytest.raises(UserError):
            section(**others | {name: value})


def test_unnamed_settings_are_the_published_ones():
    """But for the decay of the averaged weights, which the published stage configs set."""
    loop, optim, flow, data = LoopConfig(**LOOP), OptimConfig(), FlowConfig(), DataConfig("x")
    assert (optim.lr, optim.betas, optim.eps, optim.weight_decay) == (2e-4, (0.9, 0.95), 1e-15, 0.0)
    assert (optim.warmup_steps, optim.schedule, optim.decay_steps, optim.final_lr) == (0, "constant", 0, 0.0)
    assert (loop.precision, loop.grad_clip, loop.ema_decay, loop.ema_warmup) == ("bf16", 2.0, 0.9999, False)
    assert (loop.seed, loop.spike_factor, loop.max_nonfinite) == (0, None, 100)
    assert (loop.log_every, loop.ckpt_every, loop.keep_last, loop.keep_every) == (10, 1000, 5, None)
    assert (flow.snr_type, flow.mu, flow.shift, flow.shift_rule) == ("uniform", 0.0, True, "flux")
    assert (data.resolution, data.max_aspect, data.widest, data.caption_dropout_prob) == (256, 4.0, 4.0, 0.1)
    assert (data.caption_mix, data.crops_per_image, data.jpeg_draft, data.max_errors) == (None, None, False, 0.01)
    assert DataConfig("x", single_shape=True).widest == 1.0


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
