"""Training of the autoencoder with Lightning: the data module, and the module with the training step.

A *step* is one update of the decoder, on `batch_size · accumulate_grad_batches · processes` images. Step counts in
configs, logs and checkpoints are of this kind (Lightning's `global_step` sees the decoder's optimiser only), with one
published exception: `disc_start` counts the steps of both optimisers together, so 5000 means step 2500.

The data is one endless stream of permutations; a sample's crop and latent noise are functions of (seed, position in
the stream). So neither workers nor the number of processes matter, and a checkpoint needs to keep a position only:

    logs/<config name>/
        config.yaml                     as it was run, overrides included
        events.out.tfevents.*           scalars and reconstruction grids for TensorBoard
        checkpoints/
            step_0005000.ckpt           Lightning file: weights under encoder. / extra_vit. / decoder. / loss., both
                                        optimisers, position; with ema_decay also ema_state_dict, see `callbacks`
            last.ckpt -> step_...ckpt   the newest; where a restarted run goes on
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from autoencoder.common.config import UserError, build, resolve_target
from autoencoder.common.processes import mean_over_processes, peak_memory
from autoencoder.common.workers import WorkerLoader, require_shared_memory
from autoencoder.evaluation.metrics import PER_IMAGE, ImageMetrics, to_8bit
from autoencoder.images.files import Group, to_float
from autoencoder.model import SVGAutoencoder
from autoencoder.training.batches import DATA, BatchStream, CropSizes, ImageDataset, validation_batches
from autoencoder.training.losses import AutoencoderLoss
from autoencoder.training.settings import DataSection, TrainingConfig

logger = logging.getLogger("autoencoder")

PREFETCH = 2  # batches that each worker prepares ahead

# -- data -------------------------------------------------------------------------------------------------------------


class ImageDataModule(LightningDataModule):
    """Batches of uint8 groups of equal size. Its checkpoint state is the position in the stream."""

    def __init__(self, section: DataSection, training: TrainingConfig):
        super().__init__()
        params = resolve_target(section.target, "data.target", DATA)
        self.params = build(params, section.params, "data.params")
        self.training = training
        self.train_source, self.val_source, self.buckets = self.params.sources()
        self.content = self.train_source.content_fingerprint
        self.position = 0  # samples consumed before `self.first_step`
        self.first_step = 0

    def images_per_step(self, world_size: int) -> int:
        return self.params.batch_size * self.training.accumulate_grad_batches * world_size

    def steps_per_epoch(self, world_size: int) -> int:
        return max(1, len(self.train_source) // self.images_per_step(world_size))

    def total_steps(self, world_size: int) -> int:
        trainer = self.training.trainer
        return trainer.max_steps or trainer.max_epochs * self.steps_per_epoch(world_size)

    def state_dict(self) -> dict[str, Any]:
        steps = self.trainer.global_step - self.first_step
        position = self.position + steps * self.images_per_step(self.trainer.world_size)
        return {"position": position, "seed": self.training.seed, "content": self.content}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. UserError for another seed; a warning for other data."""
        if state["seed"] != self.training.seed:
            raise UserError(
                f"training.seed = {self.training.seed}, but the run was started with {state['seed']}, which fixes its "
                "data order: keep the seed, or start a new run in another training.logdir"
            )
        if state.get("content", self.content) != self.content:  # older checkpoints do not tell
            logger.warning(
                "THE DATA CHANGED: %s lists other images than at the checkpoint (%s, was %s). The run goes on with "
                "what is there now; images may come twice or not at all",
                self.train_source.name, self.content, state["content"],
            )  # fmt: skip
        self.position = state["position"]

    def train_dataloader(self) -> DataLoader:
        """This process's batches, from the position that was reached."""
        trainer = self.trainer
        self.first_step = trainer.global_step
        # Exact as long as the number of images per step is the same; if it has changed, what remains of the current
        # window of images is split anew, and some of it may come twice or not at all.
        first = math.ceil(self.position / self.images_per_step(trainer.world_size))
        stream = BatchStream(
            CropSizes(self.train_source, self.buckets),
            shape=(self.training.accumulate_grad_batches, trainer.world_size, self.params.batch_size),
            rank=trainer.global_rank,
            steps=range(first, first + trainer.max_steps - trainer.global_step),
            seed=self.training.seed,
            window=self.params.bucket_window,
        )
        return self._loader(ImageDataset(self.train_source, self.buckets, self.training.seed), stream)

    def val_dataloader(self) -> DataLoader | list:
        if self.val_source is None:
            return []
        sizes = CropSizes(self.val_source, self.buckets)
        batches = validation_batches(sizes, self.params.batch_size, self.trainer.global_rank, self.trainer.world_size)
        return self._loader(ImageDataset(self.val_source, self.buckets, seed=None), _FixedBatches(batches))

    def _loader(self, dataset: ImageDataset, batches: Any) -> DataLoader:
        image_bytes = 3 * max(width * height for width, height in self.buckets)
        ahead = PREFETCH * self.params.num_workers * self.params.batch_size  # images
        require_shared_memory(self.trainer.num_devices * ahead * image_bytes)
        return WorkerLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.params.num_workers,
            prefetch_factor=PREFETCH if self.params.num_workers else None,
            collate_fn=dataset.collate,
            pin_memory=torch.cuda.is_available(),
        )


