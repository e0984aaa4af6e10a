"""Lightning callbacks: console, learning rate, image grids, exponential moving average."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from autoencoder.common.config import first_line
from autoencoder.common.weights import EMA_KEY
from autoencoder.images.files import Group, image_grid, to_float, to_pil
from autoencoder.training.module import AutoencoderModule

logger = logging.getLogger("autoencoder")

# -- logging ----------------------------------------------------------------------------------------------------------


class Board(TensorBoardLogger):
    """Lightning's TensorBoard logger. An error there, such as a full disk, ends the recording and not the run."""

    broken = False

    def log_metrics(self, *arguments: Any, **options: Any) -> None:
        self._try(super().log_metrics, *arguments, **options)

    def picture(self, name: str, pixels: Tensor, step: int) -> None:
        """pixels: (H, W, 3) uint8."""
        self._try(lambda: self.experiment.add_image(name, pixels, step, dataformats="HWC"))

    def save(self) -> None:
        self._try(super().save)

    def finalize(self, status: str) -> None:
        self._try(super().finalize, status)

    def _try(self, write: Callable[..., None], *arguments: Any, **options: Any) -> None:
        if self.broken:
            return
        try:
            write(*arguments, **options)
        except Exception as error:
            self.broken = True
            logger.warning("TensorBoard records nothing more: %s", first_line(error))


class ConsoleLogger(Logger):
    """One line per report, for runs whose output is not a terminal (there, Lightning draws a progress bar)."""

    SHOWN = {"rec_loss": "rec", "p_loss": "lpips", "g_loss": "g", "disc_loss": "d", "decoder": "lr"}
    SHOWN |= {"psnr": "psnr", "ssim": "ssim", "lpips": "lpips", "images_per_s": "images/s", "memory_gib": "GiB"}

    def __init__(self, total_steps: int):
        super().__init__()
        self.total_steps = total_steps
        self.rates: dict[str, float] = {}  # logged before their step, shown with it

    name = version = None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        prefix = "validation  " if "val/rec_loss" in metrics else ""
        values = {name.rpartition("/")[2]: value for name, value in metrics.items()}
        if "rec_loss" not in values:
            self.rates = values
            return
        values, self.rates = self.rates | values, {}
        shown = "  ".join(f"{label} {values[name]:.4g}" for name, label in self.SHOWN.items() if name in values)
        print(f"step {step}/{self.total_steps}  {prefix}{shown}", flush=True)


class LearningRates(LearningRateMonitor):
    """Lightning's monitor, at the steps of the other scalars: its own counts are of micro-batches.

    TensorBoard gets `lr-Adam/decoder` and `lr-Adam-1/discriminator`.
    """

    def __init__(self, every: int):
        super().__init__(logging_interval="step")
        self.every = every

    def on_train_batch_start(self, trainer: Trainer, module: AutoencoderModule, *_: Any) -> None:
        step = trainer.global_step + 1
        if module.between_steps and step % self.every == 0:
            rates = self._extract_stats(trainer, "any")
            for log in trainer.loggers:
                log.log_metrics(rates, step=step)


class ReconstructionGrid(Callback):
    """At steps 1, 2, 4, 8, … below n, then every n steps: images of the current batch above their reconstructions.

    They are the TensorBoard image `train/images`.
    """

    COLUMNS = 8

    def __init__(self, every: int):
        self.every = every

    def due(self, step: int) -> bool:
        return step % self.every == 0 or (step < self.every and step & (step - 1) == 0)

    @rank_zero_only
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, module: AutoencoderModule, outputs: Any, batch: list[Group], batch_index: int
    ) -> None:
        """Log some images of the batch above their reconstructions, where this step is due."""
        boards = [log for log in trainer.loggers if isinstance(log, Board)]
        if not module.step_complete or not self.due(trainer.global_step) or not boards:
            return
        images = [to_float(batch[0].images[: self.COLUMNS])]
        module.eval()
        rows = [*images, *module.reconstruct(images)]
        module.train()  # the encoder stays in eval mode
        grid = image_grid([to_pil(image) for row in rows for image in row], columns=len(rows[0]))
        pixels = torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8).view(grid.height, grid.width, 3)
        for board in boards:
            board.picture("train/images", pixels, trainer.global_step)


# -- averaged weights -------------------------------------------------------------------------------------------------


class AveragedWeights(Callback):
    """A running average of the trained weights: a ← d·a + (1 − d)·w after step n, d = min(decay, (1 + n) / (10 + n)).

    Validation is done with it. Checkpoints hold it as `ema_state_dict`, the entries that take the place of those in
    `state_dict`; `model.params.use_ema` does that when an autoencoder is loaded.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.weights: list[Tensor] = []
        self.averages: list[Tensor] = []
        self.restored: Mapping[str, Tensor] | None = None

    def on_load_checkpoint(self, trainer: Trainer, module: AutoencoderModule, checkpoint: Mapping[str, Any]) -> None:
        self.restored = checkpoint.get(EMA_KEY)

    def on_fit_start(self, trainer: Trainer, module: AutoencoderModule) -> None:
        self.weights = module.trainable_parameters()
        self.averages = [weight.detach().clone() for weight in self.weights]
        if self.restored is not None:
            with self.swapped():
                module.load_state_dict(self.restored, strict=False)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, module: AutoencoderModule, *_: Any) -> None:
        if module.step_complete:
            step = trainer.global_step
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.averages, self.weights, 1 - decay)

    def on_save_checkpoint(self, trainer: Trainer, module: AutoencoderModule, checkpoint: dict[str, Any]) -> None:
        with self.swapped():
            state = module.state_dict()  # refers to the averages, not to the parameters
        checkpoint[EMA_KEY] = {name: state[name] for name in state if name.startswith(("decoder.", "extra_vit."))}

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The module computes with the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self, *_: Any) -> None:
        for weight, average in zip(self.weights, self.averages):
            weight.data, average.data = average.data, weight.data

    on_validation_start = on_validation_end = _swap
