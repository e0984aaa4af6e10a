"""Everything that a GPU can show, most important first, into gpu_report.json and gpu_report.md.

    bash scripts/check_gpu.sh --minutes 10
    python -m benchmarks.gpu_report --device cpu --minutes 5    # the same parts at toy size, without a GPU

Both files are written anew after every part, so that what is done stays when the time is up or the machine is taken
away. Parts run in processes of their own: one that fails, or finds no memory, is noted and the next one begins. A part
that would not end in the time that is left is left out, and said to be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoencoder.common.config import REPO_ROOT, UserError
from autoencoder.common.weights import replacing, write_json
from svg_t2i.checkpoints.weights import load_transformer
from svg_t2i.planning.networks import transformer_counts
from svg_t2i.planning.training import GB, measure_training
from svg_t2i.transformer.config import MODELS, PUBLISHED

SHOWN = 60  # lines of a part's output


class Failed(Exception):
    """A part's command ended with an error, or not in time; holds what it had printed, and what that part found."""

    found: dict[str, Any] | None = None


@dataclass(frozen=True)
class Part:
    """One of the report's parts.

    Attributes:
        seconds: what it takes on a fast card; it is left out when less is left, and cut off after twice as long.
        run: (options, seconds left) -> what it found, and lines to show.
    """

    name: str
    title: str
    seconds: int
    run: Callable[[argparse.Namespace, float], tuple[dict[str, Any], str]]


def call(words: Sequence[object], seconds: float) -> str:
    """What a command prints. Raises Failed."""
    command = [sys.executable, "-m", *map(str, words)]
    group = subprocess.Popen(
        command, cwd=REPO_ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output = group.communicate(timeout=max(1.0, seconds))[0]
    except subprocess.TimeoutExpired:
        os.killpg(group.pid, signal.SIGKILL)
        raise Failed(f"not done after {seconds:.0f} s\n{group.communicate()[0]}") from None
    if group.returncode:
        raise Failed(f"exit code {group.returncode}\n{output}")
    return output


def read_off(
    words: Sequence[object], seconds: float, read: Callable[[str], dict[str, Any]]
) -> tuple[dict[str, Any], str]:
    """What a command prints, and what `read` finds in it; also of one that did not end in time. Raises Failed."""
    try:
        output = call(words, seconds)
    except Failed as error:
        error.found = read(str(error))
        raise
    return read(output), output


def versions(options: argparse.Namespace, _: float) -> tuple[dict[str, Any], str]:
    found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "cudnn": torch.backends.cudnn.version(), "gpu": properties.name, "count": torch.cuda.device_count(),
            "memory_gb": round(properties.total_memory / GB, 1),
        }  # fmt: skip
    return found, "\n".join(f"{name}: {value}" for name, value in found.items())


def parity(options: argparse.Namespace, seconds: float) -> tuple[dict[str, Any], str]:
    """The release's vectors, in fp32 and under bf16 autocast."""
    if not options.parity_dir.is_dir():
        return {"skipped": f"there is no folder {options.parity_dir}; give --parity_dir"}, ""
    words = ["pytest", "tests/parity", "--parity-dir", options.parity_dir, "--parity-device", options.device, "-q"]
    output = call(words, seconds)
    return {"summary": output.strip().splitlines()[-1]}, output


def training(pixels: int, batch: int, checkpointing: str) -> Callable:
    """`benchmarks.training` of the full model against the peer: eager, compiled and live, each step under
    set_sync_debug_mode("error")."""

    def run(options: argparse.Namespace, seconds: float) -> tuple[dict[str, Any], str]:
        if options.device != "cuda" and pixels != 256:
            return {"skipped": "at toy size it is the part of 256 px"}, ""
        size = ["--pixels", 64, "--batch", 2, "--repeats", 1, "--precision", "fp32", "--dim", 96, "--layers", 1]
        if options.device == "cuda":
            size = ["--model", PUBLISHED, "--pixels", pixels, "--batch", batch, "--compile", "--live", "--repeats", 5]
        size += ["--captions", "ragged", "--checkpointing", checkpointing]
        words = ["benchmarks.training", "--device", options.device, *size]
        return read_off(words, seconds, lambda output: training_cases(output, pixels, batch, checkpointing))

    return run


