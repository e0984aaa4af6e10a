"""Low-rank adapters (LoRA, arXiv:2106.09685) of the transformer from files, several at once, each with its weight.

The files are those that diffusers and peft write: `pipeline.save_lora_weights`, or one safetensors file of that kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoencoder.common.config import UserError, first_line
from autoencoder.common.hub import nearest
from svg_t2i.checkpoints.adapters import FILE
from svg_t2i.sampling.networks import active_adapters


def parse_adapter(text: str) -> tuple[Path, float]:
    """ "PATH" or "PATH:WEIGHT" → path of the file and weight. UserError for what is not there, or no finite weight."""
    path, weight = text, "1"
    if not Path(text).exists() and ":" in text:
        path, _, weight = text.rpartition(":")
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"lora = {text!r}: {weight!r} is no weight; give PATH or PATH:WEIGHT, such as style:0.8")
    return _file(Path(path).expanduser()), number


def _file(path: Path) -> Path:
    """The safetensors file that is meant: itself, or in a folder the one of diffusers' name, or the only one."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"lora = {str(path)!r}: only safetensors are read; other files can run code")
        return path
    if not path.is_dir():
        raise UserError(f"lora = {str(path)!r}: no such file or folder{nearest(path)}")
    if (path / FILE).is_file():
        return path / FILE
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(f"lora = {str(path)!r}: {len(found)} safetensors files in this folder; name one")
    return found[0]


def load_adapters(pipeline: Any, adapters: Sequence[tuple[Path, float]]) -> None:
    """Put adapters on the pipeline's transformer, and activate them with their weights.

    Raises:
        UserError: a file that is no adapter, or one of another model.
    """
    names = []
    for path, _ in adapters:
        name = f"{path.parent.name}_{path.stem}_{len(names)}".replace(".", "_")
        try:
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        except (ValueError, KeyError, RuntimeError, OSError, ImportError, TypeError) as error:
            raise UserError(f"lora = {str(path)!r} is no adapter of this model: {first_line(error)}") from error
        if name not in active_adapters(pipeline.transformer):
            raise UserError(
                f"lora = {str(path)!r} is no adapter of this model: none of its layers is in the transformer"
            )
        names.append(name)
    if names:
        pipeline.set_adapters(names, [weight for _, weight in adapters])
