"""The steps of a sampling call: plan, encode, draw noise, solve, decode. `SVGT2IPipeline` is composed of them.

Latents are normalised, one fp32 tensor (C, h, w) an image; images have sides 16h and 16w.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from autoencoder.common.config import UserError
from autoencoder.images.files import LATENT_PIXELS, to_pil
from svg_t2i.sampling.denoising import Conditions, count_steps, denoise
from svg_t2i.sampling.networks import Networks
from svg_t2i.sampling.options import SamplingOptions, check_side
from svg_t2i.text.encoder import build_prompt

OutputType = Literal["pil", "np", "pt", "latent"]
StepEnd = Callable[[int, float, dict[str, Any]], "dict[str, Any] | None"]  # (step, t, {"latents", "indices"})


@dataclass(frozen=True)
class SVGT2IOutput:
    """`images`: PIL images; with output_type "np" an array (B, H, W, 3) and with "pt" a tensor (B, 3, H, W), both in
    [0, 1] as in diffusers; with "latent" normalised latents (B, C, h, w). A list of each where sizes differ."""

    images: list[Image.Image] | list[np.ndarray] | np.ndarray | list[Tensor] | Tensor


@dataclass(frozen=True)
class Request:
    """The B images of a call: prompt, latent size (h, w) and seed of each."""

    prompts: list[str]
    sizes: list[tuple[int, int]]
    seeds: list[int]


def plan_request(
    prompt: str | Sequence[str],
    height: int | Sequence[int] | None,
    width: int | Sequence[int] | None,
    num_images_per_prompt: int,
    seed: int | Sequence[int],
    options: SamplingOptions,
) -> Request:
    """One prompt, size and seed per image. UserError for what does not fit together."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UserError("prompt is an empty list; give at least one")
    if num_images_per_prompt < 1:
        raise UserError(f"num_images_per_prompt = {num_images_per_prompt}: must be at least 1")
    sides = []
    for name, value in (("height", height), ("width", width)):
        side = getattr(options, name) if value is None else value
        per_prompt = [side] * len(prompts) if isinstance(side, int) else list(side)
        if len(per_prompt) != len(prompts):
            raise UserError(f"{len(per_prompt)} values of {name} for {len(prompts)} prompts")
        for one in per_prompt:
            check_side(name, one)
        sides.append([one // LATENT_PIXELS for one in per_prompt])
    repeated = [i for i in range(len(prompts)) for _ in range(num_images_per_prompt)]
    counted = [seed + i % num_images_per_prompt for i in range(len(repeated))] if isinstance(seed, int) else None
    seeds = list(seed) if counted is None else counted
    if not all(0 <= one < 2**63 for one in seeds):
        raise UserError(f"seed = {seed}: whole numbers from 0 to 2^63 - 1")
    if len(seeds) != len(repeated):
        raise UserError(f"{len(seeds)} seeds for {len(repeated)} images; give one per image, or a single one")
    return Request([prompts[i] for i in repeated], [(sides[0][i], sides[1][i]) for i in repeated], seeds)


def encode_prompts(
    networks: Networks,
    prompts: Sequence[str],
    options: SamplingOptions,
    others: Sequence[str] | None = None,
    weights: Sequence[float] = (),
) -> Conditions:
    """What the images of these prompts are conditioned on. Every distinct text is encoded once.

    others, weights: a second prompt per image, whose velocity gets this weight and the first one the rest.
    """
    count = len(prompts)
    negatives = options.negative_prompts(count)
    guide = networks.guide if options.is_guided else None
    if guide is not None and any(negatives):
        raise UserError("negative_prompt does nothing under autoguidance; leave it out, or set_guide(None)")
    columns = [prompts] if others is None else [prompts, others]
    if options.is_guided and guide is None:
        columns = [*columns, negatives]
    texts = [[build_prompt(text, options.system_prompt) for text in column] for column in columns]
    distinct = list(dict.fromkeys(text for column in texts for text in column))
    with networks.stage("encoding the prompts", networks.text_encoder):
        features = networks.text_encoder.encode(distinct).to(networks.device)
    rows = [tuple(distinct.index(text) for text in column) for column in texts]
    negative = rows.pop() if options.is_guided and guide is None else None
    mixing = () if others is None else (tuple(1 - weight for weight in weights), tuple(weights))
    return Conditions(features, tuple(rows), negative, guide, options.guidance_scales(count), mixing, tuple(prompts))


def encode_images(networks: Networks, images: Sequence[Tensor]) -> list[Tensor]:
    """Images (3, H, W) in [-1, 1] → latents. Images of equal size are encoded together."""
    latents: list[Any] = list(images)
    with networks.stage("encoding the images", networks.autoencoder):
        for rows in _rows_by_shape(images):
            batch = torch.stack([images[i] for i in rows]).to(networks.device)
            for i, x in zip(rows, networks.autoencoder.normalize(networks.autoencoder.encode(batch).float())):
                latents[i] = x
    return latents


def draw_noise(
    networks: Networks,
    request: Request,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: Tensor | Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """N(0, 1) noise (C, h, w) an image, drawn on the CPU: the same on every device and in every batch.

    latents: use these instead of drawing; UserError if their shapes are not those of the request.
    """
    shapes = [(networks.transformer.config.in_channels, *size) for size in request.sizes]
    if latents is not None:
        if [tuple(x.shape) for x in latents] != shapes:
            raise UserError(f"latents of shapes {[tuple(x.shape) for x in latents]}: expected {shapes}")
        return [x.to(networks.device, torch.float32) for x in latents]
    if generator is None:
        generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
    else:
        generators = [generator] * len(shapes) if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != len(shapes):
        raise UserError(f"{len(generators)} generators for {len(shapes)} images; give one or as many")
    return [
        torch.randn(shape, generator=one, device=one.device).to(networks.device)
        for shape, one in zip(shapes, generators)
    ]


def solve(
    networks: Networks,
    latents: list[Tensor],
    conditions: Conditions,
    options: SamplingOptions,
    on_step_end: StepEnd | None = None,
    progress_bar: Mapping[str, Any] | None = None,
    *,
    start: float = 0.0,
    rows: Sequence[int] | None = None,
    **inpainting: Any,
) -> list[Tensor]:
    """Latents at time `start` → clean latents: `denoise` as a stage, with a progress bar and a callback.

    on_step_end: gets the latents of the images `indices` after each step; a returned {"latents": …} replaces them.
    progress_bar: options for tqdm.
    rows: which of the call's images these are, where they are not all of them; `indices` are among these.
    inpainting: `known` and `repaint` of `denoise`.

    Raises:
        UserError: the latents of an image are not finite; names the prompt and the step.
    """
    finite = _Finite()
    sizes = tuple((x.shape[1], x.shape[2]) for x in latents)
    total = count_steps(options, sizes, start)
    with (
        networks.stage("denoising", networks.transformer, networks.guide),
        tqdm(total=total, **{"desc": "denoising", "leave": False, **(progress_bar or {})}) as bar,
    ):

        def on_step(step: int, t: float, group: list[Tensor], indices: list[int]) -> list[Tensor] | None:
            bar.update()
            finite.note(step, group, indices)
            if on_step_end is None:
                return None
            named = indices if rows is None else [rows[i] for i in indices]
            answer = on_step_end(step - 1, t, {"latents": stack(group), "indices": named})
            return None if not answer or "latents" not in answer else list(answer["latents"])

        solved = denoise(networks.transformer, latents, conditions, options, start=start, on_step=on_step, **inpainting)
    finite.check(conditions.captions)
    return solved


class _Finite:
    """From which step on the latents of an image are not finite; noted on the device, which is asked at the end."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[int], Tensor]] = []

    def note(self, step: int, latents: Sequence[Tensor], images: list[int]) -> None:
        self.seen.append((step, images, torch.stack([x.isfinite().all() for x in latents])))

    def check(self, prompts: Sequence[str]) -> None:
        """UserError for the first that is not."""
        if not self.seen:
            return
        flags = iter(torch.cat([finite for _, _, finite in self.seen]).tolist())
        for step, images, _ in self.seen:
            for image in images:
                if not next(flags):
                    raise UserError(
                        f"the latents of image {image + 1}, {prompts[image][:80]!r}, are not finite from step {step} "
                        "on; use precision fp32 or a lower guidance_scale, or look whether the weights are finite"
                    )


def decode_latents(networks: Networks, latents: Sequence[Tensor], decode_pixels: int) -> list[Tensor]:
    """Latents → images (3, 16h, 16w), nominally in [-1, 1]; up to `decode_pixels` pixels at once.

    Raises:
        UserError: an image is not finite, which would be written as a black one.
    """
    images: list[Any] = list(latents)
    autoencoder, device, dtype = networks.autoencoder, networks.device, networks.dtype
    with (
        networks.stage("decoding", autoencoder),
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
    ):
        for rows in _rows_by_shape(latents):
            _, h, w = latents[rows[0]].shape
            at_once = max(1, decode_pixels // (h * w * LATENT_PIXELS**2))
            for begin in range(0, len(rows), at_once):
                chunk = rows[begin : begin + at_once]
                raw = autoencoder.denormalize(torch.stack([latents[i] for i in chunk]))
                for i, image in zip(chunk, autoencoder.decode(raw).float()):
                    images[i] = image
    finite = torch.stack([image.isfinite().all() for image in images]).tolist()
    if not all(finite):
        raise UserError(
            f"image {finite.index(False) + 1} is not finite after decoding; decode in fp32, or look whether the "
            "autoencoder's weights and the latents' statistics are finite"
        )
    return images


def check_output_type(output_type: str) -> None:
    """UserError unless it is one of `OutputType`."""
    if output_type not in get_args(OutputType):
        raise UserError(f"output_type = {output_type!r}; choose one of {', '.join(get_args(OutputType))}")


def as_output_type(images: Sequence[Tensor], output_type: OutputType) -> Any:
    """Images (3, H, W) in [-1, 1] as `SVGT2IOutput.images` of the type "pil", "np" or "pt"."""
    if output_type == "pil":
        return [to_pil(image) for image in images]
    in_unit_range = stack([(image / 2 + 0.5).clamp(0, 1) for image in images])
    if output_type == "pt":
        return in_unit_range
    arrays = [image.permute(1, 2, 0).cpu().numpy() for image in in_unit_range]  # (3, H, W) → (H, W, 3)
    return np.stack(arrays) if isinstance(in_unit_range, Tensor) else arrays


def stack(tensors: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """One tensor where all shapes are equal, else a list."""
    same = len({x.shape for x in tensors}) == 1
    return torch.stack(list(tensors)) if same else [x.clone() for x in tensors]


def _rows_by_shape(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of the tensors of each shape."""
    rows: dict[torch.Size, list[int]] = {}
    for i, x in enumerate(tensors):
        rows.setdefault(x.shape, []).append(i)
    yield from rows.values()
