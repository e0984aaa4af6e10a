"""The `hyconfig` decoder: latents (B, z, h, w) → images (B, 3, 16h, 16w), loading 3-D weights into a 2-D network.

The published decoder is that of a video autoencoder, run on one frame. There a 3-D kernel with zero padding in time
meets data in its middle slice only, so the 2-D network with that slice is exact, at a third of the work. State dicts
keep the published 3-D shapes: `from_published` takes the middle slice, `to_published` puts it between zeros.
Differences from ConvDecoder:

* levels run from the coarsest, which is level 0; attention is in the middle only;
* upsampling trades channels for pixels, and `conv_in` and every upsampling have a shortcut of repeated channels;
* where z does not divide the first width, the first shortcut repeats the last 8 latent channels only.

Shapes: B batch, z latent channels, C channels, h×w latent cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.common.config import UserError
from autoencoder.decoders.convolutional import GROUPS, Decoder, Level, Middle

SHORTCUT_CHANNELS = 8  # the residual branch's, at the end of the latent


@dataclass(frozen=True)
class HyDecoderConfig:
    """`hyconfig` of the published YAML files. `ffactor_*`: upsampling factors in space and time (only 1: images)."""

    block_out_channels: tuple[int, ...] = (768, 384, 192, 192, 96)  # coarsest level first
    out_channels: int = 3
    z_channels: int = 392
    num_res_blocks: int = 2
    ffactor_spatial: int = 16
    ffactor_temporal: int = 1
    upsample_match_channel: bool = True  # upsampling changes to the next level's width, not its first block

    def __post_init__(self) -> None:
        widths = tuple(self.block_out_channels)
        if not widths or any(width < 1 or width % GROUPS for width in widths):
            raise UserError(
                f"block_out_channels = {widths}: every width must be a positive multiple of {GROUPS} (the GroupNorm "
                "groups); published: [768, 384, 192, 192, 96]"
            )
        if self.ffactor_temporal != 1:
            raise UserError(f"ffactor_temporal = {self.ffactor_temporal}: this decoder is for images, set it to 1")
        if self.ffactor_spatial != 2 ** (len(widths) - 1):
            raise UserError(
                f"ffactor_spatial = {self.ffactor_spatial} does not fit the {len(widths)} block_out_channels: each but "
                f"the last doubles the sides, which makes {2 ** (len(widths) - 1)}"
            )
        if min(self.z_channels, self.out_channels) < 1 or self.num_res_blocks < 0:
            raise UserError(
                f"z_channels = {self.z_channels} and out_channels = {self.out_channels} must be at least 1, "
                f"num_res_blocks = {self.num_res_blocks} at least 0"
            )
        if widths[0] % self.z_channels and self.z_channels < SHORTCUT_CHANNELS:
            raise UserError(
                f"z_channels = {self.z_channels} must divide block_out_channels[0] = {widths[0]} or be at least "
                f"{SHORTCUT_CHANNELS}: the first shortcut repeats latent channels"
            )
        outs = self.upsampled_widths()
        if any(4 * out % width for width, out in zip(widths, outs)):
            raise UserError(
                f"block_out_channels = {widths}: the shortcuts of the upsampling repeat channels, so each width must "
                "divide 4 times the next one"
            )

    def upsampled_widths(self) -> tuple[int, ...]:
        """Width after the upsampling of each level but the last."""
        widths = self.block_out_channels
        return tuple(widths[1:] if self.upsample_match_channel else widths[:-1])


def pixel_shuffle(x: Tensor) -> Tensor:
    """(B, 4C, h, w) → (B, C, 2h, 2w); channels are ordered (row offset, column offset, C), unlike torch's."""
    return F.pixel_shuffle(x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2)


class ShuffleUpsample(nn.Module):
    """×2: a 3×3 convolution to 4 sub-pixels, plus the input with its channels repeated to as many."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * out_channels, 3, padding=1)
        self.repeats = 4 * out_channels // channels

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle(self.conv(x) + x.repeat_interleave(self.repeats, dim=1))


class HyDecoder(Decoder):
    """The decoder of `hyconfig`."""

    def __init__(self, config: HyDecoderConfig) -> None:
        super().__init__()
        self.config = config
        widths, upsampled = tuple(config.block_out_channels), config.upsampled_widths()
        upsamples = [*(partial(ShuffleUpsample, out_channels=width) for width in upsampled), nn.Identity]
        self.scale = config.ffactor_spatial
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = Middle(widths[0], dropout=0.0)
        self.up = nn.ModuleList(
            Level(channels, width, config.num_res_blocks + 1, upsample)
            for channels, width, upsample in zip((widths[0], *upsampled), widths, upsamples)
        )
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)
        self.register_state_dict_post_hook(_emit_published)
        self.register_load_state_dict_pre_hook(_accept_published)

    def stem(self, latents: Tensor) -> Tensor:
        # The shortcut: latent channels, each repeated in place; all if that comes out even, else the last 8.
        width, z = self.conv_in.out_channels, self.conv_in.in_channels
        kept = latents if width % z == 0 else latents[:, -SHORTCUT_CHANNELS:]
        return self.conv_in(latents) + kept.repeat_interleave(width // kept.shape[1], dim=1)


# ---- weights: 3-D kernels of the published checkpoints ↔ 2-D ones --------------------------------------------------


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """3-D kernels (O, I, t, k, k) → their middle slices (O, I, k, k); everything else as it is."""
    return {name: x[:, :, x.shape[2] // 2] if x.ndim == 5 else x for name, x in state.items()}


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """2-D kernels (O, I, k, k) → 3-D ones (O, I, k, k, k) that are zero but for the middle slice."""
    return {name: _inflate(x) if x.ndim == 4 else x for name, x in state.items()}


def _inflate(kernel: Tensor) -> Tensor:
    margin = kernel.shape[2] // 2
    return F.pad(kernel.unsqueeze(2), (0, 0, 0, 0, margin, margin))


def _emit_published(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    state.update(to_published({name: tensor for name, tensor in state.items() if name.startswith(prefix)}))


def _accept_published(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    state.update(from_published({name: tensor for name, tensor in state.items() if name.startswith(prefix)}))
