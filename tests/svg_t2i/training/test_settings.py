"""Settings of a run: their bounds, what is said of mistakes, and that the shipped files are valid."""

import math
from dataclasses import replace

import pytest

from autoencoder.common.config import UserError, load_config, to_dict
from svg_t2i.data.settings import CaptionMix, DataConfig
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
from tests.bounds import check_bounds


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
    check_bounds(section, others, name, allowed, refused)


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
