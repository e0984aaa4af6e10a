"""The convolutional decoder: latents (B, z, h, w) → images (B, 3, 16h, 16w) in [-1, 1].

The decoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, appendix E) on the features of a vision
foundation model. Module names are those of the published checkpoints. Two surprises:

* level 0 is the *finest* one, and the levels run from the coarsest down;
* self-attention follows every residual block of the coarsest level, although the published files are named "woattn"
  and their `attn_resolutions` is empty.

Shapes: B batch, z latent channels, C channels, h×w latent cells, N = h·w.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.common.config import UserError

GROUPS = 32  # of every GroupNorm


@dataclass(frozen=True)
class DecoderConfig:
    """`ddconfig` of the published YAML files; the last four fields are accepted and change nothing here."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # finest level first
    num_res_blocks: int = 2
    z_channels: int = 384
    out_ch: int = 3
    dropout: float = 0.0
    double_z: bool = True
    resolution: int = 256
    in_channels: int = 3
    attn_resolutions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.ch_mult or any(self.ch * m % GROUPS or m < 1 for m in self.ch_mult) or self.ch < 1:
            raise UserError(
                f"ddconfig: ch={self.ch} with ch_mult={tuple(self.ch_mult)}: every level's width ch·ch_mult must be a "
                f"positive multiple of {GROUPS} (the GroupNorm groups); for example ch: 128, ch_mult: [1, 1, 2, 2, 4]"
            )
        if min(self.z_channels, self.out_ch) < 1 or self.num_res_blocks < 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"ddconfig: z_channels={self.z_channels} and out_ch={self.out_ch} must be at least 1, "
                f"num_res_blocks={self.num_res_blocks} at least 0 and dropout={self.dropout} in [0, 1)"
            )


class ResidualBlock(nn.Module):
    """x + conv(drop(silu(norm(conv(silu(norm(x))))))); a 1×1 shortcut where the width changes."""

    def __init__(self, channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        return hidden + self.nin_shortcut(x)


class AttentionBlock(nn.Module):
    """x + proj(softmax(q·k/√C)·v) with one head over all h·w positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).mT.unsqueeze(1) for layer in (self.q, self.k, self.v))  # (B, 1, N, C)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, 1, N, C)
        return x + self.proj_out(mixed.squeeze(1).mT.unflatten(2, x.shape[2:]))  # (B, C, h, w)


class Upsample(nn.Module):
    """Nearest ×2, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, dropout)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention if `attention`, then `upsample` of their width."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        num_blocks: int,
        upsample: Callable[[int], nn.Module],
        dropout: float = 0.0,
        attention: bool = False,
    ) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * (num_blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(width, out_channels, dropout) for width in widths)
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in widths if attention)
        self.upsample = upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return self.upsample(x)


class Decoder(nn.Module):
    """Raw latents (B, z, h, w) → images (B, out_ch, s·h, s·w), s = `scale` = 16; the last layer is not clipped.

    The skeleton of both published decoders, which set `conv_in`, `mid`, `up`, `norm_out`, `conv_out`.
    Weights are kept channels-last, which the convolutions of CPUs and tensor cores prefer; state dicts are unaffected.
    """

    scale: int

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight at which the adaptive loss weight compares gradients (out_ch, ch, 3, 3)."""
        return self.conv_out.weight

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.stem(latents))  # (B, C, h, w)
        for level in self.levels():
            x = level(x)  # ×2 after each level but the finest
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, out_ch, 16h, 16w)

    def stem(self, latents: Tensor) -> Tensor:
        """What comes before the middle: (B, z, h, w) → (B, C, h, w)."""
        return self.conv_in(latents)

    def levels(self) -> Iterator[Level]:
        """From the coarsest, as they are computed."""
        return iter(self.up)


class ConvDecoder(Decoder):
    """The latent-diffusion decoder of `ddconfig`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.ch * mult for mult in config.ch_mult]
        coarsest = len(widths) - 1
        self.scale = 2**coarsest
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.dropout)
        self.up = nn.ModuleList(
            Level(
                channels=widths[min(level + 1, coarsest)],
                out_channels=width,
                num_blocks=config.num_res_blocks + 1,
                dropout=config.dropout,
                attention=level == coarsest,
                upsample=Upsample if level > 0 else nn.Identity,
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(GROUPS, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    def levels(self) -> Iterator[Level]:
        return reversed(self.up)
