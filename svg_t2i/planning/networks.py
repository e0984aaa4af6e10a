"""The networks of a run without values: how large they are, before anything is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from autoencoder.common.config import build, find_config, locate, read_config
from autoencoder.model import ModelConfig, SVGAutoencoder
from svg_t2i.checkpoints.adapters import LoraSettings, add_adapter
from svg_t2i.features.settings import AutoencoderSource, TextSource
from svg_t2i.loading.quantization import count_quantizable
from svg_t2i.planning.memory import META
from svg_t2i.text.loading import skeleton
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.transformer.packing import Sizes, TextFeatures

GEMMA_PARAMETERS, GEMMA_WIDTH = 2_614_341_888, 2304  # gemma-2-2b
GEMMA_IN_BLOCKS = 2_024_275_968  # of them, in the linear layers of its blocks


@dataclass(frozen=True)
class TextSize:
    """Of a text encoder. assumed: it is not here, and taken to be as large as Gemma-2-2B.

    in_blocks: the parameters that quantisation keeps in 8 bits.
    """

    parameters: int
    width: int
    in_blocks: int
    assumed: bool = False


def text_size(source: TextSource) -> TextSize:
    """Parameters and width of the text encoder that a run names."""
    model = None if source.path == "random" else skeleton(source.path)
    if model is None:
        return TextSize(GEMMA_PARAMETERS, GEMMA_WIDTH, GEMMA_IN_BLOCKS, assumed="gemma-2-2b" not in source.path)
    return TextSize(count(model), model.config.hidden_size, count_quantizable(model))


def autoencoder_skeleton(source: AutoencoderSource) -> SVGAutoencoder:
    """The autoencoder of a YAML file or a saved folder, on the meta device.

    Raises:
        UserError: there is no such file, or it describes none.
    """
    folder = locate(source.config)
    path = folder / "config.json" if folder.is_dir() else find_config(source.config)
    content = read_config(path)
    params = content.get("params") or content.get("model", {}).get("params", {})
    return autoencoder_of(build(ModelConfig, params, str(path)))


def autoencoder_of(config: ModelConfig) -> SVGAutoencoder:
    """An autoencoder on the meta device; the weights that the settings name are not looked for."""
    config = replace(config, ckpt_path=None, dinoconfig=replace(config.dinoconfig, weights=None))
    with META:
        return SVGAutoencoder(config)


def transformer_of(sizes: DiTConfig, lora: LoraSettings | None = None) -> SVGDiT:
    """A transformer in bf16 on the meta device, with an adapter where there is to be one."""
    with META:
        transformer = SVGDiT(sizes)
        if lora is not None:
            add_adapter(transformer, lora)
        return transformer.to(torch.bfloat16)


@dataclass(frozen=True)
class TransformerCounts:
    """Parameters of a transformer without an adapter, of those that are trained, and of one of its blocks."""

    all: int
    trained: int
    block: int


@lru_cache
def transformer_counts(sizes: DiTConfig, lora: LoraSettings | None = None) -> TransformerCounts:
    """How many parameters a transformer has, and how many of them, or of its adapter, are trained."""
    transformer = transformer_of(sizes, lora)
    trained = sum(weight.numel() for weight in transformer.parameters() if weight.requires_grad)
    total = count(transformer) - (0 if lora is None else trained)
    return TransformerCounts(total, trained, count(transformer.layers[0]))


def velocity(transformer: SVGDiT, grids: Sizes, lengths: Sequence[int], timesteps: int) -> Tensor:
    """A pass for latents of such grids with captions of so many tokens, at so many times."""
    sizes, patch = transformer.config, transformer.config.patch_size**2
    tokens = torch.empty(sum(h * w for h, w in grids) // patch, patch * sizes.in_channels, device=META)
    features = torch.empty(sum(lengths), sizes.cap_feat_dim, device=META, dtype=torch.bfloat16)
    times = torch.empty(timesteps, device=META)
    scales = times if sizes.guidance_embed else None
    return transformer.forward_packed(
        tokens, tuple(grids), times, TextFeatures(features, tuple(lengths)), guidance=scales
    )


def count(*networks: nn.Module) -> int:
    """Parameters of networks."""
    return sum(weight.numel() for network in networks for weight in network.parameters())


def size(*networks: nn.Module) -> int:
    """Bytes of networks, buffers included."""
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    return sum(tensor.nbytes for tensor in tensors)
