"""What the recipes of this folder share: phases that are timed, commands that are shown, and their pictures."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from autoencoder.common.config import UserError
from autoencoder.images.files import to_float, to_pil, to_uint8_tensor
from autoencoder.model import SVGAutoencoder

AUTOENCODER = Path("autoencoder/quickstart")  # in the output folder of quickstart.sh


class Steps:
    """The steps of a recipe, one after another.

    Args:
        processes: in training. threads: of all processes together.
    """

    def __init__(self, processes: int, threads: int):
        self.processes, self.threads = processes, threads
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        print(f"\n=== {name.replace('_', ' ')}", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)
        print(f"    {self.seconds[name]:.1f} s", flush=True)

    def run(self, *command: str | os.PathLike | int | float, processes: int = 1) -> None:
        """Runs `python -m ...`, showing the command; a failure ends the recipe with its exit status."""
        words = [str(word) for word in command]
        print(f"$ python -m {shlex.join(words)}", flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads // processes)}
        status = subprocess.run([sys.executable, "-m", *words], env=environment, check=False).returncode
        if status:
            raise SystemExit(status)

    def train_transformer(self, config: str, *changes: str) -> None:
        """`svg_t2i.train` with all processes."""
        launcher = ("autoencoder.common.launch", "--standalone", f"--nproc_per_node={self.processes}")
        self.run(*launcher, "-m", "svg_t2i.train", "--config", config, *changes, processes=self.processes)

    def write_report(self, results: dict[str, object], folder: Path) -> None:
        report = {**results, "seconds": self.seconds, "processes": self.processes}
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def divide_cores() -> tuple[int, int]:
    """Training processes, and threads of all of them together: OMP_NUM_THREADS, which quickstart.sh sets.

    On a CPU two processes of one thread each outrun one process of two threads, and far more so when something else
    runs on the machine. A GPU serves one process.
    """
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    return (1 if torch.cuda.is_available() else min(2, threads)), threads


def require_empty(output: Path) -> None:
    """UserError where `output` is anything but an empty folder, or not there."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is not empty; nothing was overwritten. Remove it or choose another folder")


def scalars(folder: Path) -> Callable[[str], tuple[list[int], list[float]]]:
    """The steps and values of a tag in a TensorBoard folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder))
    board.Reload()

    def read(tag: str) -> tuple[list[int], list[float]]:
        events = board.Scalars(tag)
        return [event.step for event in events], [event.value for event in events]

    return read


def read_samples(folder: Path) -> list[Image.Image]:
    """The pictures of an output folder of `svg_t2i.sample`, in the order of its prompts."""
    records = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    return [Image.open(record["image_url"]).convert("RGB") for record in records]


def trained_parts(folder: Path, quickstart: Path | None = None) -> tuple[str, ...]:
    """The settings of a training run that name the autoencoder and the text encoder of a finished quickstart.

    Args:
        folder: of the autoencoder and its statistics. quickstart: of the text encoder (default: the same).
    """
    return (
        f"autoencoder.config={folder / AUTOENCODER / 'config.yaml'}",
        f"autoencoder.checkpoint={folder / AUTOENCODER / 'checkpoints' / 'last.ckpt'}",
        f"autoencoder.stats={folder / 'latent_stats.safetensors'}",
        f"text_encoder.path={(quickstart or folder) / 'text_encoder'}",
    )


def autoencode(output: Path, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """What the autoencoder that quickstart.sh trained in `output` makes of pictures."""
    folder = output / AUTOENCODER
    autoencoder = SVGAutoencoder.from_config(folder / "config.yaml", folder / "checkpoints" / "last.ckpt").eval()
    images = torch.stack([to_float(to_uint8_tensor(picture)) for picture in pictures])
    with torch.inference_mode():
        return [to_pil(image) for image in autoencoder.decode(autoencoder.encode(images))]


def percentages(fractions: dict[str, float], names: Sequence[str] = ("colour", "place", "shape")) -> str:
    return ", ".join(f"{name} {fractions[name]:.0%}" for name in names)
