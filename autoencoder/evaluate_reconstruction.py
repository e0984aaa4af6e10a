"""Evaluate an autoencoder's reconstructions: rFID, PSNR, SSIM, LPIPS at one or several resolutions, in one pass.

    python -m autoencoder.evaluate_reconstruction CONFIG --data IMAGES --resolution 256 512 --output DIR
    torchrun --nproc-per-node 8 -m autoencoder.evaluate_reconstruction CONFIG ...        the same numbers

IMAGES is a folder or a manifest. The standard run takes the 50,000 images of ImageNet-1k val, shorter side scaled to
the resolution and cropped to a square in the middle; `evaluation.metrics` says what the metrics are. Every image is
counted once, whatever the batch size and the number of processes; nothing but numbers is kept of it.

    DIR/metrics.json    everything, with what it was measured on; null and a reason for a metric that cannot be had
    DIR/metrics.csv     a row per resolution
    DIR/images.csv      a row per image and resolution
    DIR/unusable.jsonl  the images that could not be read, if any
    DIR/table.md        a row per resolution; --table FILE adds them to a table of several autoencoders as well
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from autoencoder.common.commands import Parser, command
from autoencoder.common.config import UserError, short_path
from autoencoder.common.processes import start_world
from autoencoder.common.weights import replacing
from autoencoder.evaluation.crops import (
    Crops,
    add_image_arguments,
    add_model_arguments,
    list_failures,
    load_autoencoder,
    open_crops,
    warn_of_batch_statistics,
)
from autoencoder.evaluation.metrics import PER_IMAGE
from autoencoder.evaluation.reconstruction import Networks, Result, evaluate, group_means
from autoencoder.latents.drift import drift
from autoencoder.model import SVGAutoencoder
from autoencoder.sources.failures import FILE_NAME
from autoencoder.sources.source import Sample

logger = logging.getLogger(__name__)

FEW_IMAGES = 10_000  # FID is biased upwards, and the more so the fewer images there are
METRICS = {"rfid": "rFID ↓", "psnr": "PSNR ↑", "ssim": "SSIM ↑", "lpips": "LPIPS ↓"}
COLUMNS = ("Autoencoder", "Data", "Resolution", "Images", *METRICS.values())
KEY = 3  # columns that name a row of a table


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = Parser("autoencoder.evaluate_reconstruction", __doc__)
    add_model_arguments(parser)
    add_image_arguments(parser, max_aspect=1.0)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--name", help="of the autoencoder in the table; default: the config's file name")
    parser.add_argument("--table", type=Path, help="Markdown table to put the rows into as well (default: none)")
    parser.add_argument("--stats", help="latent statistics to compare with (default: the autoencoder's own)")
    parser.add_argument("--midpoints", action="store_true", help="measure the iFID as well: a second pass")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that has results")
    arguments = parser.parse_intermixed_args(argv)
    if (arguments.output / "metrics.json").exists() and not arguments.overwrite:
        raise UserError(f"--output {arguments.output} has results; choose another folder or add --overwrite")
    return arguments


@command
def main(argv: list[str]) -> None:
    """Measure reconstructions as the command line says, and write the numbers."""
    arguments = parse_arguments(argv)
    crops = open_crops(arguments)
    torch.backends.cudnn.allow_tf32 = False  # the same numbers on every GPU
    with start_world(arguments.device, timeout_minutes=60) as world:
        list_failures(crops, arguments.output / FILE_NAME, world)
        autoencoder = load_autoencoder(arguments, world.device, arguments.stats)
        with world.main_first():  # one process downloads the networks
            networks = Networks.build(world.device)
            warn_of_batch_statistics(autoencoder, arguments.batch_size)
            for metric, reason in networks.missing.items():
                logger.warning("%s is not available: %s", metric, reason)
        start = time.monotonic()
        options = arguments.batch_size, arguments.num_workers, arguments.midpoints
        results = evaluate(autoencoder, crops, networks, world, *options)
        if world.is_main:
            samples = [crops.sample(place) for place in results[0].places.tolist()]
            report = describe(arguments, autoencoder, crops, results, samples, time.monotonic() - start)
            write(arguments, report, samples, results)


def describe(
    arguments: argparse.Namespace,
    autoencoder: SVGAutoencoder,
    crops: Crops,
    results: list[Result],
    samples: Sequence[Sample],
    seconds: float,
) -> dict[str, Any]:
    """The content of metrics.json. samples: the images of every result."""
    summaries = []
    tags = [sample.tags for sample in samples]
    for result in results:
        summary = result.summary() | {"groups": group_means(result, tags)}
        if autoencoder.stats is not None:
            found = drift(autoencoder.stats, result.latents.result())
            summary["normalised_latents"] = found.numbers()
            if found.notable:
                source = arguments.stats or arguments.config
                logger.warning("the statistics of %s do not fit images of %d px: %s", source, result.resolution, found)
        summaries.append(summary)
    if summaries[0]["rfid"] is not None and summaries[0]["images"] < FEW_IMAGES:
        logger.warning(
            "rFID of %d images is biased upwards; compare it with that of the same images only", summaries[0]["images"]
        )
    return {
        "autoencoder": arguments.name or Path(arguments.config).stem,
        "config": arguments.config,
        "overrides": arguments.overrides,
        "checkpoint": arguments.checkpoint,
        "fingerprint": autoencoder.fingerprint(),
        "data": crops.source.name,
        "unreadable": len(crops) - summaries[0]["images"],
        "max_aspect": arguments.max_aspect,
        "precision": arguments.precision,
        "batch_size": arguments.batch_size,
        "seconds": round(seconds, 1),
        "results": summaries,
    }


def write(
    arguments: argparse.Namespace, report: dict[str, Any], samples: Sequence[Sample], results: list[Result]
) -> None:
    """All files of the drawing at the top, and the table on the console."""
    folder: Path = arguments.output
    names = ("resolution", "images", *METRICS, "shift_r", "shift_g", "shift_b")
    lines = [s | dict(zip(names[-3:], s["colour_shift"])) for s in report["results"]]
    _write_csv(folder / "metrics.csv", names, [[line[name] for name in names] for line in lines])
    images = [
        [result.resolution, sample.path, *("" if math.isnan(value) else value for value in values)]
        for result in results
        for sample, values in zip(samples, result.values.tolist())
    ]
    _write_csv(folder / "images.csv", ("resolution", "path", *PER_IMAGE), images)
    rows = [_table_row(report, summary) for summary in report["results"]]
    for path in (folder / "table.md", arguments.table):
        if path is not None:
            add_rows(path, rows)
    with replacing(folder / "metrics.json") as path:  # the last one: that it exists means that all do
        path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print((folder / "table.md").read_text(), end="")


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with replacing(path) as partial, partial.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def _table_row(report: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    digits = {"rfid": 3, "psnr": 2, "ssim": 4, "lpips": 4}
    numbers = ["n/a" if summary[name] is None else f"{summary[name]:.{digits[name]}f}" for name in METRICS]
    row = [
        report["autoencoder"],
        short_path(report["data"]),
        str(summary["resolution"]),
        str(summary["images"]),
        *numbers,
    ]
    return [cell.replace("|", "/") for cell in row]


def add_rows(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Add rows to a Markdown table, made if there is none; a row of the same autoencoder, data and resolution goes.

    Raises:
        UserError: the file holds something else.
    """
    header = [_line(COLUMNS), _line(["---"] * KEY + ["---:"] * (len(COLUMNS) - KEY))]
    kept = path.read_text(encoding="utf-8").rstrip("\n").split("\n") if path.exists() else []
    if kept and kept[:2] != header:
        raise UserError(f"{path} is not a table of these columns ({', '.join(COLUMNS)}); name another file")
    new = {tuple(row[:KEY]) for row in rows}
    kept = [line for line in kept[2:] if tuple(cell.strip() for cell in line.split("|")[1 : KEY + 1]) not in new]
    with replacing(path) as partial:
        partial.write_text("\n".join([*header, *kept, *map(_line, rows)]) + "\n", encoding="utf-8")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
