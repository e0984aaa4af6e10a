"""DiT training: the objective, what a checkpoint holds, and one optimiser step.

Unusual here:
- Timesteps and noise are functions of (seed, position of the sample in the training stream), so a step computes the
  same thing on any number of processes, in any micro-batches, before and after a resume. No generator has a state.
  (An adapter's dropout, where asked for, is seeded for every micro-batch.)
- `FlowObjective` is the module that processes share (it maps a prepared micro-batch to losses); the transformer in it
  never hears of them.
- Nothing in a step waits for the device: losses gather in a `Meter` that is read once per logging interval, and whether
  a non-finite gradient skips its update is decided by the fused optimiser on the device.

The gradient of a step is that of the mean loss over its G samples, however they are split over ranks and micro-batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.common.processes import World
from svg_t2i.data.feature_cache import FeatureBatch
from svg_t2i.data.sources import TrainBatch
from svg_t2i.features.frozen import FrozenNetworks, MicroBatch, mixed_precision
from svg_t2i.flow.paths import (
    draw_timesteps,
    feature_loss,
    flow_loss,
    interpolate,
    random_keys,
    random_normal,
    shift_time,
)
from svg_t2i.training.distill import Teacher
from svg_t2i.training.monitor import Meter
from svg_t2i.training.optimizer import UpdateGuard, ema_decay, ema_update, learning_rate, make_optimizer
from svg_t2i.training.settings import TrainConfig
from svg_t2i.training.sharding import clip_gradients, gradient_sync, local_tensors
from svg_t2i.transformer.model import SVGDiT


class FlowObjective(nn.Module):
    """Flow-matching loss of a micro-batch under noise and timesteps that belong to its samples' positions."""

    def __init__(self, transformer: SVGDiT, config: TrainConfig, teacher: Teacher | None = None):
        super().__init__()
        self.teacher = teacher  # no sub-module: it is neither trained nor spread over processes
        self.transformer = transformer
        self.flow, self.aux, self.channels = config.flow, config.aux, transformer.config.in_channels
        self.seed, self.precision = config.train.seed, config.train.precision

    def forward(self, batch: MicroBatch, t: float | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> per-sample loss (B,), the timesteps (B,) it was taken at, and the loss of an auxiliary head (B,); fp32.

        t: one for all, else drawn. Evaluation mode leaves the head out.
        """
        patch = self.transformer.config.patch_size
        lengths = tuple(h * w // patch**2 for h, w in batch.sizes)
        keys = random_keys(self.seed, batch.positions)
        if t is None:
            factor = self.flow.factor(batch.resolutions, self.channels)
            timesteps = shift_time(draw_timesteps(keys, self.flow.snr_type, self.flow.mu), factor)
        else:
            timesteps = torch.full(batch.positions.shape, t, device=batch.positions.device)
        noise = random_normal(keys, batch.tokens.shape[1:], lengths)  # (T, p·p·C)
        noisy, target = interpolate(batch.tokens, noise, timesteps, lengths)
        with mixed_precision(self.precision, noisy.device):
            inputs, further = (noisy, batch.sizes, timesteps, batch.text), {}
            if self.teacher is not None:
                further["guidance"] = scales = self.teacher.scales(keys)
                target = self.teacher.velocity(noisy, batch, timesteps, scales, lengths)
            if self.aux is None or not self.training:
                velocity = self.transformer.forward_packed(*inputs, **further)
                return flow_loss(velocity, target, lengths), timesteps, None
            velocity, early = self.transformer.forward_packed(*inputs, aux=True, **further)
        aux = flow_loss(early, target, lengths)
        if self.aux.loss == "features":
            aux = feature_loss(early, batch.tokens, lengths)
        return flow_loss(velocity, target, lengths), timesteps, aux


def trained_weights(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are trained: all, or those of an adapter. Their names do not tell what wraps the blocks."""
    return {name: weight for name, weight in transformer.state_dict(keep_vars=True).items() if weight.requires_grad}


@dataclass
class TrainState:
    """What a run carries from step to step; with the configuration, all a checkpoint needs."""

    transformer: SVGDiT
    emas: dict[float, dict[str, Tensor]]  # by decay: running averages of its weights, by name
    optimizer: torch.optim.AdamW
    guard: UpdateGuard
    step: int = 0  # updates done

    @classmethod
    def start(cls, transformer: SVGDiT, config: TrainConfig) -> TrainState:
        """A fresh state; averages start as copies of the weights. A model to be sharded is sharded before."""
        weights = trained_weights(transformer)
        emas = {
            decay: {name: weight.detach().clone() for name, weight in weights.items()}
            for decay in config.train.ema_decays
        }
        guard = UpdateGuard(config.train.spike_factor, next(iter(weights.values())).device)
        return cls(transformer, emas, make_optimizer(weights.values(), config.optim), guard)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The trained weights."""
        return self.optimizer.param_groups[0]["params"]

    @property
    def ema(self) -> dict[str, Tensor]:
        """The average that samples come from."""
        return next(iter(self.emas.values()))

    def tensors(self) -> dict[str, Any]:
        """Every tensor by name, not copied: what a checkpoint stores, and fills in place on resume."""
        moments = {
            f"{name}.{key}": value
            for name, weight in trained_weights(self.transformer).items()
            for key, value in self.optimizer.state[weight].items()
        }
        names = ["ema", *(f"ema_{decay:g}" for decay in list(self.emas)[1:])]
        averages = dict(zip(names, self.emas.values(), strict=True))
        guard = {"mean_norm": self.guard.mean_norm}
        model = {name: weight.detach() for name, weight in trained_weights(self.transformer).items()}
        return {"model": model, **averages, "optimizer": moments, "guard": guard}


def seed_dropout(*numbers: int) -> None:
    """Set torch's generators, from which adapters draw their dropout, by (seed, step, rank, micro-batch)."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))


def train_step(
    state: TrainState,
    objective: nn.Module,
    batches: Sequence[TrainBatch | FeatureBatch],
    frozen: FrozenNetworks,
    config: TrainConfig,
    world: World,
    meter: Meter,
) -> None:
    """One update from this rank's micro-batches. `objective` is the parallelised `FlowObjective`."""
    train, weights = config.train, state.weights
    state.optimizer.param_groups[0]["lr"] = learning_rate(state.step, config.optim, train.max_steps)

    micro_batches = frozen.prepare(batches, state.transformer, world.device)
    for number in range(1, len(batches) + 1):
        meter.phase("encode")
        batch = next(micro_batches)
        meter.phase("model")
        if config.lora is not None and config.lora.dropout:
            seed_dropout(train.seed, state.step, world.rank, number)
        with gradient_sync(objective, number == len(batches), config.parallel.data_parallel):
            losses, timesteps, aux = objective(batch)
            weight = world.size / train.global_batch_size if batch.counted else 0.0  # ranks are averaged over
            total = losses if config.aux is None else losses + config.aux.weight * aux
            (total.sum() * weight).backward()
        meter.add_losses(losses.detach(), timesteps, batch, None if aux is None else aux.detach())

    meter.phase("update")
    grad_norm = clip_gradients(weights, train.grad_clip)
    skip = state.guard.skip(grad_norm)
    state.optimizer.found_inf = skip  # the fused update leaves weights and moments alone where this is 1
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    for decay, ema in state.emas.items():
        decay = ema_decay(state.step, decay, train.ema_warmup)
        ema_update(local_tensors(ema.values()), local_tensors(weights), decay, skip)
    state.step += 1
    meter.add_update(grad_norm, skip)
