"""Monitoring: sums on the device, phase times, the console line, TensorBoard, Weights & Biases.

Nothing here makes the device wait but `Meter.read`, once per logging interval. Phases are timed by events that the
device itself records in passing.
"""

from __future__ import annotations

import logging
import math
import secrets
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from autoencoder.common.config import UserError, first_line, to_dict
from autoencoder.common.processes import World, peak_memory
from svg_t2i.data.feature_cache import FeatureBatch
from svg_t2i.data.sources import TrainBatch
from svg_t2i.features.frozen import MicroBatch
from svg_t2i.flow.paths import LossBins
from svg_t2i.rendering.arguments import quiet_imports
from svg_t2i.text.loading import set_loading_bars
from svg_t2i.training.optimizer import ema_decay
from svg_t2i.training.settings import TrainConfig
from svg_t2i.training.sharding import compiled_graphs
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.flops import peak_tflops, training_flops

log = logging.getLogger("svg_t2i")

TERA = 1e12


def start_logging(world: World) -> None:
    """Plain lines on standard output; what is worth a warning, from every rank, and nothing that libraries say."""
    quiet_imports(verbose=False)
    set_loading_bars(False)
    level = logging.INFO if world.is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)
    for chatty in ("httpx", "transformers", "torch.distributed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


class Phases:
    """Seconds by phase of a loop: `start("model")` ends the phase before. On a GPU, seconds of the GPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def start(self, name: str) -> None:
        self._marks.append((name, self._now()))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def pop(self) -> dict[str, float]:
        """Totals since the last call; the phase under way goes on. The device has to be idle."""
        if not self._marks:
            return {}
        self.start(self._marks[-1][0])
        seconds: dict[str, float] = defaultdict(float)
        if self._device.type == "cuda":
            self._marks[-1][1].synchronize()
        for (name, start), (_, end) in zip(self._marks, self._marks[1:]):
            seconds[name] += start.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - start
        del self._marks[:-1]
        return dict(seconds)


class Meter:
    """Sums of what is logged, kept on the device between two `read`s."""

    def __init__(self, world: World, config: TrainConfig, sizes: DiTConfig):
        self.world, self.sizes, self.frozen = world, sizes, config.lora is not None
        self.bins = LossBins(config.monitor.loss_bins, device=world.device)
        self.phases = Phases(world.device)
        self.phase = self.phases.start  # "data" (waiting for it), "encode", "model", "update", "aside"
        # on the device: losses, those of an auxiliary head, samples | gradient norms, skipped updates, of these with
        # non-finite norms
        self._sums = torch.zeros(6, device=world.device)
        # on the host: text tokens, their squares, image tokens, operations | replaced samples
        self._host = torch.zeros(5, dtype=torch.float64)
        self._updates = 0
        self.total_nonfinite = self.total_replaced = 0  # as of the last `read`

    def add_replaced(self, batches: Sequence[TrainBatch | FeatureBatch]) -> None:
        """Count the samples of a step that stand in for unusable ones."""
        self._host[4] += sum(batch.replaced for batch in batches)

    def add_losses(self, losses: Tensor, timesteps: Tensor, batch: MicroBatch, aux: Tensor | None = None) -> None:
        """Per-sample losses (B,) at timesteps (B,), if they are counted; aux: those of an auxiliary head."""
        if not batch.counted:
            return
        second = torch.zeros_like(losses[0]) if aux is None else aux.sum()
        self._sums[:3] += torch.stack((losses.sum(), second, torch.full_like(second, len(losses))))
        self.bins.update(timesteps, losses)
        text, image = batch.text.lengths, [h * w // self.sizes.patch_size**2 for h, w in batch.sizes]
        counts = (sum(text), sum(n**2 for n in text), sum(image), training_flops(self.sizes, image, text, self.frozen))
        self._host[:4] += torch.tensor(counts, dtype=torch.float64)

    def add_update(self, grad_norm: Tensor, skipped: Tensor) -> None:
        """Gradient norm before clipping, and 1 if the update was skipped."""
        finite = grad_norm.isfinite()
        self._sums[3:] += torch.stack((torch.where(finite, grad_norm, 0), skipped, finite.logical_not().float()))
        self._updates += 1

    def read(self) -> dict[str, Any]:
        """Sums and means over all ranks since the last call, from which counting starts anew. Waits for the device."""
        loss, aux, samples, grad_norm, skipped, nonfinite = self.world.reduce_sum(self._sums).tolist()
        self.world.reduce_sum(self.bins.totals)
        # a copy even on the CPU: the sums of this rank go on
        host = self.world.reduce_sum(self._host.to(self.world.device, copy=True)).tolist()
        text, squares, image, operations, replaced = host
        ranks, mean_text = self.world.size, text / max(samples, 1)
        self.total_nonfinite += round(nonfinite / ranks)
        self.total_replaced += round(replaced)
        values = {
            "loss": loss / max(samples, 1),
            "aux_loss": aux / max(samples, 1),
            "grad_norm": grad_norm / max(self._updates * ranks - nonfinite, 1),
            "skipped": round(skipped / ranks),
            "samples": round(samples - replaced),  # a stand-in for an unusable one is no sample learnt
            "replaced": self.total_replaced,
            "text_tokens": mean_text,
            "text_tokens_std": math.sqrt(max(squares / max(samples, 1) - mean_text**2, 0)),
            "tokens": text + image,
            "operations": operations / ranks,  # of one rank
            "loss_bins": self.bins.pop(),
            "phases": self.phases.pop(),
        }
        self._sums.zero_()
        self._host.zero_()
        self._updates = 0
        return values


class ProgressLogger:
    """Console, TensorBoard and Weights & Biases of rank 0; does nothing on other ranks."""

    def __init__(self, config: TrainConfig, step: int, world: World):
        self.config, self.world = config, world
        self.board = self.wandb = None
        self._since = time.perf_counter()
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
        self._peak = config.monitor.peak_tflops or peak_tflops(name)
        if world.is_main and config.monitor.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(Path(config.results_dir) / "tensorboard"), purge_step=step + 1)
        if world.is_main and config.monitor.wandb_project is not None:
            self.wandb = start_wandb(config)

    def write(self, step: int, values: Mapping[str, Any], lr: float) -> None:
        """One line for the interval that ended with `step`: its `Meter.read`, and its last learning rate."""
        seconds = time.perf_counter() - self._since
        self._since += seconds
        train = self.config.train
        scalars = {"lr": lr, "ema_decay": ema_decay(step - 1, train.ema_decays[0], train.ema_warmup)}
        scalars["images_per_second"] = values["samples"] / seconds
        names = ("loss", "grad_norm", "skipped", "replaced", "text_tokens", "text_tokens_std")
        scalars |= {key: values[key] for key in names}
        if self.config.aux is not None:
            scalars["aux_loss"] = values["aux_loss"]
        scalars["tokens_per_second"] = values["tokens"] / seconds
        phases = {name: spent for name, spent in values["phases"].items() if name != "aside"}
        scalars |= {f"share_of_{name}": spent / seconds for name, spent in phases.items()}
        if self._peak:
            scalars["flop_utilisation"] = values["operations"] / seconds / (self._peak * TERA)
        scalars["memory_gib"] = peak_memory(self.world.device, reset=True)
        if self.config.parallel.compile:
            scalars["compiled_graphs"] = compiled_graphs()
        log.info("step %d/%d  %s", step, self.config.train.max_steps, console_line(scalars))
        named = {f"train/{name}": value for name, value in scalars.items()}
        self._record(named | loss_scalars(values["loss_bins"]), step)

    def pictures(self, step: int, grid: Image.Image) -> None:
        """A grid of samples."""
        pixels = torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8).view(grid.height, grid.width, 3)
        self._on_board(lambda board: board.add_image("samples", pixels, step, dataformats="HWC"))
        if self.wandb is not None:
            self.wandb.log({"samples": _wandb().Image(grid)}, step=step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of an evaluation; the same on every rank."""
        if self.board is not None or self.wandb is not None:
            log.info("step %d  %s", step, "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self._record({f"eval/{name}": value for name, value in values.items()}, step)

    def validation(self, step: int, losses: Sequence[float]) -> None:
        """The loss on held-out samples at equally spaced times; the same on every rank."""
        mean = sum(losses) / len(losses)
        log.info("step %d/%d  validation loss %.5f", step, self.config.train.max_steps, mean)
        named = {f"validation/{name}": loss for name, loss in loss_scalars(losses).items()}
        self._record({"validation/loss": mean, **named}, step)

    def _record(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._on_board(lambda board, name=name, value=value: board.add_scalar(name, value, step))
        if self.wandb is not None:
            self.wandb.log(dict(scalars), step=step)

    def _on_board(self, write: Callable[[Any], None]) -> None:
        """Record in TensorBoard. What goes wrong there, such as a full disk, ends the recording and not the run."""
        if self.board is None:
            return
        try:
            write(self.board)
        except Exception as error:
            log.warning("TensorBoard records nothing more: %s", first_line(error))
            self.board = None

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave the time inside out of the next line's rates: it is not training."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started

    def close(self) -> None:
        self._on_board(lambda board: board.close())
        if self.wandb is not None:
            self.wandb.finish()


def console_line(scalars: Mapping[str, float]) -> str:
    """The console line of an interval."""
    line = "loss {loss:.4f}".format(**scalars) + (f"  aux {scalars['aux_loss']:.4f}" if "aux_loss" in scalars else "")
    line += "  grad {grad_norm:.3f}  lr {lr:.2e}  {images_per_second:.1f} images/s".format(**scalars)
    for name, label in (("share_of_data", "data"), ("flop_utilisation", "MFU")):
        if name in scalars:
            line += f"  {label} {scalars[name]:.0%}"
    line += f"  {scalars['memory_gib']:.1f} GiB"
    return line + (f"  replaced {scalars['replaced']}" if scalars["replaced"] else "")


def loss_scalars(bins: Sequence[float]) -> dict[str, float]:
    """Names for the mean losses of equal ranges of t; empty ranges (nan) are left out."""
    edges = [f"{i / len(bins):.2f}-{(i + 1) / len(bins):.2f}" for i in range(len(bins))]
    return {f"loss_at_t/{edge}": loss for edge, loss in zip(edges, bins) if loss == loss}


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "monitor.wandb_project is set, but wandb is not installed: pip install wandb, or leave that setting out"
        ) from error
    return wandb


def start_wandb(config: TrainConfig) -> Any:
    """A W&B run named after the results folder; a resumed run continues it, by the id kept in results_dir/wandb_id.

    Raises:
        UserError: wandb is not installed.
    """
    wandb, folder = _wandb(), Path(config.results_dir)
    kept = folder / "wandb_id"
    if not kept.exists():  # folders of two runs may have one name
        kept.write_text(secrets.token_hex(8))
    return wandb.init(
        project=config.monitor.wandb_project,
        name=folder.name,
        id=kept.read_text().strip(),
        resume="allow",
        config=to_dict(config),
        dir=str(folder),
    )


@contextmanager
def profiling(config: TrainConfig, world: World) -> Iterator[Any]:
    """Yields a function to call after every step. Rank 0 records `profile_steps` steps, after ten to warm up, as
    results_dir/profile/trace.json, to be opened in https://ui.perfetto.dev.
    """
    steps = config.monitor.profile_steps
    if not steps or not world.is_main:
        yield lambda: None
        return
    folder = Path(config.results_dir) / "profile"
    folder.mkdir(exist_ok=True)

    def write(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(folder / "trace.json"))
        log.info("wrote %s", folder / "trace.json")

    schedule = torch.profiler.schedule(wait=8, warmup=2, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True) as profile:
        yield profile.step
