"""Lightning callbacks that guard a run: requests to stop, and a watchdog over steps that do not end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, Trainer

from autoencoder.common.lock import RunLock
from autoencoder.common.processes import AnyRank, World
from autoencoder.common.stopping import StopRequest
from autoencoder.common.watchdog import Watchdog
from autoencoder.training.settings import TrainingConfig


class Guards:
    """The guards of one run.

    lock: of its folder, on the process that holds it.
    """

    def __init__(self, training: TrainingConfig, folder: Path, lock: RunLock | None):
        self.requests = Requests(lock)
        self.stalls = Stalls(folder, training.stall_minutes)


class Requests(Callback):
    """Whether the run is to stop. From the start of training on, Lightning's own handlers of signals are replaced.

    Attributes:
        stopped: whether the run stops, or has stopped, before its end.
    """

    def __init__(self, lock: RunLock | None):
        self.lock, self.stopped = lock, False
        self.request = StopRequest()
        self._asked: AnyRank | None = None

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self._asked = AnyRank(World(trainer.global_rank, size=trainer.world_size))
        self.request.__enter__()

    def stop(self, trainer: Trainer, saving: bool) -> bool:
        """After a step: whether any process was asked to stop. One step late where there are several.

        saving: whether this step is saved in any case; then the lock is looked at now.

        Raises:
            UserError: the run's folder is no longer its own.
        """
        if self.lock is not None:
            self.lock.check(look=saving)
        self.stopped = self._asked.ask(self.request.made) and trainer.global_step < trainer.max_steps
        return self.stopped

    def on_train_end(self, *_: Any) -> None:
        self._asked.answer()
        self.request.__exit__()

    def on_exception(self, *_: Any) -> None:
        self.request.__exit__()


class Stalls(Callback):
    """Tells the watchdog of progress. Validation may take any time."""

    def __init__(self, folder: Path, minutes: float | None):
        self.folder, self.minutes = folder, minutes
        self.watchdog = Watchdog(folder, None)  # until it is known how many processes there are

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.watchdog = Watchdog(self.folder, self.minutes, trainer.global_rank, trainer.world_size)
        self._wait(trainer)
        self.watchdog.__enter__()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.watchdog.at(f"in step {trainer.global_step + 1}")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._wait(trainer)

    def _wait(self, trainer: Trainer) -> None:
        self.watchdog.at(f"waiting for the batch of step {trainer.global_step + 1}")

    def on_validation_start(self, *_: Any) -> None:
        self.watchdog.pause()

    def on_validation_end(self, *_: Any) -> None:
        self.watchdog.resume()

    def on_train_end(self, *_: Any) -> None:
        self.watchdog.__exit__()

    def on_exception(self, *_: Any) -> None:
        self.watchdog.__exit__()
