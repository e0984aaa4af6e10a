"""Compute the features of all images and captions once, for training to read instead of encoding them at every visit.

    python -m svg_t2i.cache_features --config configs/svg_t2i/stage1_256.yaml \
        data.feature_cache=/fast/stage1_256 data.crops_per_image=1
    torchrun --nproc_per_node 8 -m svg_t2i.cache_features --config …

Afterwards train with the same config and overrides. Every source of the config needs its own `feature_cache`. Interrupt
and start again at will, on any number of processes: shards that are there are kept, but for those whose captions or
image files have changed since.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from autoencoder.common.commands import Parser, command, require_positive
from autoencoder.common.config import UserError, load_config, locate
from autoencoder.common.processes import World, start_world
from autoencoder.images.files import LATENT_PIXELS, to_float
from autoencoder.sources.failures import FILE_NAME
from autoencoder.sources.source import JoinedSources
from svg_t2i.data import feature_cache
from svg_t2i.data.loader import read_ahead
from svg_t2i.data.sources import T2IDataset, cache_fingerprint, make_datasets, open_sources, samples_digest
from svg_t2i.features.frozen import FrozenNetworks, mixed_precision
from svg_t2i.training.monitor import start_logging
from svg_t2i.training.networks import prepare_frozen
from svg_t2i.training.settings import TrainConfig
from svg_t2i.transformer.packing import TextFeatures

log = logging.getLogger("svg_t2i")

SHARD_BYTES = 1 << 30  # about, of one shard
LOOKED_AT = 128  # samples whose captions are tokenised to estimate sizes
LATENT_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = Parser("svg_t2i.cache_features", __doc__)
    parser.add_config("YAML file of the training that will read the cache")
    parser.add_argument("--batch_size", type=int, default=32, help="images, and captions, encoded at once")
    parser.add_argument("--shard_size", type=int, help="samples per file (default: as many as make 1 GiB)")
    parser.add_argument(
        "--latent_dtype",
        choices=LATENT_TYPES,
        default="float32",
        help="float32 is exact, float16 half as large (error 0.05%%); text keeps the text encoder's own type",
    )
    arguments = parser.parse_intermixed_args(argv)
    require_positive(arguments, "batch_size", "shard_size")
    return arguments


@command
def main(argv: list[str]) -> None:
    """Write the feature cache of the configuration that the command line names."""
    arguments = parse_arguments(argv)
    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    if config.data.all_sources[0].feature_cache is None:
        raise UserError("data.feature_cache is not set: name the folder to fill; training will read it from there")
    if config.data.crops_per_image is None:
        raise UserError(
            "data.crops_per_image is not set: a cache holds a fixed number of crops of each image; 1 is the centre, "
            "more cost as much space again"
        )
    with start_world() as world:
        start_logging(world)
        fill_caches(config, world, arguments.batch_size, arguments.shard_size, LATENT_TYPES[arguments.latent_dtype])


def fill_caches(
    config: TrainConfig, world: World, batch_size: int, shard_size: int | None, latent_dtype: torch.dtype
) -> None:
    """This process's share of the features of all sources of `config`."""
    with world.main_first():
        sources = open_sources(config.data)
    manifest = JoinedSources(sources)
    manifest.failures.keep_in(locate(config.data.all_sources[0].feature_cache) / FILE_NAME)
    config, frozen = prepare_frozen(config, manifest, world)
    datasets = make_datasets(config.data, sources, config.train.seed, config.text_encoder.max_length)
    for settings, dataset in zip(config.data.all_sources, datasets, strict=True):
        folder = locate(settings.feature_cache)
        writer = CacheWriter(folder, dataset, frozen, world, batch_size, latent_dtype)
        with world.main_first():
            writer.start(shard_size)
        writer.run(config.data.num_workers, config.data.prefetch)
        world.barrier()
        log.info("%s is complete", folder)


