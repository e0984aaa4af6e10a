"""Checkpoints of an autoencoder run: when one is written, which are kept, which a run goes on from.

    FOLDER/checkpoints/
      step_0001000.ckpt …     whole or not there; the zip file they are has a checksum of every tensor
      last.ckpt               a link to the newest

A run goes on from the newest whole one. Where there are some and none is whole, it does not begin anew on top of them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from torch.nn.utils import get_total_norm

from autoencoder.common.config import UserError
from autoencoder.common.durable import NO_SPACE, no_space, require_space, sync_folder
from autoencoder.common.weights import read_file, replacing
from autoencoder.common.workers import WorkersDied
from autoencoder.training.guards import Requests
from autoencoder.training.module import AutoencoderModule

logger = logging.getLogger("autoencoder")

LAST = "last.ckpt"


class Checkpoints(Callback):
    """A checkpoint every so many steps, at the end, and where the run is asked to stop.

    Args:
        every: a checkpoint at the multiples of each.
        keep: how many to keep, None for all.
        requests: asked after each step whether the run is to stop; it stops when the checkpoint is written.
    """

    def __init__(self, folder: Path, every: Sequence[int], keep: int | None, requests: Requests):
        self.folder, self.every, self.keep, self.requests = folder, every, keep, requests

    @rank_zero_only
    def on_fit_start(self, *_: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        for partial in self.folder.glob(".*.tmp"):  # of a run that was killed while it saved
            partial.unlink()

    def on_train_batch_end(self, trainer: Trainer, module: AutoencoderModule, *_: Any) -> None:
        if not module.step_complete:
            return
        step = trainer.global_step
        due = step == trainer.max_steps or any(step % every == 0 for every in self.every)
        stop = self.requests.stop(trainer, saving=due)
        if due or stop:
            self.save(trainer, module, step)
        trainer.should_stop = trainer.should_stop or stop

    def on_exception(self, trainer: Trainer, module: AutoencoderModule, exception: BaseException) -> None:
        # alone, all steps before the missing batch are whole; of several processes, others are in the next one
        if isinstance(exception, WorkersDied) and trainer.world_size == 1 and module.between_steps:
            self.save(trainer, module, trainer.global_step)

    def save(self, trainer: Trainer, module: AutoencoderModule, step: int) -> None:
        """Write the checkpoint of this step, then remove those that are too many."""
        require_finite(module, step)
        trainer.save_checkpoint(self.folder / f"step_{step:07d}.ckpt")  # all processes take part
        if trainer.is_global_zero:
            link = self.folder / f".{LAST}.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(f"step_{step:07d}.ckpt")
            os.replace(link, self.folder / LAST)
            sync_folder(self.folder)
            if self.keep:
                older = [path for number, path in saved_steps(self.folder) if number <= step]
                for path in older[: -self.keep]:  # later ones: the run was wound back
                    path.unlink()


def saved_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of the checkpoints in a folder, by their steps: clocks may have been set back."""
    named = ((re.fullmatch(r"step_(\d+)\.ckpt", path.name), path) for path in folder.glob("step_*.ckpt"))
    return sorted((int(match[1]), path) for match, path in named if match)


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint in a folder and its content; None where there is none at all.

    `last.ckpt` counts as the newest, also where it is a file of its own. Damaged ones are passed over with a warning.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    last = folder / LAST
    newest = [last] if last.is_symlink() or last.exists() else []
    target = last.resolve()
    candidates = newest + [path for _, path in reversed(saved_steps(folder)) if path.resolve() != target]
    for path in candidates:
        try:
            return path, read_file(path, "checkpoint to resume from", verify=True)
        except UserError as error:
            logger.warning("%s; trying an older checkpoint", error)
    if candidates:
        raise UserError(
            f"{folder}: none of the checkpoints there is whole ({', '.join(path.name for path in candidates)}), so "
            "nothing was started that would replace them; bring back a copy of one, move them away to begin anew, or "
            "choose another training.logdir"
        )
    return None


def require_finite(module: AutoencoderModule, step: int) -> None:
    """UserError where a trained weight, or what an optimiser keeps of it, is not finite."""
    tensors = [weight.detach() for weight in module.parameters() if weight.requires_grad]
    for optimizer in module.trainer.optimizers:
        tensors += [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    if not get_total_norm(tensors).isfinite():
        raise UserError(
            f"training diverged: weights are not finite at step {step}, and nothing was saved; lower "
            "model.base_learning_rate, or add training.warmup_steps or training.trainer.gradient_clip_val, and run "
            "again to go on from the last checkpoint"
        )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that an interrupted save leaves the old file; reads tensors only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file. UserError where the folder is gone or the disk is full."""
        path = Path(path)
        if not path.parent.is_dir():
            raise UserError(f"{path.parent} is gone: the run's folder was removed while the run was using it")
        require_space(path.parent, _num_bytes(checkpoint), "a checkpoint")
        try:
            with replacing(path) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's writer reports a failed write as RuntimeError
            if isinstance(error, RuntimeError) or error.errno in NO_SPACE:
                raise no_space(path.parent, "a checkpoint", _num_bytes(checkpoint)) from error
            raise

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read_file(path, "checkpoint to resume from")


def _num_bytes(content: Any) -> int:
    """Of all tensors in nested lists and mappings."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    values = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return sum(map(_num_bytes, values))
