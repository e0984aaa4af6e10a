"""Decoding large images in little memory, and exactly: stripe by stripe, with the whole image's statistics.

Tiles that are blended would each see their own statistics in every GroupNorm, and their own surroundings in every
attention block. Here each layer runs over the whole image before the next one starts, and only its temporaries are
small: a 3×3 convolution reads a stripe of rows and one row on either side, a GroupNorm is applied with the mean and
deviation collected over all stripes beforehand, attention takes its queries in portions. The result is the plain one
up to rounding.

What has to be in memory at once is the input and the output of one residual block. At 4096×4096 and the published
width of 128 that is 2 · 128 · 4096² · 4 bytes = 17.2 GB in fp32 (plainly 43 GB), half of it in bf16.

Shapes: B batch, C channels, H×W rows and columns of a feature map, N = H·W, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.decoders.convolutional import AttentionBlock, Decoder, ResidualBlock, Upsample
from autoencoder.decoders.hy import ShuffleUpsample, pixel_shuffle

STRIPE_BYTES = 2**27  # of a stripe of a feature map; a few of them exist at a time
PLAIN_PIXELS = 2**22  # images (all of a batch together) of up to 2048×2048 are decoded plainly: 11 GB in fp32


@torch.no_grad()
def decode(decoder: Decoder, latents: Tensor) -> Tensor:
    """What `decoder(latents)` gives; images beyond `PLAIN_PIXELS` one by one and in stripes. No gradients.

    latents (B, z, h, w), in the decoder's dtype → images (B, 3, 16h, 16w).
    """
    b, _, h, w = latents.shape
    if b * h * w * decoder.scale**2 <= PLAIN_PIXELS:
        return decoder(latents)
    return torch.cat([decode_in_stripes(decoder, one) for one in latents.split(1)])


@torch.no_grad()
def decode_in_stripes(decoder: Decoder, latents: Tensor, stripe_bytes: int = STRIPE_BYTES) -> Tensor:
    """What `decoder(latents)` gives in eval mode, up to rounding, with `stripe_bytes` per temporary. No gradients."""
    x = decoder.stem(latents)  # (B, C, h, w)
    for layer in _layers(decoder):
        x = _STRIPED[type(layer)](layer, x, stripe_bytes)
    activation = _normalization(decoder.norm_out, x, stripe_bytes)
    return _assembled(_convolved(decoder.conv_out, x, activation, stripe_bytes), x)


def _layers(decoder: Decoder) -> Iterator[nn.Module]:
    """All between the stem and `norm_out`, in the order of the computation."""
    yield from (decoder.mid.block_1, decoder.mid.attn_1, decoder.mid.block_2)
    for level in decoder.levels():
        for index, block in enumerate(level.block):
            yield block
            if level.attn:
                yield level.attn[index]
        yield level.upsample


# ---- layers: each takes (layer, x, stripe_bytes) -------------------------------------------------------------------


def _residual(block: ResidualBlock, x: Tensor, stripe_bytes: int) -> Tensor:
    first = _normalization(block.norm1, x, stripe_bytes)
    hidden = _assembled(_convolved(block.conv1, x, first, stripe_bytes), x)
    second = _normalization(block.norm2, hidden, stripe_bytes)
    for rows, values in _convolved(block.conv2, hidden, second, stripe_bytes):
        hidden[:, :, rows] = values + block.nin_shortcut(x[:, :, rows])  # in place: a third map would not fit
    return hidden


def _attention(block: AttentionBlock, x: Tensor, stripe_bytes: int) -> Tensor:
    normed = block.norm(x)
    q, k, v = (layer(normed).flatten(2).mT.unsqueeze(1) for layer in (block.q, block.k, block.v))  # (B, 1, N, C)
    portion = max(1, stripe_bytes // (4 * q.shape[0] * q.shape[2]))  # rows of scores that fit, should SDPA keep them
    mixed = torch.cat([F.scaled_dot_product_attention(queries, k, v) for queries in q.split(portion, dim=2)], dim=2)
    return x + block.proj_out(mixed.squeeze(1).mT.unflatten(2, x.shape[2:]))  # (B, C, H, W)


def _upsample(layer: Upsample, x: Tensor, stripe_bytes: int) -> Tensor:
    doubled = partial(F.interpolate, scale_factor=2.0, mode="nearest")
    return _assembled(_convolved(layer.conv, x, doubled, stripe_bytes // 4, stretch=2), x, stretch=2)


def _shuffle_upsample(layer: ShuffleUpsample, x: Tensor, stripe_bytes: int) -> Tensor:
    def stripes() -> Iterator[tuple[slice, Tensor]]:
        for rows, values in _convolved(layer.conv, x, lambda window: window, stripe_bytes // 4):
            shortcut = x[:, :, rows].repeat_interleave(layer.repeats, dim=1)
            yield slice(2 * rows.start, 2 * rows.stop), pixel_shuffle(values + shortcut)

    return _assembled(stripes(), x, stretch=2)


_STRIPED: dict[type[nn.Module], Callable[..., Tensor]] = {
    ResidualBlock: _residual,
    AttentionBlock: _attention,
    Upsample: _upsample,
    ShuffleUpsample: _shuffle_upsample,
    nn.Identity: lambda layer, x, stripe_bytes: x,
}


# ---- stripes -------------------------------------------------------------------------------------------------------


def _stripes(x: Tensor, stripe_bytes: int) -> list[tuple[int, int]]:
    """First row and end of each stripe of x (B, C, H, W)."""
    height = x.shape[2]
    rows = max(1, stripe_bytes // max(1, x[:, :, :1].nbytes))
    return [(start, min(start + rows, height)) for start in range(0, height, rows)]


def _convolved(
    conv: nn.Conv2d, x: Tensor, prepare: Callable[[Tensor], Tensor], stripe_bytes: int, stretch: int = 1
) -> Iterator[tuple[slice, Tensor]]:
    """3×3 convolution of prepare(x), zero-padded, as (rows, their values) from the top.

    `prepare` works on any window of rows and makes `stretch` of each. Rows that were given out are not read again: the
    caller may overwrite them in x.
    """
    height, above = x.shape[2], x[:, :, :0]
    for start, stop in _stripes(x, stripe_bytes):
        window = torch.cat([above, x[:, :, start : min(stop + 1, height)]], dim=2)
        above = x[:, :, stop - 1 : stop].clone()
        top = 1 if start == 0 else 1 - stretch  # a row of zeros at the edge; else the neighbour's rows but one are cut
        bottom = 1 if stop == height else 1 - stretch
        window = F.pad(prepare(window), (0, 0, top, bottom))
        yield slice(start * stretch, stop * stretch), F.conv2d(window, conv.weight, conv.bias, padding=(0, 1))


def _assembled(stripes: Iterator[tuple[slice, Tensor]], x: Tensor, stretch: int = 1) -> Tensor:
    """The stripes in one tensor with `stretch` times the rows and columns of x."""
    out = None
    for rows, values in stripes:
        if out is None:
            shape = (*values.shape[:2], x.shape[2] * stretch, values.shape[3])
            out = torch.empty(shape, dtype=values.dtype, device=x.device, memory_format=torch.channels_last)
        out[:, :, rows] = values
    return out


def _normalization(norm: nn.GroupNorm, x: Tensor, stripe_bytes: int) -> Callable[[Tensor], Tensor]:
    """SiLU of the GroupNorm with the statistics of all of x, as a function of any rows of it."""
    groups, height = norm.num_groups, x.shape[2]
    mean = square = torch.zeros((), dtype=torch.float64, device=x.device)
    for start, stop in _stripes(x, stripe_bytes):
        values = x[:, :, start:stop].unflatten(1, (groups, -1)).float()  # (B, G, C/G, rows, W)
        stripe_var, stripe_mean = torch.var_mean(values, dim=(2, 3, 4), correction=0)  # (B, G)
        share, stripe_mean = (stop - start) / height, stripe_mean.double()
        mean = mean + share * stripe_mean
        square = square + share * (stripe_var.double() + stripe_mean.square())
    deviation = (square - mean.square()).clamp_min(0).add(norm.eps).sqrt()  # (B, G); fp64, so nothing cancels
    scale = norm.weight.double().unflatten(0, (groups, -1)) / deviation[:, :, None]  # (B, G, C/G)
    shift = norm.bias.double().unflatten(0, (groups, -1)) - mean[:, :, None] * scale
    scale, shift = (value.flatten(1)[:, :, None, None].float() for value in (scale, shift))  # (B, C, 1, 1)
    return lambda rows: F.silu(torch.addcmul(shift, rows, scale).to(rows.dtype), inplace=True)
