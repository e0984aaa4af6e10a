"""Requests to stop: a run finishes its step, saves, and exits with code 75, or 130 after Ctrl-C.

Clusters announce with SIGTERM that they are about to take a machine away; SIGUSR1 does the same by hand or by schedule
(Slurm: `--signal=USR1@120`); Ctrl-C is SIGINT; and a process of torchrun is asked to stop by the end of torchrun, which
cannot tell it when it is killed. Inside `StopRequest` the first request is noted, for the training loop to ask; one
more, later, ends the process at once. Outside of it nothing is worth saving, and signals act as usual.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: no failure, start it again
INTERRUPTED = 130  # what shells report of a command that Ctrl-C ended: it is not to be started again
SIGNALS = (signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM), signal.SIGINT)
# One request reaches a process twice where a cluster signals all processes and torchrun passes its own on.
REPEATED_WITHIN = 5.0  # seconds
REPEATED_BY_HAND_WITHIN = 1.0  # a person who presses Ctrl-C again may be faster than that

_LAUNCHER = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None  # torchrun's process


class StopRequest:
    """Context manager."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._first = 0.0
        self._before: dict[int, Any] = {}

    @property
    def made(self) -> bool:
        """Whether this process was asked to stop since the block was entered."""
        return self._number is not None or (_LAUNCHER is not None and os.getppid() != _LAUNCHER)

    @property
    def exit_code(self) -> int:
        """What a run that stopped as asked exits with."""
        return INTERRUPTED if self._number == signal.SIGINT else EXIT_CODE

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        repeated_within = REPEATED_BY_HAND_WITHIN if number == signal.SIGINT else REPEATED_WITHIN
        if self._number is None:
            self._number, self._first = number, time.monotonic()
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # print is not for handlers
        elif time.monotonic() - self._first > repeated_within:
            _end_at_next(number)
            os.kill(os.getpid(), number)


def survive_requests() -> None:
    """In a worker that reads data: ignore the first signal, as its process needs samples to finish its step.

    torchrun and Slurm signal workers too. A second one ends it, as `DataLoader` does with workers that hang. Ctrl-C,
    which reaches all processes of a terminal, is left to the process that started the worker.
    """
    for number in SIGNALS:
        signal.signal(number, _end_at_next)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_at_next(number: int, frame: FrameType | None = None) -> None:
    signal.signal(number, signal.SIG_DFL)
