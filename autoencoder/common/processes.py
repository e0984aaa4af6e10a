"""The processes that torchrun started, for work that is divided by images and merged at the end.

Nothing here is fast, and nothing has to be: results are gathered over gloo, through the CPU, a few times per run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from autoencoder.common.config import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among its peers; `size` 1 means that it is alone and every method is the identity."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everyone's `value` (anything picklable) in the order of the ranks, on the main process; elsewhere []."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def share(self, value: T) -> T:
        """The main process's `value` (anything picklable) on all of them."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        total = tensor.detach().cpu().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined_processes(device: str | None = None, timeout_minutes: int = 60) -> Iterator[Processes]:
    """The processes of torchrun, or this one alone. `device` None: a GPU each, the CPU where there is none.

    Raises:
        UserError: there is no such device, or more processes than GPUs.
    """
    rank, local, size = (int(os.environ.get(name, default)) for name, default in _TORCHRUN)
    own = _device(device, local)
    if size > 1:
        dist.init_process_group("gloo", timeout=timedelta(minutes=timeout_minutes))
    try:
        yield Processes(rank, size, own)
    finally:
        if size > 1:
            dist.destroy_process_group()


_TORCHRUN = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


def _device(name: str | None, local_rank: int) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name}: there is no such device; choose cpu, cuda or cuda:N") from error
    if device.type != "cuda":
        return device
    if device.index is None:
        device = torch.device("cuda", local_rank)
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine wants {device}, but {torch.cuda.device_count()} GPUs are visible; "
            "start fewer processes, set CUDA_VISIBLE_DEVICES, or choose --device cpu"
        )
    torch.cuda.set_device(device)
    return device
