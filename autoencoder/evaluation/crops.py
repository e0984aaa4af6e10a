"""One pass over many images, split over processes: for measuring latents and for evaluating reconstructions.

The images are cut into chunks of `batch_size` in their order, and chunk c goes to process c mod N. A chunk is made of
the same images and computed in the same batches however many processes there are, so results that are merged in the
order of the chunks, or by index, do not depend on their number. An image is decoded once and cropped to every
resolution.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from autoencoder.common.commands import Parser, require_positive
from autoencoder.common.config import UserError
from autoencoder.common.processes import ALONE, World
from autoencoder.common.workers import WorkerLoader
from autoencoder.images.files import (
    Group,
    Size,
    aspect_buckets,
    crop_to_size,
    group_by_size,
    nearest_bucket,
    to_uint8_tensor,
)
from autoencoder.model import SVGAutoencoder
from autoencoder.sources.failures import MAX_ERRORS, Failures
from autoencoder.sources.opening import open_images
from autoencoder.sources.source import ORIENTATIONS, ImageSource, Reading, Sample

logger = logging.getLogger(__name__)


class Crops(Dataset):
    """`count` images spread evenly over a source (None: all), in their order; each cropped, from the middle, to the
    nearest size of every resolution.

    resolutions: crops have about this squared pixels. max_aspect: of the longest crop; 1 gives squares.
    """

    def __init__(
        self, source: ImageSource, resolutions: Sequence[int], max_aspect: float, count: int | None = None
    ) -> None:
        self.source, self.resolutions = source, tuple(resolutions)
        self.sizes: list[tuple[Size, ...]] = [aspect_buckets(side, max_aspect) for side in resolutions]
        count = len(source) if count is None else min(count, len(source))
        self.indices = np.linspace(0, len(source) - 1, count).round().astype(np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, place: int) -> Sample:
        return self.source[int(self.indices[place])]

    def __getitem__(self, place: int) -> tuple[int, list[Tensor] | str]:
        """(place, its crops (3, H, W) uint8 or the reason why there are none).

        An unreadable image is left out rather than replaced by its neighbour, which would count twice.
        """
        try:
            image, _ = self.source.load_exactly(int(self.indices[place]))
        except UserError as error:
            return place, str(error)
        crops = (crop_to_size(image, nearest_bucket(image.size, sizes)) for sizes in self.sizes)
        return place, [to_uint8_tensor(crop) for crop in crops]

    def collate(self, items: list[tuple[int, list[Tensor] | str]]) -> tuple[list[list[Group]], dict[int, str]]:
        """Items of a chunk → groups per resolution, and place → reason of those that have none."""
        readable = [(place, crops) for place, crops in items if not isinstance(crops, str)]
        groups = [
            group_by_size((place, crops[number]) for place, crops in readable) for number in range(len(self.sizes))
        ]
        return groups, {place: crops for place, crops in items if isinstance(crops, str)}


def read_chunks(
    crops: Crops, batch_size: int, world: World = ALONE, num_workers: int = 0, first: int = 0
) -> Iterator[tuple[int, list[list[Group]]]]:
    """This process's chunks, from chunk number `first` on; every ten seconds the main one says how far it is.

    Each as (its number, its readable images at every resolution, by size).

    Raises:
        UserError: more images are unreadable than may be.
    """
    starts = range(0, len(crops), batch_size)
    numbers = range(first + world.rank, len(starts), world.size)
    batches = [range(starts[number], min(starts[number] + batch_size, len(crops))) for number in numbers]
    loader = WorkerLoader(
        crops,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=crops.collate,
        pin_memory=torch.cuda.is_available(),
    )
    reported = time.monotonic()
    for number, (groups, reasons) in zip(numbers, loader):
        for place, reason in reasons.items():
            crops.source.fail(int(crops.indices[place]), reason)
        if world.is_main and time.monotonic() - reported > 10:
            reported = time.monotonic()
            print(f"about {number * batch_size} of {len(crops)} images", flush=True)
        yield number, groups


# ---- command lines -------------------------------------------------------------------------------------------------


def add_model_arguments(parser: Parser, words: str = "key.sub=value") -> None:
    """What `load_autoencoder` reads. words: what else may stand on the command line without an option's name."""
    parser.add_config("autoencoder YAML file, or a folder of save_pretrained", positional=True, words=words)
    parser.add_argument("--checkpoint", help="autoencoder checkpoint (default: the config's ckpt_path)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the networks")
    parser.add_argument("--device", help="cpu, cuda, cuda:N; default: a GPU per process if there is one")


