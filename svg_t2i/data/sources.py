"""Training data: sources of images and captions → samples and batches.

What is unusual here: every random choice about a sample (caption, dropout, crop) is a function of the seed and of the
sample's position in the training stream. It does not depend on the number of workers or processes, on the micro-batch
or on where a run was interrupted; the flow-matching noise is keyed by the same positions. See `svg_t2i.data.loader`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from autoencoder.common.config import UserError, locate
from autoencoder.images.files import LATENT_PIXELS, aspect_buckets, crop_to_size, nearest_bucket, to_uint8_tensor
from autoencoder.sources.failures import Failures
from autoencoder.sources.opening import open_source
from autoencoder.sources.source import ImageSource, Reading, Sample
from svg_t2i.data.draws import Augmentation, crop_rng
from svg_t2i.data.feature_cache import CachedDataset, FeatureCache
from svg_t2i.data.settings import DataConfig
from svg_t2i.text.encoder import SYSTEM_PROMPTS, build_prompt

BYTES_PER_TOKEN = 4  # of UTF-8, about, in English as in Chinese; an estimate is enough to balance micro-batches


@dataclass(frozen=True)
class TrainItem:
    """One training sample."""

    image: Tensor  # (3, H, W) uint8
    caption: str  # with its system prompt; "" where the caption was dropped
    position: int  # in the training stream of all ranks
    resolution: int  # of its source
    replaced: bool  # by the sample after it, because it was unusable


@dataclass(frozen=True)
class TrainBatch:
    """One micro-batch, ordered by image size: sample i is row i of the concatenated groups.

    Attributes:
        images: groups (n_i, 3, H_i, W_i) uint8 of equally sized images, in order of first appearance.
        captions: the B texts, system prompts applied, "" for dropped ones.
        positions: (B,) int64, position of each sample in the training stream of all ranks.
        resolutions: (B,) int64, nominal side of each image in pixels, which sets its timestep shift.
        replaced: how many of the samples stand in for unusable ones.
        counted: False for a micro-batch that only keeps its process in step with the others, which have one more.
    """

    images: tuple[Tensor, ...]
    captions: tuple[str, ...]
    positions: Tensor
    resolutions: Tensor
    replaced: int = 0
    counted: bool = True

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(H, W) in pixels of each sample."""
        return tuple((group.shape[2], group.shape[3]) for group in self.images for _ in range(group.shape[0]))

    def to(self, device: torch.device | str) -> TrainBatch:
        """Move the tensors; from pinned memory the copy overlaps with computation."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> TrainBatch:
        """Called by DataLoader's pinning thread."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> TrainBatch:
        images = tuple(map(function, self.images))
        return replace(self, images=images, positions=function(self.positions), resolutions=function(self.resolutions))


class T2IDataset(Dataset[TrainItem]):
    """Images and captions of one source, cropped to aspect buckets.

    Args:
        manifest: where the images come from; it replaces a bounded number of unreadable ones.
        resolution: crops have about resolution² pixels; a multiple of 16.
        max_aspect: largest ratio of the sides; 1 gives squares only.
        system_prompt: key of `SYSTEM_PROMPTS` for all captions; None takes the one of the manifest's convention
            ("base" for path/prompt, "align" for image_path/super_high_quality_caption).
        augmentation: what varies from visit to visit, and the seed.
        jpeg_draft: decode large JPEGs at a fraction of their size, see `load_image`.
        max_caption_tokens: where the text encoder cuts, for estimates of length.

    Raises:
        UserError: if an argument is out of its range.
    """

    def __init__(
        self,
        manifest: ImageSource,
        resolution: int,
        max_aspect: float = 4.0,
        system_prompt: str | None = None,
        augmentation: Augmentation | None = None,
        jpeg_draft: bool = False,
        max_caption_tokens: int = 256,
    ):
        if system_prompt is not None:
            build_prompt("", system_prompt)  # an unknown name fails now, not in a worker
        self.manifest, self.resolution = manifest, resolution
        self.buckets = aspect_buckets(resolution, max_aspect)
        self.system_prompt = system_prompt
        self.augmentation = augmentation or Augmentation()
        self.jpeg_draft, self.max_caption_tokens = jpeg_draft, max_caption_tokens

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    def item_bytes(self) -> int:
        """Size of the largest sample."""
        return 3 * max(width * height for width, height in self.buckets)

    def __getitem__(self, key: tuple[int, int]) -> TrainItem:
        """The sample at `key` = (position in the training stream, index in the manifest)."""
        position, index = key
        image, texts, replaced = self.load(index)
        draw = self.augmentation.draw(position)
        text = texts[draw.choose_caption(list(map(len, texts)))]
        if self.augmentation.crops_per_image is None:
            rng = draw.rng
        else:
            rng = crop_rng(index, self.augmentation.choose_crop(draw))
        crop = crop_to_size(image, nearest_bucket(image.size, self.buckets), rng)
        return TrainItem(to_uint8_tensor(crop), "" if draw.dropped else text, position, self.resolution, replaced)

    def load(self, index: int) -> tuple[Image, list[str], bool]:
        """The image at `index`, its captions with their system prompts, and whether another sample replaces it."""
        covering = (lambda size: nearest_bucket(size, self.buckets)) if self.jpeg_draft else None
        image, sample, found = self.manifest.load(index, covering)
        if not sample.captions:
            raise UserError(f"{sample.path} has no caption; text-to-image training needs one for every image")
        return image, self.texts(sample), found != index

    def texts(self, sample: Sample) -> list[str]:
        """The captions of a sample with their system prompts."""
        kind = self.system_prompt or sample.caption_kind
        return [build_prompt(caption, kind) for caption in sample.captions]

    def fixed_crops(self, index: int, image: Image) -> list[Tensor]:
        """All `crops_per_image` crops (3, H, W) uint8 of an image loaded from `index`."""
        size = nearest_bucket(image.size, self.buckets)
        count = self.augmentation.crops_per_image or 0
        return [to_uint8_tensor(crop_to_size(image, size, crop_rng(index, crop))) for crop in range(count)]

    def tokens(self, position: int, index: int) -> int:
        """About how many tokens image and caption of a visit have, from what is known without reading the image."""
        draw = self.augmentation.draw(position)
        try:
            size, caption_bytes = self.manifest.hint(index)
        except UserError:  # loading will replace the entry and report it
            size, caption_bytes = None, (0,)
        width, height = nearest_bucket(size, self.buckets) if size else (self.resolution, self.resolution)
        text = 0
        if not draw.dropped:
            text = len(SYSTEM_PROMPTS[self.system_prompt or "base"]) + caption_bytes[draw.choose_caption(caption_bytes)]
        caption = 1 + ceil(text / BYTES_PER_TOKEN)
        return width * height // LATENT_PIXELS**2 + min(caption, self.max_caption_tokens)

    @staticmethod
    def collate(items: Sequence[TrainItem]) -> TrainBatch:
        """Group items by image size, sizes in order of first appearance, items of a size in their order."""
        groups: dict[torch.Size, list[TrainItem]] = {}
        for item in items:
            groups.setdefault(item.image.shape, []).append(item)
        ordered = [item for group in groups.values() for item in group]
        return TrainBatch(
            images=tuple(torch.stack([item.image for item in group]) for group in groups.values()),
            captions=tuple(item.caption for item in ordered),
            positions=torch.tensor([item.position for item in ordered]),
            resolutions=torch.tensor([item.resolution for item in ordered]),
            replaced=sum(item.replaced for item in ordered),
        )


