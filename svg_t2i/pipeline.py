"""Prompts and seeds → images: text encoder, transformer under guidance, solver, decoder.

    pipeline = SVGT2IPipeline.from_pretrained("results/run").to("cuda", torch.bfloat16)
    images = pipeline(["a red fox in snow", "two pears"], height=768, width=1024, guidance_scale=4, seed=[0, 1]).images

Reads top-down like the method: encode the prompts, draw one noise per seed, solve dx/dt = v(x, t) from t=0 (noise) to
t=1 (data) in the normalised latent space, denormalise, decode. Image i depends on its own prompt, seed and settings
only, never on what else is in the batch. Names and behaviour follow diffusers; what starts from images is in `editing`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svg_t2i.checkpoints import weights as checkpoints
from svg_t2i.sampling.editing import ImageMethods
from svg_t2i.sampling.generation import OutputType, StepEnd, SVGT2IOutput
from svg_t2i.sampling.loading import fetch, find_sources, push_parts, save_parts
from svg_t2i.sampling.memory import memory_stage
from svg_t2i.sampling.options import PRESETS, SamplingOptions
from svg_t2i.text.encoder import TextEncoder
from svg_t2i.text.enhance import enhance


class SVGT2IPipeline(ImageMethods):
    """Text to image. Its networks: `PipelineParts`; the steps of a call: `Generation`; from images: `ImageMethods`."""

    # ------------------------------------------------------------------------------------- loading, saving, placing

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
            text_encoder: Hugging Face folder or id. A training checkpoint remembers its own parts.
            guide: folder of a weaker DiT of the same latents and text features, for autoguidance.
            use_ema: the averaged weights rather than the raw ones.
            torch_dtype: of transformer and text encoder. Weights of the decoder and all statistics stay fp32.

        Raises:
            UserError: anything missing, or parts whose fingerprints show that they do not belong together.
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
        sources.check()
        text = sources.text_encoder
        with memory_stage("loading the weights"):
            frozen = (
                sources.autoencoder.load(),
                TextEncoder.from_pretrained(text.path, max_length=text.max_length, dtype=torch_dtype),
            )
            checkpoints.check_fingerprints(sources.transformer, *(part.fingerprint() for part in frozen))
            transformer = checkpoints.load_transformer(sources.transformer, ema=use_ema).to(torch_dtype)
            pipeline = cls(frozen[0], transformer, frozen[1], sources.options)
            if sources.guide is not None:
                checkpoints.check_fingerprints(sources.guide, *(part.fingerprint() for part in frozen))
                pipeline.set_guide(checkpoints.load_transformer(sources.guide, ema=use_ema))
        return pipeline

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write all parts (safetensors, JSON, statistics, fingerprints); `from_pretrained` needs nothing else."""
        save_parts(self, save_directory)

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
        return push_parts(self, repo_id, **where)

    # ------------------------------------------------------------------------------------------------------ sampling

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
        callback_on_step_end: StepEnd | None = None,
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
        settings = self.resolve_options(preset, output_type, height=_single(height), width=_single(width), **options)
        request = self.plan_request(prompt, height, width, num_images_per_prompt, seed, settings)
        settings = settings.repeated(len(request.prompts) // num_images_per_prompt, num_images_per_prompt)
        conditions = self.encode_prompts(request.prompts, settings)
        noise = self.draw_noise(request, generator, latents)
        solved = self.solve(noise, conditions, settings, callback_on_step_end)
        return self.finish(solved, output_type, return_dict)

    def enhance(self, prompt: str) -> str:
        """The prompt rewritten in more detail by the causal text encoder; use it with system_prompt="align"."""
        with self._stage("encoding the prompts", self.text_encoder):
            return enhance(prompt, self.text_encoder)


def _single(value: int | Sequence[int] | None) -> int | None:
    return value if isinstance(value, int) else None


__all__ = ["PRESETS", "SVGT2IOutput", "SVGT2IPipeline", "SamplingOptions"]
