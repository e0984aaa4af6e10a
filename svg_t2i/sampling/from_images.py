"""Sampling that starts from images: the steps that text to image does not have."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder.common.config import UserError
from autoencoder.images.files import ImageError, crop_square, load_image
from svg_t2i.sampling.conditioning import as_prompts
from svg_t2i.sampling.denoising import Conditions
from svg_t2i.sampling.inputs import ImageInput, as_list, prepare_image, to_rgb_image
from svg_t2i.sampling.networks import Networks
from svg_t2i.sampling.options import SamplingOptions
from svg_t2i.sampling.steps import Running, encode_images, solve

log = logging.getLogger(__name__)

EMBEDDING_SIZE, EMBEDDING_BATCH = 256, 16


@dataclass(frozen=True)
class Match:
    """An image file and its similarity to the query, a cosine in [-1, 1]."""

    path: Path
    similarity: float


def check_start(start: float, strength: float | None) -> None:
    """UserError for a time outside [0, 1), or a strength outside (0, 1]."""
    if not 0 <= start < 1:
        raise UserError(f"t = {start}: must lie in [0, 1); 0 is noise, 1 the image itself")
    if strength is not None and not 0 < strength <= 1:
        raise UserError(f"strength = {strength}: must be above 0 and at most 1")


def pair_with_prompts(
    prompt: str | Sequence[str],
    image: ImageInput | Sequence[ImageInput],
    height: int | None = None,
    width: int | None = None,
) -> tuple[list[str], list[Tensor]]:
    """Prompts, and as many prepared images. UserError unless there is one image, or one per prompt."""
    prompts = as_prompts(prompt)
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
    running: Running,
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
        chosen = conditions.select(rows)
        ends = solve(networks, x, chosen, options, running, start=start, rows=rows, **inpainting)
        for i, end in zip(rows, ends, strict=True):
            solved[i] = end
    return solved


def embed_images(networks: Networks, images: Sequence[ImageInput]) -> Tensor:
    """Unit vectors (B, C) that are near for pictures of like things: normalised latents averaged over the cells."""
    latents = encode_images(networks, [prepare_image(image) for image in images], packed=True)
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
