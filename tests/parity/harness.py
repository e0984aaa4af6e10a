"""Reads the numeric vectors of the published release and keeps the score of a comparison.

A component is a pair `<name>.json` + `<name>.safetensors`; a full-size key list is `shapes_<name>.json` alone. The
JSON's `component` field names the check, a module `check_<component>.py` beside this file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

BF16_LIMIT = 0.05  # of the largest published value; the measured ones are up to 0.035


@dataclass
class Row:
    """One compared tensor."""

    key: str
    max_abs: float
    relative: float  # max abs difference ÷ max abs of the published tensor
    limit: float
    problem: str = ""


@dataclass
class Vectors:
    """One vector file: its description, its tensors, and the comparisons made so far.

    precision: "fp32" for the limits of the file; "bf16" for `BF16_LIMIT`, where networks ran under autocast.
    """

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    precision: str = "fp32"
    rows: list[Row] = field(default_factory=list)
    exempted: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, json_path: Path, device: str = "cpu", precision: str = "fp32") -> Vectors:
        meta = json.loads(json_path.read_text())
        tensor_file = json_path.with_suffix(".safetensors")
        return cls(json_path, meta, load_file(tensor_file, device) if tensor_file.exists() else {}, precision)

    @property
    def directory(self) -> Path:
        return self.path.parent

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["config"]

    def state_dict(self, prefix: str = "state_dict.") -> dict[str, torch.Tensor]:
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    def compare(self, key: str, actual: torch.Tensor | float | int, atol: float | None = None) -> None:
        """Record |actual − published| for one tensor; excess is reported at the end, with all others."""
        expected = self.tensors[key].cpu()
        actual = torch.as_tensor(actual).detach().cpu()
        if tuple(actual.shape) != tuple(expected.shape):
            self.rows.append(Row(key, 0, 0, 0, f"shape {tuple(actual.shape)}, published {tuple(expected.shape)}"))
            return
        tolerance = self.meta["tolerance"]["per_tensor"].get(key, {})
        exact = not expected.is_floating_point() or tolerance.get("exact", False)
        finite = torch.isfinite(expected.double())
        same_gaps = torch.equal(finite, torch.isfinite(actual.double()))
        difference = (actual.double() - expected.double())[finite].abs()
        max_abs = difference.max().item() if difference.numel() else 0.0
        scale = expected.double()[finite].abs().max().item() if finite.any() else 0.0
        limit = 0.0 if exact else (atol if atol is not None else tolerance["recommended_atol"])
        if self.precision == "bf16" and not exact:
            limit = max(limit, BF16_LIMIT * scale)
        problem = "" if max_abs <= limit else f"{max_abs:.3e} exceeds {limit:.1e}"
        if not same_gaps:
            problem = "non-finite values differ"
        self.rows.append(Row(key, max_abs, max_abs / scale if scale else 0.0, limit, problem))

    def exempt(self, key: str, reason: str) -> None:
        """Say why a published tensor is deliberately not compared."""
        self.exempted[key] = reason

    def finish(self) -> None:
        """Print the table and fail on any excess and on any output that was neither compared nor exempted."""
        compared = {row.key for row in self.rows}
        forgotten = [k for k in self.tensors if k.startswith("out.") and k not in compared and k not in self.exempted]
        print(f"\n{self.path.name}: {len(self.rows)} tensors compared, {len(self.exempted)} exempted")
        for row in self.rows:
            print(f"  {row.key:<58} max abs {row.max_abs:.2e}  relative {row.relative:.2e}  limit {row.limit:.1e}")
        for key, reason in self.exempted.items():
            print(f"  {key:<58} not compared: {reason}")
        problems = [f"{row.key}: {row.problem}" for row in self.rows if row.problem]
        problems += [f"{key}: no comparison" for key in forgotten]
        if problems:
            raise AssertionError(f"{self.path.name}: {len(problems)} problems\n  " + "\n  ".join(problems))


def check_keys(actual: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Fail unless two {key: shape} mappings are equal; name missing, unexpected and wrong-shaped keys."""
    problems = [f"missing {k}" for k in expected if k not in actual]
    problems += [f"unexpected {k}" for k in actual if k not in expected]
    problems += [
        f"{k}: shape {list(actual[k])}, published {list(expected[k])}"
        for k in expected
        if k in actual and list(actual[k]) != list(expected[k])
    ]
    if problems:
        raise AssertionError(f"{where}: {len(problems)} key problems\n  " + "\n  ".join(problems[:40]))
