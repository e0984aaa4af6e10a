"""Look at a data set before training on it: read every sample as training would, and say what there is.

    python -m svg_t2i.inspect_data my_images
    python -m svg_t2i.inspect_data data.jsonl --resolution 512 --text_encoder google/gemma-2-2b --num_workers 8

The path is whatever training takes: a folder, a manifest, a table, tar shards, hf://datasets/owner/name. Into --output
go report.json (all numbers), unusable.jsonl, histograms.png and contact_sheet.png: random samples as training sees
them, with their captions. The last lines are the settings to use.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from autoencoder.common.commands import Parser, command, require_positive
from autoencoder.common.config import UserError, to_yaml
from autoencoder.common.weights import replacing
from autoencoder.sources.failures import FILE_NAME, Failures
from autoencoder.sources.opening import open_source
from autoencoder.sources.source import ORIENTATIONS, Reading
from svg_t2i.data.draws import Augmentation
from svg_t2i.data.inspection import (
    ImagesOnly,
    Inspection,
    SampleReader,
    TokenCounter,
    draw_histograms,
    estimated_tokens,
    save_contact_sheet,
    settings,
)
from svg_t2i.data.loader import read_ahead
from svg_t2i.data.sources import T2IDataset


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = Parser("svg_t2i.inspect_data", __doc__)
    parser.add_argument("path", help="images and captions")
    parser.add_argument("--output", default="outputs/inspect_data", help="folder for the report")
    parser.add_argument("--resolution", type=int, default=256, help="of the training, in pixels")
    parser.add_argument("--max_aspect", type=float, default=4.0, help="largest ratio of the sides of a crop")
    parser.add_argument("--text_encoder", help="folder or Hub name, whose tokenizer counts (default: an estimate)")
    parser.add_argument("--max_length", type=int, default=256, help="tokens at which the text encoder cuts")
    parser.add_argument("--image_column", help="of a manifest or table (default: by the usual names)")
    parser.add_argument("--caption_column", help="likewise (default: by the usual names)")
    parser.add_argument("--images_only", action="store_true", help="captions are not needed: data of the autoencoder")
    parser.add_argument("--exif_orientation", choices=ORIENTATIONS, default="apply", help="as in the data section")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read; 0: this one")
    parser.add_argument("--limit", type=int, help="read so many samples, evenly spread (default: all)")
    parser.add_argument("--samples", type=int, default=24, help="pictures on the contact sheet")
    parser.add_argument("--seed", type=int, default=0, help="of the choice for the contact sheet")
    arguments = parser.parse_args(argv)
    require_positive(arguments, "limit", "samples", "max_length")
    if arguments.num_workers < 0:
        raise UserError(f"--num_workers {arguments.num_workers} must be at least 0")
    return arguments


@command
def main(argv: list[str]) -> None:
    """Inspect, write the report, print a summary."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    output = Path(arguments.output).expanduser()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be made: {error.strerror}") from None
    columns = {"image_column": arguments.image_column, "caption_column": arguments.caption_column}
    reading = Reading(
        require_captions=not arguments.images_only,
        exif_orientation=arguments.exif_orientation,
        failures=Failures(sys.maxsize, announce=False),
        **columns,
    )
    dataset = (ImagesOnly if arguments.images_only else T2IDataset)(
        open_source(arguments.path, reading),
        arguments.resolution,
        arguments.max_aspect,
        augmentation=Augmentation(caption_dropout_prob=0.0, seed=arguments.seed),
        max_caption_tokens=arguments.max_length,
    )
    inspection = inspect(dataset, token_counter(arguments.text_encoder), arguments.limit, arguments.num_workers)
    report = inspection.report() | {"tokens_are_estimated": arguments.text_encoder is None}
    usable = len(inspection.table)
    if usable:
        report["settings"] = settings(inspection, arguments.path, columns)
        draw_histograms(inspection, output / "histograms.png")
        sheet = output / "contact_sheet.png"
        save_contact_sheet(dataset, inspection.table[:, 0], arguments.samples, arguments.seed, sheet)
    with replacing(output / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with replacing(output / FILE_NAME) as partial:
        lines = ({"sample": sample, "reason": reason} for sample, reason in inspection.reasons.items())
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print("\n".join(summary(report)))
    print(f"\nwritten to {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    if not usable:
        raise UserError(f"{arguments.path}: none of the {report['read']} samples is usable; see {output / FILE_NAME}")
    print(f"\nsettings to use:\n\n{to_yaml(report['settings'])}", end="")


def token_counter(text_encoder: str | None) -> TokenCounter:
    """Counts tokens of texts as the text encoder would, or estimates them."""
    if text_encoder is None:
        return estimated_tokens
    from svg_t2i.text.loading import load_tokenizer

    return partial(counted_tokens, load_tokenizer(text_encoder))


def counted_tokens(tokenizer: Callable[..., Any], texts: Sequence[str]) -> list[int]:
    """How many tokens texts have, special ones included."""
    return [len(row) for row in tokenizer(list(texts), verbose=False)["input_ids"]]


def inspect(dataset: T2IDataset, count_tokens: TokenCounter, limit: int | None, num_workers: int) -> Inspection:
    """Read the samples in `num_workers` processes, with a progress bar."""
    known = {f"{name}, {sample}": reason for (name, sample), reason in dataset.manifest.failures.reasons.items()}
    inspection = Inspection(dataset, reasons=known)
    count = min(limit or len(dataset), len(dataset))
    indices = np.linspace(0, len(dataset) - 1, count).astype(int).tolist()
    findings = read_ahead(SampleReader(dataset, count_tokens), indices, num_workers, prefetch=16)
    for finding in tqdm(findings, total=count, desc="reading", unit="image", disable=None):
        inspection.add(finding)
    return inspection


def summary(report: dict[str, Any]) -> list[str]:
    """The report as lines to read."""
    images, captions, unusable, copies = (report[key] for key in ("images", "captions", "unusable", "duplicates"))
    lines = [f"{report['path']}: {report['samples']} samples, {report['read']} read, {report['usable']} usable"]
    lines += [f"  unusable: {unusable['count']}"]
    for kind, found in unusable["reasons"].items():
        lines += [f"    {found['count']} × {kind}", *(f"      {example}" for example in found["examples"])]
    if not report["usable"]:
        return lines
    enlarged = ", ".join(f"{share:.1%} at {side} px" for side, share in images["enlarged_at"].items())
    buckets = list(report["aspect_buckets"].items())
    crops = ", ".join(f"{count} of {size}" for size, count in buckets[:6])
    crops += f" and {len(buckets) - 6} other sizes" if len(buckets) > 6 else ""
    lines += [f"  {side}: {_range(images[side])}" for side in ("width", "height")]
    lines += [f"  smaller than the crop, so enlarged: {enlarged}", f"  crops: {crops}"]
    if captions["tokens"]:
        about = "about " if report["tokens_are_estimated"] else ""
        lines += [
            f"  captions: {captions['per_image']['mean']:g} an image; {captions['cut']} ({captions['cut_share']:.1%}) "
            f"are cut at {captions['max_length']} tokens",
            f"  tokens, with the system prompt: {about}{_range(captions['tokens'])}",
        ]
    such = f", such as samples {', '.join(map(str, copies['examples'][0]))}" if copies["examples"] else ""
    return [*lines, f"  duplicates: {copies['images']} files are copies of others{such}"]


def _range(values: dict[str, float]) -> str:
    return f"{values['min']:.0f} to {values['max']:.0f}, half below {values['median']:.0f}"


if __name__ == "__main__":
    main()
