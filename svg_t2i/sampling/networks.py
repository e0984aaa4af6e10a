"""The networks of a pipeline: compatibility checks, device placement, offload.

Each stage of sampling (encoding, denoising, decoding) runs inside `Networks.stage`. With model offload it brings its
networks to the device for that time, and a shortage of memory is reported under the name of the stage.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autoencoder.common.config import UserError
from autoencoder.model import SVGAutoencoder
from svg_t2i.sampling.memory import memory_stage
from svg_t2i.text.encoder import TextEncoder
from svg_t2i.transformer.model import SVGDiT


class Networks:
    """A frozen autoencoder, a transformer and a text encoder that belong together.

    Attributes:
        guide: a weaker transformer for autoguidance, or None (`set_guide`).
        offload_device: where the networks take turns (`enable_model_cpu_offload`), or None.

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
        self.guide: SVGDiT | None = None
        self.offload_device: torch.device | None = None

    def set_guide(self, guide: SVGDiT | None) -> None:
        """See `SVGT2IPipeline.set_guide`. UserError if the guide's latents or text features are other ones."""
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
        return self.offload_device or next(self.transformer.parameters()).device

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

    def to(self, *args: Any, **kwargs: Any) -> None:
        """Move all networks to a device, transformer and text encoder also to a dtype. Ends the offload."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        with memory_stage("loading the weights"):
            if device is not None:
                self.offload_device = None
                self.autoencoder.to(device)
                if device.type == "cuda":
                    self.autoencoder.decoder.to(memory_format=torch.channels_last)
            for network in filter(None, (self.transformer, self.guide, self.text_encoder)):
                network.to(device=device, dtype=dtype)

    def offload_to(self, device: str | torch.device) -> None:
        """Keep all networks on the CPU; each is on `device` only during its own stage."""
        self.to("cpu")
        self.offload_device = torch.device(device)

    def compile(self, **kwargs: Any) -> None:
        """Compile the transformers' blocks for any image size and prompt length; `kwargs` go to torch.compile."""
        for model in filter(None, (self.transformer, self.guide)):
            for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
                block.compile(**{"dynamic": True, **kwargs})

    @contextmanager
    def stage(self, name: str, *networks: Any) -> Iterator[None]:
        """One stage of sampling (a key of `memory.ADVICE`), without gradients, with its networks on the device."""
        moved = [network for network in networks if network is not None and self.offload_device is not None]
        with memory_stage(name), torch.no_grad():
            try:
                for network in moved:
                    network.to(self.offload_device)
                yield
            finally:
                for network in moved:
                    network.to("cpu")


def weights_digest(module: nn.Module) -> str:
    """16 hex digits over names, shapes and a sample of the values of all weights."""
    weights = dict(sorted(module.named_parameters()))
    digest = hashlib.sha256(str([(name, tuple(weight.shape)) for name, weight in weights.items()]).encode())
    samples = [weight.detach().flatten()[:: math.ceil(weight.numel() / 64)].bfloat16() for weight in weights.values()]
    digest.update(torch.cat(samples).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
