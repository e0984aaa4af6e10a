"""Sweep: metrics against sampling settings, as a CSV with a row for each point, and a plot."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autoencoder.common.config import UserError
from svg_t2i.sampling.options import SamplingOptions, changed

SWEPT = ("guidance_scale", "num_inference_steps", "time_shift", "renorm_cfg", "cfg_trunc", "solver")
Value = float | int | str


@dataclass(frozen=True)
class Axis:
    """A field of `SamplingOptions` and the values it takes."""

    name: str
    values: tuple[Value, ...]


def parse_axis(text: str, sampling: SamplingOptions) -> Axis:
    """ "guidance_scale=1,2,4" → Axis, every value checked.

    Raises:
        UserError: another form, a setting that cannot be swept, a value it cannot take, or one given twice.
    """
    name, separator, listed = text.partition("=")
    if not separator or name not in SWEPT:
        raise UserError(f"--over {text!r}: expected NAME=VALUE,VALUE,… with NAME one of {', '.join(SWEPT)}")
    values = tuple(getattr(_with(sampling, name, value), name) for value in listed.split(","))
    if len(set(values)) < len(values):
        raise UserError(f"--over {text!r} names a value twice")
    return Axis(name, values)


def _with(sampling: SamplingOptions, name: str, text: str) -> SamplingOptions:
    """`sampling` with one field given as text."""
    try:
        value = text.strip() if name == "solver" or text.strip() == "dynamic" else float(text)
    except ValueError:
        raise UserError(f"--over {name}: {text!r} is not a number") from None
    return changed(sampling, {name: value})


def points(sampling: SamplingOptions, axes: Sequence[Axis]) -> list[tuple[dict[str, Value], SamplingOptions]]:
    """Every combination of the axes' values: (the values by name, the settings)."""
    combinations = itertools.product(*(axis.values for axis in axes))
    chosen = [dict(zip((axis.name for axis in axes), values)) for values in combinations]
    return [(values, replace(sampling, **values)) for values in chosen]


# --- table ------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of the CSV so far; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def find_row(rows: Iterable[dict[str, str]], values: Mapping[str, Value]) -> dict[str, str] | None:
    """The row of a point, if it is there."""
    wanted = {name: str(value) for name, value in values.items()}
    return next((row for row in rows if wanted.items() <= row.items()), None)


def write_rows(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Write the CSV atomically."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text.getvalue(), encoding="utf-8")
    os.replace(temporary, path)


# --- plot -------------------------------------------------------------------------------------------------------


def plot(rows: Sequence[Mapping[str, str]], axes: Sequence[Axis], path: Path) -> None:
    """A panel a metric: the first axis to the right, a line for every value of the second."""
    from matplotlib.figure import Figure  # half a second, and only plots need it

    names = {axis.name for axis in axes}
    metrics = list(dict.fromkeys(name for row in rows for name in row if name not in names))
    columns = min(3, len(metrics))
    height = -(-len(metrics) // columns)
    figure = Figure(figsize=(4 * columns, 3 * height), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).ravel()
    for panel, metric in zip(panels, metrics):
        for label, line in _lines(rows, axes, metric):
            panel.plot([x for x, _ in line], [y for _, y in line], marker="o", label=label)
        panel.set(xlabel=axes[0].name, title=metric)
        panel.grid(alpha=0.3)
        if len(axes) > 1:
            panel.legend(fontsize="small")
    for panel in panels[len(metrics) :]:
        panel.remove()
    figure.savefig(path, dpi=150)


def _lines(
    rows: Sequence[Mapping[str, str]], axes: Sequence[Axis], metric: str
) -> Iterable[tuple[str, list[tuple[Value, float]]]]:
    for second in axes[1].values if len(axes) > 1 else (None,):
        fixed = {} if second is None else {axes[1].name: second}
        found = [(x, find_row(rows, {axes[0].name: x} | fixed)) for x in axes[0].values]
        line = [(x, float(row[metric])) for x, row in found if row is not None and row.get(metric)]
        yield ", ".join(f"{name}={value}" for name, value in fixed.items()), line