# --- from settings ----------------------------------------------------------------------------------------------


def open_sources(config: DataConfig) -> list[ImageSource]:
    """The sources that the settings name, sharing one count of unusable samples. Missing indexes are made."""
    reading = Reading(
        exif_orientation=config.exif_orientation,
        index_folder=None if config.index_folder is None else Path(config.index_folder).expanduser(),
        failures=Failures(config.max_errors),
    )
    return [
        open_source(
            source.path,
            replace(reading, image_column=source.image_column, caption_column=source.caption_column),
        )
        for source in config.all_sources
    ]


def make_datasets(
    config: DataConfig, sources: Sequence[ImageSource], seed: int, max_caption_tokens: int
) -> list[T2IDataset]:
    """A dataset of images for each source."""
    mix = config.caption_mix
    augmentation = Augmentation(
        config.caption_dropout_prob, mix and (mix.short, mix.middle, mix.long), config.crops_per_image, seed
    )
    return [
        T2IDataset(
            source,
            settings.resolution,
            config.widest,
            settings.system_prompt,
            augmentation,
            config.jpeg_draft,
            max_caption_tokens,
        )
        for settings, source in zip(config.all_sources, sources, strict=True)
    ]


def open_caches(
    config: DataConfig, datasets: Sequence[T2IDataset], fingerprints: Mapping[str, Any], rank: int = 0, ranks: int = 1
) -> list[CachedDataset]:
    """The feature caches that the settings name, for these datasets and frozen networks.

    Raises:
        UserError: one is missing, incomplete, or was made from other images, captions, settings or networks.
    """
    caches = []
    for source, dataset in zip(config.all_sources, datasets, strict=True):
        folder, digest = locate(source.feature_cache), partial(samples_digest, dataset.manifest)
        cache = FeatureCache.open(folder, cache_fingerprint(dataset, fingerprints), digest, rank, ranks)
        caches.append(CachedDataset(cache, dataset.augmentation, dataset.resolution))
    return caches


def samples_digest(source: ImageSource, indices: Sequence[int]) -> str:
    """16 hex digits that change when the captions or image files of some of these samples do."""
    digest = hashlib.sha256()
    for index in indices:
        try:
            digest.update(source.stamp(index))
        except UserError as error:
            digest.update(str(error).encode(errors="replace"))
    return digest.hexdigest()[:16]


def cache_fingerprint(dataset: T2IDataset, fingerprints: Mapping[str, Any]) -> dict[str, Any]:
    """All that the features of a dataset depend on. `fingerprints`: of the frozen networks."""
    prompts = (
        {dataset.system_prompt: SYSTEM_PROMPTS[dataset.system_prompt]} if dataset.system_prompt else SYSTEM_PROMPTS
    )
    return {
        "source": dataset.manifest.fingerprint(),
        "content": dataset.manifest.content_fingerprint,
        "samples": len(dataset),
        "resolution": dataset.resolution,
        "crop sizes": hashlib.sha256(repr(dataset.buckets).encode()).hexdigest()[:16],
        "crops per image": dataset.augmentation.crops_per_image,
        "jpeg draft": dataset.jpeg_draft,
        "EXIF orientation": dataset.manifest.reading.exif_orientation,
        **{f"autoencoder {name}": value for name, value in fingerprints["autoencoder"].items()},
        "text encoder": fingerprints["text_encoder"],
        "caption tokens": dataset.max_caption_tokens,
        "system prompts": hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],
    }
