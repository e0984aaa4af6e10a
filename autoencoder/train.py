"""Train the SVG autoencoder:  python -m autoencoder.train --config FILE [--devices N] [key.sub=value ...]

Everything is in the config file (see `autoencoder.training` for its schema and the folder that a run writes); further
arguments override it. A run that finds `checkpoints/last.ckpt` in its folder goes on from there. This module holds what
stands outside the training step: logging, checkpoints, the entry.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from autoencoder.config import UserError, find_config, load_config, run_entry, save_config, to_dict
from autoencoder.images import image_grid, to_float, to_pil
from autoencoder.losses import build_loss
from autoencoder.model import SVGAutoencoder
from autoencoder.training import AutoencoderModule, AutoencoderTrainConfig, ImageDataModule, TrainerConfig
from autoencoder.weights import read_file, read_state_dict

logger = logging.getLogger("autoencoder")

# What Lightning remarks on that is meant to be so: few workers, a frozen encoder, no validation data.
LIGHTNING_REMARKS = ("does not have many workers", "in eval mode at the start", "Total length of `list`", "treespec")

# -- logging ----------------------------------------------------------------------------------------------------------


class ConsoleLogger(Logger):
    """One line per report, for runs whose output is not a terminal (there, Lightning draws a progress bar)."""

    SHOWN = {"rec_loss": "rec", "p_loss": "lpips", "g_loss": "g", "disc_loss": "d", "lr": "lr"}
    SHOWN |= {"images_per_s": "images/s"}

    def __init__(self, total_steps: int):
        super().__init__()
        self.total_steps = total_steps

    name = version = None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        prefix = "validation  " if "val/rec_loss" in metrics else ""
        values = {name.rpartition("/")[2]: value for name, value in metrics.items()}
        shown = "  ".join(f"{label} {values[name]:.4g}" for name, label in self.SHOWN.items() if name in values)
        print(f"step {step}/{self.total_steps}  {prefix}{shown}", flush=True)


class ReconstructionGrid(Callback):
    """Every n steps: images of the current batch above their reconstructions, as TensorBoard image `train/images`."""

    COLUMNS = 8

    def __init__(self, every: int):
        self.every = every

    @rank_zero_only
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, module: AutoencoderModule, outputs: Any, batch: list[Tensor], batch_index: int
    ) -> None:
        boards = [log for log in trainer.loggers if isinstance(log, TensorBoardLogger)]
        if trainer.global_step % self.every or not module.step_complete or not boards:
            return
        images = [to_float(batch[0][: self.COLUMNS])]
        module.eval()
        rows = [*images, *module.reconstruct(images)]
        module.train()  # the encoder stays in eval mode
        grid = image_grid([to_pil(image) for row in rows for image in row], columns=len(rows[0]))
        pixels = torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8).view(grid.height, grid.width, 3)
        for board in boards:
            board.experiment.add_image("train/images", pixels, trainer.global_step, dataformats="HWC")


# -- checkpoints ------------------------------------------------------------------------------------------------------


class Checkpoints(Callback):
    """Every n steps and at the end: step_….ckpt, and last.ckpt pointing to it."""

    def __init__(self, folder: Path, every: int):
        self.folder, self.every = folder, every

    def on_train_batch_end(self, trainer: Trainer, module: AutoencoderModule, *_: Any) -> None:
        step = trainer.global_step
        if module.step_complete and (step % self.every == 0 or step == trainer.max_steps):
            path = self.folder / f"step_{step:07d}.ckpt"
            trainer.save_checkpoint(path)  # all processes take part
            if trainer.is_global_zero:
                link = self.folder / "last.ckpt.tmp"
                link.unlink(missing_ok=True)
                link.symlink_to(path.name)
                os.replace(link, self.folder / "last.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that an interrupted save leaves no half file; reads tensors only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".tmp")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read_file(path, "checkpoint to resume from")


def check_resumable(module: LightningModule, state: Mapping[str, Tensor], path: Path) -> None:
    """UserError unless a checkpoint's weights are those of the configured networks."""
    shapes = [{name: tensor.shape for name, tensor in each.items()} for each in (module.state_dict(), state)]
    differing = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
    if differing:
        raise UserError(
            f"{path} does not fit the configured model ({len(differing)} entries differ, such as {differing[0]}): "
            "restore the model section it was started with, or start a new run in another training.logdir "
            "(model.init_weight takes over what fits)"
        )


def load_initial_weights(module: LightningModule, state: Mapping[str, Tensor], source: str) -> None:
    """Take over the entries whose name and shape fit, and name the others; UserError if none of the decoder fits."""
    own = module.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    if not any(name.startswith("decoder.") for name in fitting):
        raise UserError(f"model.init_weight {source}: no decoder weight in it fits model.params")
    module.load_state_dict(fitting, strict=False)
    for what, names in (("not used", state.keys() - fitting.keys()), ("not in it", own.keys() - fitting.keys())):
        if names:
            logger.warning("init_weight %s: %d entries %s: %s", source, len(names), what, ", ".join(sorted(names)))


