"""Measure the per-channel mean and deviation of an autoencoder's latents over the images of a manifest, in one pass.

    python -m autoencoder.measure_latents CONFIG --manifest X.jsonl --resolution 256 --output stats.safetensors

Images are cropped to their aspect buckets as in the training of the diffusion model, from the middle. The file keeps
the encoder's fingerprint, so that it cannot be used with another encoder.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autoencoder.config import UserError, run_entry
from autoencoder.images import aspect_buckets, crop_to_size, nearest_bucket, to_float, to_uint8_tensor
from autoencoder.latents import LatentStats, StatsAccumulator
from autoencoder.manifest import ImageSource, Manifest
from autoencoder.model import SVGAutoencoder


class CroppedImages(Dataset):
    """`count` images spread evenly over a source, each cropped to its nearest size: (3, H, W) uint8."""

    def __init__(self, source: ImageSource, sizes: tuple[tuple[int, int], ...], count: int) -> None:
        self.source, self.sizes = source, sizes
        self.indices = np.linspace(0, len(source) - 1, count).round().astype(int)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        image, _ = self.source.load(int(self.indices[index]))
        return to_uint8_tensor(crop_to_size(image, nearest_bucket(image.size, self.sizes)))


def equal_size_batches(images: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """(3, H, W) tensors of any sizes → (n, 3, H, W) of one size each, n ≤ batch_size; none is left out."""
    waiting: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for image in images:
        group = waiting[image.shape]
        group.append(image)
        if len(group) == batch_size:
            yield torch.stack(waiting.pop(image.shape))
    yield from (torch.stack(group) for group in waiting.values())


def measure(autoencoder: SVGAutoencoder, batches: Iterable[Tensor], report_every: float = 10.0) -> LatentStats:
    """Statistics of the raw latents of uint8 batches (n, 3, H, W), on the autoencoder's device; prints its progress."""
    device = next(autoencoder.parameters()).device
    accumulator, images, reported = StatsAccumulator(), 0, time.monotonic()
    for batch in batches:
        accumulator.update(autoencoder.encode(to_float(batch.to(device, non_blocking=True))))
        images += len(batch)
        if time.monotonic() - reported > report_every:
            reported = time.monotonic()
            print(f"{images} images, {accumulator.count} latent positions", flush=True)
    return accumulator.result(encoder=autoencoder.encoder.fingerprint())


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m autoencoder.measure_latents", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="autoencoder YAML file")
    parser.add_argument("overrides", nargs="*", help="changes of the config, key.sub=value")
    parser.add_argument("--manifest", required=True, help="JSONL or JSON list of images; captions are not needed")
    parser.add_argument("--resolution", type=int, required=True, help="the crops have about this squared pixels")
    parser.add_argument("--output", type=Path, required=True, help="file to write, .safetensors")
    parser.add_argument("--checkpoint", help="autoencoder checkpoint, instead of the config's ckpt_path")
    parser.add_argument("--max-aspect", type=float, default=4.0, help="longest crop; 1 for squares only")
    parser.add_argument("--max-images", type=int, help="measure this many, spread evenly over the manifest")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    arguments = parser.parse_intermixed_args(argv)
    for name in ("batch_size", "max_images"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if arguments.output.suffix != ".safetensors":
        raise UserError(f"--output {arguments.output}: give it the ending .safetensors")
    if arguments.output.exists() and not arguments.overwrite:
        raise UserError(f"--output {arguments.output} exists; choose another name or add --overwrite")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {arguments.device} cannot be used here ({error}); try --device cpu") from error
    return arguments


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    sizes = aspect_buckets(arguments.resolution, arguments.max_aspect)
    source = Manifest.open(Path(arguments.manifest), require_captions=False)
    autoencoder = SVGAutoencoder.from_config(arguments.config, arguments.checkpoint, overrides=arguments.overrides)
    dataset = CroppedImages(source, sizes, min(len(source), arguments.max_images or len(source)))
    loader = DataLoader(dataset, batch_size=None, num_workers=arguments.num_workers)
    stats = measure(autoencoder.to(arguments.device), equal_size_batches(loader, arguments.batch_size))
    stats.save(arguments.output)
    print(
        f"{arguments.output}: {len(dataset)} images, {stats.channels} channels, "
        f"mean of std {stats.std.mean():.4f}, encoder {stats.encoder}, statistics {stats.fingerprint()}"
    )


if __name__ == "__main__":
    run_entry(main)
