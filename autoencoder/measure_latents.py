"""Measure the per-channel mean and deviation of an autoencoder's latents, at one or several resolutions, in one pass.

    python -m autoencoder.measure_latents CONFIG --data IMAGES --resolution 256 512 1024 --output stats.safetensors
    torchrun --nproc-per-node 8 -m autoencoder.measure_latents CONFIG ...        the same numbers to the last bit

IMAGES is a folder or a manifest. Images are cropped to their aspect buckets as in the training of the diffusion model,
from the middle. The files keep the fingerprint of the encoder and residual branch, so that they cannot be used with
others. An interrupted run goes on when it is started again with the same arguments, on any number of processes.

    stats.safetensors           every latent position counts the same, whatever its resolution
    stats-256.safetensors, …    each resolution alone, if there are several
    stats.png                   mean and deviation of each channel, and their drift between resolutions
    stats.partial.safetensors   while it runs: what was seen so far
    stats.unusable.jsonl        the images that could not be read, if any
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from autoencoder.common.commands import Parser, command
from autoencoder.common.config import UserError
from autoencoder.common.processes import start_world
from autoencoder.evaluation.crops import (
    Crops,
    add_image_arguments,
    add_model_arguments,
    list_failures,
    load_autoencoder,
    open_crops,
    warn_of_batch_statistics,
)
from autoencoder.evaluation.latent_statistics import measure
from autoencoder.latents.drift import drift, plot_stats
from autoencoder.latents.statistics import LatentStats, StatsAccumulator, pooled

logger = logging.getLogger(__name__)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = Parser("autoencoder.measure_latents", __doc__)
    add_model_arguments(parser)
    add_image_arguments(parser, max_aspect=4.0)
    parser.add_argument("--output", type=Path, required=True, help="file to write, .safetensors")
    parser.add_argument("--compare", nargs="+", default=[], help="statistics files to compare with (default: none)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.output.suffix != ".safetensors":
        raise UserError(f"--output {arguments.output}: give it the ending .safetensors")
    if arguments.output.exists() and not arguments.overwrite:
        raise UserError(f"--output {arguments.output} exists; choose another name or add --overwrite")
    return arguments


@command
def main(argv: list[str]) -> None:
    """Measure the statistics of the latents as the command line says, and write them."""
    arguments = parse_arguments(argv)
    crops = open_crops(arguments)
    partial = arguments.output.with_suffix(".partial.safetensors")
    with start_world(arguments.device, timeout_minutes=60) as world:
        list_failures(crops, arguments.output.with_suffix(".unusable.jsonl"), world, go_on=partial.exists())
        autoencoder = load_autoencoder(arguments, world.device)
        # Where a published file lacks the residual channels, as the release makes them up
        channels, made_up = autoencoder.channels, autoencoder.channels - autoencoder.encoder.channels
        row = autoencoder.model_config.num_layer
        others = {path: LatentStats.load(path, channels, row, made_up) for path in arguments.compare}
        if world.is_main:
            warn_of_batch_statistics(autoencoder, arguments.batch_size)
        accumulators = measure(autoencoder, crops, arguments.batch_size, world, arguments.num_workers, partial)
        if world.is_main:
            write(arguments.output, accumulators, crops, autoencoder.latent_fingerprint(), others)
            partial.unlink(missing_ok=True)


def write(
    output: Path, accumulators: list[StatsAccumulator], crops: Crops, encoder: str, others: dict[str, LatentStats]
) -> None:
    """All files of the drawing at the top, and a report on the console."""
    stats = pooled(accumulators).result(encoder, crops.resolutions)
    notes = {"data": crops.source.name, "images": str(len(crops))}
    lines = {"all" if len(accumulators) > 1 else f"{crops.resolutions[0]} px": stats}
    if len(accumulators) > 1:
        for resolution, accumulator in zip(crops.resolutions, accumulators):
            lines[f"{resolution} px"] = one = accumulator.result(encoder, (resolution,))
            path = output.with_name(f"{output.stem}-{resolution}.safetensors")
            one.save(path, notes)
            print(f"{path}: seen through the pooled statistics, {drift(stats, one)}")
    for path, other in others.items():
        found = drift(other, stats)
        lines[Path(path).name] = other
        if found.notable:
            logger.warning("%s does not fit these images: seen through it, %s", path, found)
        else:
            print(f"{path} fits these images: seen through it, {found}")
    plot_stats(lines, next(iter(lines)), output.with_suffix(".png"))
    stats.save(output, notes)
    print(
        f"{output}: {len(crops)} images, {stats.channels} channels, mean of std {stats.std.mean():.4f}, "
        f"encoder {stats.encoder}, statistics {stats.fingerprint()}"
    )


if __name__ == "__main__":
    main()
