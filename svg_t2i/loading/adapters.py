"""Low-rank adapters (LoRA, arXiv:2106.09685) of the transformer from files, several at once, each with its weight.

The files are those that diffusers and peft write: `pipeline.save_lora_weights`, or one safetensors file of that kind.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoencoder.common.config import UserError, first_line
from autoencoder.common.hub import nearest
from autoencoder.common.weights import report_load
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
    names = [_load(pipeline, path, number) for number, (path, _) in enumerate(adapters)]
    if names:
        pipeline.set_adapters(names, [weight for _, weight in adapters])


def _load(pipeline: Any, path: Path, number: int) -> str:
    """Put an adapter on; -> its name there. UserError as `load_adapters`."""
    name = f"{path.parent.name}_{path.stem}_{number}".replace(".", "_")
    try:
        with warnings.catch_warnings():  # an auxiliary head, which no adapter has weights for, is no matter
            warnings.filterwarnings("ignore", message="(?s).*an inconsistency was discovered.*aux_head")
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    except (ValueError, KeyError, RuntimeError, OSError, ImportError, TypeError) as error:
        raise UserError(f"lora = {str(path)!r} is no adapter of this model: {first_line(error)}") from error
    if name not in active_adapters(pipeline.transformer):
        raise UserError(f"lora = {str(path)!r} is no adapter of this model: none of its layers is in the transformer")
    own = [weight for weight in pipeline.transformer.state_dict() if f".{name}." in weight]
    report_load(f"adapter {path}", len(own))
    return name


class AdapterShelf:
    """The adapters of a folder and its subfolders, of which one at a time is put on; each is loaded when first wanted.

    Attributes:
        files: name → file. A file of diffusers' name is called after its folder, where it is alone; others after
            themselves.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        """UserError where there is no such folder, or no adapter in it."""
        self.files: dict[str, Path] = {}
        self._loaded: dict[str, str] = {}
        if folder is None:
            return
        root = Path(folder).expanduser()
        for path in sorted(root.rglob("*.safetensors")):
            if path.name != FILE and (path.parent / FILE).is_file():
                continue  # such as the statistics in the folder of a run
            own = path.relative_to(root)
            short = own.parent if path.name == FILE and own.parent.name else own.with_suffix("")
            self.files[str(own) if str(short) in self.files else str(short)] = path
        if not self.files:
            raise UserError(f"{str(folder)!r}: no adapters (*.safetensors) in this folder")

    def check(self, name: Any) -> None:
        """UserError for a name that is not here."""
        if name not in self.files:
            raise UserError(f"there is no adapter {name!r}; choose one of {', '.join(self.files) or '[none]'}")

    def put_on(self, pipeline: Any, name: str | None, weight: float = 1.0) -> None:
        """Let this adapter act, and no other; None: the model alone. UserError for a file that is no adapter of it."""
        if name is None:
            if self._loaded:
                pipeline.disable_lora()
            return
        self.check(name)
        if name not in self._loaded:
            self._loaded[name] = _load(pipeline, self.files[name], len(self._loaded))
        pipeline.enable_lora()
        pipeline.set_adapters([self._loaded[name]], [weight])