# -- entry ------------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m autoencoder.train", description="Train the SVG autoencoder.")
    parser.add_argument("--config", required=True, help="YAML file, with or without .yaml, also from the repo root")
    parser.add_argument("--devices", type=int, help="processes on this machine, one per GPU (training.trainer.devices)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override entries of the config")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.devices is not None:
        arguments.overrides.append(f"training.trainer.devices={arguments.devices}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for remark in LIGHTNING_REMARKS:
        warnings.filterwarnings("ignore", message=f".*{remark}.*")
    config = load_config(AutoencoderTrainConfig, arguments.config, arguments.overrides)
    train(config, Path(config.training.logdir) / find_config(arguments.config).stem)


def train(config: AutoencoderTrainConfig, folder: Path) -> None:
    """Train in `folder` from its last checkpoint, or from the start."""
    last = find_last_checkpoint(folder, config.resume)
    seed_everything(config.training.seed, verbose=False)
    devices = process_count(config.training.trainer)
    world_size = devices * config.training.trainer.num_nodes
    data = ImageDataModule(config.data, config.training)
    total_steps = data.total_steps(world_size)
    module, step = build_module(config, last, learning_rate(config, data, world_size), total_steps)
    if step >= total_steps:
        print(f"{folder}: trained for {step} steps already; raise training.trainer.max_steps to go on")
        return
    trainer = build_trainer(config, folder, devices, total_steps, data, first_step=step)
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
        print(f"{'resuming at step ' + str(step) if last else 'training'}: {folder}", flush=True)
    trainer.fit(module, datamodule=data, ckpt_path=last)


def find_last_checkpoint(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from. UserError for `resume` false on a folder in use."""
    if resume:
        last = folder / "checkpoints" / "last.ckpt"
        return last if last.is_symlink() or last.exists() else None
    if rank_zero_only.rank == 0 and folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder} is not empty and resume is false: nothing is overwritten. Leave out resume=false to go on with "
            "that run, or choose another training.logdir"
        )
    return None


def build_module(
    config: AutoencoderTrainConfig, last: Path | None, rate: float, total_steps: int
) -> tuple[AutoencoderModule, int]:
    """The networks, with the weights of `last` (a run to resume) or else `model.init_weight`; and the step reached."""
    params, source = config.model.params, last or config.model.init_weight
    state, step = {}, 0
    if last:
        checkpoint = read_file(last, "checkpoint to resume from")
        state, step = checkpoint["state_dict"], checkpoint["global_step"]
    elif source:
        state = read_state_dict(source, "model.init_weight")
    if any(name.startswith("encoder.") for name in state):
        params = replace(params, dinoconfig=replace(params.dinoconfig, weights=None))  # the checkpoint brings them
    autoencoder = SVGAutoencoder.from_config({"model": {"params": to_dict(params)}})
    module = AutoencoderModule(autoencoder, build_loss(params.lossconfig), rate, total_steps, config.training)
    if last:
        check_resumable(module, state, last)
        module.load_state_dict(state)
    elif source:
        load_initial_weights(module, state, source)
    autoencoder.encoder.fingerprint()  # UserError if nothing brought its weights
    return module, step


def build_trainer(
    config: AutoencoderTrainConfig, folder: Path, devices: int, total_steps: int, data: ImageDataModule, first_step: int
) -> Trainer:
    """Lightning's Trainer, told to leave steps, sampling and checkpoints to us."""
    training, trainer = config.training, config.training.trainer
    world_size = devices * trainer.num_nodes
    epoch = data.steps_per_epoch(world_size)
    every = training.save_every_n_train_steps or (training.save_every_n_epochs or 1) * epoch
    boards = training.image_logger_type == "tensorboard"
    callbacks = [ReconstructionGrid(training.log_images_every_n_steps)] if boards else []
    tty = sys.stderr.isatty()
    return Trainer(
        accelerator=trainer.accelerator,
        devices=devices,
        num_nodes=trainer.num_nodes,
        # A backward pass reaches one of the two players: the other's parameters are unused.
        strategy=DDPStrategy(find_unused_parameters=True) if world_size > 1 else "auto",
        precision=trainer.precision,
        max_steps=total_steps,
        max_epochs=-1,
        callbacks=[*callbacks, Checkpoints(folder / "checkpoints", every)],
        logger=[
            TensorBoardLogger(folder, name="", version="", purge_step=first_step + 1),
            *([] if tty else [ConsoleLogger(total_steps)]),
        ],
        enable_progress_bar=tty,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        val_check_interval=training.validate_every_n_steps * training.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        plugins=[AtomicCheckpointIO()],
    )


def learning_rate(config: AutoencoderTrainConfig, data: ImageDataModule, world_size: int) -> float:
    """`base_learning_rate`, times the images per step where `scale_lr` asks for it."""
    scale = data.params.batch_size * config.training.accumulate_grad_batches * world_size
    return config.model.base_learning_rate * (scale if config.training.scale_lr else 1)


def process_count(trainer: TrainerConfig) -> int:
    """Processes on this machine: one per GPU, one on the CPU unless the config says otherwise."""
    gpus = 0 if trainer.accelerator == "cpu" else torch.cuda.device_count()
    if trainer.devices == "auto":
        return gpus or 1
    if gpus and trainer.devices > gpus:
        raise UserError(f"{trainer.devices} devices asked for, this machine has {gpus} GPUs; lower --devices")
    return trainer.devices


if __name__ == "__main__":
    run_entry(main)
