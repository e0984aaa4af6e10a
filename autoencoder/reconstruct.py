"""Reconstruct images and show them side by side with their originals.

    python -m autoencoder.reconstruct CONFIG IMAGES... --resolution 256 512 1024 --output DIR
    python -m autoencoder.reconstruct CONFIG IMAGES... --resolution native

IMAGES are image files, and all that holds images: folders, manifests, tables, tar shards, `hf://datasets/owner/name`.
At a resolution, images are cropped to the nearest aspect bucket, from the middle; `native` keeps every pixel: sides
that 16 does not divide are padded for the autoencoder and cut again. Large images are decoded in little memory
(`autoencoder.decoders.striped`): 4096×4096 takes 18 GB in fp32, 9 GB in bf16.

    DIR/NAME_256.png    original | reconstruction; PSNR and colour shift in its text chunks
    DIR/sheet.png       all of them, small
"""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from autoencoder.common.commands import Parser, command, require_positive
from autoencoder.common.config import UserError
from autoencoder.common.processes import start_world
from autoencoder.decoders.striped import PLAIN_PIXELS
from autoencoder.evaluation.crops import add_model_arguments, load_autoencoder, warn_of_batch_statistics
from autoencoder.evaluation.metrics import colour_shift, psnr, to_8bit
from autoencoder.images.files import (
    LATENT_PIXELS,
    Size,
    aspect_buckets,
    crop_to_size,
    image_grid,
    nearest_bucket,
    save_png,
    to_float,
    to_pil,
    to_uint8_tensor,
)
from autoencoder.model import SVGAutoencoder
from autoencoder.sources.folders import FileList
from autoencoder.sources.opening import open_images
from autoencoder.sources.source import IMAGE_SUFFIXES, ImageSource, Reading

logger = logging.getLogger(__name__)

SHEET_SIDE = 256  # longest side of an image on the contact sheet
SHEET_IMAGES = 200

Found = tuple[ImageSource, int]  # an image: a source and a place in it


class NamedImage(NamedTuple):
    """An image to reconstruct: (3, H, W) uint8, and the name of its file without .png."""

    name: str
    image: Tensor


class Pair(NamedTuple):
    """name; original and reconstruction; psnr in dB; shift: of the means of red, green, blue, in 8-bit levels."""

    name: str
    original: Image.Image
    reconstruction: Image.Image
    psnr: float
    shift: tuple[float, float, float]

    def side_by_side(self) -> Image.Image:
        width, height = self.original.size
        both = Image.new("RGB", (2 * width, height))
        both.paste(self.original, (0, 0))
        both.paste(self.reconstruction, (width, 0))
        return both

    def numbers(self) -> dict[str, str]:
        return {"psnr": f"{self.psnr:.2f}", "colour_shift": " ".join(f"{value:+.2f}" for value in self.shift)}


@torch.no_grad()
def reconstruct(autoencoder: SVGAutoencoder, images: Tensor) -> Tensor:
    """Floats (n, 3, H, W) in [-1, 1], any sides → the same, not clipped. The edges are repeated up to full patches."""
    height, width = images.shape[2:]
    padding = (0, -width % LATENT_PIXELS, 0, -height % LATENT_PIXELS)
    latents = autoencoder.encode(F.pad(images, padding, mode="replicate"))
    return autoencoder.decode(latents)[:, :, :height, :width]


def reconstruct_all(autoencoder: SVGAutoencoder, jobs: Iterable[NamedImage], batch_size: int) -> Iterator[Pair]:
    """All jobs, in batches of equal size."""
    device = next(autoencoder.parameters()).device
    for batch in equal_size_batches(jobs, batch_size):
        images = torch.stack([job.image for job in batch]).to(device)
        recons = reconstruct(autoencoder, to_float(images))
        for job, image, recon in zip(batch, images.split(1), recons.split(1)):
            levels = to_8bit(recon)
            shift = tuple(colour_shift(image, levels)[0].tolist())
            yield Pair(job.name, to_pil(to_float(image[0])), to_pil(recon[0]), psnr(image, levels).item(), shift)


def equal_size_batches(jobs: Iterable[NamedImage], batch_size: int) -> Iterator[list[NamedImage]]:
    """Jobs grouped by size, at most `batch_size` of them, and fewer if they are large."""
    waiting: dict[torch.Size, list[NamedImage]] = defaultdict(list)
    for job in jobs:
        group = waiting[job.image.shape]
        group.append(job)
        if len(group) == batch_size or (len(group) + 1) * job.image[0].numel() > PLAIN_PIXELS:
            yield waiting.pop(job.image.shape)
    yield from waiting.values()


