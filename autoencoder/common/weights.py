"""Tensors from files, weights-only and loaded strictly (every error names keys and remedy); files written whole.

And names for weights, so that what belongs together can be checked: `fingerprint`, and quicker `weights_digest`.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import logging
import math
import os
import pickle
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING  # by the names of Python 2, which protocol 2 writes
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from autoencoder.common.config import UserError

logger = logging.getLogger("autoencoder")
loads = logging.getLogger("autoencoder.loads")  # what every load did; commands print it (`commands.showing_loads`)
if loads.level == logging.NOTSET:
    loads.setLevel(logging.WARNING)  # elsewhere only what a load left out is worth a line

# Of Python, all that settings in a file of weights may be made of
DATA_MODULES = {"argparse", "collections", "datetime", "functools", "pathlib", "typing"}
EMA_KEY = "ema_state_dict"  # in Lightning checkpoints: averaged weights, by the names they have in `state_dict`


def read_file(path: str | Path, what: str, verify: bool = False) -> dict[str, Any]:
    """The dictionary in a `.safetensors` or torch file, on the CPU. Nothing but tensors and plain values is unpickled.

    `what` names the file's role in messages ("autoencoder checkpoint"). Settings that Lightning kept beside the weights
    may be objects of any class: these come back as `Inert` ones. With `verify`, a torch file is read once more before,
    to compare its content with the checksums in it. Raises UserError for a missing, broken or unsafe file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{what}: there is no file {path}; check the path (relative to {Path.cwd()}) or download it")
    if verify:
        _verify(path, what)
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickled(path, what)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{what} {path}: not a torch file, or it holds Python objects besides tensors, which are refused because "
            "unpickling them can run code; get it as .safetensors, or as a torch file that holds tensors only"
        ) from error
    except Exception as error:  # on broken files the readers raise whatever they stumble over, KeyError among it
        raise UserError(f"{what} {path} cannot be read ({error!r}); if it is cut off, copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} {path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _verify(path: Path, what: str) -> None:
    """UserError where a zip file, as torch writes them, does not agree with its checksums (CRC-32 of every entry)."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{what} {path} is damaged ({error}); copy it again, or use an older one") from error
    if damaged is not None:
        raise UserError(f"{what} {path} is damaged (in {damaged}); copy it again, or use an older one")


class Inert:
    """Placeholder for a pickled object whose class is not imported; the pickled content is discarded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _unpickled(path: Path, what: str) -> Any:
    """A torch file's content; pickle.UnpicklingError for anything that looks like an attack."""
    options = {"map_location": "cpu", "weights_only": True, "mmap": zipfile.is_zipfile(path)}
    try:
        return torch.load(path, **options)
    except pickle.UnpicklingError:
        names = sorted(get_unsafe_globals_in_checkpoint(path)) if options["mmap"] else []
        if not names or not all(map(_may_be_data, names)):
            raise
        with safe_globals([(Inert, name) for name in names]):
            content = torch.load(path, **options)
        logger.warning("%s %s: settings left out, which are objects of %s", what, path, ", ".join(names))
        return content


def _may_be_data(name: str) -> bool:
    """Whether a class named in a pickle may belong to settings. Of Python's own, only types of data; none of torch's,
    which allows those that tensors need."""
    module, _, short = name.rpartition(".")
    if module == "builtins":
        return isinstance(getattr(builtins, short, None), type)
    root = module.partition(".")[0]
    return root in DATA_MODULES or root not in {"torch", *sys.stdlib_module_names, *IMPORT_MAPPING}


def read_state_dict(path: str | Path, what: str, ema: bool = False, verify: bool = False) -> dict[str, Tensor]:
    """The tensors of a plain state dict, or of the entry `state_dict` (Lightning) or `model` (MAE), by name.

    ema: averaged weights in place of those that have an average; UserError if there are none. verify: see `read_file`.
    """
    content = read_file(path, what, verify)
    state = content.get("state_dict", content.get("model", content))
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        found = ", ".join(list(map(str, content))[:8]) or "nothing"
        raise UserError(f"{what} {path}: neither a state dict nor a Lightning checkpoint with one; it holds: {found}")
    if ema and EMA_KEY not in content:
        raise UserError(
            f"{what} {path} has no averaged weights, it was trained without training.ema_decay; leave out "
            "model.params.use_ema"
        )
    return {**state, **content[EMA_KEY]} if ema else dict(state)


def report_load(source: str, loaded: int, others: Mapping[str, Iterable[str]] | None = None, total: int = 0) -> None:
    """Say what a load did; the first process of several says it.

    loaded: how many tensors were taken over, of `total` that the model has, where that may be more. others: a reason →
    the names of the tensors that were not; part of them missing in the model is worth a warning.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    loads.info("%s: %d%s tensors loaded", source, loaded, f" of {total}" if total else "")
    for reason, names in (others or {}).items():
        if names := sorted(names):
            loads.log(logging.WARNING if total else logging.INFO, "%s: %d %s: %s", source, len(names), reason,
                      folded(names))  # fmt: skip


def folded(names: Sequence[str], most: int = 30) -> str:
    """Names in one line; where there are more than `most`, those that begin alike as one: "loss.* (120)"."""
    if len(names) <= most:
        return ", ".join(names)
    heads: dict[str, list[str]] = defaultdict(list)
    for name in names:
        heads[name.partition(".")[0]].append(name)
    return ", ".join(f"{head}.* ({len(own)})" if len(own) > 1 else own[0] for head, own in heads.items())


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], source: str, remedy: str, left_out: Iterable[str] = ()
) -> None:
    """Load `state` into `module`; UserError naming every kind of disagreement, and the module untouched, if any.

    A module on the meta device gets these tensors, in its precision, and no copies: a part of a file stays there.

    left_out: what the file has besides, for the report.
    """
    expected = module.state_dict()
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the model wants {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": shapes,
    }
    if any(problems.values()):
        first = {kind: ", ".join(names[:4]) + ", …" * (len(names) > 4) for kind, names in problems.items()}
        found = "; ".join(f"{len(names)} {kind}: {first[kind]}" for kind, names in problems.items() if names)
        raise UserError(f"{source} does not fit the model: {found}. {remedy}")
    empty = any(tensor.is_meta for tensor in expected.values())
    if empty:
        state = {name: value.to(expected[name].dtype).contiguous() for name, value in state.items()}
    module.load_state_dict(dict(state), strict=True, assign=empty)
    report_load(source, len(state), {"not used": left_out})


def fingerprint(identity: Any, state: Mapping[str, Tensor]) -> str:
    """16 hex digits that name weights and the architecture (`identity`, put into JSON); the same in fp32 and bf16."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().data)
    return digest.hexdigest()[:16]


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """16 hex digits over names, shapes and a sample of the values of all weights; the same in fp32 and bf16."""
    weights = dict(sorted(weights.items()))
    digest = hashlib.sha256(str([(name, tuple(weight.shape)) for name, weight in weights.items()]).encode())
    samples = []
    for weight in weights.values():  # a quantised one is whole for a moment; the others are never copied
        plain = weight.dequantize() if is_quantized(weight) else weight
        samples.append(plain.detach().flatten()[:: math.ceil(plain.numel() / 64)].bfloat16().clone())
    digest.update(torch.cat(samples).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is one of torchao's 8-bit tensors. (Every tensor of torch has a `dequantize`, which copies.)"""
    return type(weight).__module__.startswith("torchao.")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends well: readers never see a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes files that only their owner can read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def share_weights(folder: Path, like: Path) -> None:
    """Let the weights below a folder be read by whom `like`, a file there, is: safetensors allows their owner alone."""
    wanted = like.stat()
    for path in folder.rglob("*.safetensors"):
        if path.stat().st_uid == wanted.st_uid:
            path.chmod(wanted.st_mode)


def write_json(content: Any, path: Path) -> None:
    """Write JSON by one rename: readers see the old file or the new one, never half of one."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Float32Buffers(nn.Module):
    """A module whose own buffers follow it to another device but not to another precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            moved = self._buffers[name]
            if moved.dtype != before.dtype:
                self._buffers[name] = before.to(moved.device)
        return self
