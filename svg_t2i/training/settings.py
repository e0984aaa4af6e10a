"""The settings of a DiT training run, as in its YAML file.

Paths may be relative to the working directory or to the repository (`locate`). What can be checked before any weight is
loaded is checked here; the messages name the field, its value and the rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import Tensor

from autoencoder.common.config import UserError, build, require, to_dict
from autoencoder.images.files import LATENT_PIXELS
from svg_t2i.checkpoints.adapters import LoraSettings
from svg_t2i.data.settings import DataConfig
from svg_t2i.evaluation.settings import EvaluationConfig
from svg_t2i.features.settings import AutoencoderSource, TextSource
from svg_t2i.flow.paths import dimension_shift_factor, flux_shift_factor, timestep_range
from svg_t2i.sampling.options import SamplingOptions
from svg_t2i.transformer.config import MODELS, AuxLoss, DiTConfig


@dataclass(frozen=True)
class LoopConfig:
    """Length, batch and bookkeeping of a run."""

    max_steps: int  # updates, after which the run ends
    global_batch_size: int  # samples of a step, on all ranks together
    micro_batch_size: int  # most samples of a rank at a time; the rest of its share is accumulated
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"  # of the forward pass; weights and moments are fp32
    seed: int = 0  # of weights, order, crops, captions, noise
    log_every: int = 10  # steps
    ckpt_every: int = 1000  # steps
    keep_last: int = 5  # newest checkpoints that are kept …
    keep_every: int | None = None  # … besides those of every so many steps
    async_checkpoints: bool = True  # write them in the background, from a copy in host memory
    grad_clip: float = 2.0  # largest norm of all gradients together
    ema_decay: float | tuple[float, ...] = 0.9999  # several: samples come from the first
    ema_warmup: bool = False  # decay of update n at most (1 + n) / (10 + n): early averages forget the random start
    max_nonfinite: int = 100  # updates skipped for their non-finite gradient before the run gives up
    stall_minutes: float | None = 10.0  # without a batch or a step, then the run ends and names the rank; null: never
    spike_factor: float | None = None  # skip updates whose gradient norm exceeds this multiple of its running mean

    def __post_init__(self) -> None:
        for name in ("max_steps", "global_batch_size", "micro_batch_size", "log_every", "ckpt_every", "keep_last"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.keep_every is None or self.keep_every >= 1, "keep_every", self.keep_every, "at least 1, or null")
        require(self.grad_clip > 0, "grad_clip", self.grad_clip, "positive; use .inf for no clipping")
        decays = self.ema_decays
        require(all(0 <= decay < 1 for decay in decays), "ema_decay", self.ema_decay, "in [0, 1)")
        require(0 < len(decays) == len(set(decays)), "ema_decay", self.ema_decay, "one number, or different ones")
        minutes = self.stall_minutes
        require(minutes is None or minutes > 0, "stall_minutes", minutes, "positive, or null for no watchdog")
        factor = self.spike_factor
        require(factor is None or factor > 1, "spike_factor", factor, "above 1, or null for no such policy")

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """Decay of each average."""
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW. The rate rises linearly over `warmup_steps`, then follows `schedule`:

    constant (published); cosine, down to final_lr at train.max_steps; wsd, constant but for a linear descent to
    final_lr over the last `decay_steps` (warm-up, stable, decay: arXiv:2404.06395).
    """

    lr: float = 2e-4  # of AdamW
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-15
    weight_decay: float = 0.0
    warmup_steps: int = 0  # in which the rate rises from 0
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    decay_steps: int = 0  # of wsd
    final_lr: float = 0.0  # of cosine and wsd

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", self.lr, "positive")
        require(0 <= self.final_lr <= self.lr, "final_lr", self.final_lr, "between 0 and lr")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        fits = self.decay_steps >= 1 if self.schedule == "wsd" else self.decay_steps == 0
        require(fits, "decay_steps", self.decay_steps, "1 or more with schedule=wsd, and 0 otherwise")


