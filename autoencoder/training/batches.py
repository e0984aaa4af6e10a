"""Training data of the autoencoder: the choices for `data.target`, crops, batches of equal size.

Samples are addressed by (position in the training stream, index): the crop is a function of (seed, position), whatever
worker or process cuts it. Which samples make a batch is a function of the seed, the image sizes and the number of
images per step. Images travel as uint8 and become floats on the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from autoencoder.common.config import UserError, locate, resolve_target
from autoencoder.images.files import (
    Group,
    Size,
    aspect_buckets,
    crop_to_size,
    group_by_size,
    image_size,
    nearest_bucket,
    to_uint8_tensor,
)
from autoencoder.images.order import SampleOrder, sample_rng
from autoencoder.sources.failures import MAX_ERRORS, Failures
from autoencoder.sources.folders import ImageFolder
from autoencoder.sources.opening import open_source
from autoencoder.sources.source import ImageSource, Reading

Key = tuple[int, int]  # position in the training stream, index in the source
HEADER_READERS = 16  # threads; on network storage a header takes milliseconds of waiting

# -- what a config says -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ManifestParams:
    """Images of a manifest, or of all else that `sources.opening` knows, in their native aspect.

    They have about `train_resol`² pixels each; captions are not needed.
    """

    batch_size: int
    json_path: str
    train_resol: int
    num_workers: int = 0
    wrap: bool = True  # published; without effect: the stream has no end
    # -- own --
    max_aspect: float = 4.0  # 1: squares only
    bucket_window: int = 4096  # images among which those of equal size are sought for a batch; 1: as they come
    val_json_path: str | None = None
    image_column: str | None = None  # of a manifest or table; None: found by the usual names
    index_folder: str | None = None  # where indexes of large sources are kept; None: beside them, see sources.spans
    max_errors: float = MAX_ERRORS
    exif_orientation: str = "apply"

    def __post_init__(self) -> None:
        _check_loading(self)
        if self.bucket_window < 1:
            raise UserError(f"bucket_window = {self.bucket_window} must be at least 1")

    def sources(self) -> tuple[ImageSource, ImageSource | None, tuple[Size, ...]]:
        reading, paths = reading_of(self), [self.json_path, self.val_json_path]
        folder = None if self.index_folder is None else Path(self.index_folder).expanduser()
        reading = replace(reading, image_column=self.image_column, index_folder=folder)
        train, validation = (open_source(path, reading) if path else None for path in paths)
        return train, validation, aspect_buckets(self.train_resol, self.max_aspect)


@dataclass(frozen=True)
class SplitParams:
    data_root: str
    size: int


@dataclass(frozen=True)
class Split:
    target: str
    params: SplitParams

    def source(self, field: str, reading: Reading) -> ImageFolder:
        folder = resolve_target(self.target, f"data.params.{field}.target", IMAGENET_SPLITS)
        return ImageFolder(locate(self.params.data_root), folder, reading)


@dataclass(frozen=True)
class FolderParams:
    """Square crops of data_root/train (at random places) and data_root/val (the middle): the layout of ImageNet."""

    batch_size: int
    train: Split
    validation: Split | None = None
    num_workers: int = 0
    wrap: bool = True  # published; without effect: the stream has no end
    # -- own --
    max_errors: float = MAX_ERRORS
    exif_orientation: str = "apply"

    bucket_window = 1  # one size: nothing to sort

    def __post_init__(self) -> None:
        _check_loading(self)
        if self.validation is not None and self.validation.params.size != self.train.params.size:
            sizes = self.validation.params.size, self.train.params.size
            raise UserError(f"validation.params.size = {sizes[0]} must be train.params.size = {sizes[1]}")

    def sources(self) -> tuple[ImageSource, ImageSource | None, tuple[Size, ...]]:
        reading = reading_of(self)
        train = self.train.source("train", reading)
        validation = self.validation.source("validation", reading) if self.validation else None
        return train, validation, aspect_buckets(self.train.params.size, max_aspect=1.0)


def reading_of(params: ManifestParams | FolderParams) -> Reading:
    """How the sources are read; they share one count of unusable images."""
    return Reading(
        require_captions=False, exif_orientation=params.exif_orientation, failures=Failures(params.max_errors)
    )


def _check_loading(params: ManifestParams | FolderParams) -> None:
    if params.batch_size < 1 or params.num_workers < 0:
        raise UserError(
            f"batch_size = {params.batch_size} must be at least 1, num_workers = {params.num_workers} not negative"
        )


IMAGENET_SPLITS = {"ldm.data.imagenet.ImageNetTrain": "train", "ldm.data.imagenet.ImageNetValidation": "val"}
DATA: dict[str, type[ManifestParams] | type[FolderParams]] = {
    "utils.data_module_allinone.DataModuleFromConfig": FolderParams,
    "utils.data_module_allinone.DataModuleFromConfigJson": ManifestParams,
    "autoencoder.training.batches.FolderParams": FolderParams,
    "autoencoder.training.batches.ManifestParams": ManifestParams,
    "autoencoder.data.FolderParams": FolderParams,  # where they were
    "autoencoder.data.ManifestParams": ManifestParams,
}


# -- images -----------------------------------------------------------------------------------------------------------


class ImageDataset(Dataset):
    """(position, crop (3, H, W) uint8, whether it stands in for an unusable image), by the key (position, index).

    seed: of the random crops; None crops the middle.
    """

    def __init__(self, source: ImageSource, buckets: tuple[Size, ...], seed: int | None):
        self.source, self.buckets, self.seed = source, buckets, seed

    def __getitem__(self, key: Key) -> tuple[int, Tensor, bool]:
        position, index = key
        image, _, found = self.source.load(index)
        rng = None if self.seed is None else sample_rng(self.seed, position)
        crop = crop_to_size(image, nearest_bucket(image.size, self.buckets), rng)
        return position, to_uint8_tensor(crop), found != index

    @staticmethod
    def collate(items: list[tuple[int, Tensor, bool]]) -> list[Group]:
        """The images of a batch by size."""
        replaced = {position for position, _, replaced in items if replaced}
        groups = group_by_size((position, image) for position, image, _ in items)
        return [group._replace(replaced=len(replaced.intersection(group.places))) for group in groups]


# -- batches ----------------------------------------------------------------------------------------------------------


class CropSizes:
    """Which of `buckets` every image of a source is cropped to, found in the file headers and remembered."""

    def __init__(self, source: ImageSource, buckets: tuple[Size, ...]):
        self.source, self.buckets = source, buckets
        self.known = np.full(len(source), -1, dtype=np.int16)

    def of(self, indices: np.ndarray) -> np.ndarray:
        """Indices (n,) of images → places (n,) in `buckets`."""
        if len(self.buckets) == 1:
            return np.zeros_like(indices)
        unknown = np.unique(indices[self.known[indices] < 0])
        with ThreadPoolExecutor(HEADER_READERS) as readers:
            self.known[unknown] = list(readers.map(self._read, unknown.tolist()))
        return self.known[indices]

    def _read(self, index: int) -> int:
        try:
            size = image_size(self.source.read(index)[0], turn=self.source.reading.turn)
        except UserError:
            return 0  # loading it will tell, and replace it
        return self.buckets.index(nearest_bucket(size, self.buckets))


class BatchStream:
    """One process's batches of keys for the given steps, such that nearly all batches have one image size.

    The stream of all processes is cut into windows. The samples of a window are sorted by size, split into its
    steps, and within a step to micro-batches and processes; then the steps are shuffled. So in a window at most
    (sizes − 1) micro-batches of all processes are mixed, every sample is used once, and a step is made of the same
    samples however many processes share it. A run goes on at any step: what remains of the window is found anew.

    Args:
        sizes: of the images to train on.
        shape: (micro-batches per step, processes, images per micro-batch).
        rank: this process.
        steps: from the first to train up to the last.
        window: how many images are sorted at a time, at most an epoch; rounded to whole steps.
    """

    def __init__(
        self, sizes: CropSizes, shape: tuple[int, int, int], rank: int, steps: range, seed: int, window: int = 1
    ):
        self.sizes, self.shape, self.rank, self.steps, self.seed = sizes, shape, rank, steps, seed
        self.window = max(1, min(window, len(sizes.known)) // math.prod(shape))  # in steps

    def __iter__(self) -> Iterator[list[Key]]:
        return itertools.islice(self._batches(), len(self.steps) * self.shape[0])

    def _batches(self) -> Iterator[list[Key]]:
        windows, skipped = self._windows(), self.steps.start % self.window
        with ThreadPoolExecutor(1) as ahead:  # the next window is sorted while this one is trained on
            coming = ahead.submit(next, windows)
            while True:
                window, coming = coming.result(), ahead.submit(next, windows)
                for step in window[skipped:]:
                    yield from ([(int(p), int(i)) for p, i in batch] for batch in step[:, self.rank])
                skipped = 0

    def _windows(self) -> Iterator[np.ndarray]:
        """Keys (window, micro-batches, processes, images, 2), window after window without end."""
        count = self.window * math.prod(self.shape)
        order = SampleOrder([len(self.sizes.known)], seed=self.seed)
        for number in itertools.count(self.steps.start // self.window):
            positions = np.arange(number * count, (number + 1) * count)
            indices = order.locate(positions)[1]
            keys = np.stack([positions, indices], axis=1)[np.argsort(self.sizes.of(indices), kind="stable")]
            steps = keys.reshape(self.window, *self.shape, 2)
            yield np.random.default_rng((self.seed, number)).permutation(steps)


def validation_batches(sizes: CropSizes, batch_size: int, rank: int, world_size: int) -> list[list[Key]]:
    """All images once over all processes, in batches that have one size where possible."""
    indices = np.argsort(sizes.of(np.arange(len(sizes.known))), kind="stable")[rank::world_size].tolist()
    starts = range(0, len(indices), batch_size)
    return [[(index, index) for index in indices[start : start + batch_size]] for start in starts]
