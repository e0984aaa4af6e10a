"""Prompts and seeds → images: text encoder, transformer under guidance, solver, decoder.

    pipeline = SVGT2IPipeline.from_pretrained("results/run")
    images = pipeline(["a red fox in snow", "two pears"], height=768, width=1024, guidance_scale=4.0, seed=[0, 1])

Reads top-down like the method: encode the prompts, draw one noise per seed, solve dx/dt = v(x, t) from t=0 (noise) to
t=1 (data) in the normalised latent space, denormalise, decode. Image i depends on its own prompt, seed and settings
only, never on what else is in the batch.

Saved layout (`save_pretrained`):

    folder/transformer/   config.json, model.safetensors
    folder/autoencoder/   config.json, model.safetensors, latent_stats.safetensors
    folder/text_encoder/  Hugging Face format
    folder/model_index.json
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from autoencoder.config import UserError, build
from autoencoder.images import to_pil
from autoencoder.model import SVGAutoencoder
from svg_t2i import checkpoint as checkpoints
from svg_t2i.frozen import load_autoencoder
from svg_t2i.guidance import guided_velocity
from svg_t2i.model import SVGDiT
from svg_t2i.packing import TextFeatures
from svg_t2i.settings import LATENT_PIXELS, AutoencoderSource, TextSource
from svg_t2i.solvers import SOLVERS, Velocity, sample
from svg_t2i.text import TextEncoder, build_prompt

INDEX = "model_index.json"


class SVGT2IPipeline:
    """A frozen autoencoder, a transformer and a text encoder that belong together.

    Raises:
        UserError: when latent channels or text widths do not fit each other.
    """

    def __init__(self, autoencoder: SVGAutoencoder, transformer: SVGDiT, text_encoder: TextEncoder):
        if autoencoder.channels != transformer.config.in_channels:
            raise UserError(
                f"the autoencoder has {autoencoder.channels} latent channels, the transformer expects "
                f"{transformer.config.in_channels}: they do not belong together"
            )
        if text_encoder.hidden_size != transformer.config.cap_feat_dim:
            raise UserError(
                f"the text encoder's features are {text_encoder.hidden_size} wide, the transformer expects "
                f"{transformer.config.cap_feat_dim}: they do not belong together"
            )
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.transformer = transformer.eval().requires_grad_(False)
        self.text_encoder = text_encoder

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def to(self, device: str | torch.device) -> SVGT2IPipeline:
        """Move all three models."""
        for part in (self.autoencoder, self.transformer, self.text_encoder):
            part.to(device)
        return self

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        autoencoder: str | os.PathLike | None = None,
        autoencoder_checkpoint: str | os.PathLike | None = None,
        latent_stats: str | os.PathLike | None = None,
        text_encoder: str | os.PathLike | None = None,
        use_ema: bool = True,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> SVGT2IPipeline:
        """Load a saved pipeline, a training run (newest checkpoint), one checkpoint, or a published folder.

        Args:
            folder: where the transformer is. A training checkpoint remembers its autoencoder and text encoder; a
                published folder does not, so name them.
            autoencoder: YAML file or saved folder; `autoencoder_checkpoint` and `latent_stats` complete a YAML.
            text_encoder: Hugging Face folder or id.
            use_ema: the averaged weights rather than the raw ones.
            dtype: of transformer and text encoder; bf16 on a GPU and fp32 on a CPU by default. The decoder is fp32.

        Raises:
            UserError: anything missing, or parts whose fingerprints show that they do not belong together.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        folder = Path(folder)
        if (folder / INDEX).is_file():
            autoencoder, text_encoder = autoencoder or folder / "autoencoder", text_encoder or folder / "text_encoder"
            folder = folder / "transformer"
        trained_with = checkpoints.read_meta(folder).get("config", {})
        source = _autoencoder_source(trained_with, autoencoder, autoencoder_checkpoint, latent_stats)
        text = build(TextSource, trained_with.get("text_encoder", {}), source=str(folder))
        if text_encoder is not None or "text_encoder" not in trained_with:
            text = replace(text, path=str(_given(text_encoder, "text_encoder", folder)))
        parts = (
            load_autoencoder(source).to(device),
            TextEncoder.from_pretrained(text.path, max_length=text.max_length, dtype=dtype, device=device),
        )
        checkpoints.check_fingerprints(folder, *(part.fingerprint() for part in parts))
        transformer = checkpoints.load_transformer(folder, ema=use_ema).to(device, dtype)
        return cls(parts[0], transformer, parts[1])

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write all parts below `folder`; `from_pretrained(folder)` reads them back with no other argument."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.autoencoder.save_pretrained(folder / "autoencoder")
        checkpoints.save_transformer(
            self.transformer,
            folder / "transformer",
            autoencoder_fingerprint=self.autoencoder.fingerprint(),
            text_fingerprint=self.text_encoder.fingerprint(),
        )
        self.text_encoder.save_pretrained(folder / "text_encoder")
        (folder / INDEX).write_text(json.dumps({"_class_name": "SVGT2IPipeline"}, indent=2))

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        system_prompt: str = "base",
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        renorm_cfg: float = 1.0,
        cfg_trunc: float = 1.0,
        solver: str = "dpm",
        time_shift: float | None = None,
        seed: int | Sequence[int] = 0,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        output_type: Literal["pil", "pt", "latent"] = "pil",
        callback: Callable[[int, float, Tensor], None] | None = None,
    ) -> list[Image.Image] | Tensor:
        """Make `len(prompt) · num_images_per_prompt` images, prompt by prompt.

        Args:
            prompt: one or several; each is prefixed with the system prompt of that name.
            negative_prompt: what guidance leads away from; "" is the unconditional text of training.
            height, width: pixels, multiples of 16.
            num_inference_steps: model calls of `dpm`; grid points (including both ends) of the ODE solvers.
            guidance_scale: s in v_u + s·(v_c − v_u); 1 runs the conditional branch only.
            renorm_cfg: bound on ‖v‖/‖v_c‖ per image; 0 is off.
            cfg_trunc: no guidance for t ≥ this; from 1 on, guidance throughout.
            time_shift: more steps near noise for larger values; None is the solver's default.
            seed: one for the first image (image i uses seed + i within its prompt), or one per image.
            latents: starting noise (B, C, height/16, width/16) instead of the one drawn from the seeds.
            output_type: "pil"; "pt" for (B, 3, height, width) in [-1, 1]; "latent" for normalised latents.
            callback: called as (step, t, latents) after every step.

        Raises:
            UserError: an argument out of range, named with its value.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        seeds = self._seeds(seed, len(prompts), num_images_per_prompt)
        self._check(prompts, height, width, solver, num_inference_steps, time_shift)

        text, empty = self._encode_prompts(prompts, negative_prompt, system_prompt, guided=guidance_scale != 1)
        noise = self._noise(seeds, height, width) if latents is None else latents.to(self.device, torch.float32)
        parts = []
        for rows in self._solver_batches(solver, len(prompts)):
            velocity = self._velocity(text.select(rows), empty, guidance_scale, renorm_cfg, cfg_trunc)
            parts.append(sample(solver, velocity, noise[rows], num_inference_steps, time_shift, callback=callback))
        solved = torch.cat(parts)                                                               # (B, C, h, w)

        if output_type == "latent":
            return solved
        images = self.autoencoder.decode(self.autoencoder.denormalize(solved))                  # (B, 3, H, W)
        return images if output_type == "pt" else [to_pil(image) for image in images]

    @staticmethod
    def _seeds(seed: int | Sequence[int], count: int, per_prompt: int) -> list[int]:
        if isinstance(seed, int):
            return [seed + i % per_prompt for i in range(count)]
        if len(seed) != count:
            raise UserError(f"{len(seed)} seeds for {count} images; give one seed an image, or a single one")
        return list(seed)

    @staticmethod
    def _check(
        prompts: list[str], height: int, width: int, solver: str, num_inference_steps: int, time_shift: float | None
    ) -> None:
        if not prompts:
            raise UserError("prompt is an empty list; give at least one")
        for name, side in (("height", height), ("width", width)):
            if side < LATENT_PIXELS or side % LATENT_PIXELS:
                raise UserError(f"{name} = {side}: image sides must be positive multiples of {LATENT_PIXELS}")
        if solver not in SOLVERS:
            raise UserError(f"solver = {solver!r}; choose one of {', '.join(SOLVERS)}")
        if num_inference_steps < 2 and solver != "dpm":
            raise UserError(f"num_inference_steps = {num_inference_steps}: {solver} needs both ends of [0, 1], so ≥ 2")
        if time_shift is not None and not time_shift > 0:
            raise UserError(f"time_shift = {time_shift}: must be positive; 1 spaces the steps evenly")

    def _encode_prompts(
        self, prompts: list[str], negative_prompt: str, system_prompt: str, guided: bool
    ) -> tuple[TextFeatures, TextFeatures | None]:
        """Features of every prompt and of the negative one, each distinct text encoded once."""
        texts = [build_prompt(p, system_prompt) for p in prompts]
        negative = build_prompt(negative_prompt, system_prompt) if negative_prompt else ""
        distinct = list(dict.fromkeys(texts + [negative] * guided))
        features = self.text_encoder.encode(distinct)
        empty = features.select([distinct.index(negative)]) if guided else None
        return features.select([distinct.index(t) for t in texts]), empty

    def _noise(self, seeds: list[int], height: int, width: int) -> Tensor:
        """One generator an image, on the CPU: the same noise on every device and in every batch. (B, C, h, w)"""
        shape = (self.transformer.config.in_channels, height // LATENT_PIXELS, width // LATENT_PIXELS)
        draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(draws).to(self.device)

    @staticmethod
    def _solver_batches(solver: str, count: int) -> list[list[int]]:
        """An adaptive solver shares its step size over the batch, so it gets one image at a time."""
        return [[i] for i in range(count)] if SOLVERS[solver].adaptive else [list(range(count))]

    def _velocity(
        self, text: TextFeatures, empty: TextFeatures | None, guidance_scale: float, renorm_cfg: float, cfg_trunc: float
    ) -> Velocity:
        """The guided model as a function of (latents, t). Both branches run in one packed forward."""
        dtype = next(self.transformer.parameters()).dtype

        def run(latents: Tensor, t: float, features: TextFeatures) -> Tensor:
            timesteps = torch.full((len(latents),), t, device=latents.device)
            return self.transformer(latents.to(dtype), timesteps, features).float()

        def conditional(latents: Tensor, t: float) -> Tensor:
            return run(latents, t, text)

        if empty is None:
            return conditional
        both = TextFeatures.cat([text] + [empty] * len(text.lengths))

        def pair(latents: Tensor, t: float) -> tuple[Tensor, Tensor]:
            v_cond, v_uncond = run(torch.cat([latents, latents]), t, both).chunk(2)
            return v_cond, v_uncond

        return guided_velocity(pair, conditional, guidance_scale, renorm_cfg, cfg_trunc)


def _autoencoder_source(
    trained_with: Mapping[str, Any],
    config: str | os.PathLike | None,
    checkpoint: str | os.PathLike | None,
    stats: str | os.PathLike | None,
) -> AutoencoderSource:
    """What the checkpoint recorded, replaced by what the caller gives. A config given anew brings its own weights."""
    recorded = {} if config is not None else dict(trained_with.get("autoencoder", {}))
    recorded |= {
        name: str(value)
        for name, value in (("config", config), ("checkpoint", checkpoint), ("stats", stats))
        if value is not None
    }
    _given(recorded.get("config"), "autoencoder", "the checkpoint")
    return build(AutoencoderSource, recorded, source="autoencoder")


def _given(value: str | os.PathLike | None, name: str, where: object) -> str | os.PathLike:
    if value is None:
        raise UserError(f"{where} does not say which {name} it was trained with; give --{name}")
    return value
