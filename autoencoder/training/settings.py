"""Settings of autoencoder training: the published YAML schema as dataclasses, with own fields marked.

Every field works or is refused by name; own fields are off by default, which is what the release does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from autoencoder.common.config import UserError, resolve_target
from autoencoder.model import ModelConfig, SVGAutoencoder


@dataclass(frozen=True)
class TrainerConfig:
    """`training.trainer`, with the names of Lightning's Trainer. One of max_steps and max_epochs ends the run."""

    devices: int | Literal["auto"] = "auto"
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true"] = "auto"  # several processes: DDP in any case
    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = "auto"
    max_epochs: int | None = None
    precision: Literal[32, "32", "32-true", "bf16-mixed"] = 32
    # -- own --
    max_steps: int | None = None
    gradient_clip_val: float | None = None  # largest gradient norm of each of the two players
    sync_batchnorm: bool = False  # the discriminator's statistics over all processes; published: each its own

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_epochs is None:
            raise UserError("give max_steps or max_epochs")
        _at_least_one(self, "num_nodes", "max_epochs", "max_steps", *(["devices"] if self.devices != "auto" else []))
        if self.gradient_clip_val is not None and not self.gradient_clip_val > 0:
            raise UserError(f"gradient_clip_val = {self.gradient_clip_val} must be positive, or null for no clipping")


@dataclass(frozen=True)
class TrainingConfig:
    """`training`. A step is one update of the decoder; what happens every n steps is counted in these."""

    trainer: TrainerConfig
    logdir: str = "logs"
    scale_lr: bool = False  # learning rate = base_learning_rate · images per step
    accumulate_grad_batches: int = 1
    save_every_n_train_steps: int | None = None
    save_every_n_epochs: int | None = None  # both: at either; neither: every epoch
    image_logger_type: Literal["tensorboard", "none"] = "tensorboard"
    # -- own --
    seed: int = 0
    log_every_n_steps: int = 50
    log_images_every_n_steps: int = 1000  # and before that at steps 1, 2, 4, 8, …
    validate_every_n_steps: int = 5000
    stall_minutes: float | None = 10.0  # without a batch or a step, after which the run is ended; null: never
    keep_last_k: int | None = None  # delete older step checkpoints; null: keep all
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    ema_decay: float | None = None  # such as 0.999: keep a running average of the weights
    # τ: the decoder learns from latents + σ·ε with σ ~ |N(0, τ²)| drawn per image (RAE, arXiv 2510.11690).
    latent_noise: float = 0.0
    # Statistics of the latents. With them τ is in normalised units, the diffusion model's: a channel's noise is σ times
    # its deviation. Without them τ is in the units of the raw latents, the same for all channels.
    latent_stats: str | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "accumulate_grad_batches", "save_every_n_train_steps", "save_every_n_epochs", "keep_last_k")
        _at_least_one(self, "log_every_n_steps", "log_images_every_n_steps", "validate_every_n_steps")
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps = {self.warmup_steps} must not be negative")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay = {self.ema_decay} must lie between 0 and 1, or be null for no average")
        if self.stall_minutes is not None and self.stall_minutes <= 0:
            raise UserError(f"stall_minutes = {self.stall_minutes} must be positive, or null for no watchdog")
        if not 0 <= self.latent_noise < math.inf:
            raise UserError(f"latent_noise = {self.latent_noise} must be 0 (none) or a positive scale")
        if self.latent_stats is not None and not self.latent_noise:
            raise UserError("latent_stats give latent_noise its units, which is 0; set both or neither")


MODELS = {
    "autoencoder.model.SVGAutoencoder": SVGAutoencoder,
    "ldm.models.dinov3_decoder_native_resolution.DinoDecoder": SVGAutoencoder,
    "ldm.models.dinov3_decoder_imagenet.DinoDecoder": SVGAutoencoder,
}


@dataclass(frozen=True)
class ModelSection:
    """`model`."""

    base_learning_rate: float
    params: ModelConfig
    target: str = "autoencoder.model.SVGAutoencoder"
    init_weight: str | None = None  # a previous stage's checkpoint, loaded as far as names and shapes agree

    def __post_init__(self) -> None:
        resolve_target(self.target, "model.target", MODELS)
        if not 0 <= self.base_learning_rate < math.inf:
            raise UserError(f"base_learning_rate = {self.base_learning_rate} must not be negative")
        if self.params.lossconfig is None:
            raise UserError("params.lossconfig is missing; training needs it")
        if not self.params.is_train:
            raise UserError("params.is_train is false: this file is for encoding and decoding; set it to true to train")


@dataclass(frozen=True)
class DataSection:
    """`data`: which params are right depends on the target, see `autoencoder.training.batches.DATA`."""

    target: str
    params: dict[str, Any]


@dataclass(frozen=True)
class AutoencoderTrainConfig:
    """The whole file."""

    training: TrainingConfig
    model: ModelSection
    data: DataSection
    resume: bool = True  # own: go on from checkpoints/last.ckpt; false: refuse a folder that is not empty


def _at_least_one(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name} = {value} must be at least 1")