def training_cases(output: str, pixels: int, batch: int, checkpointing: str) -> dict[str, dict[str, float]]:
    """What `benchmarks.training` printed of each case; times against the peer, memory against the plan."""
    found = re.findall(r"^(.+?): ([\d.]+) ms, ([\d.]+) GiB$", output, flags=re.MULTILINE)
    cases = {case: {"ms": float(ms), "gib": float(gib)} for case, ms, gib in found}
    peer = cases.get("diffusers")
    for case in cases.values() if peer else ():
        case["times as fast as diffusers"] = round(peer["ms"] / case["ms"], 2)
    if "ours" in cases:
        planned = planned_gib(pixels, batch, checkpointing)
        cases["planned, ours"] = {"gib": round(planned, 1), "ratio": round(cases["ours"]["gib"] / planned, 3)}
    return cases


def planned_gib(pixels: int, batch: int, checkpointing: str) -> float:
    """What svg_t2i.plan expects of the benchmark's eager step: all weights, moments, an average, no frozen networks."""
    from benchmarks.forward import ragged_lengths

    parameters = transformer_counts(MODELS[PUBLISHED]).all
    grid = (pixels // 16,) * 2
    passed = measure_training(MODELS[PUBLISHED], (grid,) * batch, ragged_lengths(batch), checkpointing)
    return ((4 + 8 + 4 + 2) * parameters + passed.peak_with(4)) / 2**30  # one micro-batch: gradients come in its course


def benchmark(module: str, on_gpu: Sequence[object], on_cpu: Sequence[object]) -> Callable:
    def run(options: argparse.Namespace, seconds: float) -> tuple[dict[str, Any], str]:
        return {}, call([module, *(on_gpu if options.device == "cuda" else on_cpu)], seconds)

    return run


def whole_calls(options: argparse.Namespace, seconds: float) -> tuple[dict[str, Any], str]:
    """`benchmarks.pipeline`: times and memory of an image, resident, quantised and with networks taking turns."""
    size = [] if options.device == "cuda" else ["--side", 64, "--steps", 6]
    return read_off(["benchmarks.pipeline", "--device", options.device, *size], seconds, whole_calls_in)


def whole_calls_in(output: str) -> dict[str, dict[str, float]]:
    """What `benchmarks.pipeline` printed of each way."""
    row = r"^(.+): ([\d.]+) s, (\d+) evaluations(?:, ([\d.]+) GiB)?(?: \(planned: ([\d.]+)\))?$"
    names = "seconds", "evaluations", "gib", "planned gib"
    return {
        way: {name: float(number) for name, number in zip(names, numbers, strict=True) if number}
        for way, *numbers in re.findall(row, output, flags=re.MULTILINE)
    }


def survival(options: argparse.Namespace, seconds: float) -> tuple[dict[str, Any], str]:
    """A small run, the same one killed -9 after its first checkpoint and started again, and a difference of weights."""
    end = time.monotonic() + seconds
    folder = options.output / "runs"
    words = [
        "svg_t2i.train", "--config", "configs/svg_t2i/forTest_1gpu.yaml", "model=tiny", "text_encoder.path=random",
        "autoencoder.encoder_weights=random", "data.resolution=64", "data.num_workers=0", "train.max_steps=6",
        "train.ckpt_every=2", f"train.precision={'bf16' if options.device == 'cuda' else 'fp32'}",
    ]  # fmt: skip
    call([*words, f"results_dir={folder / 'straight'}"], end - time.monotonic())
    first = folder / "killed" / "checkpoints" / "0000002"
    command = [sys.executable, "-m", *words, f"results_dir={folder / 'killed'}"]
    quiet = subprocess.DEVNULL
    killed = subprocess.Popen(command, cwd=REPO_ROOT, stdout=quiet, stderr=quiet, start_new_session=True)
    while not first.is_dir() and killed.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    output = call([*words, f"results_dir={folder / 'killed'}"], end - time.monotonic())
    models = [load_transformer(folder / name, ema=False) for name in ("straight", "killed")]
    pairs = zip(*(model.parameters() for model in models), strict=True)
    found: dict[str, Any] = {"largest_difference": max((a - b).abs().max().item() for a, b in pairs)}
    if options.device == "cuda" and torch.cuda.device_count() > 1:
        two = ["torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", *words]
        call([*two, "parallel.data_parallel=fsdp", f"results_dir={folder / 'two'}"], end - time.monotonic())
        found["two_processes"] = "ran"
    return found, output


PARTS = [
    Part("versions", "Versions", 0, versions),
    Part("parity", "Numbers of the published release", 60, parity),
    Part("training_256", "Training at 256 px, against diffusers", 150, training(256, 24, "none")),
    Part("survival", "Killed and continued", 60, survival),
    Part("pipeline", "Prompt to image: memory against the plan", 120, whole_calls),
    Part("training_1024", "Training at 1024 px, against diffusers", 150, training(1024, 2, "selective")),
    Part("sampling", "Sampling", 90, benchmark(
        "benchmarks.sampling", ["--full", "--repeats", 1], ["--steps", 2, "--dim", 96, "--layers", 1, "--repeats", 1])),
    Part("attention", "Attention", 30, benchmark(
        "benchmarks.attention", ["--device", "cuda"], ["--shapes", "2x16", "--repeats", 1])),
    Part("training_512", "Training at 512 px, against diffusers", 150, training(512, 8, "none")),
]  # fmt: skip


def report(options: argparse.Namespace, parts: Sequence[Part] = tuple(PARTS)) -> dict[str, Any]:
    """Run the parts, writing both files after each. -> what gpu_report.json holds.

    With --parts, what an earlier report in the folder says of the others stays.
    """
    end = time.monotonic() + 60 * options.minutes
    written, results = options.output / "gpu_report.json", {}
    if options.parts:
        parts = [part for part in parts if part.name in options.parts]
        results = json.loads(written.read_text()) if written.is_file() else {}
    for part in parts:
        left = end - time.monotonic()
        began = time.monotonic()
        entry: dict[str, Any] = {"title": part.title}
        if left < (part.seconds if options.device == "cuda" else 1):
            entry["skipped"] = f"{part.seconds} s are needed and {max(left, 0):.0f} s are left"
        else:
            try:
                found, output = part.run(options, min(left, 2 * part.seconds) if options.device == "cuda" else left)
                entry |= {"found": found, "output": output.strip().splitlines()[-SHOWN:]}
                if "skipped" in found:
                    entry["skipped"] = found["skipped"]
            except Failed as error:
                entry |= {"failed": str(error).partition("\n")[0], "output": str(error).splitlines()[-SHOWN:]}
                entry |= {"found": error.found} if error.found else {}
            entry["seconds"] = round(time.monotonic() - began, 1)
        results[part.name] = entry
        print(f"{part.title}: {state_of(entry)}", flush=True)
        write_json(results, written)
        with replacing(options.output / "gpu_report.md") as path:
            path.write_text(as_markdown(results), encoding="utf-8")
    return results


def state_of(entry: dict[str, Any]) -> str:
    if "failed" in entry:
        return f"failed, {entry['failed']}"
    return f"left out: {entry['skipped']}" if "skipped" in entry else f"done in {entry['seconds']} s"


def as_markdown(results: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["# What the GPU shows", ""]
    for entry in results.values():
        lines += [f"## {entry['title']}", "", state_of(entry), ""]
        if entry.get("found"):
            lines += ["```json", json.dumps(entry["found"], indent=1), "```", ""]
        if entry.get("output"):
            lines += ["```", *entry["output"], "```", ""]
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=[part.name for part in PARTS],
        default=[],
        metavar="PART",
        help="only these: " + ", ".join(part.name for part in PARTS),
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu_report"), help="folder of the report")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: all parts at toy size")
    parser.add_argument("--parity_dir", type=Path, default=REPO_ROOT.parent / "shared" / "parity")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use; --device cpu runs all parts at toy size")
    if not options.minutes > 0:
        raise UserError(f"--minutes {options.minutes} must be positive")
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    results = report(options)
    failed = [name for name, entry in results.items() if "failed" in entry]
    print(f"report: {options.output / 'gpu_report.md'}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
