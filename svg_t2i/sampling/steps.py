"""The steps of a sampling call: plan, encode images, draw noise, solve, decode; `conditioning` has those of the texts.

Latents are normalised, one fp32 tensor (C, h, w) an image; images have sides 16h and 16w.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from autoencoder.common.config import UserError
from autoencoder.images.files import LATENT_PIXELS, to_pil
from svg_t2i.sampling.conditioning import as_prompts
from svg_t2i.sampling.denoising import Conditions, count_steps, denoise
from svg_t2i.sampling.networks import Networks, stage
from svg_t2i.sampling.options import SamplingOptions, check_side

OutputType = Literal["pil", "np", "pt", "latent"]
StepEnd = Callable[[int, float, dict[str, Any]], "dict[str, Any] | None"]  # (step, t, {"latents", "indices"})
MAX_RANDOM_SEED = 2**32


@dataclass(frozen=True)
class Running:
    """How the steps of a call run, beside its settings.

    packed: whether images may share a forward pass. Small ones are faster so, and differ in their last bits.
    scheduler: a scheduler of diffusers instead of a solver.
    on_step_end: gets the latents of the images `indices` after each step; a returned {"latents": …} replaces them.
    progress_bar: (total=…) → a bar with `update`, entered for the solution.
    interrupted: asked after each step; true ends the solution, with the latents as they are.
    """

    packed: bool = False
    scheduler: Any = None
    on_step_end: StepEnd | None = None
    progress_bar: Callable[..., AbstractContextManager] = partial(tqdm, disable=True)
    interrupted: Callable[[], bool] = bool


@dataclass(frozen=True)
class CallOptions:
    """The keywords that all calls of a pipeline share, besides the fields of `SamplingOptions`.

    They are explained where they are arguments: `SVGT2IPipeline.__call__`.
    """

    num_images_per_prompt: int = 1
    seed: Any = None
    generator: Any = None
    scheduler: Any = None
    packed: bool = False
    output_type: OutputType = "pil"
    return_dict: bool = True
    callback_on_step_end: Callable[..., Any] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    preset: str | None = None

    @classmethod
    def split(cls, arguments: Mapping[str, Any]) -> tuple[CallOptions, dict[str, Any]]:
        """These keywords, and the rest of the arguments. UserError for a wrong output type or count."""
        own = {field.name for field in fields(cls)}
        call = cls(**{name: value for name, value in arguments.items() if name in own})
        if call.output_type not in get_args(OutputType):
            raise UserError(f"output_type = {call.output_type!r}; choose one of {', '.join(get_args(OutputType))}")
        if as_whole("num_images_per_prompt", call.num_images_per_prompt) < 1:
            raise UserError(f"num_images_per_prompt = {call.num_images_per_prompt}: must be at least 1")
        return call, {name: value for name, value in arguments.items() if name not in own}


@dataclass(frozen=True)
class Request:
    """The B images of a call: prompt, latent size (h, w) and seed of each."""

    prompts: list[str]
    sizes: list[tuple[int, int]]
    seeds: list[int]


def plan_request(
    prompt: Any, height: Any, width: Any, num_images_per_prompt: int, seed: Any, options: SamplingOptions
) -> Request:
    """One prompt, size and seed per image, from the arguments of a call.

    Args:
        prompt: one or several; in place of a text, the features of one.
        seed: None draws seeds from torch's global generator, a new one for every image.

    Raises:
        UserError: a value of a wrong type or out of range, or what does not fit together; names it.
    """
    prompts = as_prompts(prompt)
    count = num_images_per_prompt
    sides = []
    for name, value in (("height", height), ("width", width)):
        value = getattr(options, name) if value is None else value
        several = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str)
        per_prompt = [as_whole(name, one) for one in value] if several else [as_whole(name, value)] * len(prompts)
        if len(per_prompt) != len(prompts):
            raise UserError(f"{name} = {list(value)}: give one value, or as many as prompts ({len(prompts)})")
        for one in per_prompt:
            check_side(name, one)
        sides.append([one // LATENT_PIXELS for one in per_prompt])
    repeated = [i for i in range(len(prompts)) for _ in range(count)]
    sizes = [(sides[0][i], sides[1][i]) for i in repeated]
    return Request([prompts[i] for i in repeated], sizes, _seeds(seed, len(repeated), count))


def _seeds(seed: Any, images: int, per_prompt: int) -> list[int]:
    """One seed per image: counted up from a single one within each prompt, or drawn."""
    if seed is None:
        return torch.randint(MAX_RANDOM_SEED, (images,)).tolist()
    if isinstance(seed, (Sequence, np.ndarray, Tensor)) and not isinstance(seed, str) and np.ndim(seed):
        seeds = [as_whole("seed", one) for one in seed]
    else:
        seeds = [as_whole("seed", seed) + i % per_prompt for i in range(images)]
    if not all(0 <= one < 2**63 for one in seeds):
        raise UserError(f"seed = {seed}: whole numbers from 0 to 2^63 - 1")
    if len(seeds) != images:
        raise UserError(f"{len(seeds)} seeds for {images} images; give one per image, or a single one")
    return seeds


def as_whole(name: str, value: Any) -> int:
    """A whole number of any library as an int. UserError for anything else, True and False included."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise UserError(f"{name} = {value!r}: give a whole number")
    return int(value)


