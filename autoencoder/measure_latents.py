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
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from autoencoder.common.config import UserError, run_entry
from autoencoder.common.processes import Processes, joined_processes
from autoencoder.common.weights import read_file, replacing
from autoencoder.evaluation.crops import (
    Crops,
    add_image_arguments,
    add_model_arguments,
    load_autoencoder,
    open_crops,
    sweep,
    warn_of_batch_statistics,
)
from autoencoder.images.files import to_float
from autoencoder.latents.drift import drift, plot_stats
from autoencoder.latents.statistics import LatentStats, StatsAccumulator
from autoencoder.model import SVGAutoencoder

logger = logging.getLogger(__name__)

CHUNKS_PER_ROUND = 32  # of each process, between merging and saving
ALONE = Processes(rank=0, size=1, device=torch.device("cpu"))


class Progress:
    """What was measured so far, kept in `path` (None: nowhere): one accumulator per resolution, for chunks 0 … done−1.

    identity: all that the numbers depend on; a file of another identity is refused.
    """

    def __init__(self, resolutions: tuple[int, ...], identity: dict[str, Any], path: Path | None) -> None:
        self.resolutions, self.identity, self.path = resolutions, identity, path
        self.accumulators = [StatsAccumulator() for _ in resolutions]
        self.done = 0
        if path is not None and path.exists():
            self._load()

    def add(self, states: list[dict[str, torch.Tensor]]) -> None:
        """The states of the next chunk, one per resolution. In this order always, so that rounding is the same."""
        for accumulator, state in zip(self.accumulators, states, strict=True):
            accumulator.merge(StatsAccumulator.from_state(state))
        self.done += 1

    def save(self) -> None:
        if self.path is None:
            return
        tensors = {
            f"{resolution}.{name}": value
            for resolution, accumulator in zip(self.resolutions, self.accumulators)
            for name, value in accumulator.state().items()
        }
        with replacing(self.path) as partial:
            save_file(tensors, partial, {"identity": json.dumps(self.identity), "done": str(self.done)})

    def _load(self) -> None:
        tensors = read_file(self.path, "interrupted measurement")
        with safe_open(self.path, framework="pt") as file:
            metadata = file.metadata() or {}
        recorded = json.loads(metadata.get("identity", "{}"))
        differing = [f"{k}: {recorded.get(k)} ≠ {v}" for k, v in self.identity.items() if recorded.get(k) != v]
        if differing:
            raise UserError(
                f"{self.path} is an interrupted measurement of something else ({'; '.join(differing)}); repeat its "
                "arguments to go on with it, or delete it"
            )
        for number, resolution in enumerate(self.resolutions):
            state = {name: tensors[f"{resolution}.{name}"] for name in ("count", "mean", "squares")}
            self.accumulators[number] = StatsAccumulator.from_state(state)
        self.done = int(metadata["done"])


def measure(
    autoencoder: SVGAutoencoder,
    crops: Crops,
    batch_size: int = 16,
    processes: Processes = ALONE,
    num_workers: int = 0,
    partial: Path | None = None,
) -> list[StatsAccumulator]:
    """Moments of the raw latents at each of the crops' resolutions; [] on all processes but the main one.

    partial: file to keep the progress in and to go on from; it is left there.
    """
    identity = {
        "encoder": autoencoder.latent_fingerprint(),
        "data": crops.source.name,
        "images in the data": len(crops.source),
        "images measured": len(crops),
        "crops": [list(map(list, sizes)) for sizes in crops.sizes],
        "batch_size": batch_size,
        "precision": str(next(autoencoder.parameters()).dtype),
    }
    progress = Progress(crops.resolutions, identity, partial if processes.is_main else None)
    first = processes.share(progress.done)
    if first and processes.is_main:
        print(f"going on after {min(first * batch_size, len(crops))} of {len(crops)} images: {partial}", flush=True)
    own = _chunk_states(autoencoder, sweep(crops, batch_size, processes.rank, processes.size, num_workers, first))
    chunks = -(-len(crops) // batch_size)
    per_round, reported = CHUNKS_PER_ROUND * processes.size, time.monotonic()
    for _ in range(first, chunks, per_round):
        gathered = processes.gather(list(islice(own, CHUNKS_PER_ROUND)))
        for _, states in sorted((entry for entries in gathered for entry in entries), key=lambda entry: entry[0]):
            progress.add(states)
        progress.save()
        if processes.is_main and time.monotonic() - reported > 10:
            reported = time.monotonic()
            print(f"{min(progress.done * batch_size, len(crops))} of {len(crops)} images", flush=True)
    return progress.accumulators if processes.is_main else []


@torch.no_grad()
def _chunk_states(autoencoder: SVGAutoencoder, chunks: Any) -> Iterator[tuple[int, list[dict[str, torch.Tensor]]]]:
    """(chunk number, moments of its latents at each resolution)."""
    device = next(autoencoder.parameters()).device
    for chunk in chunks:
        accumulators = [StatsAccumulator() for _ in chunk.groups]
        for accumulator, groups in zip(accumulators, chunk.groups):
            for group in groups:
                accumulator.update(autoencoder.encode(to_float(group.images.to(device, non_blocking=True))))
        yield chunk.number, [accumulator.state() for accumulator in accumulators]


def pooled(accumulators: list[StatsAccumulator]) -> StatsAccumulator:
    """All of them together; every latent position counts the same."""
    total = StatsAccumulator()
    for accumulator in accumulators:
        total.merge(accumulator)
    return total


# ---- the entry -----------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(prog="python -m autoencoder.measure_latents", description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("overrides", nargs="*", help="changes of the config, key.sub=value")
    add_image_arguments(parser, max_aspect=4.0)
    parser.add_argument("--output", type=Path, required=True, help="file to write, .safetensors")
    parser.add_argument("--compare", nargs="+", default=[], help="statistics files to compare the measured ones with")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.output.suffix != ".safetensors":
        raise UserError(f"--output {arguments.output}: give it the ending .safetensors")
    if arguments.output.exists() and not arguments.overwrite:
        raise UserError(f"--output {arguments.output} exists; choose another name or add --overwrite")
    return arguments


def main(argv: list[str]) -> None:
    """The entry; `argv` without the program's name."""
    arguments = parse_arguments(argv)
    crops = open_crops(arguments)
    partial = arguments.output.with_suffix(".partial.safetensors")
    with joined_processes(arguments.device) as processes:
        autoencoder = load_autoencoder(arguments, processes.device)
        others = {path: _published_or_own(path, autoencoder) for path in arguments.compare}
        if processes.is_main:
            warn_of_batch_statistics(autoencoder, arguments.batch_size)
        accumulators = measure(autoencoder, crops, arguments.batch_size, processes, arguments.num_workers, partial)
        if processes.is_main:
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
            one = accumulator.result(encoder, (resolution,))
            path = output.with_name(f"{output.stem}-{resolution}.safetensors")
            one.save(path, notes)
            lines[f"{resolution} px"] = one
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


def _published_or_own(path: str, autoencoder: SVGAutoencoder) -> LatentStats:
    """A file to compare with. Where a published one lacks the residual channels, as the release makes them up."""
    made_up = autoencoder.channels - autoencoder.encoder.channels
    return LatentStats.load(path, autoencoder.channels, autoencoder.config.num_layer, made_up)


if __name__ == "__main__":
    run_entry(main)
