"""Train a DiT on the features of a frozen autoencoder.

    python -m svg_t2i.train --config configs/svg_t2i/forTest_1gpu.yaml train.max_steps=20
    torchrun --nproc_per_node 8 -m svg_t2i.train --config configs/svg_t2i/stage2_512.yaml --init_from FOLDER

A run continues from the newest whole checkpoint in its results folder; `checkpoints.run` draws that folder. Asked to
end by SIGTERM, SIGUSR1 or Ctrl-C it finishes the step, saves, and exits with code 75 (130 after Ctrl-C): start the same
command again to go on.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autoencoder.common.commands import Parser, command
from autoencoder.common.config import REPO_ROOT, UserError, build, load_config, save_config, to_dict
from autoencoder.common.lock import RunLock
from autoencoder.common.processes import World, start_world
from autoencoder.sources.failures import FILE_NAME
from autoencoder.sources.source import ImageSource, JoinedSources
from svg_t2i.checkpoints import run as saving
from svg_t2i.checkpoints import weights as checkpoint
from svg_t2i.data.batching import largest_share, num_micro_batches
from svg_t2i.data.loader import TrainLoader, build_loader
from svg_t2i.data.sources import make_datasets, open_caches, open_sources
from svg_t2i.features.frozen import FrozenNetworks
from svg_t2i.training.distill import load_teacher
from svg_t2i.training.loop import TrainLoop
from svg_t2i.training.monitor import start_logging
from svg_t2i.training.networks import make_transformer, prepare_frozen
from svg_t2i.training.prior import with_prior
from svg_t2i.training.settings import TrainConfig, changed_settings
from svg_t2i.training.sharding import parallelize
from svg_t2i.training.step import FlowObjective, TrainState
from svg_t2i.training.validation import Validation
from svg_t2i.transformer.config import DiTConfig

log = logging.getLogger("svg_t2i")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("svg_t2i.train", __doc__)
    parser.add_config("YAML file, as given or below the repository")
    parser.add_argument("--init_from", help="checkpoint, run or published folder with first weights (default: random)")
    return parser.parse_intermixed_args(argv)


@command
def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    overrides = arguments.overrides + ([f"init_from={arguments.init_from}"] if arguments.init_from else [])
    config = load_config(TrainConfig, arguments.config, overrides)
    with start_world() as world:
        start_logging(world)
        code = run(config, world)
    if code:
        raise SystemExit(code)


def run(config: TrainConfig, world: World) -> int:
    """Train to `train.max_steps`, from scratch, from other weights, or from where the results folder stands.

    Returns:
        The exit code: 0 when the run is done.
    """
    if config.train.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    with ExitStack() as held:
        lock = None
        if world.is_main:
            refuse_used_folder(config, world)
            lock = held.enter_context(RunLock(Path(config.results_dir), "results_dir"))
        return run_in_folder(config, world, lock)


def run_in_folder(config: TrainConfig, world: World, lock: RunLock | None) -> int:
    """`run`, in a results folder that is this run's alone."""
    newest = world.from_main(lambda: open_results(config))
    with world.main_first():  # the others find the indexes
        sources = open_sources(config.data)
    manifest = JoinedSources(sources)
    manifest.failures.keep_in(Path(config.results_dir) / FILE_NAME)
    cached = config.data.all_sources[0].feature_cache is not None  # then cache_features has compared the statistics
    config, frozen = prepare_frozen(config, manifest, world, compare=not cached)
    transformer, base = make_transformer(config, frozen, newest, world)
    teacher, record = load_teacher(config, frozen, newest, world)
    objective = parallelize(FlowObjective(transformer, config, teacher), config.parallel, config.train.precision, world)
    state = TrainState.start(transformer, config)
    if newest is not None:
        resume(config, state, frozen, newest)
    data = config.data
    if config.prior_preservation is not None:
        data = with_prior(config, config.prior_preservation, state, frozen, world)
        sources = open_sources(data)
        manifest = JoinedSources(sources)
        manifest.failures.keep_in(Path(config.results_dir) / FILE_NAME)
    contents = {source.name: source.content_fingerprint for source in sources} if world.is_main else {}
    if newest is not None:
        warn_of_other_data(checkpoint.read_meta(newest).get("data", {}), contents)
    if world.is_main:
        save_config(config, Path(config.results_dir) / "config.yaml")
        describe(config, state, frozen, manifest, world)
    if state.step >= config.train.max_steps:
        log.info("the run in %s is done; raise train.max_steps to go on", config.results_dir)
        return 0
    validation = None if config.validation is None else Validation(config, config.validation, world)
    open_loader = make_loader(replace(config, data=data), sources, frozen, world)
    meta = checkpoint_meta(config, state, frozen) | base | record | {"data": contents}
    code = TrainLoop(config, state, objective, frozen, open_loader, meta, world, lock, validation).run()
    if world.is_main:
        manifest.failures.report()
    return code


def refuse_used_folder(config: TrainConfig, world: World) -> None:
    """UserError for `resume` false on a folder that is not empty."""
    folder = Path(config.results_dir)
    afresh = not config.resume and not world.restarts  # after a failure, torchrun's next try goes on
    if afresh and folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"results_dir={config.results_dir} is not empty; nothing was overwritten. Choose another folder, empty it, "
            "or continue the run there with resume=true"
        )


