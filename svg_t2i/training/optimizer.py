"""AdamW, learning-rate schedules, exponential moving average, and the guard against bad gradients.

Everything here works on whole weights and on this rank's share of sharded ones alike, and never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from svg_t2i.training.settings import OptimConfig

NORM_MEMORY = 0.02  # weight of the newest gradient norm in the running mean


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


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """Rate of the update after `step` updates, of `max_steps` in all (see `OptimConfig`)."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    decay_steps = max_steps - optim.warmup_steps if optim.schedule == "cosine" else optim.decay_steps
    if optim.schedule == "constant" or step < max_steps - decay_steps:
        return optim.lr
    done = min(1.0, (step - (max_steps - decay_steps)) / decay_steps)  # 0 at the start of the descent
    left = (1 + math.cos(math.pi * done)) / 2 if optim.schedule == "cosine" else 1 - done
    return optim.final_lr + (optim.lr - optim.final_lr) * left


def ema_decay(step: int, decay: float, warmup: bool) -> float:
    """Decay of the average in the update after `step` updates."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


def ema_update(ema: Sequence[Tensor], weights: Sequence[Tensor], decay: float, skipped: Tensor | None = None) -> None:
    """ema ← decay · ema + (1 − decay) · weights, in place; nothing happens where `skipped` () is 1."""
    if skipped is None:
        torch._foreach_lerp_(list(ema), list(weights), 1 - decay)
    else:
        torch._foreach_lerp_(list(ema), list(weights), [(1 - decay) * (1 - skipped)] * len(ema))


class UpdateGuard:
    """Decides on the device, alike on all ranks, which updates to skip: those whose gradient norm is not finite and,
    with a `spike_factor`, those where it exceeds so many times its running mean.

    A spike enters the mean at the limit, so that norms which stay high are accepted before long.
    """

    def __init__(self, spike_factor: float | None, device: torch.device):
        self.spike_factor = spike_factor
        self.mean_norm = torch.zeros((), device=device)  # 0: none seen yet

    def skip(self, norm: Tensor) -> Tensor:
        """Whether to skip the update with this gradient norm: fp32 0 or 1, ()."""
        finite = norm.isfinite()
        if self.spike_factor is None:
            return finite.logical_not().float()
        seen = self.mean_norm > 0
        limit = torch.where(seen, self.spike_factor * self.mean_norm, torch.inf)
        newest = torch.where(finite, norm.clamp(max=limit), self.mean_norm)
        self.mean_norm.copy_(torch.where(seen, self.mean_norm.lerp(newest, NORM_MEMORY), newest))
        return (finite & (norm <= limit)).logical_not().float()
