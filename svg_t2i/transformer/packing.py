"""Packed caption features, and index tables of a packed batch: where each caption's and each latent's tokens are.

Everything is computed on the host from sizes and lengths, which travel with the batch as integers; the device is never
read. Inside a packed batch the samples are sorted by length; callers never see that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from autoencoder.common.config import UserError
from svg_t2i.transformer.attention import Segments

ROPE_THETA = 10000.0
AXES = ("caption", "row", "column")

Sizes = tuple[tuple[int, int], ...]  # (height, width) of each latent


@dataclass(frozen=True)
class TextFeatures:
    """Caption features of B samples, packed: features (sum of lengths, cap_feat_dim), lengths as host integers."""

    features: Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextFeatures:
        return replace(self, features=self.features.to(device=device, dtype=dtype, non_blocking=True))

    def select(self, indices: Sequence[int]) -> TextFeatures:
        """The samples `indices` (host integers; repeats allowed), in that order."""
        parts, lengths = self.features.split(self.lengths), tuple(self.lengths[i] for i in indices)
        return replace(self, features=torch.cat([parts[i] for i in indices]), lengths=lengths)

    @staticmethod
    def cat(texts: Sequence[TextFeatures]) -> TextFeatures:
        """All samples, one behind the other; features of one kind only."""
        lengths = tuple(length for text in texts for length in text.lengths)
        return replace(texts[0], features=torch.cat([text.features for text in texts]), lengths=lengths)

    @staticmethod
    def from_padded(features: Tensor, mask: Tensor) -> TextFeatures:
        """features (B, L, cap_feat_dim), mask (B, L) nonzero at real tokens. Reads the mask back: not for hot paths."""
        mask = mask.bool()
        return TextFeatures(features[mask.to(features.device)], tuple(mask.sum(dim=1).tolist()))


@dataclass(frozen=True)
class RefinedText(TextFeatures):
    """Captions behind the DiT's context refiner (`SVGDiT.refine`): (sum of lengths, dim). The same at any time."""


@dataclass(frozen=True)
class Packing:
    """Index tables of a batch, all on its device.

    Entry order: the caption tokens of all samples, then the image tokens of all samples.
    Joint order: for each sample its caption tokens, then its image tokens.
    """

    captions: Segments
    images: Segments
    joint: Segments
    caption_index: Tensor  # (T_captions,) caption tokens as given -> entry order
    image_index: Tensor  # (T_images,) image tokens as given -> entry order
    joint_index: Tensor  # (T,) entry order -> joint order
    output_index: Tensor  # (T_images,) joint order -> image tokens as given
    output_owner: Tensor  # (T_images,) sample of each image token as given
    caption_rope: Tensor  # (T_captions, 1, head_dim / 2, 2) float32: cosine and sine of the rotary angles
    image_rope: Tensor  # likewise (T_images, …)
    joint_rope: Tensor  # likewise (T, …)


@lru_cache(maxsize=16)
@torch.compiler.disable
def plan_packing(
    sizes: Sizes,
    lengths: tuple[int, ...],
    patch_size: int,
    axes_dims: tuple[int, int, int],
    axes_lens: tuple[int, int, int],
    device: torch.device,
) -> Packing:
    """The index tables for latents of `sizes` with captions of `lengths` tokens; kept for repeated shapes.

    Raises UserError where a position exceeds axes_lens. Copies to the device once, without synchronising.
    """
    grids = np.array(sizes, dtype=np.int64) // patch_size  # (B, 2) rows, columns
    caption, image = np.array(lengths, dtype=np.int64), grids.prod(axis=1)
    _check_positions(grids, caption, axes_lens)
    tables = _index_tables(grids, caption, image)
    order = tables.pop("order")
    with torch.inference_mode(False):  # a cached inference tensor could not be used in training later
        at = _to_device(tables, device)
        angles = zip(_rope_tables(axes_dims, axes_lens, device), AXES, strict=True)
        rope = torch.cat([table[at[axis]] for table, axis in angles], dim=1)[:, None]  # (T, 1, head_dim / 2, 2)
        caption_tokens = int(caption.sum())
        return Packing(
            captions=Segments.build(caption[order], at["caption_offsets"], at["caption_owner"]),
            images=Segments.build(image[order], at["image_offsets"], at["image_owner"]),
            joint=Segments.build((caption + image)[order], at["joint_offsets"], at["joint_owner"]),
            **{name: at[name] for name in ("caption_index", "image_index", "joint_index")},
            **{name: at[name] for name in ("output_index", "output_owner")},
            caption_rope=rope[:caption_tokens].clone(),
            image_rope=rope[caption_tokens:].clone(),
            joint_rope=rope[at["joint_index"]],
        )


