"""The frozen networks of training: images → clean latents, captions → text features.

Their fingerprints are recorded in every checkpoint: a DiT means nothing to other encoders or statistics.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder.common.config import UserError, locate
from autoencoder.common.processes import World
from autoencoder.evaluation.crops import Crops
from autoencoder.evaluation.latent_statistics import measure, pooled
from autoencoder.images.files import to_float
from autoencoder.images.manifest import ImageSource
from autoencoder.latents.drift import drift
from autoencoder.latents.statistics import LatentStats
from autoencoder.model import SVGAutoencoder
from svg_t2i.data.feature_cache import FeatureBatch
from svg_t2i.data.sources import TrainBatch
from svg_t2i.features.sharded_at_rest import ShardedAtRest
from svg_t2i.text.encoder import TextEncoder, make_toy_text_encoder
from svg_t2i.training.settings import AutoencoderSource, TrainConfig
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.transformer.packing import TextFeatures

log = logging.getLogger(__name__)

MEASURED_IMAGES = 1024
COMPARED_IMAGES = 8
FAR_OFF = 0.5  # drift that so few images show only if the statistics are wrong for them
VOCABULARY_SAMPLES = 10_000


@dataclass(frozen=True)
class MicroBatch:
    """B samples ready for the transformer, on its device."""

    tokens: Tensor  # (T, p·p·C) clean normalised latents, fp32
    sizes: tuple[tuple[int, int], ...]  # (h, w) of each latent
    positions: Tensor  # (B,) int64, in the training stream
    resolutions: Tensor  # (B,) int64, nominal side of each image in pixels: sets its timestep shift
    text: TextFeatures


class CaptionCache:
    """Text features by caption: each is encoded once while it stays among the recent ones (up to `max_tokens`).

    A caption's features depend in their last bits on what it is encoded with. Emptying the cache at every checkpoint
    makes a resumed run repeat the uninterrupted one bit for bit.
    """

    def __init__(self, encoder: TextEncoder, max_tokens: int):
        self.encoder, self.max_tokens = encoder, max_tokens
        self._features: OrderedDict[str, Tensor] = OrderedDict()  # least recently used first
        self._tokens = 0

    def __call__(self, captions: Sequence[str]) -> TextFeatures:
        """Features of all captions, in order, on the encoder's device."""
        distinct = list(dict.fromkeys(captions))
        found = {caption: self._features[caption] for caption in distinct if caption in self._features}
        missing = [caption for caption in distinct if caption not in found]
        if missing:
            encoded = self.encoder.encode(missing)
            found |= zip(missing, encoded.features.split(encoded.lengths))
        if self.max_tokens:
            self._remember(found)
        rows = [found[caption] for caption in captions]
        return TextFeatures(torch.cat(rows), tuple(len(row) for row in rows))

    def _remember(self, used: Mapping[str, Tensor]) -> None:
        for caption, features in used.items():
            if caption not in self._features:
                self._features[caption] = features.clone()  # a view would keep its whole batch alive
                self._tokens += len(features)
            self._features.move_to_end(caption)
        while self._tokens > self.max_tokens:
            _, dropped = self._features.popitem(last=False)
            self._tokens -= len(dropped)

    def clear(self) -> None:
        """Forget everything."""
        self._features.clear()
        self._tokens = 0


class FrozenNetworks:
    """Autoencoder and text encoder: images and captions → what the transformer is trained on.

    Attributes:
        fingerprints: identity of both, recorded in checkpoints.
        whole: context manager; inside it the networks can be used whether or not they are sharded at rest.
    """

    def __init__(self, autoencoder: SVGAutoencoder, text_encoder: TextEncoder, cache_tokens: int, precision: str):
        self.autoencoder, self.precision = autoencoder, precision
        self.captions = CaptionCache(text_encoder, cache_tokens)
        self.fingerprints: dict[str, Any] = {
            "autoencoder": autoencoder.fingerprint(),
            "text_encoder": text_encoder.fingerprint(),
        }
        self.whole: Callable[[], AbstractContextManager] = nullcontext

    def shard(self, world: World) -> None:
        """Keep a share of the weights on each rank from now on (see `ShardedAtRest`)."""
        self.whole = ShardedAtRest((self.autoencoder, self.captions.encoder.model), world).whole

    @torch.no_grad()
    def prepare(
        self, batches: Sequence[TrainBatch | FeatureBatch], transformer: SVGDiT, device: torch.device
    ) -> list[MicroBatch]:
        """Encode a step's micro-batches from the loader, one after another; those of a cache only move."""
        with self.whole():
            return [self._prepare(batch.to(device), transformer) for batch in batches]

    def _prepare(self, batch: TrainBatch | FeatureBatch, transformer: SVGDiT) -> MicroBatch:
        """One micro-batch on its device. Latents are normalised in fp32 whatever the precision."""
        if isinstance(batch, FeatureBatch):
            return MicroBatch(*transformer.pack(batch.unpacked()), batch.positions, batch.resolutions, batch.text)
        tokens, sizes = [], []
        for images in batch.images:  # (n, 3, H, W) uint8
            with mixed_precision(self.precision, images.device):
                latents = self.autoencoder.encode(to_float(images))  # (n, C, h, w)
            group, group_sizes = transformer.pack(self.autoencoder.normalize(latents.float()))
            tokens.append(group)
            sizes += group_sizes
        text = self.captions(batch.captions)
        return MicroBatch(torch.cat(tokens), tuple(sizes), batch.positions, batch.resolutions, text)


