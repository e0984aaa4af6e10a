"""One training run of the autoencoder: networks and their first weights, Lightning's Trainer, resuming."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from autoencoder.common.config import UserError, locate, save_config, to_dict
from autoencoder.common.lock import RunLock
from autoencoder.common.processes import peak_memory
from autoencoder.common.weights import EMA_KEY, read_state_dict, report_load
from autoencoder.encoders.encoder import build_encoder
from autoencoder.model import SVGAutoencoder
from autoencoder.sources.failures import FILE_NAME
from autoencoder.training.callbacks import (
    AveragedWeights,
    Board,
    ConsoleLogger,
    LearningRates,
    ReconstructionGrid,
)
from autoencoder.training.checkpoints import AtomicCheckpointIO, Checkpoints, newest_checkpoint
from autoencoder.training.guards import Guards
from autoencoder.training.losses import AutoencoderLoss, SyncedBatchNorm, build_loss
from autoencoder.training.module import AutoencoderModule, ImageDataModule
from autoencoder.training.settings import AutoencoderTrainConfig, ModelSection, TrainerConfig

logger = logging.getLogger("autoencoder")

# What Lightning remarks on that is meant to be so: few workers, a frozen encoder, no validation data.
LIGHTNING_REMARKS = ("does not have many workers", "in eval mode at the start", "Total length of `list`", "treespec")


def train(config: AutoencoderTrainConfig, folder: Path) -> int:
    """Train in `folder` from its newest whole checkpoint, or from the start.

    Returns:
        The exit code: 0 when the run is done, else what `StopRequest` says.
    """
    if not is_first_process():
        return train_in_folder(config, folder, None)
    refuse_used_folder(folder, config.resume)
    with RunLock(folder, "training.logdir") as lock:
        return train_in_folder(config, folder, lock)


def is_first_process() -> bool:
    """Whether this process is rank 0, as torchrun says, or Slurm and Lightning's launcher. Known before Lightning's."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def train_in_folder(config: AutoencoderTrainConfig, folder: Path, lock: RunLock | None) -> int:
    """`train`, in a folder that is this run's alone."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for remark in LIGHTNING_REMARKS:
        warnings.filterwarnings("ignore", message=f".*{remark}.*")
    last = newest_checkpoint(folder / "checkpoints") if config.resume else None
    seed_everything(config.training.seed, verbose=False)
    devices = process_count(config.training.trainer)
    world_size = devices * config.training.trainer.num_nodes
    data = ImageDataModule(config.data, config.training)
    data.train_source.failures.keep_in(folder / FILE_NAME)
    total_steps = data.total_steps(world_size)
    module, first_step = build_module(config, data, last, world_size)
    if first_step >= total_steps:
        print(f"{folder}: trained for {first_step} steps already; raise training.trainer.max_steps to go on")
        return 0
    guards = Guards(config.training, folder, lock)
    trainer = build_trainer(config, folder, devices, data, first_step, module.loss.discriminator is not None, guards)
    if trainer.is_global_zero:
        save_config(config, folder / "config.yaml")
        print(f"{'resuming at step ' + str(first_step) if last else 'training'}: {folder}", flush=True)
    started = time.perf_counter()
    trainer.fit(module, datamodule=data, ckpt_path=last and last[0])
    if trainer.is_global_zero:
        data.train_source.failures.report()
        minutes = (time.perf_counter() - started) / 60
        memory = peak_memory(trainer.strategy.root_device)
        steps = trainer.global_step - first_step
        print(f"{steps} steps in {minutes:.1f} minutes, at most {memory:.2f} GiB: {folder}", flush=True)
        if guards.requests.stopped:
            print(f"stopped after step {trainer.global_step} as asked; the same command goes on from there", flush=True)
    return guards.requests.request.exit_code if guards.requests.stopped else 0


def refuse_used_folder(folder: Path, resume: bool) -> None:
    """UserError for `resume` false on a folder in use."""
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"{folder} is not empty and resume is false: nothing is overwritten. Leave out resume=false to go on with "
            "that run, or choose another training.logdir"
        )


# -- networks ---------------------------------------------------------------------------------------------------------


def build_module(
    config: AutoencoderTrainConfig, data: ImageDataModule, last: tuple[Path, dict[str, Any]] | None, world_size: int
) -> tuple[AutoencoderModule, int]:
    """The networks, with the weights of `last` (a run to resume) or else `model.init_weight`; and the step reached.

    last: a checkpoint and its content.
    """
    model, training = config.model, config.training
    checkpoint, state = {"global_step": 0}, {}
    if last:
        path, checkpoint = last
        state = checkpoint["state_dict"]
    elif model.init_weight:
        state = read_state_dict(locate(model.init_weight), "model.init_weight")
    autoencoder = build_autoencoder(model, state, resumed=last is not None)
    norm = SyncedBatchNorm if training.trainer.sync_batchnorm else None
    loss = build_loss(model.params.lossconfig, norm=norm)
    check_discriminator(loss, data, training.trainer.sync_batchnorm)
    rate = model.base_learning_rate * (data.images_per_step(world_size) if training.scale_lr else 1)
    module = AutoencoderModule(autoencoder, loss, rate, data.total_steps(world_size), training)
    if last:
        check_resumable(module, checkpoint, path)
        module.load_state_dict(state)
        if EMA_KEY in checkpoint and training.ema_decay is None:
            logger.warning("%s has averaged weights; they end here, as training.ema_decay is not set", path)
    elif state:
        load_initial_weights(module, state, model.init_weight)
    autoencoder.encoder.fingerprint()  # UserError if nothing brought its weights
    if training.latent_stats is not None:
        stats = autoencoder.read_stats(training.latent_stats)
        module.noise_scale = stats.std
        if autoencoder.extra_vit is None or autoencoder.extra_vit.config.frozen:
            autoencoder.set_stats(stats)  # UserError if another encoder's; training a branch changes its latents
    return module, checkpoint["global_step"]


def build_autoencoder(model: ModelSection, state: Mapping[str, Tensor], resumed: bool) -> SVGAutoencoder:
    """The configured autoencoder, without the weights of its encoder if those in `state` will take their place."""
    params = model.params
    brought = any(name.startswith("encoder.") for name in state)
    if brought:
        params = replace(params, dinoconfig=replace(params.dinoconfig, weights=None))
    autoencoder = SVGAutoencoder.from_config({"model": {"params": to_dict(params)}})
    if brought and not resumed and not autoencoder.encoder.loaded and not has_encoder(autoencoder, state):
        autoencoder.encoder = build_encoder(model.params.dinoconfig)
    return autoencoder


def has_encoder(module: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether `state` holds all of the module's encoder."""
    own = {name: tensor.shape for name, tensor in module.state_dict().items() if name.startswith("encoder.")}
    return all(name in state and state[name].shape == shape for name, shape in own.items())


