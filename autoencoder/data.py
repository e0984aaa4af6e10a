"""Training data of the autoencoder: what a config may name as `data.target`, crops, batches grouped by size.

Samples are addressed by (position in the stream, index): the crop is a function of (seed, position), whatever worker
or process cuts it. Images travel as uint8 and become floats on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from autoencoder.config import REPO_ROOT, resolve_target
from autoencoder.images import Size, aspect_buckets, crop_to_size, nearest_bucket, to_uint8_tensor
from autoencoder.manifest import ImageFolder, ImageSource, Manifest, ResumableSampler, sample_rng


@dataclass(frozen=True)
class ManifestParams:
    """Images of a manifest in their native aspect, about `train_resol`² pixels each; captions are not needed."""

    batch_size: int
    json_path: str
    train_resol: int
    num_workers: int = 0
    wrap: bool = True  # published; without effect
    max_aspect: float = 4.0  # own: 1 for squares only
    val_json_path: str | None = None  # own

    def sources(self) -> tuple[ImageSource, ImageSource | None, tuple[Size, ...]]:
        paths = [self.json_path, self.val_json_path]
        train, validation = (Manifest.open(find_data(p), require_captions=False) if p else None for p in paths)
        return train, validation, aspect_buckets(self.train_resol, self.max_aspect)


@dataclass(frozen=True)
class SplitParams:
    data_root: str
    size: int


@dataclass(frozen=True)
class Split:
    target: str
    params: SplitParams

    def source(self, field: str) -> ImageFolder:
        folder = resolve_target(self.target, f"data.params.{field}.target", IMAGENET_SPLITS)
        return ImageFolder(find_data(self.params.data_root), folder)


@dataclass(frozen=True)
class FolderParams:
    """Square crops of data_root/train and data_root/val, the layout of ImageNet."""

    batch_size: int
    train: Split
    validation: Split | None = None
    num_workers: int = 0
    wrap: bool = True  # published; without effect

    def sources(self) -> tuple[ImageSource, ImageSource | None, tuple[Size, ...]]:
        train = self.train.source("train")
        validation = self.validation.source("validation") if self.validation else None
        return train, validation, aspect_buckets(self.train.params.size, max_aspect=1.0)


IMAGENET_SPLITS = {"ldm.data.imagenet.ImageNetTrain": "train", "ldm.data.imagenet.ImageNetValidation": "val"}
DATA: dict[str, type[ManifestParams] | type[FolderParams]] = {
    "utils.data_module_allinone.DataModuleFromConfig": FolderParams,
    "utils.data_module_allinone.DataModuleFromConfigJson": ManifestParams,
    "autoencoder.data.FolderParams": FolderParams,
    "autoencoder.data.ManifestParams": ManifestParams,
}


def find_data(path: str) -> Path:
    """A data path of a config: as given, else from the repository root."""
    candidates = [Path(path).expanduser(), REPO_ROOT / path]
    return next((candidate for candidate in candidates if candidate.exists()), candidates[0])


class ImageDataset(Dataset):
    """Uint8 crops (3, H, W), addressed by (position in the stream, index); `seed` None crops the middle."""

    def __init__(self, source: ImageSource, buckets: tuple[Size, ...], seed: int | None):
        self.source, self.buckets, self.seed = source, buckets, seed

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        position, index = key
        image, _ = self.source.load(index)
        rng = None if self.seed is None else sample_rng(self.seed, position)
        return to_uint8_tensor(crop_to_size(image, nearest_bucket(image.size, self.buckets), rng))


def group_by_size(images: list[Tensor]) -> list[Tensor]:
    """One (n, 3, H, W) tensor per size, in order of first appearance."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for image in images:
        groups.setdefault(image.shape, []).append(image)
    return [torch.stack(group) for group in groups.values()]


class BatchStream:
    """Lists of `batch_size` (position, index) keys. It has no length: Lightning stops by steps, not by epochs."""

    def __init__(self, sampler: ResumableSampler, batch_size: int):
        self.sampler, self.batch_size = sampler, batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        keys = self.sampler.iter_positions()
        return iter(lambda: list(islice(keys, self.batch_size)), [])
