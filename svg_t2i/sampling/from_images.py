"""Sampling that starts from images: their preparation, and the steps that text to image does not have.

Images are PIL images, files, or tensors (3, H, W) in [0, 1]. Their sides are cropped to multiples of 16 pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from autoencoder.common.config import UserError
from autoencoder.images.files import (
    LATENT_PIXELS,
    ImageError,
    crop_square,
    crop_to_size,
    load_image,
    to_float,
    to_rgb,
    to_uint8_tensor,
)
from svg_t2i.sampling.denoising import Conditions
from svg_t2i.sampling.networks import Networks
from svg_t2i.sampling.options import SamplingOptions, check_side
from svg_t2i.sampling.steps import StepEnd, encode_images, solve

log = logging.getLogger(__name__)

ImageInput = Image.Image | str | Path | Tensor
EMBEDDING_SIZE, EMBEDDING_BATCH = 256, 16


@dataclass(frozen=True)
class Match:
    """An image file and its similarity to the query, a cosine in [-1, 1]."""

    path: Path
    similarity: float


def pair_with_prompts(
    prompt: str | Sequence[str],
    image: ImageInput | Sequence[ImageInput],
    height: int | None = None,
    width: int | None = None,
) -> tuple[list[str], list[Tensor]]:
    """Prompts, and as many prepared images. UserError unless there is one image, or one per prompt."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    images = [prepare_image(one, height, width) for one in as_list(image)]
    if len(images) == 1:
        images *= len(prompts)
    if len(images) != len(prompts):
        raise UserError(f"{len(images)} images for {len(prompts)} prompts; give one per prompt, or a single one")
    return prompts, images


def sample_on(
    networks: Networks,
    clean: Sequence[Tensor],
    noise: Sequence[Tensor],
    starts: Sequence[float],
    conditions: Conditions,
    options: SamplingOptions,
    on_step_end: StepEnd | None = None,
    progress_bar: Mapping[str, Any] | None = None,
    repaint: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Noise the latents `clean` (C, h, w) to their start times and solve from there.

    repaint: masks (h, w) of latent cells; where one is 0, the clean latents are kept.
    """
    solved = list(clean)
    for start in dict.fromkeys(starts):  # sizes with a dynamic time shift of their own start at their own times
        rows = [i for i, one in enumerate(starts) if one == start]
        x = [torch.lerp(noise[i], clean[i], start) for i in rows]
        inpainting: dict[str, Any] = {}
        if repaint is not None:
            inpainting = {"known": [clean[i] for i in rows], "repaint": [repaint[i] for i in rows]}
        ends = solve(
            networks, x, conditions.select(rows), options, on_step_end, progress_bar,
            start=start, rows=rows, **inpainting,
        )  # fmt: skip
        for i, end in zip(rows, ends, strict=True):
            solved[i] = end
    return solved


def embed_images(networks: Networks, images: Sequence[ImageInput]) -> Tensor:
    """Unit vectors (B, C) that are near for pictures of like things: normalised latents averaged over the cells."""
    latents = encode_images(networks, [prepare_image(image) for image in images])
    return F.normalize(torch.stack([x.mean(dim=(1, 2)) for x in latents]), dim=1)


def embed_files(networks: Networks, files: Sequence[Path]) -> Iterator[tuple[list[Path], Tensor]]:
    """Batches of readable files with their `embed_images`; unreadable ones are left out with a warning."""
    for begin in range(0, len(files), EMBEDDING_BATCH):
        readable = {}
        for path in files[begin : begin + EMBEDDING_BATCH]:
            try:
                readable[path] = crop_square(load_image(path), EMBEDDING_SIZE)
            except ImageError as error:
                log.warning("left out: %s", error)
        if readable:
            yield list(readable), embed_images(networks, list(readable.values()))


def nearest_images(networks: Networks, image: ImageInput, files: Sequence[Path], top_k: int) -> list[Match]:
    """The `top_k` files whose latents are most like the image's, best first. UserError if none is readable."""
    if top_k < 1:
        raise UserError(f"top_k = {top_k}: must be at least 1")
    query = embed_images(networks, [crop_square(to_rgb_image(image), EMBEDDING_SIZE)])
    batches = list(embed_files(networks, files))
    paths = [path for readable, _ in batches for path in readable]
    if not paths:
        raise UserError(f"not one readable image among {len(files)} files, the first of them {files[0]}")
    similarity = (torch.cat([vectors for _, vectors in batches]) @ query[0]).cpu()
    best = similarity.argsort(descending=True)[:top_k].tolist()
    return [Match(paths[i], float(similarity[i])) for i in best]


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """From `first` to `second` (C, h, w) along the great circle in every cell; lengths change linearly."""
    lengths = [x.norm(dim=0, keepdim=True).clamp_min(1e-12) for x in (first, second)]
    a, b = first / lengths[0], second / lengths[1]
    angle = (a * b).sum(dim=0, keepdim=True).clamp(-1, 1).acos()
    straight = angle.sin() < 1e-4  # (nearly) parallel or opposite: there the circle is undefined
    divisor = angle.sin().masked_fill(straight, 1.0)
    left = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / divisor)
    right = torch.where(straight, share, (share * angle).sin() / divisor)
    return (left * a + right * b) * torch.lerp(*lengths, share)