class _FixedBatches(list):
    """Batches of keys. Lightning 2.5.0 asks a batch sampler for its sampler, to see whether it shuffles."""

    sampler = None


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
        self.encoder, self.extra_vit = autoencoder.encoder, autoencoder.extra_vit
        self.decoder = autoencoder.decoder
        self.encode, self.decode = autoencoder.encode, autoencoder.decode
        self.trainable_parameters = autoencoder.trainable_parameters
        self.draws = autoencoder.draws_in_training()
        self.register_buffer("noise_scale", None, persistent=False)  # (D,): what latent_noise is measured in
        self.loss = loss
        loss.average = mean_over_processes
        self.learning_rate, self.total_steps, self.training_config = learning_rate, total_steps, training
        self.meter = Meter()
        self.validation_sums = torch.zeros(0)
        self.micro_steps, self.step_complete = 0, False
        self.train()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        players = {"decoder": self.trainable_parameters()}
        if self.loss.discriminator is not None:
            players["discriminator"] = list(self.loss.discriminator.parameters())
        groups = [[{"params": player, "name": name}] for name, player in players.items()]  # names are for the logs
        return [torch.optim.Adam(group, self.learning_rate, betas=(0.5, 0.9), fused=True) for group in groups]

    @property
    def between_steps(self) -> bool:
        """Whether no micro-batch of the next step has been seen."""
        return self.micro_steps % self.training_config.accumulate_grad_batches == 0

    def reconstruct(self, images: list[Tensor], noise_at: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
        """Groups of (n, 3, H, W) in [-1, 1] → groups of the same shapes.

        noise_at: stream positions of the images, to decode from noisy latents.
        """
        latents = [self.encode(group) for group in images]
        if noise_at is not None:
            tau, seed = self.training_config.latent_noise, self.training_config.seed
            noise = (latent_noise(x, at, tau, seed, self.noise_scale) for x, at in zip(latents, noise_at))
            latents = [x + y.to(x.dtype) for x, y in zip(latents, noise)]
        return [self.decode(group) for group in latents]

    def training_step(self, batch: list[Group], batch_index: int) -> None:
        """Gradients of one micro-batch, given in groups of one size; after the last of a step, the updates."""
        step, part = self.global_step, self.micro_steps % self.training_config.accumulate_grad_batches
        self.micro_steps += 1
        self.step_complete = part + 1 == self.training_config.accumulate_grad_batches
        optimizers = self.optimizers()  # one alone comes without a list
        decoder_optimizer, *others = optimizers if isinstance(optimizers, list) else [optimizers]
        if self.draws:  # a resumed run draws the same masks
            torch.manual_seed(hash((self.training_config.seed, step, part, self.global_rank)))

        images = [to_float(group.images) for group in batch]
        noise_at = [group.places for group in batch] if self.training_config.latent_noise else None
        recons = self.reconstruct(images, noise_at)
        loss, logs = self.loss.generator_loss(images, recons, self.decoder.last_layer, step=2 * step)
        logs |= self._turn("decoder", loss, decoder_optimizer)
        if self.loss.disc_factor(2 * step + 1) > 0:
            loss, more_logs = self.loss.discriminator_loss(images, recons, step=2 * step + 1)
            # The bare optimiser: Lightning does not count its steps.
            logs |= more_logs | self._turn("discriminator", loss, others[0].optimizer)

        self.meter.add(logs, sum(map(len, images)), sum(group.replaced for group in batch))
        if self.step_complete and self.global_step % self.training_config.log_every_n_steps == 0:
            self._report()
        self.meter.count_time()

    def _turn(self, player: str, loss: Tensor, optimizer: Any) -> dict[str, Tensor]:
        """Backward for one player, and its update once all micro-batches are in."""
        waiting = not self.step_complete and self.trainer.world_size > 1
        with self.trainer.strategy.block_backward_sync() if waiting else nullcontext():
            self.manual_backward(loss / self.training_config.accumulate_grad_batches)
        if not self.step_complete:
            return {}
        logs, limit = {}, self.training_config.trainer.gradient_clip_val
        if limit is not None:
            logs[f"grad_norm_{player}"] = clip_grad_norm_(optimizer.param_groups[0]["params"], limit, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return logs

    def _set_rates(self) -> None:
        """The learning rate of the step that comes next, a function of its number: a resumed run needs no state."""
        config, step = self.training_config, self.global_step
        warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.total_steps) if config.lr_schedule == "cosine" else 1.0
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * warmup * cosine

    def _report(self) -> None:
        """Log means since the last report, over all processes: the only device synchronisation of the loop."""
        metrics = self.meter.read()
        if not math.isfinite(metrics["total_loss"]):
            raise UserError(
                f"training diverged: total_loss = {metrics['total_loss']} at step {self.global_step}; lower "
                "model.base_learning_rate or add training.warmup_steps, and start from an earlier checkpoint"
            )
        metrics["images_per_s"] *= self.trainer.world_size
        metrics["replaced"] *= self.trainer.world_size  # since the last report
        metrics["memory_gib"] = peak_memory(self.device)
        self._log("train", metrics)
        self.log("rec_loss", metrics["rec_loss"], prog_bar=True, logger=False)

    def _log(self, what: str, metrics: Mapping[str, float]) -> None:
        for log in self.loggers:
            log.log_metrics({f"{what}/{name}": value for name, value in metrics.items()}, step=self.global_step)

    # -- validation: means over all images, each counted once --

    def on_validation_epoch_start(self) -> None:
        columns = len(PER_IMAGE) + 2
        self.validation_sums = torch.zeros(columns, dtype=torch.float64, device=self.device)  # …, rec_loss, images

    def validation_step(self, batch: list[Group], batch_index: int) -> None:
        images = [to_float(group.images) for group in batch]
        recons = self.reconstruct(images)
        measure = ImageMetrics(self.loss.perceptual_loss)
        columns = torch.cat([measure(group.images, to_8bit(recon)) for group, recon in zip(batch, recons)])  # (n, 6)
        rec = self.loss.reconstruction(images, recons).rec[:, None]
        self.validation_sums += torch.cat([columns, rec, torch.ones_like(rec)], dim=1).sum(dim=0)

    def on_validation_epoch_end(self) -> None:
        *sums, count = mean_over_processes(self.validation_sums).tolist()
        means = {name: total / count for name, total in zip((*PER_IMAGE, "rec_loss"), sums)}
        if self.loss.perceptual_loss is None:
            del means["lpips"]
        self._log("val", means)

    # -- between steps; what is not training does not count as its time --

    def on_train_batch_start(self, batch: list[Group], batch_index: int) -> None:
        self.meter.arrived()

    def on_train_batch_end(self, *_: Any) -> None:
        self._set_rates()
        self.meter.begin()

    on_train_start = on_train_batch_end

    def on_validation_end(self) -> None:
        self.meter.begin()


def latent_noise(
    latents: Tensor, positions: Sequence[int], tau: float, seed: int, scale: Tensor | None = None
) -> Tensor:
    """Noise σ·ε for latents (n, D, h, w) of the images at these stream positions, in fp32, from (seed, position).

    ε ~ N(0, 1) per element and σ ~ |N(0, τ²)| per image (RAE, arXiv 2510.11690), in units of `scale` (D,) or of 1.
    """
    noise = torch.empty(latents.shape, device=latents.device)
    for row, position in zip(noise, positions):
        entropy = np.random.SeedSequence(seed, spawn_key=(position, 0)).generate_state(1, np.uint64)
        generator = torch.Generator(latents.device).manual_seed(int(entropy[0]))
        sigma = tau * torch.randn((), generator=generator, device=latents.device).abs()
        row.normal_(generator=generator).mul_(sigma)
    return noise if scale is None else noise * scale[:, None, None]


class Meter:
    """Sums of logged values, kept on the device until they are read; and time, of training alone."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.images = self.replaced = 0
        self.busy = self.waited = 0.0  # seconds; waiting for data is part of being busy
        self.begin()

    def begin(self) -> None:
        """Forget the time since `begin` or `count_time`."""
        self.since = time.perf_counter()

    def arrived(self) -> None:
        """All that time was spent waiting for a batch."""
        self.waited += time.perf_counter() - self.since

    def count_time(self) -> None:
        """It was spent training."""
        self.busy += time.perf_counter() - self.since
        self.begin()

    def add(self, logs: Mapping[str, Tensor], images: int, replaced: int = 0) -> None:
        """Logs of a micro-batch of so many images, of which some stand in for unusable ones."""
        for name, value in logs.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.images += images - replaced
        self.replaced += replaced

    def read(self) -> dict[str, float]:
        """Means over calls and processes; speed of this process, and its share of time without data. Starts afresh.

        Stand-ins for unusable images are counted apart (`replaced`): they are no new images.
        """
        means = torch.stack([total.float() / self.counts[name] for name, total in self.sums.items()])  # (k,)
        means = torch.cat([means, torch.full_like(means[:1], self.replaced)])
        metrics = dict(zip([*self.sums, "replaced"], mean_over_processes(means).tolist()))
        self.count_time()
        metrics |= {"images_per_s": self.images / self.busy, "data_wait": self.waited / self.busy}
        self.__init__()
        return metrics
