"""Processes: joining them, wrapping a module for them, and the few collectives training needs.

A model is single-device code. Everything that depends on how many processes there are is applied here, from outside:

    with start_world() as world:                 # torchrun's processes, or this one alone
        module = wrap(module, world)             # gradients are averaged over the ranks in backward
        with gradient_sync(module, last):        # off while gradients accumulate
            loss.backward()

Every rank contributes the mean over its own samples and the ranks hold equally many, so the averaged gradient is that
of the global batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autoencoder.config import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers. `size` 1 means there is no process group and every collective is the identity."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the logs and the small files."""
        return self.rank == 0


@contextmanager
def start_world(timeout_minutes: int = 30) -> Iterator[World]:
    """Join the processes that torchrun started, over NCCL with GPUs and gloo without; leave them at the end.

    Raises:
        UserError: if a machine runs more processes than it has GPUs.
    """
    rank, local_rank, size = (int(os.environ.get(key, default)) for key, default in _TORCHRUN.items())
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} visible; "
                "lower NPROC_PER_NODE or set CUDA_VISIBLE_DEVICES"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        bound = device if backend == "nccl" else None  # NCCL's barrier has to know its GPU
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), device_id=bound)
    try:
        yield World(rank, local_rank, size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


_TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def wrap(module: nn.Module, world: World) -> nn.Module:
    """`module` with its gradients averaged over all ranks during backward; rank 0's weights are given to all."""
    if world.size == 1:
        return module
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def gradient_sync(module: nn.Module, enabled: bool) -> AbstractContextManager:
    """Whether backward inside this context averages over the ranks; False while gradients accumulate."""
    wrapped = isinstance(module, DistributedDataParallel)
    return nullcontext() if enabled or not wrapped else module.no_sync()


def reduce_sum(tensor: Tensor, world: World) -> Tensor:
    """Sum over the ranks, in place, without waiting for the device."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def reduce_mean(tensor: Tensor, world: World) -> Tensor:
    """Mean over the ranks, in place, without waiting for the device."""
    return reduce_sum(tensor, world).div_(world.size)


def from_main(value: T, world: World) -> T:
    """Rank 0's `value` (anything picklable, small) on every rank; so that all act on one view of the file system."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Rank 0 runs the body before the others do (downloads, files that are made once)."""
    if world.size > 1 and not world.is_main:
        dist.barrier()
    try:
        yield
    finally:
        if world.size > 1 and world.is_main:
            dist.barrier()