def prepare_image(image: ImageInput, height: int | None = None, width: int | None = None) -> Tensor:
    """(3, H, W) in [-1, 1], cropped in the middle to the size given, or else to the multiples of 16 below its own."""
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise UserError(f"image tensors are float (3, H, W) in [0, 1], got {tuple(image.shape)} {image.dtype}")
        check_side("image height", image.shape[1])
        check_side("image width", image.shape[2])
        if image.min() < 0 or image.max() > 1:
            raise UserError(f"image tensors lie in [0, 1]; got values from {image.min():.3g} to {image.max():.3g}")
        return 2 * image.float() - 1
    return to_float(to_uint8_tensor(crop_image(image, height, width)))


def crop_image(image: Image.Image | str | Path, height: int | None = None, width: int | None = None) -> Image.Image:
    """An image or file scaled and cropped in the middle to the size given, or cropped to multiples of 16 below its own.

    Raises:
        UserError: unreadable, or smaller than 16 pixels.
    """
    picture = to_rgb_image(image)
    size = [given or own // LATENT_PIXELS * LATENT_PIXELS for given, own in zip((width, height), picture.size)]
    for name, side in zip(("image width", "image height"), size):
        check_side(name, side)
    return crop_to_size(picture, tuple(size))


def prepare_mask(mask: ImageInput, size: tuple[int, int]) -> Tensor:
    """Latent cells (h, w) to repaint, 1 or 0, from a mask image or a tensor of cells; UserError if there are none."""
    h, w = size
    if isinstance(mask, Tensor):
        if mask.shape != (h, w):
            raise UserError(f"mask of {tuple(mask.shape)} cells: the image has {h}×{w} (height/16 × width/16)")
        cells = (mask != 0).float()
    else:
        picture = mask if isinstance(mask, Image.Image) else load_image(mask)
        white = crop_to_size(picture.convert("L").convert("RGB"), (w * LATENT_PIXELS, h * LATENT_PIXELS))
        pixels = (to_uint8_tensor(white)[:1] > 127).float()  # (1, H, W)
        cells = F.max_pool2d(pixels, LATENT_PIXELS)[0]  # (h, w)
    if not cells.any():
        raise UserError("the mask is black everywhere: nothing to repaint; white marks what to repaint")
    return cells


def to_rgb_image(image: ImageInput) -> Image.Image:
    """A PIL image or file as RGB, upright. UserError for tensors, which have no size to be changed to."""
    if isinstance(image, Tensor):
        raise UserError("an image tensor cannot be resized here; give a PIL image or a file")
    return to_rgb(image, turn=True) if isinstance(image, Image.Image) else load_image(image)


def as_list(image: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """One image or several, also as a tensor (B, 3, H, W), as a list."""
    if isinstance(image, Tensor) and image.ndim == 4:
        return list(image)
    return list(image) if isinstance(image, (list, tuple)) else [image]


def interpolation_ends(
    prompt: str | Sequence[str], image: Sequence[ImageInput] | None, t: float
) -> tuple[str, str | None]:
    """First prompt, and second one or None. UserError where there is nothing to go between, or t is not in [0, 1]."""
    prompts = [prompt, None] if isinstance(prompt, str) else list(prompt)
    if len(prompts) != 2 or (image is not None and len(image) != 2):
        raise UserError("interpolate wants two prompts (or one for all) and two images (or none)")
    if image is None and isinstance(prompt, str):
        raise UserError("interpolate has nothing to go between: give two prompts, or two images")
    if not 0 <= t <= 1:
        raise UserError(f"t = {t}: must lie in [0, 1]; 0 is noise, 1 the mixed image itself")
    return prompts[0], prompts[1]


def interpolation_weights(weights: int | Sequence[float]) -> list[float]:
    """Weights of the second end: those given, or `weights` of them evenly from 0 to 1. UserError outside [0, 1]."""
    if isinstance(weights, int):
        if weights < 2:
            raise UserError(f"weights = {weights}: at least 2 images make a way between two ends")
        return [i / (weights - 1) for i in range(weights)]
    shares = [float(share) for share in weights]
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise UserError(f"weights = {list(weights)}: numbers in [0, 1], 0 for the first end")
    return shares
