"""A watchdog over runs that stand still: after some minutes without progress it says which rank stands where, and ends
the run.

Every rank watches itself in a thread. The first that sees no progress marks the results folder; then all ranks write
what they were doing, and the stacks of their threads, to FOLDER/stalled/rank_00000.txt …, and the lowest of them sums
up. A rank that writes nothing is stopped, dead, or stuck in the driver.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoencoder.common.workers import SHOW_STACKS

FOLDER = "stalled"
EXIT_CODE = 2
LOOKS = 60  # how often a rank looks at the time within the limit, but at least every LONGEST seconds
LONGEST = 5.0


class Watchdog:
    """Context manager. `at` tells it of progress.

    Args:
        folder: results folder, on storage that all ranks share.
        minutes: without progress until the run is ended; None never ends it.
    """

    def __init__(self, folder: Path, minutes: float | None, rank: int = 0, size: int = 1):
        self.folder, self.minutes, self.rank, self.size = folder / FOLDER, minutes, rank, size
        self._doing, self._since = "starting", time.monotonic()
        self._paused = self._ended = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)  # of the run before
        if self.minutes is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True

    def at(self, doing: str) -> None:
        """Progress was made; what comes next, such as "waiting for the batch of step 7"."""
        self._doing, self._since = doing, time.monotonic()

    def pause(self) -> None:
        """What comes next may take any time, until `resume`."""
        self._paused = True

    def resume(self) -> None:
        self._paused, self._since = False, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The body may take any time."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def _watch(self) -> None:
        limit = 60 * self.minutes
        pause = min(limit / LOOKS, LONGEST)
        mark = self.folder / "found"
        while True:
            time.sleep(pause)
            if self._ended:
                return
            standing = 0.0 if self._paused else time.monotonic() - self._since
            if standing > limit:
                self.folder.mkdir(parents=True, exist_ok=True)
                mark.touch()
            if standing > limit or (standing > limit / 2 and mark.exists()):
                self._report()
                time.sleep(3 * pause)  # until the others have written, too
                self._sum_up()
                os._exit(EXIT_CODE)

    def _report(self) -> None:
        for worker in multiprocessing.active_children():
            if SHOW_STACKS is not None and worker.daemon:
                os.kill(worker.pid, SHOW_STACKS)  # to standard error
        path = self.folder / f"rank_{self.rank:05d}.txt"
        with path.open("w", encoding="utf-8") as file:
            print(f"{self._doing} (process {os.getpid()} on {socket.gethostname()})\n", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)

    def _sum_up(self) -> None:
        doing: dict[str, list[int]] = {}
        for path in sorted(self.folder.glob("rank_*.txt")):
            doing.setdefault(path.read_text(encoding="utf-8").partition(" (")[0], []).append(int(path.stem[5:]))
        seen = sorted(rank for ranks in doing.values() for rank in ranks)
        if self.rank != seen[0]:
            return
        silent = sorted(set(range(self.size)) - set(seen))
        states = [f"{_ranks(ranks)} {what}" for what, ranks in sorted(doing.items(), key=lambda item: len(item[1]))]
        states = ([f"{_ranks(silent)} without an answer"] if silent else []) + states
        print(
            f"error: no progress for {self.minutes:g} minutes: {'; '.join(states)}. Stacks of all threads are in "
            f"{self.folder}. Start the same command again to go on from the last checkpoint; a run whose batches or "
            "steps take longer needs a larger stall_minutes",
            file=sys.stderr,
            flush=True,
        )


def _ranks(ranks: list[int]) -> str:
    some = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {some}" if len(ranks) == 1 else f"ranks {some}"