def _check_positions(grids: np.ndarray, caption: np.ndarray, axes_lens: tuple[int, int, int]) -> None:
    if caption.min() < 1:
        raise UserError(f"caption {int(caption.argmin())} has no tokens; even an empty caption needs one")
    used = (int(caption.max()) + 1, int(grids[:, 0].max()), int(grids[:, 1].max()))  # the image sits behind its caption
    for axis, count, limit in zip(AXES, used, axes_lens, strict=True):
        if count > limit:
            raise UserError(f"{count} {axis} positions needed, but the model's axes_lens {axes_lens} has {limit}")


def _index_tables(grids: np.ndarray, caption: np.ndarray, image: np.ndarray) -> dict[str, np.ndarray]:
    """The tables of `Packing` and the positions of all tokens in entry order, from (B, 2) grids and (B,) lengths."""
    batch = np.arange(len(caption))
    order = np.lexsort((caption, caption + image))  # by length: equal lengths become neighbours, see Segments
    captions, images = caption[order], image[order]
    joint_offsets = _offsets(captions + images)
    caption_rows = _ranges(joint_offsets[:-1], captions)  # where the tokens in entry order lie in the joint order
    image_rows = _ranges(joint_offsets[:-1] + captions, images)
    image_index = _ranges(_offsets(image)[order], images)
    row, column = np.divmod(_ranges(0 * images, images), np.repeat(grids[order, 1], images))
    nowhere = np.zeros(captions.sum(), dtype=np.int64)
    return {
        "order": order,
        "caption_offsets": _offsets(captions),
        "image_offsets": _offsets(images),
        "joint_offsets": joint_offsets,
        "caption_owner": np.repeat(order, captions),
        "image_owner": np.repeat(order, images),
        "joint_owner": np.repeat(order, captions + images),
        "output_owner": np.repeat(batch, image),
        "caption_index": _ranges(_offsets(caption)[order], captions),
        "image_index": image_index,
        "joint_index": np.argsort(np.concatenate([caption_rows, image_rows])),
        "output_index": image_rows[np.argsort(image_index)],
        "caption": np.concatenate([_ranges(0 * captions, captions), np.repeat(captions, images)]),
        "row": np.concatenate([nowhere, row]),
        "column": np.concatenate([nowhere, column]),
    }


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """0, l₀, l₀ + l₁, …: one entry more than lengths."""
    return np.concatenate([[0], np.cumsum(lengths)])


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, …, start + length - 1 for each pair, one behind the other."""
    return np.repeat(starts[: len(lengths)] - _offsets(lengths)[:-1], lengths) + np.arange(lengths.sum())


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, for which the host does not wait: to a GPU it goes from pinned memory."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _to_device(tables: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """All tables as int32, over in one copy."""
    buffer = torch.from_numpy(np.concatenate(list(tables.values())).astype(np.int32))
    parts = upload(buffer, device).split([len(table) for table in tables.values()])
    return {name: part.clone() for name, part in zip(tables, parts, strict=True)}  # compiled code wants aligned storage


@lru_cache(maxsize=8)
def _rope_tables(dims: tuple[int, ...], lens: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Per axis the cosine and sine of position · θ^(-2i/d), (positions, d/2, 2); angles in float64."""
    tables = []
    for dim, length in zip(dims, lens, strict=True):
        frequencies = ROPE_THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.arange(length, dtype=torch.float64).outer(frequencies)
        tables.append(upload(torch.stack((angles.cos(), angles.sin()), dim=-1).float(), device))
    return tables