def check_discriminator(loss: AutoencoderLoss, data: ImageDataModule, synchronised: bool) -> None:
    """UserError for images too small for the discriminator, and where its statistics cannot be synchronised."""
    if loss.discriminator is None:
        return
    smallest, side = loss.discriminator.smallest_side, min(map(min, data.buckets))
    if side < smallest:
        raise UserError(
            f"the discriminator needs images of {smallest} px or more, data.params asks for {side}: raise the "
            "resolution, lower disc_num_layers, or train without (model.params.lossconfig.params.disc_weight=0)"
        )
    if synchronised and loss.config.disc_per_image:
        raise UserError(
            "training.trainer.sync_batchnorm: the discriminator takes its statistics of every image alone, there is "
            "nothing to synchronise; leave it out, or set model.params.lossconfig.params.disc_per_image=false"
        )
    if synchronised and len(data.buckets) > 1:
        raise UserError(
            "training.trainer.sync_batchnorm: processes have images of different sizes at the same time, which have no "
            "common statistics; leave it out, or train on squares (data.params.max_aspect=1)"
        )


def check_resumable(module: AutoencoderModule, checkpoint: Mapping[str, Any], path: Path) -> None:
    """UserError unless a checkpoint has the weights of the configured networks, and trains the same of them."""
    shapes = [{(name, x.shape) for name, x in s.items()} for s in (module.state_dict(), checkpoint["state_dict"])]
    differing = sorted({name for name, _ in shapes[0] ^ shapes[1]})
    trained = [len(optimizer["param_groups"][0]["params"]) for optimizer in checkpoint["optimizer_states"]]
    if not differing and trained[0] != len(module.trainable_parameters()):
        differing = ["the number of trained weights (extra_vit_config.frozen)"]
    if differing:
        raise UserError(
            f"{path} does not fit the configured model ({len(differing)} entries differ, such as {differing[0]}): "
            "restore the model section it was started with, or start a new run in another training.logdir "
            "(model.init_weight takes over what fits)"
        )


