"""Time loading a transformer in bf16 from files in fp32, against diffusers' Lumina2Transformer2DModel of the same size.

Ours is read from the files of the published release, from an export, and from a run's checkpoint; the peer from the
safetensors that it writes. Weights are random, and in the page cache as far as it has room. Two numbers for each: the
median seconds of three, and the most memory that was taken besides pages of the files, which the system can drop.

    python -m benchmarks.loading [--model NextDiT_2B_GQA_patch1_Adaln_Refiner] [--folder FOLDER]

Needs disk space for four copies (42 GB for the 2.6 B model), and Linux, for the memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel
from torch import nn

from autoencoder.common.config import to_dict
from benchmarks.forward import lumina2_peer, randomise, timings
from svg_t2i.checkpoints import published
from svg_t2i.checkpoints.run import save_checkpoint
from svg_t2i.checkpoints.weights import load_transformer, save_transformer
from svg_t2i.transformer.config import MODELS, PUBLISHED
from svg_t2i.transformer.model import build_model, published_state_dict

PEER = "Lumina2Transformer2DModel"


class PeakMemory:
    """The most anonymous memory of this process while the block runs, in GB more than before it."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is freed and kept would count as there before
        self.before = self.most = _anonymous()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.most = max(self.most, _anonymous())

    @property
    def gigabytes(self) -> float:
        return (self.most - self.before) / 1e9


def _anonymous() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def write_all(name: str, folder: Path) -> dict[str, Callable[[], nn.Module]]:
    """Write random weights of the model `name` in every format -> who reads it: how."""
    model = build_model(name)
    randomise(model)
    release = folder / "release"
    release.mkdir()
    torch.save(argparse.Namespace(model=name, qk_norm=True), release / published.ARGUMENTS)
    torch.save(published_state_dict(model), release / published.WEIGHTS["ema"])
    save_transformer(model, folder / "export")
    meta = {"model_args": to_dict(model.config), "fingerprints": {}, "config": {}}
    save_checkpoint(folder / "run" / "checkpoints", 1, {"ema": model.state_dict()}, meta)
    lumina2_peer(model).save_pretrained(folder / "peer")
    return {
        "the release's files": lambda: load_transformer(release).bfloat16(),
        "an export": lambda: load_transformer(folder / "export").bfloat16(),
        "a run's checkpoint": lambda: load_transformer(folder / "run").bfloat16(),
        PEER: lambda: Lumina2Transformer2DModel.from_pretrained(folder / "peer", torch_dtype=torch.bfloat16),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PUBLISHED, choices=MODELS)
    parser.add_argument("--folder", help="where the files are made, and removed after (default: a temporary folder)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        cases = write_all(options.model, Path(folder))
        seconds = {}
        print(f"{options.model}, fp32 files → bf16{'':20s}seconds   GB of memory")
        for name, load in cases.items():
            with PeakMemory() as memory:
                load()
            seconds[name] = timings({name: load}, 3, torch.device("cpu"), warm_up=0)[name]
            print(f"{name:60s}{seconds[name]:9.2f}{memory.gigabytes:12.1f}", flush=True)
    for name in list(cases)[:-1]:
        print(f"ratio {seconds[PEER] / seconds[name]:.2f} for {name} (above 1: ours is faster)")


if __name__ == "__main__":
    main()