def prepare(images: Sequence[Found], sizes: Mapping[str, Sequence[Size] | None]) -> Iterator[NamedImage]:
    """Every image at every resolution, cropped to the nearest of `sizes[name of the resolution]` (None: not at all).

    Unreadable images are left out, with a warning.

    Raises:
        UserError: more are unreadable than may be, or all of them.
    """
    names: dict[str, int] = defaultdict(int)
    unreadable = 0
    for source, index in images:
        try:
            image, sample = source.load_exactly(index)
        except UserError as error:
            source.fail(index, str(error))
            unreadable += 1
            if unreadable == len(images):
                raise UserError(f"all {len(images)} images are unreadable; the last: {error}") from error
            continue
        stem = sample.path.stem
        names[stem] += 1
        name = stem if names[stem] == 1 else f"{stem}-{names[stem]}"
        for resolution, buckets in sizes.items():
            crop = image if buckets is None else crop_to_size(image, nearest_bucket(image.size, buckets))
            yield NamedImage(f"{name}_{resolution}", to_uint8_tensor(crop))


# ---- the entry -----------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = Parser("autoencoder.reconstruct", __doc__)
    add_model_arguments(parser, words="image|folder|manifest|…|key.sub=value")
    parser.add_argument("--resolution", nargs="+", default=["native"], help="numbers, or native")
    parser.add_argument("--image_column", help="of manifests and tables (default: found by the usual names)")
    parser.add_argument("--max_aspect", type=float, default=4.0, help="longest crop; 1: squares only")
    parser.add_argument("--max_images", type=int, help="only the first so many (default: all)")
    parser.add_argument("--batch_size", type=int, default=8, help="images at a time, fewer if they are large")
    parser.add_argument("--output", type=Path, default=Path("outputs/reconstructions"), help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    arguments = parser.parse_intermixed_args(argv)
    words = arguments.overrides
    arguments.overrides = [word for word in words if "=" in word and "://" not in word and not Path(word).exists()]
    arguments.images = [word for word in words if word not in arguments.overrides]
    if not arguments.images:
        raise UserError("no images: name image files, folders or manifests after the config")
    require_positive(arguments, "batch_size", "max_images")
    arguments.sizes = {value: _sizes(value, arguments.max_aspect) for value in arguments.resolution}
    if arguments.output.is_dir() and any(arguments.output.iterdir()) and not arguments.overwrite:
        raise UserError(f"--output {arguments.output} is not empty; choose another folder or add --overwrite")
    return arguments


def _sizes(resolution: str, max_aspect: float) -> Sequence[Size] | None:
    if resolution != "native" and not resolution.isdecimal():
        raise UserError(f"--resolution {resolution}: give numbers such as 256 512, or native")
    return None if resolution == "native" else aspect_buckets(int(resolution), max_aspect)


def find_images(words: Sequence[str], reading: Reading) -> list[Found]:
    """The images that are named, and those in the folders, manifests, … that are named."""
    images: list[Found] = []
    for word in words:
        path = Path(word).expanduser()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir() and "://" not in word:
            source: ImageSource = FileList([path], reading)  # a missing one is reported when it is read
        else:
            source = open_images(word, reading)
        images += [(source, index) for index in range(len(source))]
    return images


@command
def main(argv: list[str]) -> None:
    """Reconstruct the images that the command line names."""
    arguments = parse_arguments(argv)
    images = find_images(arguments.images, Reading(image_column=arguments.image_column))[: arguments.max_images]
    jobs = prepare(images, arguments.sizes)
    with start_world(arguments.device, timeout_minutes=60) as world:
        autoencoder = load_autoencoder(arguments, world.device)
        warn_of_batch_statistics(autoencoder, arguments.batch_size)
        tiles, labels = [], []
        for pair in reconstruct_all(autoencoder, jobs, arguments.batch_size):
            image, path = pair.side_by_side(), arguments.output / f"{pair.name}.png"
            save_png(image, path, {"autoencoder": arguments.config} | pair.numbers())
            print(f"{path}  PSNR {pair.psnr:.2f}  colour shift {pair.numbers()['colour_shift']}", flush=True)
            if len(tiles) < SHEET_IMAGES:
                image.thumbnail((2 * SHEET_SIDE, SHEET_SIDE))
                tiles.append(image)
                labels.append(f"{pair.name}, PSNR {pair.psnr:.1f}, colour shift {pair.numbers()['colour_shift']}")
    sheet = arguments.output / "sheet.png"
    save_png(image_grid(tiles, columns=4, labels=labels), sheet)
    print(f"{sheet}: {len(tiles)} images beside their reconstructions")


if __name__ == "__main__":
    main()