def list_failures(crops: Crops, path: Path, world: World, go_on: bool = False) -> None:
    """Keep the list of unreadable images, which the processes share, in a file; `go_on` with the one that is there."""
    with world.main_first():
        if world.is_main and not go_on:
            path.unlink(missing_ok=True)
        crops.source.failures.keep_in(path)


def load_autoencoder(arguments: argparse.Namespace, device: torch.device, stats: str | None = None) -> SVGAutoencoder:
    """The autoencoder of `config`, `checkpoint`, `overrides` and `precision`, on the device, in eval mode."""
    model = SVGAutoencoder.from_pretrained(
        arguments.config, arguments.checkpoint, stats, arguments.overrides, resolvers=True
    )
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    return model.to(device, dtype).eval()


def warn_of_batch_statistics(autoencoder: SVGAutoencoder, batch_size: int) -> None:
    """Say that latents depend on the batch, where a residual branch normalises over it (as published)."""
    residual = autoencoder.model_config.extra_vit_config
    if residual is not None and residual.use_outnorm and residual.outnorm == "batch" and batch_size > 1:
        logger.warning(
            "extra_vit_config.outnorm is batch, as published: the residual latents of an image depend on the %d images "
            "it is encoded with, and so do the results on --batch_size. Add the override "
            "model.params.extra_vit_config.outnorm=per_image, or --batch_size 1",
            batch_size,
        )


def add_image_arguments(parser: Parser, max_aspect: float) -> None:
    """What `open_crops` and `read_chunks` read."""
    parser.add_argument(
        "--data", "--manifest", dest="data", required=True,
        help="images: a folder, manifest, table, tar shards or hf://datasets/owner/name",
    )  # fmt: skip
    parser.add_argument("--image_column", help="of a manifest or table (default: found by the usual names)")
    parser.add_argument(
        "--resolution", type=int, nargs="+", required=True, help="one or several; crops have about this squared pixels"
    )
    parser.add_argument("--max_aspect", type=float, default=max_aspect, help="longest crop; 1: squares only")
    parser.add_argument("--max_images", type=int, help="only this many, spread evenly over the data (default: all)")
    parser.add_argument("--batch_size", type=int, default=16, help="images at a time per process")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read images, per process")
    parser.add_argument(
        "--max_errors", type=float, default=MAX_ERRORS,
        help="unreadable images that are left out: a share of the data (at least 16 images), or a number from 1 on",
    )  # fmt: skip
    parser.add_argument(
        "--exif_orientation", choices=ORIENTATIONS, default="apply", help="ignore: as the published data was read"
    )


def open_crops(arguments: argparse.Namespace) -> Crops:
    """The images that the arguments ask for; UserError for values out of range and data without images."""
    require_positive(arguments, "batch_size", "max_images")
    if len(set(arguments.resolution)) < len(arguments.resolution):
        raise UserError(f"--resolution {' '.join(map(str, arguments.resolution))} names a resolution twice")
    reading = Reading(
        exif_orientation=arguments.exif_orientation,
        image_column=arguments.image_column,
        failures=Failures(arguments.max_errors),
    )
    images = open_images(arguments.data, reading)
    return Crops(images, arguments.resolution, arguments.max_aspect, arguments.max_images)