def encode_images(networks: Networks, images: Sequence[Tensor], packed: bool = False) -> list[Tensor]:
    """Images (3, H, W) in [-1, 1] → latents. `packed`: images of equal size are encoded together."""
    latents: list[Any] = list(images)
    with stage("encoding the images"):
        for rows in _rows_by_shape(images) if packed else ([i] for i in range(len(images))):
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
        if not all(isinstance(x, Tensor) for x in latents):
            raise UserError(f"latents = {latents!r}: give a tensor (B, C, h, w), or a list of (C, h, w)")
        if [tuple(x.shape) for x in latents] != shapes:
            raise UserError(f"latents of shapes {[tuple(x.shape) for x in latents]}: expected {shapes}")
        return [x.to(networks.device, torch.float32) for x in latents]
    if generator is None:
        generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
    else:
        several = isinstance(generator, (list, tuple))
        generators = list(generator) if several else [generator] * len(shapes)
    if not all(isinstance(one, torch.Generator) for one in generators):
        raise UserError(f"generator = {generator!r}: give a torch.Generator or a list of them")
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
    running: Running,
    *,
    start: float = 0.0,
    rows: Sequence[int] | None = None,
    **inpainting: Any,
) -> list[Tensor]:
    """Latents at time `start` → clean latents: `denoise` as a stage, with a progress bar and a callback.

    rows: which of the call's images these are, where they are not all of them; `indices` are among these.
    inpainting: `known` and `repaint` of `denoise`.

    Raises:
        UserError: the latents of an image are not finite; names the prompt and the step.
    """
    finite = _Finite()
    sizes, prediction = tuple((x.shape[1], x.shape[2]) for x in latents), networks.transformer.config.prediction
    total = count_steps(options, sizes, prediction, start, running.scheduler)
    with stage("denoising"), running.progress_bar(total=total) as bar:

        def on_step(step: int, t: float, group: list[Tensor], indices: list[int]) -> list[Tensor] | None:
            bar.update()
            finite.note(step, group, indices)
            if running.on_step_end is None:
                return None
            named = indices if rows is None else [rows[i] for i in indices]
            answer = running.on_step_end(step - 1, t, {"latents": stack(group), "indices": named}) or {}
            if set(answer) - {"latents", "indices"}:
                raise UserError(f"callback_on_step_end returned {sorted(answer)}; only latents can be replaced")
            return list(answer["latents"]) if "latents" in answer else None

        how = {"scheduler": running.scheduler, "packed": running.packed, "interrupted": running.interrupted}
        solved = denoise(
            networks.transformer, latents, conditions, options, start=start, on_step=on_step, **how, **inpainting
        )
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


def decode_latents(networks: Networks, latents: Sequence[Tensor]) -> list[Tensor]:
    """Latents → images (3, 16h, 16w), nominally in [-1, 1]. One at a time: none depends on the others.

    Raises:
        UserError: an image is not finite, which would be written as a black one.
    """
    autoencoder, device, dtype = networks.autoencoder, networks.device, networks.dtype
    with stage("decoding"), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        images = [autoencoder.decode(autoencoder.denormalize(x[None]))[0].float() for x in latents]
    finite = torch.stack([image.isfinite().all() for image in images]).tolist()
    if not all(finite):
        raise UserError(
            f"image {finite.index(False) + 1} is not finite after decoding; decode in fp32, or look whether the "
            "autoencoder's weights and the latents' statistics are finite"
        )
    return images


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
