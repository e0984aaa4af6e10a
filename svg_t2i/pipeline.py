"""Prompts, images and seeds → images: text encoder, transformer under guidance, solver, decoder.

    pipeline = SVGT2IPipeline.from_pretrained("results/run").to("cuda", torch.bfloat16)
    images = pipeline(["a red fox in snow", "two pears"], height=768, width=1024, guidance_scale=4, seed=[0, 1]).images

A call encodes the prompts, draws one noise per seed, solves dx/dt = v(x, t) from t=0 (noise) to t=1 (data) in the
normalised latent space, denormalises and decodes; each of these is a function of `sampling.steps`. Image i depends on
its own prompt, seed and settings only, never on what else is in the batch. Names and behaviour follow diffusers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder.common.config import UserError
from autoencoder.model import SVGAutoencoder
from autoencoder.sources.folders import list_images
from svg_t2i.sampling import from_images, steps
from svg_t2i.sampling.denoising import strength_start
from svg_t2i.sampling.from_images import ImageInput, Match
from svg_t2i.sampling.loading import fetch, find_sources, load_networks, push_pipeline, save_pipeline
from svg_t2i.sampling.networks import Networks
from svg_t2i.sampling.options import SamplingOptions, changed, preset_options
from svg_t2i.sampling.steps import OutputType, StepEnd, SVGT2IOutput
from svg_t2i.text.encoder import TextEncoder
from svg_t2i.text.enhance import enhance
from svg_t2i.transformer.model import SVGDiT

DECODE_PIXELS = 2 * 1024 * 1024

PipelineStepEnd = Callable[["SVGT2IPipeline", int, float, dict[str, Any]], "dict[str, Any] | None"]


class SVGT2IPipeline:
    """Text to image, and what starts from images.

    Attributes:
        networks: the autoencoder, the transformer, the text encoder, and where they run.
        options: the sampling settings of calls that name no others; saved with the pipeline.
        decode_pixels: how many pixels are decoded at once.

    Raises:
        UserError: when latent channels or text widths of the networks do not fit each other.
    """

    def __init__(
        self,
        autoencoder: SVGAutoencoder,
        transformer: SVGDiT,
        text_encoder: TextEncoder,
        options: SamplingOptions | None = None,
    ):
        self.networks = Networks(autoencoder, transformer, text_encoder)
        self.options = options or SamplingOptions()
        self.decode_pixels = DECODE_PIXELS
        self._progress_bar: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        autoencoder: str | os.PathLike | None = None,
        autoencoder_checkpoint: str | os.PathLike | None = None,
        latent_stats: str | os.PathLike | None = None,
        text_encoder: str | os.PathLike | None = None,
        guide: str | os.PathLike | None = None,
        use_ema: bool = True,
        torch_dtype: torch.dtype = torch.float32,
    ) -> SVGT2IPipeline:
        """Load a saved pipeline (folder or Hub id), a training run, one checkpoint, or the published `pre-trained/`.

        Args:
            subfolder: which DiT, where the folder holds several.
            autoencoder: YAML file or saved folder; `autoencoder_checkpoint` and `latent_stats` complete a YAML.
            text_encoder: Hugging Face folder or id. A training checkpoint records its own networks.
            guide: folder of a weaker DiT of the same latents and text features, for autoguidance.
            use_ema: the averaged weights rather than the raw ones.
            torch_dtype: of transformer and text encoder. Weights of the decoder and all statistics stay fp32.

        Raises:
            UserError: anything missing, or networks whose fingerprints show that they do not belong together.
        """
        sources = find_sources(
            fetch(pretrained_model_name_or_path, revision, token),
            subfolder=subfolder,
            autoencoder=autoencoder,
            autoencoder_checkpoint=autoencoder_checkpoint,
            latent_stats=latent_stats,
            text_encoder=text_encoder,
            guide=guide,
        )
        *networks, guide_network = load_networks(sources, use_ema, torch_dtype)
        pipeline = cls(*networks, sources.options)
        pipeline.set_guide(guide_network)
        return pipeline

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write all networks (safetensors, JSON, statistics, fingerprints): all that `from_pretrained` needs."""
        save_pipeline(self.networks, self.options, save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload SVGT2IPipeline",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub; returns the commit's address."""
        where = {"commit_message": commit_message, "private": private, "token": token, "revision": revision}
        return push_pipeline(self.networks, self.options, repo_id, **where)

    # -------------------------------------------------------------------------------------------------- the networks

    @property
    def autoencoder(self) -> SVGAutoencoder:
        """Images ↔ latents."""
        return self.networks.autoencoder

    @property
    def transformer(self) -> SVGDiT:
        """The diffusion transformer."""
        return self.networks.transformer

    @property
    def text_encoder(self) -> TextEncoder:
        """Prompts → text features."""
        return self.networks.text_encoder

    @property
    def device(self) -> torch.device:
        """Where sampling runs."""
        return self.networks.device

    @property
    def dtype(self) -> torch.dtype:
        """Of transformer and text encoder."""
        return self.networks.dtype

    def to(self, *args: Any, **kwargs: Any) -> SVGT2IPipeline:
        """Move all networks to a device, transformer and text encoder also to a dtype: to("cuda", torch.bfloat16)."""
        self.networks.to(*args, **kwargs)
        return self

    def enable_model_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Text encoder, transformer and autoencoder take turns on `device`; otherwise they are on the CPU."""
        self.networks.offload_to(device)

    def compile(self, **kwargs: Any) -> None:
        """Compile the transformer's blocks, for any image size and prompt length; `kwargs` go to torch.compile."""
        self.networks.compile(**kwargs)

    def set_guide(self, guide: SVGDiT | None) -> None:
        """Guide away from a weaker model with the same prompt (autoguidance) instead of the unconditional branch."""
        self.networks.set_guide(guide)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options for tqdm, e.g. disable=True."""
        self._progress_bar |= kwargs

    # ------------------------------------------------------------------------------------------------- text to image

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | Sequence[Tensor] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: PipelineStepEnd | None = None,
        preset: str | None = None,
        **options: Any,
    ) -> SVGT2IOutput | tuple:
        """Make `len(prompt) · num_images_per_prompt` images, prompt by prompt, in one packed batch.

        Args:
            prompt: one or several; each is prefixed with the system prompt of `options`.
            height, width: pixels, multiples of 16; or one per prompt.
            seed: one for the first image (image i uses seed + i within its prompt), or one per image.
            generator: torch generators instead of seeds: one for all, or one per image.
            latents: starting noise (B, C, height/16, width/16), or a list of (C, h, w), instead of drawing it.
            output_type, return_dict: see `SVGT2IOutput`; False returns it as a tuple.
            callback_on_step_end: (pipeline, step, t, {"latents", "indices"}) after every step, latents of the images
                `indices`; a returned {"latents": …} replaces them.
            preset: settings of a model stage (`options.PRESETS`) in place of the pipeline's own.
            **options: fields of `SamplingOptions`: num_inference_steps, guidance_scale, negative_prompt, solver, …

        Raises:
            UserError: an argument out of range, named with its value; or out of memory, naming the stage.
        """
        options |= {name: side for name, side in (("height", height), ("width", width)) if isinstance(side, int)}
        settings = self._settings(preset, output_type, options)
        request = steps.plan_request(prompt, height, width, num_images_per_prompt, seed, settings)
        settings = settings.repeated(len(request.prompts) // num_images_per_prompt, num_images_per_prompt)
        conditions = steps.encode_prompts(self.networks, request.prompts, settings)
        noise = steps.draw_noise(self.networks, request, generator, latents)
        on_step_end = self._bound(callback_on_step_end)
        solved = steps.solve(self.networks, noise, conditions, settings, on_step_end, self._progress_bar)
        return self._output(solved, output_type, return_dict)

    def enhance(self, prompt: str) -> str:
        """The prompt rewritten in more detail by the causal text encoder; use it with system_prompt="align"."""
        with self.networks.stage("encoding the prompts", self.text_encoder):
            return enhance(prompt, self.text_encoder)

    # ---------------------------------------------------------------------------------------------------- from images
    # Keywords that these share with a text-to-image call (num_images_per_prompt, seed, generator, output_type,
    # return_dict, callback_on_step_end, preset, and the fields of `SamplingOptions`) mean the same here.

    def image_to_image(
        self,
        prompt: str | Sequence[str],
        image: ImageInput | Sequence[ImageInput],
        *,
        strength: float = 0.6,
        **settings: Any,
    ) -> SVGT2IOutput | tuple:
        """Redraw an image after a prompt. One image, or one per prompt.

        strength: how much changes, in (0, 1]: the last `strength` of the steps run. 1 starts from noise alone.
        """
        return self._from_images(prompt, image, strength=strength, **settings)

    def variation(
        self, image: ImageInput | Sequence[ImageInput], *, t: float = 0.3, prompt: str = "", **settings: Any
    ) -> SVGT2IOutput | tuple:
        """Other images like this one: noised to time t in [0, 1) and sampled on; the nearer to 1, the more alike."""
        images = from_images.as_list(image)
        return self._from_images([prompt] * len(images), images, start=t, **settings)

    def inpaint(
        self,
        prompt: str | Sequence[str],
        image: ImageInput | Sequence[ImageInput],
        mask_image: ImageInput,
        *,
        strength: float = 1.0,
        **settings: Any,
    ) -> SVGT2IOutput | tuple:
        """Repaint the cells where the mask is white; the latents of all other cells stay exactly what they were.

        mask_image: an image of the image's size (a cell is repainted if any of its 16×16 pixels is white), or a
            tensor of latent cells (H/16, W/16), nonzero where to repaint.
        strength: as in `image_to_image`, for the repainted cells.
        """
        return self._from_images(prompt, image, strength=strength, mask=mask_image, **settings)

    def _from_images(
        self,
        prompt: str | Sequence[str],
        image: ImageInput | Sequence[ImageInput],
        *,
        strength: float | None = None,
        start: float = 0.0,
        mask: ImageInput | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: PipelineStepEnd | None = None,
        preset: str | None = None,
        **options: Any,
    ) -> SVGT2IOutput | tuple:
        """Noise encoded images to `start` (or to where `strength` begins) and sample on, one image per prompt."""
        if not 0 <= start < 1:
            raise UserError(f"t = {start}: must lie in [0, 1); 0 is noise, 1 the image itself")
        if strength is not None and not 0 < strength <= 1:
            raise UserError(f"strength = {strength}: must be above 0 and at most 1")
        settings = self._settings(preset, output_type, options)
        prompts, images = from_images.pair_with_prompts(prompt, image, options.get("height"), options.get("width"))
        heights, widths = [x.shape[1] for x in images], [x.shape[2] for x in images]
        request = steps.plan_request(prompts, heights, widths, num_images_per_prompt, seed, settings)
        settings = settings.repeated(len(prompts), num_images_per_prompt)
        cells = None
        if mask is not None:
            cells = [from_images.prepare_mask(mask, size).to(self.device) for size in request.sizes]
        starts = [start] * len(request.sizes)
        if strength is not None and strength < 1:
            starts = [strength_start(settings, size, strength) for size in request.sizes]
        conditions = steps.encode_prompts(self.networks, request.prompts, settings)
        clean = [x for x in steps.encode_images(self.networks, images) for _ in range(num_images_per_prompt)]
        noise = steps.draw_noise(self.networks, request, generator)
        on_step_end = self._bound(callback_on_step_end)
        solved = from_images.sample_on(
            self.networks, clean, noise, starts, conditions, settings, on_step_end, self._progress_bar, cells
        )
        return self._output(solved, output_type, return_dict)

    def interpolate(
        self,
        prompt: str | Sequence[str] = "",
        image: Sequence[ImageInput] | None = None,
        *,
        weights: int | Sequence[float] = 5,
        t: float = 0.3,
        seed: int | Sequence[int] = 0,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: PipelineStepEnd | None = None,
        preset: str | None = None,
        **options: Any,
    ) -> SVGT2IOutput | tuple:
        """Images on the way from one prompt or image to another, all from the same noise (or one seed each).

        Between prompts the two velocities are mixed; between images the latents, along the great circle in each
        cell, which are then noised to time t and sampled on.

        Args:
            prompt: one for all, or two.
            image: two images, or None.
            weights: of the second prompt and image, in [0, 1]; or how many, evenly from 0 to 1.
            t: with images only, in [0, 1]; 1 decodes the mixed latents as they are.
        """
        first_prompt, second_prompt = from_images.interpolation_ends(prompt, image, t)
        shares, start = from_images.interpolation_weights(weights), 0.0
        settings = self._settings(preset, output_type, options)
        if image is not None:
            first = from_images.prepare_image(image[0], options.get("height"), options.get("width"))
            pair = [first, from_images.prepare_image(image[1], *first.shape[1:])]
            settings = changed(settings, {"height": first.shape[1], "width": first.shape[2]})
        seeds = [seed] * len(shares) if isinstance(seed, int) else seed
        request = steps.plan_request([first_prompt] * len(shares), None, None, 1, seeds, settings)
        x = steps.draw_noise(self.networks, request)
        if image is not None:
            start = t
            left, right = steps.encode_images(self.networks, pair)
            x = [torch.lerp(noise, from_images.slerp(left, right, share), t) for noise, share in zip(x, shares)]
        if start < 1:
            others = None if second_prompt is None else [second_prompt] * len(shares)
            conditions = steps.encode_prompts(self.networks, request.prompts, settings, others, shares)
            on_step_end = self._bound(callback_on_step_end)
            x = steps.solve(self.networks, x, conditions, settings, on_step_end, self._progress_bar, start=start)
        return self._output(x, output_type, return_dict)

    def retrieve(self, image: ImageInput, folder: str | Path | Sequence[Path], *, top_k: int = 10) -> list[Match]:
        """The images below a folder (or among files) whose latents are most like the query's, best first.

        Unreadable files are left out with a warning. Raises UserError if no image is left.
        """
        files = list_images(folder) if isinstance(folder, (str, Path)) else [Path(path) for path in folder]
        return from_images.nearest_images(self.networks, image, files, top_k)

    # --------------------------------------------------------------------------------------------- shared by the calls

    def _settings(self, preset: str | None, output_type: str, changes: Mapping[str, Any]) -> SamplingOptions:
        """The pipeline's options, or a preset's, with changes. UserError for unknown or wrong ones."""
        steps.check_output_type(output_type)
        return changed(self.options if preset is None else preset_options(preset), changes)

    def _bound(self, callback: PipelineStepEnd | None) -> StepEnd | None:
        return None if callback is None else partial(callback, self)

    def _output(self, latents: list[Tensor], output_type: OutputType, return_dict: bool) -> SVGT2IOutput | tuple:
        """Clean latents (C, h, w) → the output that was asked for."""
        if output_type == "latent":
            images: Any = steps.stack(latents)
        else:
            images = steps.as_output_type(steps.decode_latents(self.networks, latents, self.decode_pixels), output_type)
        return SVGT2IOutput(images) if return_dict else (images,)
