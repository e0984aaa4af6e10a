"""The training loop: steps, log lines, pictures and checkpoints, until the run is done, asked to stop or stuck."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from autoencoder.common.config import UserError
from autoencoder.common.lock import RunLock
from autoencoder.common.processes import AnyRank, World
from autoencoder.common.stopping import StopRequest
from autoencoder.common.watchdog import Watchdog
from autoencoder.common.workers import WorkersDied
from svg_t2i.checkpoints.adapters import write_adapter
from svg_t2i.checkpoints.run import Saver
from svg_t2i.data.feature_cache import FeatureBatch
from svg_t2i.data.loader import TrainLoader
from svg_t2i.data.sources import TrainBatch
from svg_t2i.features.frozen import FrozenNetworks
from svg_t2i.training.monitor import Meter, ProgressLogger, profiling
from svg_t2i.training.optimizer import learning_rate
from svg_t2i.training.pictures import evaluate_averaged, sample_grid
from svg_t2i.training.settings import TrainConfig
from svg_t2i.training.sharding import whole_tensor
from svg_t2i.training.step import TrainState, train_step
from svg_t2i.training.validation import Validation

log = logging.getLogger("svg_t2i")


class TrainLoop:
    """Trains `state` up to `train.max_steps`.

    Args:
        objective: the parallelised `FlowObjective`.
        open_loader: (first step, number of workers) → this rank's micro-batches from that step on.
        meta: recorded in every checkpoint.
        lock: of the results folder, on the rank that holds it.
        validation: the held-out samples, where there are some.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        objective: nn.Module,
        frozen: FrozenNetworks,
        open_loader: Callable[[int, int], TrainLoader],
        meta: dict[str, Any],
        world: World,
        lock: RunLock | None = None,
        validation: Validation | None = None,
    ):
        self.config, self.state, self.objective, self.frozen = config, state, objective, frozen
        self.open_loader, self.meta, self.world, self.lock = open_loader, meta, world, lock
        self.validation = validation
        loop, folder = config.train, Path(config.results_dir)
        self.meter = Meter(world, config, state.transformer.config)
        self.logger = ProgressLogger(config, state.step, world)
        self.saver = Saver(
            folder / "checkpoints",
            background=loop.async_checkpoints,
            keep_last=loop.keep_last,
            keep_every=loop.keep_every,
        )
        self.watchdog = Watchdog(folder, loop.stall_minutes, world.rank, world.size)
        self.batches = iter(open_loader(state.step, config.data.num_workers))
        self.died: WorkersDied | None = None

    @property
    def last(self) -> bool:
        """Whether the run is done."""
        return self.state.step == self.config.train.max_steps

    def run(self) -> int:
        """-> exit code of the run: 0 when it is done, else what `StopRequest` says.

        Raises:
            UserError: the run cannot go on. What could be saved is saved.
        """
        asked, stop = AnyRank(self.world), False
        with profiling(self.config, self.world) as next_step, self.watchdog, StopRequest() as request:
            while not self.last and not stop:
                self.take_step()
                stop = asked.ask(request.made or self.died is not None)
                self.log_if_due()
                with self.logger.excluded():
                    next_step()
                    self.show_if_due(stop)
                    self.save_if_due(stop)
            asked.answer()
            with self.watchdog.paused():
                self.saver.close()  # the signal that stops at once is still heard
        self.logger.close()
        if self.died is not None:
            raise self.died
        if self.last:
            return 0
        log.info("stopped after step %d as asked; the same command goes on from there", self.state.step)
        return request.exit_code

    def take_step(self) -> None:
        number = self.state.step + 1
        self.watchdog.at(f"waiting for the batch of step {number}")
        self.meter.phase("data")
        batches = self.next_batches()
        self.watchdog.at(f"in step {number}")
        self.meter.add_replaced(batches)
        train_step(self.state, self.objective, batches, self.frozen, self.config, self.world, self.meter)
        self.meter.phase("aside")

    def next_batches(self) -> Sequence[TrainBatch | FeatureBatch]:
        """The micro-batches of the next step. If workers died, by one more worker: other ranks are in that step.

        Alone there is nobody to wait for: what is trained is saved, and the run ends.
        """
        try:
            return next(self.batches)
        except WorkersDied as error:
            if self.world.size == 1:
                self.save()
                self.saver.close()
            if self.world.size == 1 or self.died is not None:
                raise
            self.died = error
        log.warning("rank %d: %s. The run will be saved after the next steps, and end", self.world.rank, self.died)
        self.batches = iter(self.open_loader(self.state.step, 1))
        return next(self.batches)

    def log_if_due(self) -> None:
        loop, step = self.config.train, self.state.step
        if self.last or step % loop.log_every == 0:
            values = self.meter.read()
            stop_if_diverged(values, self.meter, self.config)
            self.logger.write(step, values, learning_rate(step - 1, self.config.optim, loop.max_steps))

    def show_if_due(self, stop: bool) -> None:
        """The loss on held-out samples; pictures and metrics of the averaged weights."""
        step, samples, evaluation = self.state.step, self.config.samples, self.config.evaluation
        held_out = self.config.validation
        with self.watchdog.paused():
            if held_out and self.validation and not stop and (self.last or step % held_out.every == 0):
                losses = self.validation.measure(self.objective, self.state.transformer, self.frozen)
                self.logger.validation(step, losses)
            if samples.every and not stop and (self.last or step % samples.every == 0):
                grid = sample_grid(self.state, self.frozen, self.config, self.world)
                if grid is not None:
                    self.logger.pictures(step, grid)
            if evaluation and evaluation.every and not stop and (self.last or step % evaluation.every == 0):
                self.logger.metrics(step, evaluate_averaged(self.state, self.frozen, self.config, self.world))

    def save_if_due(self, stop: bool) -> None:
        due = self.last or stop or self.state.step % self.config.train.ckpt_every == 0
        if self.lock is not None:
            self.lock.check(look=due)
        if due:
            self.watchdog.at(f"saving step {self.state.step}")
            self.save()

    def save(self) -> None:
        """Begin a checkpoint of this step; an adapter is also written as a file for pipelines."""
        self.saver.save(self.state.step, self.state.tensors(), self.meta)
        if self.config.lora is not None:
            whole = {name: whole_tensor(weight) for name, weight in self.state.ema.items()}
            if self.world.is_main:
                write_adapter(self.config.results_dir, whole, self.config.lora)
        self.frozen.captions.clear()  # as a resumed run would find it


def stop_if_diverged(values: dict[str, Any], meter: Meter, config: TrainConfig) -> None:
    """Give up after too many updates with non-finite gradients.

    Raises:
        UserError: with what can be done about it.
    """
    if values["skipped"]:
        log.warning("%d updates skipped since the last line: gradients not finite, or a spike", values["skipped"])
    if meter.total_nonfinite > config.train.max_nonfinite:
        raise UserError(
            f"{meter.total_nonfinite} updates had non-finite gradients, more than "
            f"train.max_nonfinite={config.train.max_nonfinite}; lower optim.lr or use train.precision=fp32, and "
            f"continue from the last checkpoint in {config.results_dir}"
        )
