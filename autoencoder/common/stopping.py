"""Stop requests by signal: a run finishes its step, saves, and exits with code 75.

Clusters announce with SIGTERM that they are about to take a machine away; SIGUSR1 does the same by hand or by schedule
(Slurm: `--signal=USR1@120`). Inside `StopRequest` the first of them is noted, for the training loop to ask; one more,
later, ends the process at once. Outside of it nothing is worth saving, and signals act as usual.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: no failure, start it again
SIGNALS = (signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM))
# One request reaches a process twice where a cluster signals all processes and torchrun passes its own on.
REPEATED_WITHIN = 5.0  # seconds


class StopRequest:
    """Context manager.

    Attributes:
        made: whether this process was asked to stop since the block was entered.
    """

    def __init__(self) -> None:
        self.made = False
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.made:
            self.made, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > REPEATED_WITHIN:
            _end_at_next(number)
            os.kill(os.getpid(), number)


def survive_request(_: int = 0) -> None:
    """In a worker that reads data: ignore the first signal, as its process needs samples to finish its step.

    torchrun and Slurm signal workers too. A second one ends it, as `DataLoader` does with workers that hang.
    """
    for number in SIGNALS:
        signal.signal(number, _end_at_next)


def _end_at_next(number: int, frame: FrameType | None = None) -> None:
    signal.signal(number, signal.SIG_DFL)