class CacheWriter:
    """Fills one cache folder together with the other processes: shard s is written by rank s mod world size."""

    def __init__(
        self,
        folder: Path,
        dataset: T2IDataset,
        frozen: FrozenNetworks,
        world: World,
        batch_size: int,
        latent_dtype: torch.dtype,
    ):
        self.folder, self.dataset, self.frozen, self.world = folder, dataset, frozen, world
        self.batch_size, self.latent_dtype = batch_size, latent_dtype
        self.text_encoder = frozen.captions.encoder

    def start(self, shard_size: int | None) -> None:
        """Begin a cache or check one that was begun, and print how large it is going to be.

        Raises:
            UserError: the folder holds another cache, or the disk is too small.
        """
        fingerprint = cache_fingerprint(self.dataset, self.frozen.fingerprints)
        latents, text = self._bytes_per_sample()
        meta = feature_cache.read_meta(self.folder)
        if meta is None:
            fitting = max(1, int(SHARD_BYTES / (latents + text)))
            feature_cache.write_meta(self.folder, fingerprint, shard_size or min(fitting, len(self.dataset)))
        elif self.world.is_main:
            self._drop_what_changed(meta, fingerprint)
        meta = feature_cache.read_meta(self.folder)
        feature_cache.check_fingerprint(self.folder, meta, fingerprint)
        files = feature_cache.cache_files(self.folder, meta)
        missing = [path for path in files[1:] if not path.is_file()]
        if self.world.is_main:
            self._announce(latents, text, len(missing) / len(files[1:]), meta["shard_size"])
        if not files[0].is_file():
            feature_cache.write_unconditional(self.folder, self.text_encoder.encode([""]).features.cpu())

    def _drop_what_changed(self, meta: dict[str, Any], fingerprint: dict[str, Any]) -> None:
        """Delete the shards whose samples are not what they were, so that `run` makes them anew.

        Raises:
            UserError: the settings or networks are others; or all of several shards changed: most likely the folder is
                the cache of other data.
        """
        differing = feature_cache.differences(meta, fingerprint)
        if not differing.keys() <= set(feature_cache.OF_THE_DATA):
            return  # which is refused next
        present = meta | {"fingerprint": fingerprint}
        shards = [path for path in feature_cache.cache_files(self.folder, meta)[1:] if path.is_file()]
        kept = feature_cache.cache_files(self.folder, present)[1:]
        stale = [
            path for path in shards if path not in kept or self._is_stale(path, present, kept.index(path), differing)
        ]
        if len(stale) == len(shards) > 1:
            feature_cache.check_fingerprint(self.folder, meta, fingerprint)
            raise UserError(
                f"feature cache {self.folder}: the image files of all {len(shards)} shards have another size or time "
                "than when it was made; give another folder, or delete this one if its images were replaced"
            )
        if stale:
            log.info("%s: captions or images of %d of %d shards have changed; these are made anew", self.folder,
                     len(stale), len(shards))  # fmt: skip
        for path in stale:
            path.unlink()
        if differing:
            feature_cache.write_meta(self.folder, fingerprint, meta["shard_size"])

    def _is_stale(self, path: Path, meta: dict[str, Any], number: int, differing: dict[str, str]) -> bool:
        samples = feature_cache.shard_range(meta, number)
        return not feature_cache.is_current(path, samples_digest(self.dataset.manifest, samples), not differing)

    def run(self, num_workers: int, prefetch: int) -> None:
        """Write this rank's shards that are not there."""
        meta = feature_cache.read_meta(self.folder)
        shards = feature_cache.cache_files(self.folder, meta)[1:]
        mine = range(self.world.rank, len(shards), self.world.size)
        mine = [number for number in mine if not shards[number].is_file()]
        ranges = [feature_cache.shard_range(meta, number) for number in mine]
        loaded = iter(read_ahead(_Samples(self.dataset), list(chain(*ranges)), num_workers, prefetch * 8))
        started, replaced = time.perf_counter(), 0
        for done, (number, indices) in enumerate(zip(mine, ranges), start=1):
            digest = samples_digest(self.dataset.manifest, indices)  # before they are read: a change meanwhile shows
            replaced += self._write(shards[number], islice(loaded, len(indices)), digest)
            seconds = time.perf_counter() - started
            log.info(
                "%s: %d of %d shards here, %.1f images/s, %.0f min left",
                self.folder, done, len(mine), sum(map(len, ranges[:done])) / seconds,
                seconds / done * (len(mine) - done) / 60,
            )  # fmt: skip
        if replaced:
            log.warning("%s: %d unusable samples hold the features of the ones after them", self.folder, replaced)

    def _write(self, path: Path, samples: Iterator[_Loaded], digest: str) -> int:
        """Encode and write one shard; how many samples were replaced."""
        latents, text, lengths, replaced = [], [], [], []
        while chunk := list(islice(samples, 4 * self.batch_size)):
            latents += self._encode_crops([crops for crops, _, _ in chunk])
            text += self._encode_texts([texts for _, texts, _ in chunk])
            lengths += [list(map(len, texts)) for _, texts, _ in chunk]
            replaced += [stand_in for _, _, stand_in in chunk]
        feature_cache.write_shard(path, latents, text, lengths, replaced, digest)
        return sum(replaced)

    @torch.no_grad()
    def _encode_crops(self, samples: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Normalised latents (C, h, w) of each crop of each sample, encoded in batches of equal size."""
        by_size: dict[torch.Size, list[tuple[int, int]]] = {}
        for i, crops in enumerate(samples):
            for j, crop in enumerate(crops):
                by_size.setdefault(crop.shape, []).append((i, j))
        latents: list[list[Tensor]] = [[torch.empty(0)] * len(crops) for crops in samples]
        for places in by_size.values():
            for first in range(0, len(places), self.batch_size):
                batch = places[first : first + self.batch_size]
                images = torch.stack([samples[i][j] for i, j in batch]).to(self.world.device)
                with mixed_precision(self.frozen.precision, images.device):
                    raw = self.frozen.autoencoder.encode(to_float(images))
                encoded = self.frozen.autoencoder.normalize(raw.float()).to(self.latent_dtype).cpu()
                for (i, j), latent in zip(batch, encoded, strict=True):
                    latents[i][j] = latent
        return latents

    def _encode_texts(self, samples: Sequence[Sequence[str]]) -> list[TextFeatures]:
        """Features of the captions of each sample. Texts of similar length are encoded together."""
        texts = sorted({text for texts in samples for text in texts}, key=lambda text: (len(text), text))
        features: dict[str, Tensor] = {}
        for first in range(0, len(texts), self.batch_size):
            batch = texts[first : first + self.batch_size]
            encoded = self.text_encoder.encode(batch)
            features |= zip(batch, encoded.features.cpu().split(encoded.lengths))
        rows = [[features[text] for text in texts] for texts in samples]
        return [TextFeatures(torch.cat(texts), tuple(map(len, texts))) for texts in rows]

    def _bytes_per_sample(self) -> tuple[float, float]:
        """About, of latents and of text."""
        spread = np.linspace(0, len(self.dataset) - 1, min(len(self.dataset), LOOKED_AT)).astype(int).tolist()
        tokens = []
        for index in spread:
            with suppress(UserError):  # encoding will replace the sample and report it
                texts = self.dataset.texts(self.dataset.manifest[index])
                tokens.append(sum(map(len, self.text_encoder.tokenize(texts))))
        cells = (self.dataset.resolution // LATENT_PIXELS) ** 2 * self.dataset.augmentation.crops_per_image
        text_type = self.text_encoder.model.dtype
        return (
            cells * self.frozen.autoencoder.channels * self.latent_dtype.itemsize,
            float(np.mean(tokens or [0])) * self.text_encoder.hidden_size * text_type.itemsize,
        )

    def _announce(self, latents: float, text: float, missing: float, shard_size: int) -> None:
        """Print sizes. UserError if they exceed the free space."""
        count, gib = len(self.dataset), 1 << 30
        free = shutil.disk_usage(self.folder).free
        needed = count * (latents + text) * missing
        log.info(
            "%s: %d samples × %d crops; latents %.2f GiB + text about %.2f GiB = %.2f GiB in shards of %d samples; "
            "%.0f%% of it to be made, %.2f GiB free",
            self.folder, count, self.dataset.augmentation.crops_per_image, count * latents / gib, count * text / gib,
            count * (latents + text) / gib, shard_size, 100 * missing, free / gib,
        )  # fmt: skip
        if needed > free:
            raise UserError(
                f"data.feature_cache={self.folder}: {needed / gib:.1f} GiB needed, {free / gib:.1f} GiB free; choose "
                "another disk, --latent_dtype float16, or fewer data.crops_per_image"
            )


_Loaded = tuple[list[Tensor], list[str], bool]  # crops, texts, whether the sample stands in for another


class _Samples(Dataset):
    """All fixed crops and all texts of a sample."""

    def __init__(self, dataset: T2IDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> _Loaded:
        image, texts, replaced = self.dataset.load(index)
        return self.dataset.fixed_crops(index, image), texts, replaced


if __name__ == "__main__":
    main()