@dataclass(frozen=True)
class FlowConfig:
    """Distribution of training timesteps: see `svg_t2i.flow.paths.sample_timesteps`.

    With `shift`, times move toward noise by a factor k, t ← t / (t + k (1 − t)):
    flux (published): log k linear in the token count, 0.5 at 256 and 1.15 at 4096;
    dimension: k = √(tokens · channels / 4096) (arXiv:2510.11690); constant: k = shift_factor.
    Tokens are those of a square image of the nominal resolution.
    """

    snr_type: str = "uniform"  # or lognorm, or uniform_LOW_HIGH
    mu: float = 0.0  # of lognorm: below 0 more of the training is near noise
    shift: bool = True  # move times toward noise
    shift_rule: Literal["flux", "dimension", "constant"] = "flux"
    shift_factor: float | None = None  # of the constant rule

    def __post_init__(self) -> None:
        timestep_range(self.snr_type)
        given, wanted = self.shift_factor is not None, self.shift_rule == "constant"
        require(given == wanted, "shift_factor", self.shift_factor, "given with shift_rule=constant, and only then")
        require(not given or self.shift_factor > 0, "shift_factor", self.shift_factor, "positive")

    def factor(self, resolutions: Tensor, in_channels: int) -> Tensor | float:
        """Factor k of the timestep shift, (B,), for latents of images of nominal sides (B,); 1 without shift."""
        if not self.shift:
            return 1.0
        if self.shift_rule == "constant":
            return self.shift_factor
        tokens = (resolutions // LATENT_PIXELS) ** 2
        return flux_shift_factor(tokens) if self.shift_rule == "flux" else dimension_shift_factor(tokens * in_channels)


@dataclass(frozen=True)
class ParallelConfig:
    """Parallelism and memory: see `svg_t2i.training.sharding`."""

    data_parallel: Literal["ddp", "fsdp", "sdp", "hsdp"] = "ddp"
    shard_size: int | None = None  # hsdp: processes that share one copy of the weights; null: those of a machine
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False  # one graph per kind of block, for any number of tokens
    shard_frozen: bool = False  # autoencoder and text encoder: whole only while they encode

    def __post_init__(self) -> None:
        size = self.shard_size
        require(size is None or self.data_parallel == "hsdp", "shard_size", size, "null unless data_parallel=hsdp")
        require(size is None or size >= 1, "shard_size", size, "at least 1")


@dataclass(frozen=True)
class MonitorConfig:
    """What is recorded besides the console line."""

    tensorboard: bool = True  # write curves into results_dir/tensorboard
    wandb_project: str | None = None  # needs wandb: pip install -e .[wandb]
    loss_bins: int = 20  # of the timestep range
    peak_tflops: float | None = None  # of one device, dense, for the utilisation; null: known for common GPUs
    profile_steps: int = 0  # trace so many steps, after ten, into results_dir/profile

    def __post_init__(self) -> None:
        require(self.loss_bins >= 1, "loss_bins", self.loss_bins, "at least 1")
        require(self.profile_steps >= 0, "profile_steps", self.profile_steps, "0 or more")


@dataclass(frozen=True)
class SamplesConfig(SamplingOptions):
    """Pictures of fixed prompts and seeds from the averaged weights, every so many steps, and how they are sampled."""

    height: int | None = None  # pixels; null: data.resolution
    width: int | None = None
    every: int = 0  # steps; 0 switches it off
    prompts: tuple[str, ...] = ()
    seed: int = 0  # picture i has seed + i

    def __post_init__(self) -> None:
        self.options(LATENT_PIXELS)  # checks the settings
        require(self.every >= 0, "every", self.every, "0 or more")
        require(not self.every or self.prompts, "prompts", self.prompts, "given where samples.every is")

    def options(self, resolution: int) -> SamplingOptions:
        """The settings of the pictures, squares of `resolution` pixels unless they name their own sides."""
        values = {field.name: getattr(self, field.name) for field in fields(SamplingOptions)}
        return SamplingOptions(**values | {side: values[side] or resolution for side in ("height", "width")})


@dataclass(frozen=True)
class ValidationConfig:
    """The loss on held-out samples: see `svg_t2i.training.validation`."""

    path: str  # whatever holds images and captions, as data.path
    every: int = 1000  # steps
    num_samples: int = 64  # spread evenly over the data

    def __post_init__(self) -> None:
        require(self.every >= 1, "every", self.every, "at least 1")
        require(self.num_samples >= 1, "num_samples", self.num_samples, "at least 1")


@dataclass(frozen=True)
class AuxConfig:
    """A second head behind the first `block` layers, whose loss is added to that of the last layer, times `weight`.

    flow: the same flow loss; sampling can then guide away from it (`SamplingOptions.internal_guidance`,
    arXiv:2512.24176). features: 1 - cosine with the clean latents, which are an encoder's features (REPA,
    arXiv:2410.06940).
    """

    loss: AuxLoss
    block: int  # the head is behind this one, counted from 1
    weight: float = 0.5  # of its loss beside the main one

    def __post_init__(self) -> None:
        require(self.block >= 1, "block", self.block, "at least 1")
        require(self.weight > 0, "weight", self.weight, "positive")


@dataclass(frozen=True)
class DistillConfig:
    """Learn the guided velocity of a teacher, for sampling in half the passes: see `svg_t2i.training.distill`."""

    teacher: str  # folder of a run, a checkpoint or an export: its averaged weights
    scales: tuple[float, float] = (1.0, 8.0)  # guidance scales are drawn evenly from here
    renorm_cfg: float = 1.0  # of the teacher's guidance, as in sampling

    def __post_init__(self) -> None:
        low, high = self.scales
        require(0 <= low <= high, "scales", self.scales, "two numbers, the larger last, none negative")
        require(self.renorm_cfg >= 0, "renorm_cfg", self.renorm_cfg, "0 (off) or positive")


@dataclass(frozen=True)
class PriorConfig:
    """Pictures that the model draws before it is fine-tuned, and sees while it is: see `svg_t2i.training.prior`."""

    prompts: str | tuple[str, ...]  # of what it should keep: a list, or a file as `svg_t2i.sample` reads them
    num_images: int = 100
    weight: float = 1.0  # how many of them training sees for each of the own images

    def __post_init__(self) -> None:
        require(len(self.prompts) > 0, "prompts", self.prompts, "at least one, or the name of a file")
        require(self.num_images >= 1, "num_images", self.num_images, "at least 1")
        require(self.weight > 0, "weight", self.weight, "positive")


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. Defaults are the release's, but for the EMA decay (see the published stage configs)."""

    model: str  # a name of `transformer.config.MODELS`
    results_dir: str  # checkpoints, curves, pictures
    data: DataConfig
    train: LoopConfig
    autoencoder: AutoencoderSource
    text_encoder: TextSource = field(default_factory=TextSource)
    optim: OptimConfig = field(default_factory=OptimConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    evaluation: EvaluationConfig | None = None  # metrics of the averaged weights, every so many steps
    validation: ValidationConfig | None = None  # the loss on held-out samples, every so many steps
    model_overrides: dict[str, Any] = field(default_factory=dict)  # fields of DiTConfig
    aux: AuxConfig | None = None  # an auxiliary head and its loss
    distill: DistillConfig | None = None  # learn a teacher's guided velocity instead of the data
    lora: LoraSettings | None = None  # train an adapter of the model in `init_from`, instead of all weights
    prior_preservation: PriorConfig | None = None  # keep what the model can do, by pictures that it draws itself
    resume: bool = True  # from the newest whole checkpoint in results_dir, if there is one
    init_from: str | None = None  # folder to take first weights from

    def __post_init__(self) -> None:
        given = self.lora is None or self.init_from is not None
        require(given, "init_from", self.init_from, "given with lora: the folder of the model to adapt")
        scale, head = self.samples.internal_guidance, self.aux is not None and self.aux.loss == "flow"
        require(scale == 1 or head, "samples.internal_guidance", scale, "1 unless aux.loss=flow trains a head for it")
        own = {name: value for name, value in self.model_overrides.items() if name.startswith(("aux_", "guidance_"))}
        require(not own, "model_overrides", own, "without these: the sections aux and distill set them")
        require(self.distill is None or self.lora is None, "lora", self.lora, "null with distill, which trains all")
        if self.prior_preservation is not None:
            require(self.init_from is not None, "init_from", None, "given with prior_preservation: what should be kept")
            weighed, sources = {source.weight is not None for source in self.data.all_sources}, self.data.sources
            require(
                weighed == {True} or len(sources) < 2, "data.sources", sources, "given a weight each beside a prior"
            )
            cache = self.data.all_sources[0].feature_cache
            require(cache is None, "data.feature_cache", cache, "null with prior_preservation, whose images it lacks")

    def model_config(self, in_channels: int, cap_feat_dim: int) -> DiTConfig:
        """Sizes of the DiT for these latents and text features.

        Raises:
            UserError: unknown model, unknown or wrong override.
        """
        if self.model not in MODELS:
            raise UserError(f"model: unknown name {self.model!r}; known: {', '.join(MODELS)}")
        sizes = to_dict(MODELS[self.model]) | {"in_channels": in_channels, "cap_feat_dim": cap_feat_dim}
        head = {} if self.aux is None else {"aux_loss": self.aux.loss, "aux_block": self.aux.block}
        head |= {"guidance_embed": self.distill is not None}
        return build(DiTConfig, sizes | self.model_overrides | head, source="model_overrides")


def changed_settings(before: Mapping[str, Any], now: TrainConfig) -> list[str]:
    """Which settings differ between a checkpoint's recorded configuration and the current one, one line each.

    A setting that is newer than the checkpoint counts with its default.
    """
    with suppress(UserError):  # a setting that is gone by now: then all names are compared as they are
        before = to_dict(build(TrainConfig, before))
    old, new = _flatten(before), _flatten(to_dict(now))
    return [f"{key}: {old.get(key)} → {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
