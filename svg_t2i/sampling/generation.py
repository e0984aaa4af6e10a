"""The steps of a sampling call, from what was asked for to images: plan, draw noise, solve, finish.

`SVGT2IPipeline` and its image methods are made of these; each takes what the one before returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from svg_t2i.sampling.options import SamplingOptions, changed, check_side, preset
from svg_t2i.sampling.parts import PipelineParts

OutputType = Literal["pil", "np", "pt", "latent"]
StepEnd = Callable[[Any, int, float, dict[str, Any]], "dict[str, Any] | None"]


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


class Generation(PipelineParts):
    """What every way of sampling has in common."""

    def resolve_options(
        self, preset_name: str | None = None, output_type: OutputType = "pil", **changes: Any
    ) -> SamplingOptions:
        """The pipeline's options, or a preset's, with changes. UserError for unknown or wrong ones."""
        if output_type not in get_args(OutputType):
            raise UserError(f"output_type = {output_type!r}; choose one of {', '.join(get_args(OutputType))}")
        if preset_name is not None:
            return preset(preset_name, **changes)
        return changed(self.options, changes)

    def plan_request(
        self,
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

    def draw_noise(
        self,
        request: Request,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """N(0, 1) fp32 noise (C, h, w) an image, drawn on the CPU: the same on every device and in every batch."""
        shapes = [(self.transformer.config.in_channels, *size) for size in request.sizes]
        if latents is not None:
            if [tuple(x.shape) for x in latents] != shapes:
                raise UserError(f"latents of shapes {[tuple(x.shape) for x in latents]}: expected {shapes}")
            return [x.to(self.device, torch.float32) for x in latents]
        if generator is None:
            generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
        else:
            generators = [generator] * len(shapes) if isinstance(generator, torch.Generator) else list(generator)
        if len(generators) != len(shapes):
            raise UserError(f"{len(generators)} generators for {len(shapes)} images; give one or as many")
        return [
            torch.randn(shape, generator=one, device=one.device).to(self.device)
            for shape, one in zip(shapes, generators)
        ]

    def solve(
        self,
        latents: list[Tensor],
        conditions: Conditions,
        options: SamplingOptions,
        callback_on_step_end: StepEnd | None = None,
        *,
        start: float = 0.0,
        rows: Sequence[int] | None = None,
        **inpainting: Any,
    ) -> list[Tensor]:
        """`denoising.denoise` as a stage, with progress bar and callback. Normalised latents (C, h, w) per image.

        rows: what the callback calls these images, where they are not all of the call's.
        """
        sizes = tuple((x.shape[1], x.shape[2]) for x in latents)
        total = count_steps(options, sizes, start)
        with self._stage("denoising", self.transformer, self.guide), tqdm(total=total, **self._progress_bar) as bar:

            def on_step(step: int, t: float, group: list[Tensor], indices: list[int]) -> list[Tensor] | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                named = indices if rows is None else [rows[i] for i in indices]
                answer = callback_on_step_end(self, step - 1, t, {"latents": _stacked(group), "indices": named})
                return None if not answer or "latents" not in answer else list(answer["latents"])

            return denoise(self.transformer, latents, conditions, options, start=start, on_step=on_step, **inpainting)

    def finish(self, latents: list[Tensor], output_type: OutputType, return_dict: bool) -> SVGT2IOutput | tuple:
        """Normalised latents (C, h, w) → the output that was asked for."""
        if output_type == "latent":
            images: Any = _stacked(latents)
        else:
            decoded = self.decode_latents(latents)
            if output_type == "pil":
                images = [to_pil(image) for image in decoded]
            else:
                images = _stacked([(image / 2 + 0.5).clamp(0, 1) for image in decoded])
            if output_type == "np":
                arrays = [image.permute(1, 2, 0).cpu().numpy() for image in images]  # (3, H, W) → (H, W, 3)
                images = np.stack(arrays) if isinstance(images, Tensor) else arrays
        return SVGT2IOutput(images) if return_dict else (images,)


def _stacked(tensors: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """One tensor where all shapes are equal, else a list."""
    same = len({x.shape for x in tensors}) == 1
    return torch.stack(list(tensors)) if same else [x.clone() for x in tensors]
