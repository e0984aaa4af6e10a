"""The folder of a saved pipeline: what diffusers writes and reads, and what is checked beside.

    model_index.json     classes of the components, sampling settings; written last
    pipeline.py          one line, by which `DiffusionPipeline.from_pretrained(…, trust_remote_code=True)` finds us
    autoencoder/ transformer/ text_encoder/ tokenizer/, and guide/ and scheduler/ where there are any

`SVGT2IPipeline.from_pretrained` runs no code of the folder, and its index may name the classes of such a pipeline only.
Folders of before this layout have the tokenizer in text_encoder/ and only settings in their index; `loading` reads
them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from autoencoder.common.config import UserError, build
from autoencoder.model import SVGAutoencoder
from svg_t2i.checkpoints.weights import compare_fingerprints
from svg_t2i.features.settings import TextSource
from svg_t2i.sampling.memory import memory_stage
from svg_t2i.sampling.networks import Networks
from svg_t2i.sampling.options import SamplingOptions
from svg_t2i.text.encoder import TextEncoder
from svg_t2i.text.loading import reason_of

INDEX, CODE = "model_index.json", "pipeline.py"
COMPONENTS = "svg_t2i.loading.components"
CLASSES = {
    "autoencoder": (COMPONENTS, "SVGAutoencoder"),
    "transformer": (COMPONENTS, "SVGDiT"),
    "guide": (COMPONENTS, "SVGDiT"),
    "text_encoder": ("transformers", None),
    "tokenizer": ("transformers", None),
    "scheduler": ("diffusers", None),
}
DTYPES = {
    "fp32": torch.float32, "float32": torch.float32, "float": torch.float32,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16, "half": torch.float16,
}  # fmt: skip


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A dtype from itself or its name; fp32 from None. UserError for what is neither."""
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype.removeprefix("torch."), dtype)
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in DTYPES.values():
        raise UserError(f"dtype = {dtype!r}: give torch.float32, torch.bfloat16 or torch.float16, or fp32, bf16, fp16")
    return dtype


# ------------------------------------------------------------------------------------------------------------ reading


def _read(folder: Path) -> Mapping[str, Any] | None:
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is broken ({error}); save the pipeline again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is broken (no mapping); save the pipeline again")
    return content


def is_saved_pipeline(folder: Path) -> bool:
    """Whether `folder` holds a pipeline that diffusers reads; UserError for a broken index."""
    content = _read(folder)
    return content is not None and "transformer" in content


def read_index(folder: Path) -> tuple[SamplingOptions, int] | None:
    """Sampling defaults and caption limit of a saved pipeline of any layout; None if `folder` is none."""
    content = _read(folder)
    if content is None:
        return None
    try:
        max_length = int(content.get("max_length", TextSource().max_length))
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / INDEX} is broken ({error}); save the pipeline again") from error
    return build(SamplingOptions, content.get("sampling", {}), source=str(folder / INDEX)), max_length


def checked_index(content: Any, class_name: str) -> Any:
    """The content of an index, with the name of the class alone instead of where its code is.

    Raises:
        UserError: it names a component or a class that such a pipeline has not; loading would import it.
    """
    index = dict(content)
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, (list, tuple)) or list(value) == [None, None]:
            continue
        library, kind = CLASSES.get(name, (None, None))
        if len(value) != 2 or value[0] != library or kind not in (None, value[1]):
            raise UserError(f"{INDEX}: {name} = {list(value)} is no component of {class_name}; it is not loaded")
    index["_class_name"] = class_name
    return index


@contextmanager
def loading_errors(folder: Path) -> Iterator[None]:
    """Say of what diffusers and transformers raise on loading which folder it is about, in one line."""
    try:
        with memory_stage("loading the weights"):
            yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, NotImplementedError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded as a pipeline: {reason_of(error)}") from error


def device_alone(arguments: dict[str, Any], folder: Path) -> torch.device:
    """The device of `device_map`, taken out of the arguments, which then hold components only.

    Raises:
        UserError: an argument that only a saved pipeline takes.
    """
    device = arguments.pop("device_map", None) or "cpu"
    other = sorted(set(arguments) - {"scheduler"})
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError):
        other.append(f"device_map={device!r}")
    if other:
        raise UserError(
            f"{folder} is no saved pipeline, and only one takes {', '.join(other)}; load it without, and write one "
            "with save_pretrained"
        )
    return where


# ------------------------------------------------------------------------------------------- what belongs together


def fingerprints(networks: Networks) -> dict[str, Any]:
    """What is recorded with a transformer about the networks it belongs to; of a rounded text encoder nothing."""
    text = networks.text_encoder
    own = {"text_encoder": text.fingerprint()} if text.is_exact else {}
    return {"autoencoder": networks.autoencoder.fingerprint(), **own}


def check_fingerprints(transformers: Mapping[str, Any], autoencoder: SVGAutoencoder, text: TextEncoder) -> None:
    """UserError unless the transformers, by name, were trained with the networks loaded now, where they recorded them.

    The text encoder is not compared where its weights are rounded: in fp16, or quantised.
    """
    for name, transformer in transformers.items():
        recorded = {} if transformer is None else transformer.config.get("fingerprints")
        if recorded:
            now = text.fingerprint() if text.is_exact else None
            compare_fingerprints(recorded, autoencoder.fingerprint(), now, f"the {name}")


# ------------------------------------------------------------------------------------------------------------ writing


def begin(folder: str | os.PathLike) -> None:
    """Prepare a folder: until the index is there again it is no complete pipeline."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    (folder / CODE).write_text("from svg_t2i.pipeline import SVGT2IPipeline as SVGT2IPipeline\n")


def with_class(content: str, class_name: str) -> str:
    """The text of an index whose class is the one that pipeline.py names."""
    return json.dumps({**json.loads(content), "_class_name": [CODE.removesuffix(".py"), class_name]}, indent=2) + "\n"
