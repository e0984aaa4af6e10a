"""DiT training: the objective, what a checkpoint holds, and one optimiser step.

Unusual here:
- Timesteps and noise are functions of (seed, position of the sample in the training stream), so a step computes the
  same thing on any number of processes, in any micro-batches, before and after a resume. No generator has a state.
- `FlowObjective` is the module that processes share (it maps a prepared micro-batch to losses); the transformer in it
  never hears of them.
- Nothing in a step waits for the device: losses gather in a `Meter` that is read once per logging interval, and whether
  a non-finite gradient skips its update is decided by the fused optimiser on the device.

A step of G samples on R ranks is G / (R · micro_batch_size) micro-batches per rank; its gradient is that of the mean
loss over the G samples.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from svg_t2i.data import TrainBatch
from svg_t2i.feature_cache import FeatureBatch
from svg_t2i.flow import LossBins, draw_timesteps, flow_loss, interpolate, random_keys, random_normal
from svg_t2i.frozen import FrozenNetworks, MicroBatch, mixed_precision
from svg_t2i.model import SVGDiT
from svg_t2i.parallel import World, gradient_sync, reduce_sum
from svg_t2i.settings import LATENT_PIXELS, OptimConfig, TrainConfig


class FlowObjective(nn.Module):
    """Flow-matching loss of a micro-batch under noise and timesteps that belong to its samples' positions."""

    def __init__(self, transformer: SVGDiT, config: TrainConfig):
        super().__init__()
        self.transformer = transformer
        self.flow = config.flow
        self.seed, self.precision = config.train.seed, config.train.precision

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """-> per-sample loss (B,) and the timesteps (B,) it was taken at, both fp32."""
        patch = self.transformer.config.patch_size
        lengths = tuple(h * w // patch**2 for h, w in batch.sizes)
        keys = random_keys(self.seed, batch.positions)
        shift_tokens = (batch.resolutions // LATENT_PIXELS) ** 2 if self.flow.shift else None
        timesteps = draw_timesteps(keys, self.flow.snr_type, self.flow.mu, shift_tokens)
        noise = random_normal(keys, batch.tokens.shape[1:], lengths)  # (T, p·p·C)
        noisy, target = interpolate(batch.tokens, noise, timesteps, lengths)
        with mixed_precision(self.precision, noisy.device):
            velocity = self.transformer.forward_packed(noisy, batch.sizes, timesteps, batch.text)
        return flow_loss(velocity, target, lengths), timesteps


@dataclass
class TrainState:
    """What a run carries from step to step; with the configuration, all a checkpoint needs."""

    transformer: SVGDiT
    ema: SVGDiT  # running average of its weights
    optimizer: torch.optim.AdamW
    step: int = 0  # updates done

    @classmethod
    def start(cls, transformer: SVGDiT, optim: OptimConfig) -> TrainState:
        """A fresh state; the average starts as a copy of the weights."""
        ema = copy.deepcopy(transformer).eval().requires_grad_(False)
        return cls(transformer, ema, make_optimizer(transformer.parameters(), optim))

    def tensors(self) -> dict[str, Any]:
        """Every tensor by name, not copied: what a checkpoint stores, and fills in place on resume."""
        moments = {
            f"{name}.{key}": value
            for name, weight in self.transformer.named_parameters()
            for key, value in self.optimizer.state[weight].items()
        }
        return {"model": self.transformer.state_dict(), "ema": self.ema.state_dict(), "optimizer": moments}


def make_optimizer(weights: Iterable[nn.Parameter], optim: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW whose moments exist from the start, so that a checkpoint can be loaded into them."""
    optimizer = torch.optim.AdamW(
        weights, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )
    for weight in optimizer.param_groups[0]["params"]:
        optimizer.state[weight] = {
            "step": torch.zeros((), device=weight.device),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }
    return optimizer


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Rate of the update after `step` updates."""
    return optim.lr * min(1.0, (step + 1) / max(1, optim.warmup_steps))


def ema_update(ema: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """ema ← decay · ema + (1 − decay) · weights, in place."""
    torch._foreach_lerp_(list(ema), list(weights), 1 - decay)


def train_step(
    state: TrainState,
    objective: nn.Module,
    steps: Iterator[list[TrainBatch | FeatureBatch]],
    frozen: FrozenNetworks,
    config: TrainConfig,
    world: World,
    meter: Meter,
) -> None:
    """One update from the next micro-batches of this rank. `objective` is the wrapped `FlowObjective`."""
    weights = state.optimizer.param_groups[0]["params"]
    state.optimizer.param_groups[0]["lr"] = learning_rate(state.step, config.optim)

    micro_batches = next(steps)
    for i, micro_batch in enumerate(micro_batches, start=1):
        batch = frozen.prepare(micro_batch, state.transformer)
        with gradient_sync(objective, enabled=i == len(micro_batches)):
            losses, timesteps = objective(batch)
            (losses.sum() * world.size / config.train.global_batch_size).backward()
        meter.add_losses(losses.detach(), timesteps, batch)

    grad_norm = clip_grad_norm_(weights, config.train.grad_clip, foreach=True)
    skip = grad_norm.isfinite().logical_not().float()  # the same on every rank: gradients are averaged by now
    state.optimizer.found_inf = skip  # the fused update leaves weights and moments alone where this is 1
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    ema_update(list(state.ema.parameters()), weights, config.train.ema_decay)
    state.step += 1
    meter.add_update(grad_norm, skip)


class Meter:
    """Sums of what is logged, kept on the device between two `read`s."""

    def __init__(self, world: World):
        self.world = world
        self.bins = LossBins(device=world.device)
        self._sums = torch.zeros(4, device=world.device)  # losses, samples | gradient norm, skipped updates
        self._updates = self._text_tokens = self._samples = 0
        self.total_skipped = 0  # as of the last `read`

    def add_losses(self, losses: Tensor, timesteps: Tensor, batch: MicroBatch) -> None:
        """Per-sample losses (B,) at timesteps (B,)."""
        self._sums[:2] += torch.stack((losses.sum(), torch.full_like(losses[0], len(losses))))
        self.bins.update(timesteps, losses)
        self._text_tokens += sum(batch.text.lengths)
        self._samples += len(losses)

    def add_update(self, grad_norm: Tensor, skipped: Tensor) -> None:
        """Gradient norm before clipping, and 1 if the update was skipped."""
        self._sums[2:] += torch.stack((grad_norm, skipped))
        self._updates += 1

    def read(self) -> dict[str, Any]:
        """Means over all ranks since the last call, from which counting starts anew. Waits for the device."""
        loss, samples, grad_norm, skipped = reduce_sum(self._sums, self.world).tolist()
        reduce_sum(self.bins.totals, self.world)
        self.total_skipped += round(skipped / self.world.size)
        values = {
            "loss": loss / max(samples, 1),
            "grad_norm": grad_norm / max(self._updates * self.world.size, 1),
            "skipped": round(skipped / self.world.size),
            "samples": round(samples),
            "text_tokens": self._text_tokens / max(self._samples, 1),
            "loss_bins": self.bins.pop(),
        }
        self._sums.zero_()
        self._updates = self._text_tokens = self._samples = 0
        return values
