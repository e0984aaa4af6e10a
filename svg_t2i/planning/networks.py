"""The networks of a run without values: how large they are, before anything is downloaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from autoencoder.common.config import build, find_config, locate, read_config
from autoencoder.model import ModelConfig, SVGAutoencoder
from svg_t2i.features.settings import AutoencoderSource, TextSource
from svg_t2i.planning.memory import META
from svg_t2i.text.loading import skeleton

GEMMA_PARAMETERS, GEMMA_WIDTH = 2_614_341_888, 2304  # gemma-2-2b


@dataclass(frozen=True)
class TextSize:
    """Of a text encoder. assumed: it is not here, and taken to be as large as Gemma-2-2B."""

    parameters: int
    width: int
    assumed: bool = False


def text_size(source: TextSource) -> TextSize:
    """Parameters and width of the text encoder that a run names."""
    model = None if source.path == "random" else skeleton(source.path)
    if model is None:
        return TextSize(GEMMA_PARAMETERS, GEMMA_WIDTH, assumed="gemma-2-2b" not in source.path)
    return TextSize(count(model), model.config.hidden_size)


def autoencoder_skeleton(source: AutoencoderSource) -> SVGAutoencoder:
    """The autoencoder of a YAML file or a saved folder, on the meta device.

    Raises:
        UserError: there is no such file, or it describes none.
    """
    folder = locate(source.config)
    path = folder / "config.json" if folder.is_dir() else find_config(source.config)
    content = read_config(path)
    params = content.get("params") or content.get("model", {}).get("params", {})
    config = build(ModelConfig, params, str(path))
    config = replace(config, ckpt_path=None, dinoconfig=replace(config.dinoconfig, weights=None))
    with META:
        return SVGAutoencoder(config)


def count(*networks: nn.Module) -> int:
    """Parameters of networks."""
    return sum(weight.numel() for network in networks for weight in network.parameters())


def size(*networks: nn.Module) -> int:
    """Bytes of networks, buffers included."""
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    return sum(tensor.nbytes for tensor in tensors)
