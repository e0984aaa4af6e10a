"""The three networks of a pipeline: whether they fit, where they run, and what each of them does in its turn.

Each stage of sampling (encoding, denoising, decoding) runs inside `PipelineParts._stage`: with model offload it brings
its networks to the device for that time, and a shortage of memory is reported under its name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autoencoder.common.config import UserError
from autoencoder.images.files import LATENT_PIXELS
from autoencoder.model import SVGAutoencoder
from svg_t2i.sampling.denoising import Conditions
from svg_t2i.sampling.memory import memory_stage
from svg_t2i.sampling.options import SamplingOptions
from svg_t2i.text.encoder import TextEncoder, build_prompt
from svg_t2i.transformer.model import SVGDiT

P = TypeVar("P", bound="PipelineParts")

DECODE_PIXELS = 2 * 1024 * 1024


class PipelineParts:
    """A frozen autoencoder, a transformer and a text encoder that belong together.

    Attributes:
        options: the sampling settings of calls that name no others; saved with the pipeline.
        guide: a weaker transformer for autoguidance, or None (`set_guide`).
        decode_pixels: how many pixels are decoded at once.

    Raises:
        UserError: when latent channels or text widths do not fit each other.
    """

    def __init__(
        self,
        autoencoder: SVGAutoencoder,
        transformer: SVGDiT,
        text_encoder: TextEncoder,
        options: SamplingOptions | None = None,
    ):
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
        self.options = options or SamplingOptions()
        self.guide: SVGDiT | None = None
        self.decode_pixels = DECODE_PIXELS
        self._offload_device: torch.device | None = None
        self._progress_bar: dict[str, Any] = {"desc": "denoising", "leave": False}

    def set_guide(self, guide: SVGDiT | None) -> None:
        """Guide away from a weaker model with the same prompt (autoguidance) instead of the unconditional branch."""
        if guide is not None:
            for name in ("in_channels", "cap_feat_dim", "patch_size"):
                ours, theirs = getattr(self.transformer.config, name), getattr(guide.config, name)
                if ours != theirs:
                    raise UserError(f"the guide's {name} is {theirs}, the transformer's is {ours}: they do not fit")
            parameter = next(self.transformer.parameters())
            guide = guide.eval().requires_grad_(False).to(parameter.device, parameter.dtype)
        self.guide = guide

    @property
    def device(self) -> torch.device:
        """Where sampling runs."""
        return self._offload_device or next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of transformer and text encoder."""
        return next(self.transformer.parameters()).dtype

    def describe(self) -> dict[str, Any]:
        """What identifies the weights. A path does not: a training run has newer ones under it every hour."""
        guide = {} if self.guide is None else {"guide": weights_digest(self.guide)}
        return {
            "transformer": weights_digest(self.transformer),
            "autoencoder": self.autoencoder.fingerprint(),
            "decoder": weights_digest(self.autoencoder.decoder),
            "text_encoder": self.text_encoder.fingerprint(),
            "dtype": str(self.dtype),
            **guide,
        }

    def to(self: P, *args: Any, **kwargs: Any) -> P:
        """Move all models to a device, transformer and text encoder also to a dtype: to("cuda", torch.bfloat16)."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        with memory_stage("loading the weights"):
            if device is not None:
                self._offload_device = None
                self.autoencoder.to(device)
                if device.type == "cuda":
                    self.autoencoder.decoder.to(memory_format=torch.channels_last)
            for part in filter(None, (self.transformer, self.guide, self.text_encoder)):
                part.to(device=device, dtype=dtype)
        return self

    def enable_model_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Text encoder, transformer and autoencoder take turns on `device`; else they wait on the CPU."""
        self.to("cpu")
        self._offload_device = torch.device(device)

    def compile(self, **kwargs: Any) -> None:
        """Compile the transformer's blocks, for any image size and prompt length; `kwargs` go to torch.compile."""
        for model in filter(None, (self.transformer, self.guide)):
            for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
                block.compile(**{"dynamic": True, **kwargs})

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options for tqdm, e.g. disable=True."""
        self._progress_bar |= kwargs

    @contextmanager
    def _stage(self, name: str, *parts: Any) -> Iterator[None]:
        """One stage: its parts on the device while it runs, and a shortage of memory reported under its name."""
        with memory_stage(name), torch.no_grad():
            parts = tuple(part for part in parts if part is not None) if self._offload_device else ()
            try:
                for part in parts:
                    part.to(self._offload_device)
                yield
            finally:
                for part in parts:
                    part.to("cpu")

    def encode_prompts(
        self,
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
        guide = self.guide if options.is_guided else None
        if guide is not None and any(negatives):
            raise UserError("negative_prompt does nothing under autoguidance; leave it out, or set_guide(None)")
        columns = [prompts] if others is None else [prompts, others]
        if options.is_guided and guide is None:
            columns = [*columns, negatives]
        texts = [[build_prompt(text, options.system_prompt) for text in column] for column in columns]
        distinct = list(dict.fromkeys(text for column in texts for text in column))
        with self._stage("encoding the prompts", self.text_encoder):
            features = self.text_encoder.encode(distinct).to(self.device)
        rows = [tuple(distinct.index(text) for text in column) for column in texts]
        negative = rows.pop() if options.is_guided and guide is None else None
        mixing = () if others is None else (tuple(1 - weight for weight in weights), tuple(weights))
        return Conditions(features, tuple(rows), negative, guide, options.guidance_scales(count), mixing)

    def decode_latents(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Normalised latents (C, h, w) → images (3, 16h, 16w) in [-1, 1]; up to `decode_pixels` at once."""
        by_shape: dict[torch.Size, list[int]] = {}
        for i, x in enumerate(latents):
            by_shape.setdefault(x.shape, []).append(i)
        images: list[Any] = list(latents)
        with (
            self._stage("decoding", self.autoencoder),
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32),
        ):
            for shape, rows in by_shape.items():
                at_once = max(1, self.decode_pixels // (shape[1] * shape[2] * LATENT_PIXELS**2))
                for begin in range(0, len(rows), at_once):
                    chunk = rows[begin : begin + at_once]
                    raw = self.autoencoder.denormalize(torch.stack([latents[i] for i in chunk]))
                    for i, image in zip(chunk, self.autoencoder.decode(raw).float()):
                        images[i] = image
        return images


def weights_digest(module: nn.Module) -> str:
    """16 hex digits over names, shapes and a sample of the values of all weights."""
    weights = dict(sorted(module.named_parameters()))
    digest = hashlib.sha256(str([(name, tuple(weight.shape)) for name, weight in weights.items()]).encode())
    samples = [weight.detach().flatten()[:: math.ceil(weight.numel() / 64)].bfloat16() for weight in weights.values()]
    digest.update(torch.cat(samples).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
