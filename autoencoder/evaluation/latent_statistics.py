"""Statistics of an autoencoder's latents over many images, in one resumable pass, split over processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from autoencoder.common.config import UserError
from autoencoder.common.processes import ALONE, World
from autoencoder.common.weights import read_file, replacing
from autoencoder.evaluation.crops import Crops, read_chunks
from autoencoder.images.files import to_float
from autoencoder.latents.statistics import StatsAccumulator
from autoencoder.model import SVGAutoencoder

CHUNKS_PER_ROUND = 32  # of each process, between merging and saving


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
    world: World = ALONE,
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
    progress = Progress(crops.resolutions, identity, partial if world.is_main else None)
    first = world.broadcast(progress.done)
    if first and world.is_main:
        print(f"going on after {min(first * batch_size, len(crops))} of {len(crops)} images: {partial}", flush=True)
    own = _chunk_states(autoencoder, read_chunks(crops, batch_size, world, num_workers, first))
    chunks = -(-len(crops) // batch_size)
    for _ in range(first, chunks, CHUNKS_PER_ROUND * world.size):
        gathered = world.gather(list(islice(own, CHUNKS_PER_ROUND)))
        for _, states in sorted((entry for entries in gathered for entry in entries), key=lambda entry: entry[0]):
            progress.add(states)
        progress.save()
    return progress.accumulators if world.is_main else []


@torch.no_grad()
def _chunk_states(autoencoder: SVGAutoencoder, chunks: Any) -> Iterator[tuple[int, list[dict[str, torch.Tensor]]]]:
    """(chunk number, moments of its latents at each resolution)."""
    device = next(autoencoder.parameters()).device
    for number, resolutions in chunks:
        accumulators = [StatsAccumulator() for _ in resolutions]
        for accumulator, groups in zip(accumulators, resolutions):
            for group in groups:
                accumulator.update(autoencoder.encode(to_float(group.images.to(device, non_blocking=True))))
        yield number, [accumulator.state() for accumulator in accumulators]
