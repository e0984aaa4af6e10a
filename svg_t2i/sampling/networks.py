"""The networks of a call: what belongs together, where it runs, and the stages of sampling that use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoencoder.common.config import UserError
from autoencoder.common.weights import weights_digest
from autoencoder.model import SVGAutoencoder
from svg_t2i.sampling.memory import memory_stage
from svg_t2i.text.encoder import TextCache, TextEncoder
from svg_t2i.transformer.model import SVGDiT


@dataclass(frozen=True)
class Networks:
    """A frozen autoencoder, a transformer and a text encoder that belong together.

    Attributes:
        guide: a weaker transformer for autoguidance, or None.
        device: where they compute; with an offload that is not where the weights are.
        dtype: of the transformer's computation.
        texts: features of the texts of earlier calls.
    """

    autoencoder: SVGAutoencoder
    transformer: SVGDiT
    text_encoder: TextEncoder
    guide: SVGDiT | None
    device: torch.device
    dtype: torch.dtype
    texts: TextCache

    def describe(self) -> dict[str, Any]:
        """What identifies the weights. A path does not: a training run has newer ones under it every hour."""
        guide = {} if self.guide is None else {"guide": weights_digest(dict(self.guide.named_parameters()))}
        adapters = active_adapters(self.transformer)
        return {
            "transformer": weights_digest(dict(self.transformer.named_parameters())),
            "autoencoder": self.autoencoder.fingerprint(),
            "decoder": weights_digest(dict(self.autoencoder.decoder.named_parameters())),
            "text_encoder": self.text_encoder.fingerprint(),
            "dtype": str(self.dtype),
            **guide,
            **({"adapters": adapters} if adapters else {}),
        }


@contextmanager
def stage(name: str) -> Iterator[None]:
    """One stage of sampling (a key of `memory.ADVICE`): without gradients; a shortage of memory names it."""
    with memory_stage(name), torch.no_grad():
        yield


def check_widths(autoencoder: SVGAutoencoder, transformer: SVGDiT, hidden_size: int, guide: SVGDiT | None) -> None:
    """UserError when latent channels, text widths or the guide's sizes do not fit each other."""
    sizes = transformer.config
    if autoencoder.channels != sizes.in_channels:
        raise UserError(
            f"the autoencoder has {autoencoder.channels} latent channels, the transformer expects "
            f"{sizes.in_channels}: they do not belong together"
        )
    if hidden_size != sizes.cap_feat_dim:
        raise UserError(
            f"the text encoder's features are {hidden_size} wide, the transformer expects {sizes.cap_feat_dim}: "
            "they do not belong together"
        )
    for name in ("in_channels", "cap_feat_dim", "patch_size", "prediction") if guide is not None else ():
        ours, theirs = getattr(sizes, name), getattr(guide.config, name)
        if ours != theirs:
            raise UserError(f"the guide's {name} is {theirs}, the transformer's is {ours}: they do not fit")


def active_adapters(model: nn.Module) -> dict[str, float]:
    """Name → strength of the adapters that act in a model: weight · alpha / rank of the last layer that has them."""
    strengths: dict[str, float] = {}
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "lora_A"):
            strengths |= {name: module.scaling[name] for name in module.active_adapters if name in module.scaling}
    return strengths
