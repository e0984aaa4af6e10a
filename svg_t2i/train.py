"""Train a DiT on the features of a frozen autoencoder.

    python -m svg_t2i.train --config configs/svg_t2i/forTest_1gpu.yaml train.max_steps=20
    torchrun --nproc_per_node 8 -m svg_t2i.train --config configs/svg_t2i/stage2_512.yaml --init_from FOLDER

A run continues from the newest whole checkpoint in its results folder. `svg_t2i.checkpoint` draws that folder.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.tensorboard import SummaryWriter

from autoencoder.config import UserError, load_config, run_entry, save_config, to_dict
from autoencoder.manifest import ImageSource, JoinedSources
from svg_t2i import checkpoint
from svg_t2i.data import make_datasets, open_caches, open_sources
from svg_t2i.frozen import FrozenNetworks, fill_in, load_frozen
from svg_t2i.loader import TrainLoader, build_loader
from svg_t2i.model import SVGDiT
from svg_t2i.parallel import World, from_main, main_first, start_world, wrap
from svg_t2i.settings import TrainConfig, changed_settings, locate
from svg_t2i.training import FlowObjective, Meter, TrainState, learning_rate, train_step

log = logging.getLogger("svg_t2i")
T = TypeVar("T")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m svg_t2i.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file, as given or below the repository")
    parser.add_argument("--init_from", help="take first weights from this checkpoint, run or published folder")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes of the config")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    overrides = arguments.overrides + ([f"init_from={arguments.init_from}"] if arguments.init_from else [])
    config = load_config(TrainConfig, arguments.config, overrides)
    with start_world() as world:
        if config.data.micro_batch_tokens is None:
            config.micro_batches(world.size)  # complains before anything is loaded
        start_logging(world)
        run(config, world)


def start_logging(world: World) -> None:
    """Plain lines on standard output; what is worth a warning, from every rank."""
    level = logging.INFO if world.is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)
    for chatty in ("httpx", "transformers", "torch.distributed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def run(config: TrainConfig, world: World) -> None:
    """Train to `train.max_steps`, from scratch, from other weights, or from where the results folder stands."""
    if config.train.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    newest = from_main(open_results(config) if world.is_main else None, world)
    with main_first(world):  # the others find the indexes
        sources = open_sources(config.data)
    manifest = JoinedSources(sources)
    config = fill_in(config, manifest, world)
    frozen = load_frozen(config, world)
    state = start_state(config, frozen, newest, world)
    if world.is_main:
        save_config(config, Path(config.results_dir) / "config.yaml")
        describe(config, state, frozen, manifest, world)
    if state.step >= config.train.max_steps:
        log.info("the run in %s is done; raise train.max_steps to go on", config.results_dir)
        return
    loader = make_loader(config, sources, frozen, state.step, world)
    train(config, state, frozen, loader, world)


def open_results(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start.

    Raises:
        UserError: `resume` is off and the folder is not empty.
    """
    folder = Path(config.results_dir)
    if not config.resume and folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"results_dir={config.results_dir} is not empty; nothing was overwritten. Choose another folder, empty it, "
            "or continue the run there with resume=true"
        )
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint.clean(checkpoints)
    return checkpoint.newest_checkpoint(checkpoints)


def start_state(config: TrainConfig, frozen: FrozenNetworks, newest: Path | None, world: World) -> TrainState:
    """The state to train from: the newest checkpoint's, else other weights under fresh moments, else a fresh one."""
    sizes = config.model_config(frozen.autoencoder.channels, frozen.captions.encoder.hidden_size)
    torch.manual_seed(config.train.seed)
    with world.device:
        transformer = SVGDiT(sizes)
    if newest is not None:
        return resume(config, TrainState.start(transformer, config.optim), frozen, newest)
    if config.init_from is not None:
        source = locate(config.init_from)
        checkpoint.init_from(transformer, source)
        if checkpoint.read_meta(source).get("fingerprints", frozen.fingerprints) != frozen.fingerprints:
            log.warning("%s was trained with another autoencoder, statistics or text encoder than this run", source)
    return TrainState.start(transformer, config.optim)


def resume(config: TrainConfig, state: TrainState, frozen: FrozenNetworks, folder: Path) -> TrainState:
    """Fill `state` from a checkpoint of this run.

    Raises:
        UserError: other frozen networks or another model than before.
    """
    fingerprints, meta = frozen.fingerprints, checkpoint.read_meta(folder)
    checkpoint.check_fingerprints(folder, fingerprints["autoencoder"], fingerprints["text_encoder"])
    sizes = to_dict(state.transformer.config)
    if meta["model_args"] != sizes:
        other = [f"{key} was {value} and is {sizes.get(key)}" for key, value in meta["model_args"].items()
                 if sizes.get(key) != value]  # fmt: skip
        raise UserError(f"{folder} holds another model: {', '.join(other)}; choose another results_dir for this one")
    checkpoint.load_checkpoint(folder, state.tensors())
    state.step = meta["step"]
    log.info("resumed from %s", folder)
    for change in changed_settings(meta["config"], config):
        log.info("changed since the checkpoint: %s", change)
    return state


def make_loader(
    config: TrainConfig, sources: list[ImageSource], frozen: FrozenNetworks, first_step: int, world: World
) -> TrainLoader:
    """This rank's micro-batches from step `first_step` on, from images or from feature caches."""
    data, text = config.data, config.text_encoder
    datasets = make_datasets(data, sources, config.train.seed, text.max_length)
    if data.all_sources[0].feature_cache is not None:
        datasets = open_caches(data, datasets, frozen.fingerprints)
    return build_loader(
        datasets,
        weights=[source.weight for source in data.all_sources],
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        micro_batch_tokens=data.micro_batch_tokens,
        total_steps=config.train.max_steps,
        resume_step=first_step,
        rank=world.rank,
        world_size=world.size,
        num_workers=data.num_workers,
        prefetch=data.prefetch,
    )


