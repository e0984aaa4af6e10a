"""Data loader: the samples of each step, split over processes and micro-batches, and the workers that read them.

The samples of a step are a function of (seed, step) alone. The parent process looks up the order and deals; workers
decode. Where dealing has to know how long samples are (`micro_batch_tokens`), one more worker reads ahead in the
manifests, so that the parent has nothing to do but to hand over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from autoencoder.common.config import UserError
from autoencoder.common.workers import WorkerLoader, require_shared_memory
from autoencoder.images.files import LATENT_PIXELS
from autoencoder.images.order import SampleOrder
from svg_t2i.data.batching import largest_share, split_by_tokens, split_evenly
from svg_t2i.data.feature_cache import CachedDataset, FeatureBatch
from svg_t2i.data.sources import T2IDataset, TrainBatch

T = TypeVar("T")
Keys = np.ndarray  # (n, 3) int64: position, source, index


@dataclass(frozen=True)
class TrainStream(Dataset):
    """The samples of each step, split over ranks. Item s: this rank's micro-batches in step s.

    Attributes:
        micro_batch_size: most samples of a micro-batch.
        micro_batch_tokens: fill micro-batches up to this many tokens instead.
    """

    datasets: Sequence[T2IDataset | CachedDataset]
    order: SampleOrder
    global_batch_size: int
    micro_batch_size: int
    micro_batch_tokens: int | None
    rank: int
    world_size: int

    def __getitem__(self, step: int) -> list[Keys]:
        """The keys of each micro-batch; an empty one only keeps this rank in step."""
        count = self.global_batch_size
        positions = np.arange(step * count, (step + 1) * count)
        if self.micro_batch_tokens is None:
            shares = split_evenly(count, self.world_size, self.micro_batch_size)[self.rank]
            return [self._keys(positions[numbers]) for numbers in shares]
        keys = self._keys(positions)
        costs = [self.datasets[source].tokens(position, index) for position, source, index in keys.tolist()]
        return [
            keys[numbers] for numbers in split_by_tokens(costs, self.world_size, self.micro_batch_tokens)[self.rank]
        ]

    def _keys(self, positions: np.ndarray) -> Keys:
        return np.stack([positions, *self.order.locate(positions)], axis=1)


class MicroBatches(Dataset):
    """What a worker does: keys → their batch; the flag travels along. For no keys, a sample that does not count."""

    def __init__(self, datasets: Sequence[T2IDataset | CachedDataset]):
        self.datasets = datasets

    def __getitem__(self, work: tuple[Keys, bool]) -> tuple[TrainBatch | FeatureBatch, bool]:
        keys, last_of_step = work
        if not len(keys):
            return replace(self.datasets[0].collate([self.datasets[0][0, 0]]), counted=False, replaced=0), last_of_step
        items = [self.datasets[source][position, index] for position, source, index in keys.tolist()]
        return self.datasets[0].collate(items), last_of_step


class _Work(Sampler):
    """The micro-batches of all steps in order, each with a flag: is it the last of its step?"""

    def __init__(self, stream: TrainStream, steps: range, ahead: bool):
        super().__init__()
        self.stream, self.steps, self.ahead = stream, steps, ahead

    def __iter__(self) -> Iterator[tuple[Keys, bool]]:
        for step in read_ahead(self.stream, self.steps, int(self.ahead), prefetch=4) if self.ahead else self._split():
            yield from ((keys, number == len(step)) for number, keys in enumerate(step, start=1))

    def _split(self) -> Iterator[list[Keys]]:
        return (self.stream[step] for step in self.steps)


class TrainLoader:
    """This rank's micro-batches, a list per step, in order, on the host."""

    def __init__(self, stream: TrainStream, steps: range, num_workers: int, prefetch: int):
        self.steps = steps
        self._work = _Work(stream, steps, ahead=stream.micro_batch_tokens is not None and num_workers > 0)
        self._loader = read_ahead(MicroBatches(stream.datasets), self._work, num_workers, prefetch)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[TrainBatch | FeatureBatch]]:
        step: list[TrainBatch | FeatureBatch] = []
        for batch, last_of_step in self._loader:
            step.append(batch)
            if last_of_step:
                yield step
                step = []


def read_ahead(dataset: Dataset, sampler: Iterable, num_workers: int, prefetch: int) -> WorkerLoader:
    """dataset[key] for each key of `sampler`, in order, read by workers (none: when asked for)."""
    return WorkerLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,  # torch limits each to one thread
        prefetch_factor=prefetch if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),  # else starting to iterate advances the global one
    )


def _as_it_is(item: T) -> T:
    return item


def build_loader(
    datasets: T2IDataset | Sequence[T2IDataset | CachedDataset],
    *,
    global_batch_size: int,
    micro_batch_size: int,
    total_steps: int,
    weights: Sequence[float | None] | None = None,
    micro_batch_tokens: int | None = None,
    resume_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
    loaders: int = 1,
) -> TrainLoader:
    """This rank's micro-batches of steps `resume_step` … `total_steps` − 1.

    The samples of a step, and how they look, are the same for any number of processes, workers and micro-batches.

    Args:
        weights: of the datasets, see `SampleOrder`.
        micro_batch_size: most samples of a micro-batch.
        micro_batch_tokens: fill micro-batches up to this many tokens instead, about equally on all ranks.
        prefetch: micro-batches that each worker prepares ahead.
        loaders: on this machine, one per process.

    Raises:
        UserError: if what workers prepare ahead does not fit shared memory; from the
            iterator, if too many images are unreadable.
    """
    datasets = [datasets] if isinstance(datasets, T2IDataset) else list(datasets)
    if not 0 <= resume_step <= total_steps:
        raise UserError(f"resume step {resume_step} must lie in 0 .. total steps = {total_steps}")
    order = SampleOrder([len(dataset) for dataset in datasets], weights, datasets[0].augmentation.seed)
    stream = TrainStream(datasets, order, global_batch_size, micro_batch_size, micro_batch_tokens, rank, world_size)
    if micro_batch_tokens is None:
        samples = min(micro_batch_size, largest_share(global_batch_size, world_size))
    else:
        samples = max(1, micro_batch_tokens * LATENT_PIXELS**2 // max(dataset.resolution for dataset in datasets) ** 2)
    if num_workers:
        largest = max(dataset.item_bytes for dataset in datasets)
        require_shared_memory(loaders * num_workers * prefetch * samples * largest)
    return TrainLoader(stream, range(resume_step, total_steps), num_workers, prefetch)
