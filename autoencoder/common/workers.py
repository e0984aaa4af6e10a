"""Worker processes of a data loader: they end with the run that started them, and it learns why one of them is gone.

What torch and multiprocessing do by themselves, and what is done about it here:

- multiprocessing sends workers one SIGTERM when the interpreter exits and then waits for them without end. Workers
  have to outlive that signal (see `stopping`), so they are killed before.
- torch raises an error out of any line of the main process when a worker dies, also half-way through an update. Here
  it is raised where the next batch is asked for, as `WorkersDied`: what was trained until then can be saved.
- A batch that a worker cannot hand over (shared memory is full) is dropped, and its receiver waits without end. Here
  the worker ends, with the reason.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import inspect
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Set
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from autoencoder.common.config import UserError, first_line
from autoencoder.common.stopping import survive_requests

T = TypeVar("T")

SHARED_MEMORY = Path("/dev/shm")
DYING_SECONDS = 2.0  # that a killed worker may take to end, once its connections have
CANNOT_HAND_OVER = 74  # EX_IOERR of sysexits.h: exit code of a worker whose batch did not fit shared memory
SHOW_STACKS = getattr(signal, "SIGUSR2", None)  # makes a worker print its stacks


class WorkersDied(UserError):
    """Worker processes ended by themselves; the batches that they were preparing are lost."""


class WorkerLoader(DataLoader[T]):
    """A DataLoader whose workers' errors arrive as the one message they were raised with.

    Raises:
        WorkersDied: while iterating, if a worker was killed or ended.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, worker_init_fn=_prepare_worker, **options)

    def __iter__(self) -> Iterator[T]:
        others = set(multiprocessing.active_children())
        handler = _handler_before_torch()
        batches = super().__iter__()
        workers = set(multiprocessing.active_children()) - others
        if workers:
            _kill_workers_at_exit()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, handler)  # not torch's, which raises anywhere; next() looks at them, too
        try:
            yield from batches
            return
        except UserError as error:  # torch re-raises it with the worker's traceback as message
            name = type(error).__name__
            traceback, _, message = str(error).rpartition(f"{name}: ")
            if not traceback.startswith(f"Caught {name} "):
                raise
            raised, failed = UserError(message.rstrip()), error
        except (RuntimeError, OSError, EOFError) as error:
            codes = _exit_codes(workers)
            if not codes:
                raise
            raised, failed = WorkersDied(_cause(codes)), error
        failed.__traceback__ = None  # refers to torch's iterator, which stops its workers only when it is let go
        del batches
        raise raised


def _handler_before_torch() -> Any:
    """What handles SIGCHLD, or did before a loader of torch, earlier in this process, put its own in the place."""
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", None) == signal_handling.__name__:
        handler = inspect.getclosurevars(handler).nonlocals.get("previous_handler")
    return handler or signal.SIG_DFL


def _exit_codes(workers: Set[BaseProcess]) -> list[int]:
    """Those of workers that failed. One that is killed loses its connections a moment before it has ended."""
    if not workers:
        return []
    ending = wait([worker.sentinel for worker in workers], timeout=DYING_SECONDS)
    for worker in workers:
        if worker.sentinel in ending:
            worker.join(DYING_SECONDS)
    return [worker.exitcode for worker in workers if worker.exitcode]


def _cause(codes: list[int]) -> str:
    """What ended workers with these exit codes; negative ones are numbers of signals."""
    code = next((code for code in codes if code != -signal.SIGTERM), codes[0])
    how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    reason = {
        -signal.SIGKILL: "most likely the machine ran out of memory (see dmesg); lower num_workers or prefetch",
        -signal.SIGBUS: f"most likely shared memory is full: {shared_memory()}",
        CANNOT_HAND_OVER: f"its batch did not fit shared memory: {shared_memory()}",
    }.get(code, "num_workers=0 reads in the main process, where the error shows itself")
    return f"a worker that reads data {how}; {reason}"


def shared_memory() -> str:
    """How much of it there is, and what to do if that is too little."""
    usage = shutil.disk_usage(SHARED_MEMORY)
    return (
        f"{SHARED_MEMORY} has {usage.free / 1e6:.0f} of {usage.total / 1e6:.0f} MB free; lower num_workers or "
        "prefetch, or give the container more (docker run --shm-size=16g)"
    )


def require_shared_memory(size: int) -> None:
    """UserError where batches of `size` bytes in all, on their way from workers, do not fit shared memory."""
    if SHARED_MEMORY.is_dir() and size > shutil.disk_usage(SHARED_MEMORY).free:
        raise UserError(f"workers hand over batches in shared memory, about {size / 1e6:.0f} MB: {shared_memory()}")


def _prepare_worker(_: int) -> None:
    survive_requests()
    if SHOW_STACKS is not None:
        faulthandler.register(SHOW_STACKS, file=2, all_threads=True)  # the descriptor: sys.stderr may be anything
    # a hook of multiprocessing, called in the thread that hands batches over
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)


def _end_worker(error: Exception, _: Any) -> None:
    print(f"error: a worker cannot hand over its batch: {first_line(error)}", file=sys.stderr, flush=True)
    os._exit(CANNOT_HAND_OVER)


@functools.cache
def _kill_workers_at_exit() -> None:
    atexit.register(_kill_workers)  # later than multiprocessing, so that it is called before


def _kill_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