def train(config: TrainConfig, state: TrainState, frozen: FrozenNetworks, loader: TrainLoader, world: World) -> None:
    """Steps, log lines and checkpoints up to `train.max_steps`."""
    loop = config.train
    objective = wrap(FlowObjective(state.transformer, config), world)
    meter, batches = Meter(world), WaitTimer(loader)
    logger = ProgressLogger(config, state.step) if world.is_main else None
    while state.step < loop.max_steps:
        train_step(state, objective, batches, frozen, config, world, meter)
        last = state.step == loop.max_steps
        if last or state.step % loop.log_every == 0:
            values = meter.read()
            stop_if_diverged(values, meter, config)
            if logger is not None:
                logger.write(state.step, values, batches.pop())
        if last or state.step % loop.ckpt_every == 0:
            started = time.perf_counter()
            save(config, state, frozen)
            if logger is not None:
                logger.exclude(time.perf_counter() - started)
    if logger is not None:
        logger.close()


def save(config: TrainConfig, state: TrainState, frozen: FrozenNetworks) -> None:
    """Write a checkpoint of `state` (all ranks)."""
    meta = {
        "model_args": to_dict(state.transformer.config),
        "fingerprints": frozen.fingerprints,
        "config": to_dict(config),
    }
    folder = checkpoint.save_checkpoint(Path(config.results_dir) / "checkpoints", state.step, state.tensors(), meta)
    frozen.captions.clear()  # as a resumed run would find it
    log.info("saved %s", folder)


def stop_if_diverged(values: dict[str, Any], meter: Meter, config: TrainConfig) -> None:
    """Give up after too many updates with non-finite gradients.

    Raises:
        UserError: with what can be done about it.
    """
    if values["skipped"]:
        log.warning("%d updates skipped since the last line: their gradients were not finite", values["skipped"])
    if meter.total_skipped > config.train.max_nonfinite:
        raise UserError(
            f"{meter.total_skipped} updates had non-finite gradients, more than "
            f"train.max_nonfinite={config.train.max_nonfinite}; lower optim.lr or use train.precision=fp32, and "
            f"continue from the last checkpoint in {config.results_dir}"
        )


def describe(
    config: TrainConfig, state: TrainState, frozen: FrozenNetworks, manifest: ImageSource, world: World
) -> None:
    """Two lines on what is about to happen."""
    size = sum(weight.numel() for weight in state.transformer.parameters())
    log.info(
        "%s: %.1f M parameters on %d × %s in %s; %d latent channels, text width %d",
        config.model, size / 1e6, world.size, world.device.type, config.train.precision,
        frozen.autoencoder.channels, frozen.captions.encoder.hidden_size,
    )  # fmt: skip
    budget = config.data.micro_batch_tokens
    if budget is None:
        micro = f"{config.micro_batches(world.size)} micro-batches × {config.train.micro_batch_size}"
    else:
        micro = f"micro-batches of at most {budget} tokens"
    log.info(
        "%d samples; batch %d on %d processes in %s; steps %d to %d; results in %s",
        len(manifest), config.train.global_batch_size, world.size, micro,
        state.step, config.train.max_steps, config.results_dir,
    )  # fmt: skip


class WaitTimer(Iterator[T]):
    """An iterator that adds up how long its source kept it waiting."""

    def __init__(self, source: Iterable[T]):
        self._source, self._waited = iter(source), 0.0

    def __next__(self) -> T:
        started = time.perf_counter()
        item = next(self._source)
        self._waited += time.perf_counter() - started
        return item

    def pop(self) -> float:
        """Seconds since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited


class ProgressLogger:
    """The console line and the TensorBoard scalars of rank 0."""

    def __init__(self, config: TrainConfig, step: int):
        self.config = config
        self.board = SummaryWriter(str(Path(config.results_dir) / "tensorboard"), purge_step=step + 1)
        self._since = time.perf_counter()

    def write(self, step: int, values: dict[str, Any], waited: float) -> None:
        """One line for the interval that ended with `step`; `waited`: seconds spent waiting for data in it."""
        seconds = time.perf_counter() - self._since
        self._since += seconds
        rate, lr = values["samples"] / seconds, learning_rate(step - 1, self.config.optim)
        log.info(
            "step %d/%d  loss %.4f  grad %.3f  lr %.2e  %.1f images/s  data %.0f%%",
            step, self.config.train.max_steps, values["loss"], values["grad_norm"], lr, rate, 100 * waited / seconds,
        )  # fmt: skip
        scalars = {"lr": lr, "images_per_second": rate, "data_wait": waited / seconds}
        scalars |= {key: values[key] for key in ("loss", "grad_norm", "skipped", "text_tokens")}
        for name, value in scalars.items():
            self.board.add_scalar(f"train/{name}", value, step)
        bins = values["loss_bins"]
        for i, loss in enumerate(bins):
            if loss == loss:  # nan: no sample fell into this bin
                self.board.add_scalar(f"loss_at_t/{i / len(bins):.2f}-{(i + 1) / len(bins):.2f}", loss, step)

    def exclude(self, seconds: float) -> None:
        """Leave time that was not training out of the next line's rate."""
        self._since += seconds

    def close(self) -> None:
        self.board.close()


if __name__ == "__main__":
    run_entry(main)