def mixed_precision(precision: str, device: torch.device) -> torch.autocast:
    """Autocast to bf16 when `precision` says so. Weights, reductions and losses stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# ------------------------------------------------------------------------------------------------------------ loading


def load_autoencoder(source: AutoencoderSource) -> SVGAutoencoder:
    """The autoencoder that `source` describes, on the CPU.

    Raises:
        UserError: something is missing or does not fit; or encoder weights for a folder that has its own.
    """
    path = locate(source.config)
    stats = None if source.stats is None else locate(source.stats)
    if not path.is_dir():
        weights = (
            [] if source.encoder_weights is None else [f"model.params.dinoconfig.weights={source.encoder_weights}"]
        )
        checkpoint = None if source.checkpoint is None else locate(source.checkpoint)
        return SVGAutoencoder.from_config(source.config, checkpoint, stats, weights)
    for name in ("checkpoint", "encoder_weights"):
        if getattr(source, name) is not None:
            raise UserError(f"autoencoder.{name} is for a YAML config; the folder {path} brings its own weights")
    return SVGAutoencoder.from_pretrained(path, stats=stats)


def load_frozen(config: TrainConfig, world: World) -> FrozenNetworks:
    """Both networks on this process's device, the text encoder in the run's precision.

    Raises:
        UserError: as `load_autoencoder` and `TextEncoder.from_pretrained`; or there are no latent statistics.
    """
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    text = config.text_encoder
    with world.main_first():  # one process downloads, the others find the files
        text_encoder = TextEncoder.from_pretrained(text.path, text.max_length, dtype, world.device)
        autoencoder = load_autoencoder(config.autoencoder).to(world.device)
    if autoencoder.stats is None:
        raise UserError(
            "autoencoder.stats is not set and the autoencoder brings no latent statistics: give the published file or "
            "one of python -m autoencoder.measure_latents, or 'measure' to take them from the training images"
        )
    frozen = FrozenNetworks(autoencoder, text_encoder, text.cache_tokens, config.train.precision)
    if config.parallel.shard_frozen and world.size > 1:
        frozen.shard(world)
    return frozen


def fill_in(config: TrainConfig, manifest: ImageSource, world: World) -> TrainConfig:
    """Make what the settings ask to be made, once per results folder, and name the files in the settings returned.

    `autoencoder.stats: measure` takes latent statistics from up to `MEASURED_IMAGES` training images, and
    `text_encoder.path: random` is a small random text encoder with the manifest's words (for trials without weights).
    """
    folder = Path(config.results_dir)
    with world.main_first():
        if config.autoencoder.stats == "measure":
            path = folder / "latent_stats.safetensors"
            config = replace(config, autoencoder=replace(config.autoencoder, stats=str(path)))
            if not path.exists():
                _measure(config, manifest, world.device).save(path)
        if config.text_encoder.path == "random":
            path = folder / "text_encoder"
            config = replace(config, text_encoder=replace(config.text_encoder, path=str(path)))
            log.warning("text_encoder.path=random: a small random text encoder with a word tokenizer, for trials only")
            if not path.exists():
                samples = (manifest[i] for i in range(min(len(manifest), VOCABULARY_SAMPLES)))
                make_toy_text_encoder((caption for sample in samples for caption in sample.captions), path)
    return config


def _measure(config: TrainConfig, manifest: ImageSource, device: torch.device) -> LatentStats:
    log.info("measuring latent statistics over the training images")
    autoencoder = load_autoencoder(replace(config.autoencoder, stats=None)).to(device)
    images = Crops(manifest, trained_resolutions(config), config.data.widest, MEASURED_IMAGES)
    return pooled(measure(autoencoder, images)).result(autoencoder.latent_fingerprint(), images.resolutions)


def trained_resolutions(config: TrainConfig) -> list[int]:
    """Of all sources, ascending."""
    return sorted({source.resolution for source in config.data.all_sources})


def warn_of_statistics(config: TrainConfig, frozen: FrozenNetworks, manifest: ImageSource, world: World) -> None:
    """Warn of latent statistics that were measured at other resolutions than training is at, and say how they fit.

    The numbers come from up to `COMPARED_IMAGES` training images. Statistics that do not tell their resolutions
    (published ones) are warned of if they are far off. All ranks call this: they may have to share the weights.
    """
    stats = frozen.autoencoder.stats
    others = [resolution for resolution in trained_resolutions(config) if resolution not in stats.resolutions]
    if not others:
        return
    with frozen.whole():
        seen = measure(frozen.autoencoder, Crops(manifest, others, config.data.widest, COMPARED_IMAGES))
    measured_at = f"were measured at {', '.join(map(str, stats.resolutions))} px"
    for resolution, accumulator in zip(others, seen):
        try:
            found = drift(stats, accumulator.result())
        except UserError as error:  # no readable image, which stops training itself, or nothing but plain ones
            if world.is_main:
                log.info("the latent statistics were not compared with training at %d px: %s", resolution, error)
            continue
        if world.is_main and (stats.resolutions or found.size > FAR_OFF):
            log.warning(
                "the latent statistics %s %s, training is at %d px: on a few training images, %s. Measure them at this "
                "resolution (autoencoder.stats=measure, or python -m autoencoder.measure_latents), unless the weights "
                "you start from were trained with them",
                config.autoencoder.stats or f"of {config.autoencoder.config}",
                measured_at if stats.resolutions else "do not fit the images", resolution, found,
            )  # fmt: skip
