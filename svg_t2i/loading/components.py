"""The networks as models of diffusers: what its pipelines, offloading, adapters and quantisation expect of one.

The networks themselves know nothing of diffusers; the mixins join here. Every entry of theirs (encode, decode, refine,
…) goes through `forward`, because that is where accelerate and diffusers hang their hooks. A saved pipeline names this
module in its model_index.json.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from autoencoder import model as autoencoder_model
from autoencoder.common.config import UserError, to_dict
from svg_t2i.transformer import model as transformer_model
from svg_t2i.transformer.config import DiTConfig


def _through_forward(name: str) -> Callable[..., Any]:
    """A method that calls that of the network, by way of `forward` and its hooks."""

    def entry(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self(*args, method=name, **kwargs)

    entry.__name__ = name
    return entry


class Component(ModelMixin, ConfigMixin):
    """What both networks share: a view of a plain one, and one door for all hooks."""

    config_name = "config.json"
    _gradient_checkpointing_func = None

    @classmethod
    def adopt(cls, network: nn.Module) -> Any:
        """`network` as a component: the same weights and sub-modules, nothing is copied."""
        if isinstance(network, cls):
            return network
        view = cls.__new__(cls)
        view.__dict__.update({name: value for name, value in network.__dict__.items() if name != "config"})
        view.register_to_config(**cls.describe(network))
        return view

    @staticmethod
    def describe(network: nn.Module) -> dict[str, Any]:
        """The content of the network's config.json."""
        raise NotImplementedError

    def forward(self, *args: Any, method: str = "forward", **kwargs: Any) -> Any:
        """The network's `method`."""
        return getattr(super(), method)(*args, **kwargs)


class SVGDiT(Component, PeftAdapterMixin, transformer_model.SVGDiT):
    """The transformer. Its config.json holds the fields of `DiTConfig`, and `fingerprints` of what it belongs to."""

    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]
    # what is small, or whose dtype tells in which to compute
    _skip_layerwise_casting_patterns = ["x_embedder", "t_embedder", "cap_embedder", "norm", "final_layer", "aux_head"]

    refine = _through_forward("refine")
    forward_packed = _through_forward("forward_packed")

    set_attention_backend = transformer_model.SVGDiT.set_attention_backend

    def reset_attention_backend(self) -> None:
        """Let attention be computed as is fastest here."""
        self.set_attention_backend("auto")

    def __init__(self, fingerprints: Mapping[str, Any] | None = None, **sizes: Any) -> None:
        transformer_model.SVGDiT.__init__(self, DiTConfig(**sizes))
        self.register_to_config(fingerprints=dict(fingerprints or {}))

    @property
    def config(self) -> Any:
        """The fields of `DiTConfig` and `fingerprints`, a frozen dictionary whose entries are attributes as well."""
        return self._internal_dict

    @config.setter
    def config(self, sizes: DiTConfig) -> None:
        self.register_to_config(**vars(sizes))

    @staticmethod
    def describe(network: nn.Module) -> dict[str, Any]:
        return {**vars(network.config), "fingerprints": {}}

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        return {"self", "fingerprints", *(field.name for field in fields(DiTConfig))}


class SVGAutoencoder(Component, autoencoder_model.SVGAutoencoder):
    """The autoencoder. Its folder is that of `autoencoder.model`, statistics included; its weights stay fp32."""

    encode = _through_forward("encode")
    decode = _through_forward("decode")
    normalize = _through_forward("normalize")
    denormalize = _through_forward("denormalize")

    @staticmethod
    def describe(network: nn.Module) -> dict[str, Any]:
        return to_dict(network.model_config)

    def to(self, *args: Any, **kwargs: Any) -> SVGAutoencoder:
        """Move to a device. A dtype is left aside: decoding computes in the pipeline's, under autocast."""
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None:
            return self
        super().to(device=device, non_blocking=non_blocking)
        if device.type == "cuda":
            self.decoder.to(memory_format=torch.channels_last)
        return self

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, subfolder: str | None = None, **_: Any) -> SVGAutoencoder:
        """From a folder of `save_pretrained`. What else diffusers says (dtype, variant, …) does not concern it."""
        place = os.path.join(folder, subfolder) if subfolder else folder
        return cls.adopt(autoencoder_model.SVGAutoencoder.from_pretrained(place))

    def save_pretrained(self, folder: str | os.PathLike, **_: Any) -> None:
        """Write configuration, weights (safetensors) and statistics."""
        if next(self.parameters()).is_meta:
            raise UserError("the autoencoder's weights are offloaded; save the pipeline before enabling an offload")
        autoencoder_model.SVGAutoencoder.save_pretrained(self, folder)
