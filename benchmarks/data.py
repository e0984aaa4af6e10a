"""Time what a large data source costs: opening it, looking up its order, reading its samples, decoding its JPEGs.

JPEG file → crop → uint8 tensor is timed against Pillow with torchvision and, where it is installed, against the
webdataset library with the same transform reading a tar; all in one process, taking turns.

    python -m benchmarks.data [--lines 2000000 --jpegs 64 --folder DIR]
    python -m benchmarks.data --lines 100000000 --short     # 6.7 GB on the disk while it runs

A manifest of `--lines` lines like those of web data sets is written to a temporary folder (some 200 bytes a line, or
67 with `--short`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as vision

from autoencoder.images.files import crop_square, load_image, to_uint8_tensor
from autoencoder.images.order import SampleOrder
from autoencoder.sources.manifest import Manifest
from svg_t2i.data.loader import build_loader
from svg_t2i.data.sources import T2IDataset

ROUNDS = 5
OPEN = """
import re, sys, time
import autoencoder.sources.manifest as m
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024  # MiB
imported, started = peak(), time.perf_counter()
manifest = m.Manifest.open(sys.argv[1])
seconds = time.perf_counter() - started
manifest[len(manifest) - 1]
print(seconds, peak(), imported)
"""


def write_manifest(path: Path, lines: int) -> None:
    rng = np.random.default_rng(0)
    words = ["sunset", "a", "portrait of", "the old", "harbour", "in", "watercolour", "with", "two", "cats"]
    with path.open("w") as file:
        for block in range(0, lines, 10_000):
            lengths = rng.integers(5, 40, 10_000)
            for i in range(min(10_000, lines - block)):
                caption = " ".join(words[(i * 7 + j * 3) % 10] for j in range(lengths[i]))
                entry = {"path": f"{block:09d}/{i:05d}.jpg", "prompt": caption, "width": 1024, "height": 768}
                file.write(json.dumps(entry) + "\n")


def write_short_manifest(path: Path, lines: int) -> None:
    """Lines of 67 bytes that differ in their numbers."""
    template = b'{"path": "a/00000000.jpg", "prompt": "a red bird number 00000000"}\n'
    block = np.tile(np.frombuffer(template, dtype=np.uint8), (1_000_000, 1))  # (n, 67)
    ends = [template.index(b".jpg"), template.index(b'"}')]

    def number(numbers: np.ndarray | int, digits: range) -> None:
        for digit in digits:
            for end in ends:
                block[:, end - 1 - digit] = ord("0") + numbers // 10**digit % 10

    number(np.arange(len(block)), range(6))
    with path.open("wb") as file:
        for first in range(0, lines, len(block)):
            number(first, range(6, 8))
            file.write(block[: lines - first].data)


def forget(path: Path) -> None:
    """Let the next reader of a file go to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def opening(path: Path, label: str) -> None:
    """In a process of its own, whose memory is measured."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-c", OPEN, str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()
    took, peak, imported = map(float, output)
    print(f"{label:<40}{took:8.2f} s   {peak:6.0f} MiB at most, of which imports (torch) {imported:.0f}")


def jpegs(folder: Path, count: int) -> list[Path]:
    """Photograph-like images of 3 megapixels."""
    rng, paths = np.random.default_rng(0), [folder / f"{i}.jpg" for i in range(count)]
    for path in paths:
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        small.resize((2048, 1536), Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


def ours(paths: Sequence[Path], side: int, draft: bool) -> Iterator[Tensor]:
    for path in paths:
        image = load_image(path, shrink=(lambda _: (side, side)) if draft else None)
        yield to_uint8_tensor(crop_square(image, side, None))


def transform(image: Image.Image, side: int) -> Tensor:
    """The usual one of torchvision."""
    scaled = vision.resize(image, side, vision.InterpolationMode.BICUBIC)
    return vision.pil_to_tensor(vision.center_crop(scaled, [side, side]))


def torchvision_reads(paths: Sequence[Path], side: int) -> Iterator[Tensor]:
    for path in paths:
        with Image.open(path) as image:
            yield transform(image.convert("RGB"), side)


def webdataset_reads(shard: Path, side: int) -> Iterator[Tensor]:
    import webdataset

    samples = webdataset.WebDataset(str(shard), shardshuffle=False).decode("pil").to_tuple("jpg")
    return (transform(image, side) for (image,) in samples)


def decoding(folder: Path, count: int) -> None:
    """Milliseconds an image and ratios: medians over rounds in which the readers take turns."""
    paths, shard = jpegs(folder, count), folder / "shard.tar"
    with tarfile.open(shard, "w") as file:
        for path in paths:
            file.add(path, path.name)
    for side in (256, 512):
        readers: dict[str, Callable[[], Iterator[Tensor]]] = {
            "ours": lambda side=side: ours(paths, side, draft=False),
            "ours, jpeg_draft": lambda side=side: ours(paths, side, draft=True),
            "Pillow and torchvision": lambda side=side: torchvision_reads(paths, side),
        }
        if importlib.util.find_spec("webdataset") is not None:
            readers["webdataset"] = lambda side=side: webdataset_reads(shard, side)
        taken: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(ROUNDS):
            for name, read in readers.items():
                taken[name].append(1000 / count * seconds(lambda read=read: deque(read(), maxlen=0)))
        for name in ("ours", "ours, jpeg_draft"):
            for peer in list(readers)[2:]:
                ratio = statistics.median(b / a for a, b in zip(taken[name], taken[peer], strict=True))
                own, other = statistics.median(taken[name]), statistics.median(taken[peer])
                print(f"2048×1536 JPEG → {side} px  {name:<18}{own:6.1f} ms   {peer:<24}{other:6.1f} ms   {ratio:.2f}×")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=2_000_000)
    parser.add_argument("--short", action="store_true", help="short lines, quickly written")
    parser.add_argument("--jpegs", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        path = folder / "large.jsonl"
        (write_short_manifest if arguments.short else write_manifest)(path, arguments.lines)
        print(f"manifest of {arguments.lines} lines, {path.stat().st_size / 2**20:.0f} MiB")
        forget(path)
        opening(path, "first open, from the disk")
        index = next(folder.glob(".index/*.npy"), None)  # small files have none
        if index is not None:
            size = index.stat().st_size / 2**20
            index.unlink()
            opening(path, "first open, file in the page cache")
            opening(path, f"later open (index of {size:.1f} MiB)")

        manifest = Manifest.open(path)
        order = SampleOrder([10**9], seed=0)
        positions = np.arange(10**12, 10**12 + 100_000)
        rate = len(positions) / seconds(lambda: order.locate(positions))
        print(f"order of a billion samples: {rate / 1e6:.2f} M positions/s at position 10^12")
        chosen = np.random.default_rng(1).integers(0, len(manifest), 20_000).tolist()
        rate = len(chosen) / seconds(lambda: [manifest[index] for index in chosen])
        print(f"entries at random: {rate:.0f} /s")
        stream = {"global_batch_size": 1536, "micro_batch_size": 24, "total_steps": 4, "micro_batch_tokens": 16384}
        planner = build_loader(T2IDataset(manifest, 256), **stream, world_size=64)._work.stream
        planned = seconds(lambda: [planner[step] for step in range(4)]) / 4
        print(f"dealing a step of 1536 samples by tokens to 64 processes: {1000 * planned:.0f} ms")

        decoding(folder, arguments.jpegs)


if __name__ == "__main__":
    main()
