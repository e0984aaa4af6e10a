"""The sizes of an SVGDiT, and the table of named ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from autoencoder.common.config import UserError

Prediction = Literal["velocity", "data"]
AuxLoss = Literal["flow", "features"]


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of an SVGDiT; the field names are the published ones.

    axes_dims splits head_dim over (caption index, row, column); axes_lens bounds those positions, exclusively.
    prediction: what the last layer gives. velocity: data - noise (published). data: the clean latents, from which the
    model makes the velocity itself.
    aux_loss, aux_block: an auxiliary head behind the first `aux_block` layers, and what it gives: flow, the same as the
    last layer; features, the clean latents' directions, for `flow.paths.feature_loss`. None: no such head.
    guidance_embed: the guidance scale is an input, and the output is guided already (`training.distill`).
    """

    dim: int
    n_layers: int
    n_heads: int
    axes_dims: tuple[int, int, int]
    n_kv_heads: int | None = None
    n_refiner_layers: int = 2
    patch_size: int = 1
    in_channels: int = 384
    cap_feat_dim: int = 2304
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = True
    axes_lens: tuple[int, int, int] = (600, 512, 512)
    prediction: Prediction = "velocity"
    aux_loss: AuxLoss | None = None
    aux_block: int | None = None
    guidance_embed: bool = False

    def __post_init__(self) -> None:
        for name in ("axes_dims", "axes_lens"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != 3:
                raise UserError(f"DiTConfig.{name} needs 3 entries (caption, row, column), got {getattr(self, name)}")
        if self.prediction not in get_args(Prediction):
            raise UserError(f"DiTConfig.prediction = {self.prediction!r}: choose velocity or data")
        for name, value in vars(self).items():
            least = 0 if name == "n_refiner_layers" else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise UserError(f"DiTConfig.{name} must be at least {least}, got {value}")
        if self.aux_loss not in (None, *get_args(AuxLoss)):
            raise UserError(f"DiTConfig.aux_loss = {self.aux_loss!r}: choose {' or '.join(get_args(AuxLoss))}")
        behind = 0 if self.aux_block is None else self.aux_block
        if (behind > 0) != (self.aux_loss is not None) or behind >= self.n_layers:
            raise UserError(
                f"DiTConfig.aux_block = {self.aux_block}: give it with aux_loss, from 1 to n_layers - 1 = "
                f"{self.n_layers - 1}, or neither of them"
            )
        if self.dim % self.n_heads:
            raise UserError(f"DiTConfig: dim {self.dim} is not divisible by n_heads {self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise UserError(f"DiTConfig: n_heads {self.n_heads} is not divisible by n_kv_heads {self.kv_heads}")
        if sum(self.axes_dims) != self.head_dim or any(dim % 2 for dim in self.axes_dims):
            raise UserError(
                f"DiTConfig: axes_dims {self.axes_dims} must be even and sum to dim / n_heads = {self.head_dim}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields; peft before 0.18 asks a model's config for them."""
        return dict(vars(self))

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def modulation_dim(self) -> int:
        return min(self.dim, 1024)

    @property
    def ffn_dim(self) -> int:
        hidden = int(4 * self.dim * (self.ffn_dim_multiplier or 1.0))
        return math.ceil(hidden / self.multiple_of) * self.multiple_of


def _published(dim: int, n_layers: int, n_heads: int, axis: int, n_kv_heads: int = 8) -> DiTConfig:
    return DiTConfig(dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, axes_dims=(axis,) * 3)


PUBLISHED = "NextDiT_2B_GQA_patch1_Adaln_Refiner"  # the size of the released weights
MODELS: dict[str, DiTConfig] = {
    "NextDiT_08B_GQA_patch1_Adaln_Refiner": _published(1152, 28, 16, axis=24),
    PUBLISHED: _published(2304, 26, 24, axis=32),
    "NextDiT_3B_GQA_patch1_Adaln_Refiner": _published(2592, 30, 24, axis=36),
    "NextDiT_4B_GQA_patch1_Adaln_Refiner": _published(2880, 32, 24, axis=40),
    "NextDiT_7B_GQA_patch1_Adaln_Refiner": _published(3840, 32, 32, axis=40),
    # for tests: about 0.5 M parameters; for the quickstart: about 2 M
    "tiny": DiTConfig(dim=64, n_layers=3, n_heads=2, n_kv_heads=1, n_refiner_layers=1, axes_dims=(8, 12, 12)),
    "toy": DiTConfig(dim=128, n_layers=5, n_heads=4, n_kv_heads=2, n_refiner_layers=1, axes_dims=(8, 12, 12)),
}
