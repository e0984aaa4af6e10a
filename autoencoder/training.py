"""Training of the autoencoder with Lightning: config schema, data module, training module, callbacks.

A *step* is one update of the decoder, on `batch_size · accumulate_grad_batches · processes` images. Step counts in
configs, logs and checkpoints are of this kind (Lightning's `global_step` sees the decoder's optimiser only), with one
published exception: `disc_start` counts the steps of both optimisers together, so 5000 means step 2500.

The data is one endless stream of permutations; a sample's crop is a function of (seed, position in the stream). So
the order depends neither on workers nor on the number of processes, and a checkpoint needs to keep a position only:

    logs/<config name>/
        config.yaml                     as it was run, overrides included
        events.out.tfevents.*           scalars and reconstruction grids for TensorBoard
        checkpoints/
            step_0005000.ckpt           Lightning file: weights under encoder. / decoder. / loss., optimisers, position
            last.ckpt -> step_...ckpt   the newest; where a restarted run goes on
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from autoencoder.config import UserError, build, resolve_target
from autoencoder.data import DATA, BatchStream, ImageDataset, group_by_size
from autoencoder.images import to_float
from autoencoder.losses import AutoencoderLoss
from autoencoder.manifest import ResumableSampler
from autoencoder.model import ModelConfig, SVGAutoencoder

# -- config: the published YAML schema, own fields marked -------------------------------------------------------------


@dataclass(frozen=True)
class TrainerConfig:
    """`training.trainer`. Length of the run: `max_steps` (own) or `max_epochs`."""

    devices: int | Literal["auto"] = "auto"
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true"] = "auto"  # several processes: DDP in any case
    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = "auto"
    max_epochs: int | None = None
    max_steps: int | None = None
    precision: Literal[32, "32", "32-true", "bf16-mixed"] = 32

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_epochs is None:
            raise UserError("give max_steps or max_epochs")
        for name in ("devices", "num_nodes", "max_epochs", "max_steps"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise UserError(f"{name} = {value} must be at least 1")


@dataclass(frozen=True)
class TrainingConfig:
    """`training`."""

    trainer: TrainerConfig
    logdir: str = "logs"
    scale_lr: bool = False  # learning rate = base_learning_rate · batch size over all processes and accumulation
    accumulate_grad_batches: int = 1
    save_every_n_train_steps: int | None = None
    save_every_n_epochs: int | None = None
    image_logger_type: Literal["tensorboard", "none"] = "tensorboard"
    # own
    seed: int = 0
    log_every_n_steps: int = 50
    log_images_every_n_steps: int = 1000
    validate_every_n_steps: int = 5000
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("accumulate_grad_batches", "log_every_n_steps", "log_images_every_n_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be at least 1")


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
        if self.params.lossconfig is None:
            raise UserError("params.lossconfig is missing; training needs it")


@dataclass(frozen=True)
class DataSection:
    """`data`: which params are right depends on the target, see `autoencoder.data.DATA`."""

    target: str
    params: dict[str, Any]


@dataclass(frozen=True)
class AutoencoderTrainConfig:
    """The whole file."""

    training: TrainingConfig
    model: ModelSection
    data: DataSection
    resume: bool = True  # own: go on from checkpoints/last.ckpt; false: refuse a folder that is not empty


# -- data -------------------------------------------------------------------------------------------------------------


class ImageDataModule(LightningDataModule):
    """Batches are lists of uint8 groups. Its checkpoint state is the position in the stream."""

    def __init__(self, section: DataSection, training: TrainingConfig):
        super().__init__()
        params = resolve_target(section.target, "data.target", DATA)
        self.params = build(params, section.params, "data.params")
        if self.params.batch_size < 1:
            raise UserError(f"data.params.batch_size = {self.params.batch_size} must be at least 1")
        self.training = training
        self.train_source, self.val_source, self.buckets = self.params.sources()
        self.position = 0  # samples consumed before `self.first_step`
        self.first_step = 0

    def steps_per_epoch(self, world_size: int) -> int:
        batch = self.params.batch_size * self.training.accumulate_grad_batches * world_size
        return max(1, len(self.train_source) // batch)

    def total_steps(self, world_size: int) -> int:
        trainer = self.training.trainer
        return trainer.max_steps or trainer.max_epochs * self.steps_per_epoch(world_size)

    def _consumed(self) -> int:
        batch = self.params.batch_size * self.training.accumulate_grad_batches * self.trainer.world_size
        return self.position + (self.trainer.global_step - self.first_step) * batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self._consumed(), "seed": self.training.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if state["seed"] != self.training.seed:
            raise UserError(
                f"training.seed = {self.training.seed}, but the run was started with {state['seed']}, which fixes its "
                "data order: keep the seed, or start a new run in another training.logdir"
            )
        self.position = state["position"]

    def train_dataloader(self) -> DataLoader:
        trainer, accumulate = self.trainer, self.training.accumulate_grad_batches
        self.first_step = trainer.global_step
        global_batch = self.params.batch_size * trainer.world_size
        first = math.ceil(self.position / global_batch)  # exact unless the batch size has changed since
        sampler = ResumableSampler(
            length=len(self.train_source),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            global_batch_size=global_batch,
            total_steps=first + (trainer.max_steps - trainer.global_step) * accumulate,
            resume_step=first,
            seed=self.training.seed,
        )
        dataset = ImageDataset(self.train_source, self.buckets, self.training.seed)
        return self._loader(dataset, BatchStream(sampler, self.params.batch_size))

    def val_dataloader(self) -> DataLoader | list:
        if self.val_source is None:
            return []
        indices = range(self.trainer.global_rank, len(self.val_source), self.trainer.world_size)
        starts = range(0, len(indices), self.params.batch_size)
        batches = [[(i, i) for i in indices[start : start + self.params.batch_size]] for start in starts]
        return self._loader(ImageDataset(self.val_source, self.buckets, seed=None), batches)

    def _loader(self, dataset: ImageDataset, batches: Any) -> DataLoader:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.params.num_workers,
            collate_fn=group_by_size,
            pin_memory=torch.cuda.is_available(),
        )


# -- training ---------------------------------------------------------------------------------------------------------


class AutoencoderModule(LightningModule):
    """Decoder, and residual branch if any, against discriminator; the encoder is frozen.

    The networks are registered as `encoder`, `extra_vit`, `decoder`, `loss`: state dicts have the published names.

    Args:
        learning_rate: of both Adam optimisers (betas 0.5, 0.9).
        total_steps: end of the cosine schedule.
    """

    def __init__(
        self,
        autoencoder: SVGAutoencoder,
        loss: AutoencoderLoss,
        learning_rate: float,
        total_steps: int,
        training: TrainingConfig,
    ):
        super().__init__()
        self.automatic_optimization = False
        for name, module in autoencoder.named_children():
            self.add_module(name, module)
        self.encode, self.decode = autoencoder.encode, autoencoder.decode
        self.trainable_parameters = autoencoder.trainable_parameters
        self.draws = autoencoder.draws_in_training()
        self.loss = loss
        self.learning_rate, self.total_steps, self.training_config = learning_rate, total_steps, training
        self.meter = Meter()
        self.micro_steps, self.step_complete = 0, False
        self.train()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        players = [self.trainable_parameters()]
        if self.loss.discriminator is not None:
            players.append(list(self.loss.discriminator.parameters()))
        return [torch.optim.Adam(player, self.learning_rate, betas=(0.5, 0.9), fused=True) for player in players]

    def reconstruct(self, images: list[Tensor]) -> list[Tensor]:
        """Groups of (n, 3, H, W) in [-1, 1] → groups of the same shapes."""
        return [self.decode(self.encode(group)) for group in images]

    def training_step(self, batch: list[Tensor], batch_index: int) -> None:
        step, part = self.global_step, self.micro_steps % self.training_config.accumulate_grad_batches
        self.micro_steps += 1
        self.step_complete = part + 1 == self.training_config.accumulate_grad_batches
        decoder_optimizer, *others = _as_list(self.optimizers())
        if self.draws:  # a resumed run draws the same masks
            torch.manual_seed(hash((self.training_config.seed, step, part, self.global_rank)))

        images = [to_float(group) for group in batch]
        recons = self.reconstruct(images)
        loss, logs = self.loss.generator_loss(images, recons, self.decoder.last_layer, step=2 * step)
        self._turn(loss, decoder_optimizer, step)
        if self.loss.disc_factor(2 * step + 1) > 0:
            loss, more_logs = self.loss.discriminator_loss(images, recons, step=2 * step + 1)
            self._turn(loss, others[0].optimizer, step)  # the bare optimiser: Lightning does not count its steps
            logs |= more_logs

        self.meter.add(logs, sum(map(len, images)))
        if self.step_complete and self.global_step % self.training_config.log_every_n_steps == 0:
            self._report()

    def _turn(self, loss: Tensor, optimizer: Any, step: int) -> None:
        """Backward for one player, and its update once all micro-batches are in."""
        waiting = not self.step_complete and self.trainer.world_size > 1
        with self.trainer.strategy.block_backward_sync() if waiting else nullcontext():
            self.manual_backward(loss / self.training_config.accumulate_grad_batches)
        if self.step_complete:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * self._schedule(step)
            optimizer.step()
            optimizer.zero_grad()

    def _schedule(self, step: int) -> float:
        config = self.training_config
        warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.total_steps)
        return warmup * (cosine if config.lr_schedule == "cosine" else 1.0)

    def _report(self) -> None:
        """Log means since the last report, over all processes: the only device synchronisation of the loop."""
        metrics = self.meter.read(self.trainer.strategy.reduce)
        if not math.isfinite(metrics["total_loss"]):
            raise UserError(
                f"training diverged: total_loss = {metrics['total_loss']} at step {self.global_step}; lower "
                "model.base_learning_rate or add training.warmup_steps, and start from an earlier checkpoint"
            )
        metrics["images_per_s"] *= self.trainer.world_size
        metrics["lr"] = self.learning_rate * self._schedule(self.global_step - 1)
        for log in self.loggers:
            log.log_metrics({f"train/{name}": value for name, value in metrics.items()}, step=self.global_step)
        self.log("rec_loss", metrics["rec_loss"], prog_bar=True, logger=False)

    def validation_step(self, batch: list[Tensor], batch_index: int) -> None:
        images = [to_float(group) for group in batch]
        terms = self.loss.reconstruction(images, self.reconstruct(images))
        for name, value in (("rec_loss", terms.rec), ("p_loss", terms.perceptual)):
            self.log(f"val/{name}", value.mean(), batch_size=len(value), sync_dist=True)
        self.log("step", float(self.global_step))  # Lightning's word for the x axis


class Meter:
    """Sums of logged values, kept on the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.images, self.since = 0, time.perf_counter()

    def add(self, logs: Mapping[str, Tensor], images: int) -> None:
        for name, value in logs.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.images += images

    def read(self, reduce: Callable[..., Tensor]) -> dict[str, float]:
        """Means over calls and, by `reduce`, over processes; images/s of this process. Starts afresh."""
        means = torch.stack([total.float() / self.counts[name] for name, total in self.sums.items()])  # (k,)
        metrics = dict(zip(self.sums, reduce(means, reduce_op="mean").tolist()))
        metrics["images_per_s"] = self.images / (time.perf_counter() - self.since)
        self.__init__()
        return metrics


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]