def open_results(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    checkpoints = Path(config.results_dir) / "checkpoints"
    saving.clean(checkpoints)
    return saving.newest_checkpoint(checkpoints, verify=True)


def resume(config: TrainConfig, state: TrainState, frozen: FrozenNetworks, folder: Path) -> None:
    """Fill `state` from a checkpoint of this run. An average that the checkpoint lacks starts from its weights.

    Raises:
        UserError: other frozen networks or another model than before.
    """
    fingerprints, meta = frozen.fingerprints, checkpoint.read_meta(folder)
    checkpoint.check_fingerprints(folder, fingerprints["autoencoder"], fingerprints["text_encoder"])
    now = vars(state.transformer.config)
    before = vars(build(DiTConfig, meta["model_args"], source=str(folder)))  # an old one lacks what is newer
    if before != now:
        other = [f"{key} was {value} and is {now[key]}" for key, value in before.items() if now[key] != value]
        raise UserError(f"{folder} holds another model: {', '.join(other)}; choose another results_dir for this one")
    check_adapter(meta, config, folder)
    stored, parts = saving.stored_tensors(folder), state.tensors()
    missing = [part for part in parts if not any(name.startswith(f"{part}.") for name in stored)]
    saving.load_checkpoint(folder, {part: tensors for part, tensors in parts.items() if part not in missing})
    for part in missing:
        if not part.startswith("ema"):
            raise UserError(f"{folder} has no {part}; a run cannot go on without it, but a new one can init_from it")
        log.warning("%s has no %s: it starts from the weights", folder, part)
        for name, tensor in parts[part].items():
            tensor.copy_(parts["model"][name])
    state.step = meta["step"]
    log.info("resumed from %s: %d tensors", folder, sum(len(tensors) for tensors in parts.values()))
    for change in changed_settings(meta["config"], config):
        log.info("changed since the checkpoint: %s", change)


def check_adapter(meta: Mapping[str, Any], config: TrainConfig, folder: Path) -> None:
    """UserError where a checkpoint holds another adapter than the settings describe, or one of the two has none."""
    before, now = meta["config"].get("lora"), to_dict(config.lora)
    if before is None or now is None:
        other = [] if before is now else [f"lora was {before} and is {now}"]
    else:
        fixed = [key for key in now if key != "dropout"]
        other = [f"lora.{key} was {before.get(key)} and is {now[key]}" for key in fixed if before.get(key) != now[key]]
    if other:
        raise UserError(f"{folder} was trained otherwise: {', '.join(other)}; choose another results_dir for this")


def warn_of_other_data(recorded: Mapping[str, str], present: Mapping[str, str]) -> None:
    """Say which sources are not what they were. recorded, present: the name of each source → its fingerprint."""
    for name in sorted(recorded.keys() & present.keys()):
        if recorded[name] != present[name]:
            log.warning(
                "THE DATA CHANGED: %s lists other samples or captions than at the checkpoint (%s, was %s). The run "
                "goes on with what is there now; samples may come twice or not at all",
                name, present[name], recorded[name],
            )  # fmt: skip


def make_loader(
    config: TrainConfig, sources: list[ImageSource], frozen: FrozenNetworks, world: World
) -> Callable[[int, int], TrainLoader]:
    """(first step, number of workers) → this rank's micro-batches from there on, from images or feature caches."""
    data, text = config.data, config.text_encoder
    datasets = make_datasets(data, sources, config.train.seed, text.max_length)
    if data.all_sources[0].feature_cache is not None:
        datasets = open_caches(data, datasets, frozen.fingerprints, world.rank, world.size)
    return lambda first_step, num_workers: build_loader(
        datasets,
        weights=[source.weight for source in data.all_sources],
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        micro_batch_tokens=data.micro_batch_tokens,
        total_steps=config.train.max_steps,
        resume_step=first_step,
        rank=world.rank,
        world_size=world.size,
        num_workers=num_workers,
        prefetch=data.prefetch,
        loaders=world.local_size,
    )


def checkpoint_meta(config: TrainConfig, state: TrainState, frozen: FrozenNetworks) -> dict[str, Any]:
    """What a checkpoint records besides tensors."""
    return {
        "model_args": to_dict(state.transformer.config),
        "fingerprints": frozen.fingerprints,
        "config": to_dict(config),
        "torch": torch.__version__,
        "code": git_revision(),
    }


def git_revision() -> str | None:
    """Commit of this code, with "-dirty" behind it where files differ; None outside a git checkout."""
    command = ["git", "-C", str(REPO_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe(
    config: TrainConfig, state: TrainState, frozen: FrozenNetworks, manifest: ImageSource, world: World
) -> None:
    """Two lines on what is about to happen."""
    parameters = sum(weight.numel() for weight in state.transformer.parameters())
    trained = sum(weight.numel() for weight in state.weights)
    log.info(
        "%s: %.1f M parameters%s on %d × %s in %s; %d latent channels, text width %d",
        config.model, parameters / 1e6, "" if trained == parameters else f", {trained / 1e6:.2f} M of them trained,",
        world.size, world.device.type, config.train.precision,
        frozen.autoencoder.channels, frozen.captions.encoder.hidden_size,
    )  # fmt: skip
    budget, batch, size = config.data.micro_batch_tokens, config.train.global_batch_size, config.train.micro_batch_size
    micro = f"micro-batches of at most {budget} tokens"
    if budget is None:
        number, share = num_micro_batches(batch, world.size, size), largest_share(batch, world.size)
        micro = f"{number} micro-batches × {-(-share // number)}"
        if idle := world.size * share - batch:
            log.warning(
                "%d of %d processes have a sample fewer than the others and wait for them; a multiple of %d as "
                "train.global_batch_size would occupy all", idle, world.size, world.size,
            )  # fmt: skip
    log.info(
        "%d samples; batch %d on %d processes in %s; steps %d to %d; results in %s",
        len(manifest), batch, world.size, micro,
        state.step, config.train.max_steps, config.results_dir,
    )  # fmt: skip


if __name__ == "__main__":
    main()
