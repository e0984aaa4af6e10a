"""Processes of torchrun: rank and device of this one (`World`), and its collectives.

    with start_world() as world:                  # torchrun's processes, or this one alone
        with world.main_first():                  # rank 0 downloads, the others find the files
            model = load(path).to(world.device)
        total = world.reduce_sum(total)           # tensors on a GPU: NCCL; on the CPU: gloo
        lines = world.gather(lines)               # anything picklable, over gloo

Alone, every collective is the identity and there is no process group. Gradients are averaged by DDP and FSDP, see
`svg_t2i.training.sharding`; `mean_over_processes` is for losses of stage 1, where Lightning starts the processes.
"""

from __future__ import annotations

import itertools
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from autoencoder.common.config import UserError

T = TypeVar("T")

CPU = torch.device("cpu")
GIB = 2**30
LONG = timedelta(days=7)  # for rank 0 to index, download or measure alone
FILES_PER_PEER = 6  # descriptors of gloo, for the two groups that a sharded run has
OTHER_FILES = 1024  # of a process, besides
_TORCHRUN = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_RESTART_COUNT": 0}


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Attributes:
        rank, size: of all processes; `size` 1 means that there is no process group.
        local_rank, local_size: of the processes on this machine.
        device: where this process computes.
        restarts: how often torchrun has started these processes again after a failure.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = CPU
    local_size: int = 1
    restarts: int = 0
    store: dist.Store | None = field(default=None, repr=False, compare=False)
    _turns: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the logs and the small files."""
        return self.rank == 0

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place. On a GPU the host does not wait for it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` (anything picklable, small) on every rank: all act on one view of the file system."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0 (anything picklable, small), on every rank. It may take any time.

        Raises:
            UserError: on rank 0, if `make` does; the other ranks end quietly then.
        """
        value, error = None, None
        with self.main_first():
            if self.is_main:
                try:
                    value = make()
                except UserError as raised:
                    error = raised
        if not self.broadcast(error is None):
            raise error or SystemExit(2)
        return self.broadcast(value)

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` (anything picklable, small), by rank, on rank 0; elsewhere an empty list."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def join_shares(self, share: Tensor) -> Tensor:
        """Every rank's flat tensor (n,), all of one length, as one (size · n,) on every rank."""
        whole = share.new_empty(len(share) * self.size)
        dist.all_gather_into_tensor(whole, share)
        return whole

    def barrier(self) -> None:
        """Wait until all processes are here. Over the CPU: kernels of a GPU may still be running."""
        self.reduce_sum(torch.zeros(()))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the body before the others do (downloads, files that are made once). It may take any time.

        The others wait for an entry of the store, not in a collective: those end after `timeout_minutes`.
        """
        turn = f"main first {next(self._turns)}"
        if not self.is_main:
            self.store.wait([turn], LONG)
        try:
            yield
        finally:
            if self.is_main and self.size > 1:
                self.store.set(turn, "done")


ALONE = World()


@contextmanager
def start_world(device: str | None = None, timeout_minutes: int = 30) -> Iterator[World]:
    """Join the processes that torchrun started, or be alone; leave them at the end.

    GPU tensors travel over NCCL, everything else over gloo.

    Args:
        device: "cpu", "cuda" or "cuda:N"; None is a GPU per process, or the CPU where there is none.
        timeout_minutes: how long a collective waits for the slowest process.

    Raises:
        UserError: there is no such device, a machine runs more processes than it has GPUs, or the limit of open
            files is too low for so many processes.
    """
    rank, local_rank, size, local_size, restarts = (int(os.environ.get(k, default)) for k, default in _TORCHRUN.items())
    own = choose_device(device, local_rank)
    gpu, timeout = own.type == "cuda", timedelta(minutes=timeout_minutes)
    if gpu:
        torch.cuda.set_device(own)
    raise_file_limit(size)
    store = None
    if size > 1:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps the store when it restarts: addresses of dead processes must not be found in it
        store = dist.PrefixStore(f"attempt {restarts}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=own if gpu else None,
        )
    try:
        yield World(rank, local_rank, size, own, local_size, restarts, store)
    finally:
        if size > 1:
            dist.destroy_process_group()


def raise_file_limit(size: int) -> None:
    """Let this process open the files and sockets that `size` processes need.

    Raises:
        UserError: the system does not allow so many.
    """
    needed = FILES_PER_PEER * size + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(
            f"{size} processes need about {needed} open files each, and the limit here is {hard}; raise it with "
            "`ulimit -Hn`, LimitNOFILE (systemd) or --ulimit nofile (docker)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def choose_device(name: str | None = None, local_rank: int = 0) -> torch.device:
    """The device of that name; None: a GPU, or the CPU where there is none. "cuda" is GPU number `local_rank`.

    Raises:
        UserError: there is none of that name here, or fewer GPUs than processes.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; choose cpu, cuda or cuda:N") from error
    if device.type != "cuda":
        return device
    device = torch.device("cuda", local_rank if device.index is None else device.index)
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} wants {device}, but {torch.cuda.device_count()} GPUs are visible here; "
            "start fewer processes (NPROC_PER_NODE), set CUDA_VISIBLE_DEVICES, or choose --device cpu"
        )
    return device


def peak_memory(device: torch.device, reset: bool = False) -> float:
    """Largest memory use in GiB: of tensors on a GPU, or of this whole process on the CPU.

    reset: count anew from here on (on a GPU).
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return peak / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB


class AnyRank:
    """Whether any rank wants something, asked step by step between the hosts, without waiting for a device."""

    def __init__(self, world: World):
        self.world = world
        self._wanted, self._sent = torch.zeros(1, dtype=torch.int32), None

    def ask(self, wanted: bool) -> bool:
        """The answer to the question asked by the call before, the same on all ranks; alone, to this one."""
        if self.world.size == 1:
            return wanted
        answer = self.answer()
        self._wanted.fill_(wanted)
        self._sent = dist.all_reduce(self._wanted, dist.ReduceOp.MAX, async_op=True)
        return answer

    def answer(self) -> bool:
        """Wait for the answer to the last question."""
        if self._sent is not None:
            self._sent.wait()
        return bool(self._wanted.item())


# ------------------------------------------------------------------------------------- inside Lightning's processes


def group_size() -> int:
    """Number of processes in the current process group, whoever started it; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean over all processes, differentiable; the tensor itself where there is only one.

    With equally large batches, a mean over processes of means is the mean over the global batch.
    """
    return _Mean.apply(tensor) if group_size() > 1 else tensor


class _Mean(torch.autograd.Function):
    """y_r = 1/R · Σ_s x_s. Its own adjoint: the gradient of x_s is 1/R · Σ_r ∂/∂y_r."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Mean.apply(grad)
