"""The networks of a run: the frozen ones, and the transformer with the weights it starts from."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autoencoder.common.config import UserError
from autoencoder.common.processes import World
from autoencoder.sources.source import ImageSource
from svg_t2i.checkpoints import weights
from svg_t2i.checkpoints.adapters import LoraSettings, add_adapter
from svg_t2i.features.frozen import FrozenNetworks, load_frozen
from svg_t2i.features.preparation import make_text_encoder, measure_statistics, warn_of_statistics
from svg_t2i.loading.sources import find_transformer
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


def make_transformer(
    config: TrainConfig, frozen: FrozenNetworks, newest: Path | None, world: World
) -> tuple[SVGDiT, dict[str, Any]]:
    """The model with the weights that training starts from, and what a checkpoint records of them.

    Random ones, those of `init_from` or of a teacher; with `lora` a frozen model and a fresh adapter. newest: the
    checkpoint that will fill the trained weights, if there is one.
    """
    if config.lora is not None:
        return adapted_transformer(config, config.lora, frozen, newest, world)
    sizes = config.model_config(frozen.autoencoder.channels, frozen.captions.encoder.hidden_size)
    torch.manual_seed(config.train.seed)
    with world.device:
        transformer = SVGDiT(sizes)
    first, averaged = config.init_from, False
    if first is None and config.distill is not None:
        first, averaged = config.distill.teacher, True  # a student starts as its teacher
    if newest is None and first is not None:
        source = find_transformer(first)
        weights.init_from(transformer, source, averaged)
        if weights.read_meta(source).get("fingerprints", frozen.fingerprints) != frozen.fingerprints:
            log.warning("%s was trained with another autoencoder, statistics or text encoder than this run", source)
    return transformer, {}


def adapted_transformer(
    config: TrainConfig, lora: LoraSettings, frozen: FrozenNetworks, newest: Path | None, world: World
) -> tuple[SVGDiT, dict[str, Any]]:
    """The model of `init_from`, frozen and in the precision of the run, with a fresh adapter in fp32.

    Its weights are the averaged ones, which is what pictures are made with. After a resume they are those of before.

    Raises:
        UserError: it is another model than the settings say, other weights than before, or was trained with other
            networks.
    """
    recorded = {} if newest is None else weights.read_meta(newest).get(weights.BASE, {})
    folder = Path(recorded.get("folder") or find_transformer(config.init_from or "").resolve())
    transformer, digest = weights.load_base(folder, recorded.get("digest"))
    sizes = config.model_config(frozen.autoencoder.channels, frozen.captions.encoder.hidden_size)
    if sizes != transformer.config:
        other = [f"{key} is {value} there and {getattr(sizes, key)} here"
                 for key, value in vars(transformer.config).items() if value != getattr(sizes, key)]  # fmt: skip
        raise UserError(f"init_from = {folder}: {', '.join(other)}; give model and model_overrides of the one there")
    weights.check_fingerprints(folder, frozen.fingerprints["autoencoder"], frozen.fingerprints["text_encoder"])
    torch.manual_seed(config.train.seed)
    transformer = transformer.to(torch.bfloat16 if config.train.precision == "bf16" else torch.float32).train()
    add_adapter(transformer, lora)
    return transformer.to(world.device), {weights.BASE: {"folder": str(folder), "digest": digest}}
