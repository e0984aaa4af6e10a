"""Learned mixed rotary positions (arXiv:2403.13298) of the residual branch's vit-rope-s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import RotaryEmbeddingMixed
from torch import Tensor


class MixedRotary(RotaryEmbeddingMixed):
    """timm's learned rotary frequencies (2, depth, heads, head_dim/2), with angles in fp32 under any precision."""

    def __init__(self, *args: Any, square: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.square = square  # side of the published grid in patches

    def get_embed(self, shape: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
        """sin and cos side by side for a grid of (h, w) patches: (depth, heads, N, 2·head_dim), fp32."""
        h, w = shape
        if self.square is not None and h * w == self.square**2:
            h = w = self.square
        rows, columns = (torch.arange(n, device=self.freqs.device, dtype=torch.float32) for n in (h, w))
        y, x = (axis.flatten()[:, None] for axis in torch.meshgrid(rows, columns, indexing="ij"))  # (N, 1)
        f_x, f_y = self.freqs.unsqueeze(-2)  # (depth, heads, 1, head_dim/2)
        angles = x * f_x + y * f_y  # (depth, heads, N, head_dim/2); products, not matmuls: autocast leaves them alone
        return torch.cat([table.repeat_interleave(2, dim=-1) for table in (angles.sin(), angles.cos())], dim=-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> MixedRotary:
        """Follow the model's device, not its precision."""
        before = self.freqs.data
        super()._apply(fn, *args, **kwargs)
        if self.freqs.dtype != torch.float32:
            self.freqs.data = before.to(self.freqs.device)
        return self