def load_initial_weights(module: AutoencoderModule, state: Mapping[str, Tensor], source: str) -> None:
    """Take over the entries whose name and shape fit, and name the others; the encoder all or nothing.

    Raises:
        UserError: no weight matrix of the decoder fits.
    """
    own, whole_encoder = module.state_dict(), has_encoder(module, state)
    fitting = {
        name: value
        for name, value in state.items()
        if name in own and own[name].shape == value.shape and (whole_encoder or not name.startswith("encoder."))
    }
    if not any(name.startswith("decoder.") and value.ndim > 1 for name, value in fitting.items()):
        raise UserError(f"model.init_weight {source}: no decoder weight in it fits model.params")
    module.load_state_dict(fitting, strict=False)
    others = {"not used": state.keys() - fitting.keys(), "not in it": own.keys() - fitting.keys()}
    report_load(f"init_weight {source}", len(fitting), others, total=len(own))


# -- trainer ----------------------------------------------------------------------------------------------------------


def build_trainer(
    config: AutoencoderTrainConfig,
    folder: Path,
    devices: int,
    data: ImageDataModule,
    first_step: int,
    two_players: bool,
    guards: Guards,
) -> Trainer:
    """Lightning's Trainer, told to leave steps, sampling and checkpoints to us."""
    training, trainer = config.training, config.training.trainer
    world_size = devices * trainer.num_nodes
    total_steps, epoch = data.total_steps(world_size), data.steps_per_epoch(world_size)
    saves = [training.save_every_n_train_steps, training.save_every_n_epochs and training.save_every_n_epochs * epoch]
    boards = training.image_logger_type == "tensorboard"
    tty = sys.stderr.isatty()
    return Trainer(
        accelerator=trainer.accelerator,
        devices=devices,
        num_nodes=trainer.num_nodes,
        strategy=build_strategy(two_players, gpu=torch.cuda.is_available() and trainer.accelerator != "cpu")
        if world_size > 1
        else "auto",
        precision=trainer.precision,
        max_steps=total_steps,
        max_epochs=-1,
        callbacks=[
            LearningRates(training.log_every_n_steps),
            *([AveragedWeights(training.ema_decay)] if training.ema_decay is not None else []),
            *([ReconstructionGrid(training.log_images_every_n_steps)] if boards else []),
            guards.requests,
            Checkpoints(
                folder / "checkpoints",
                [every for every in saves if every] or [epoch],
                training.keep_last_k,
                guards.requests,
            ),
            guards.stalls,
        ],
        logger=[
            Board(folder, name="", version="", purge_step=first_step + 1),
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


def build_strategy(two_players: bool, gpu: bool) -> DDPStrategy:
    """Data parallelism: gradients over NCCL on GPUs, and requests to stop over gloo in any case."""
    return DDPStrategy(
        # A backward pass reaches one of two players: the other's parameters are unused. Buffers differ between
        # processes only in the discriminator's running statistics, which nothing reads.
        find_unused_parameters=two_players,
        broadcast_buffers=False,
        process_group_backend="cpu:gloo,cuda:nccl" if gpu else "gloo",
    )


def process_count(trainer: TrainerConfig) -> int:
    """Processes on this machine: one per GPU, one on the CPU unless the config says otherwise."""
    gpus = 0 if trainer.accelerator == "cpu" else torch.cuda.device_count()
    if trainer.devices == "auto":
        return gpus or 1
    if gpus and trainer.devices > gpus:
        raise UserError(f"{trainer.devices} devices asked for, this machine has {gpus} GPUs; lower --devices")
    return trainer.devices
