"""The networks of a run: the frozen ones, and the transformer with the weights it starts from."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from autoencoder.common.config import locate
from autoencoder.common.processes import World
from autoencoder.sources.source import ImageSource
from svg_t2i.checkpoints import weights
from svg_t2i.features.frozen import FrozenNetworks, load_frozen
from svg_t2i.features.preparation import make_text_encoder, measure_statistics, warn_of_statistics
from svg_t2i.training.settings import TrainConfig
from svg_t2i.transformer.model import SVGDiT

log = logging.getLogger(__name__)


def prepare_frozen(
    config: TrainConfig, manifest: ImageSource, world: World, compare: bool = True
) -> tuple[TrainConfig, FrozenNetworks]:
    """The frozen networks, and the settings with the files that were made for them in `results_dir`.

    compare: warn of latent statistics that do not fit the images.
    """
    folder = Path(config.results_dir)
    config = replace(
        config,
        autoencoder=measure_statistics(config.autoencoder, config.data, manifest, folder, world),
        text_encoder=make_text_encoder(config.text_encoder, manifest, folder, world),
    )
    frozen = load_frozen(
        config.autoencoder, config.text_encoder, config.train.precision, world, config.parallel.shard_frozen
    )
    if compare:
        name = config.autoencoder.stats or f"of {config.autoencoder.config}"
        warn_of_statistics(name, config.data, frozen, manifest, world)
    return config, frozen


def make_transformer(config: TrainConfig, frozen: FrozenNetworks, first: bool, world: World) -> SVGDiT:
    """The model with the weights that the `first` step starts from: random ones, or those of `init_from`."""
    sizes = config.model_config(frozen.autoencoder.channels, frozen.captions.encoder.hidden_size)
    torch.manual_seed(config.train.seed)
    with world.device:
        transformer = SVGDiT(sizes)
    if first and config.init_from is not None:
        source = locate(config.init_from)
        weights.init_from(transformer, source)
        if weights.read_meta(source).get("fingerprints", frozen.fingerprints) != frozen.fingerprints:
            log.warning("%s was trained with another autoencoder, statistics or text encoder than this run", source)
    return transformer
