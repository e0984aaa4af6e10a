"""Position embeddings of patches: DINOv3's rotary tables, and learned positions resized to any grid.

Both are taken over exactly as the networks were trained; timm's own versions differ in the third decimal.
Shapes: h×w grid of patches, N = h·w, D channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoder.common.weights import Float32Buffers


class Rotary(Float32Buffers):
    """Axial rotary tables from stored periods, in fp32 whatever the precision of the model; replaces timm's.

    Angles are 2π·c/period with patch centres c mapped to [-1, 1] separately for rows and columns (Siméoni et al. 2025,
    arXiv:2508.10104). The periods are rounded to bfloat16, as in the released weights.
    """

    MAX_TABLES = 64

    def __init__(self, head_dim: int, base: float = 100.0) -> None:
        super().__init__()
        exponents = torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 4)
        self.register_buffer("periods", (base**exponents).bfloat16().float())
        self._tables: dict[tuple[int, int], Tensor] = {}

    def get_embed(self, shape: tuple[int, int]) -> Tensor:
        """sin and cos side by side for a grid of (h, w) patches: (N, 2·head_dim), fp32."""
        key = (int(shape[0]), int(shape[1]))
        if key not in self._tables:
            if len(self._tables) >= self.MAX_TABLES:
                self._tables.clear()
            rows, columns = (
                2 * ((torch.arange(n, device=self.periods.device, dtype=torch.float32) + 0.5) / n) - 1 for n in key
            )
            centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
            angles = (2 * math.pi * centres[:, :, None] / self.periods).flatten(1).tile(2)  # (N, head_dim)
            self._tables[key] = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (N, 2·head_dim)
        return self._tables[key]

    def _apply(self, fn: Any, recurse: bool = True) -> Rotary:
        self._tables.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._tables.clear()
        super()._load_from_state_dict(*args, **kwargs)


def resize_positions(positions: Tensor, grid: tuple[int, int], antialias: bool = False, offset: float = 0.0) -> Tensor:
    """Learned positions (1, S·S, D) of a square grid, bicubically resized to (1, h·w, D); fp32 inside.

    antialias: as DINOv2 with registers was trained (a low-pass filter, and Keys' a = -0.5 in place of -0.75).
    offset: DINOv2 without registers was trained with coordinates scaled by S/(h + 0.1) instead of S/h, once added
    against rounding (Oquab et al. 2023, arXiv:2304.07193, released code).
    """
    side = math.isqrt(positions.shape[1])
    if tuple(grid) == (side, side):
        return positions
    size, factors = (None, tuple((cells + offset) / side for cells in grid)) if offset else (tuple(grid), None)
    square = positions.float().unflatten(1, (side, side)).movedim(-1, 1)  # (1, D, S, S)
    resized = F.interpolate(square, size, factors, mode="bicubic", align_corners=False, antialias=antialias)
    return resized.flatten(2).mT.to(positions.dtype)  # (1, h·w, D)
