"""Checkpoints: saving, finding the newest whole one, resuming, exporting, and reading the published folders.

    results_dir/
      config.yaml                     the run's configuration
      tensorboard/                    scalars
      checkpoints/
        0001000/                      named after the step; appears by one rename, so it is whole or it is not there
          .metadata  __0_0.distcp …   shards (torch.distributed.checkpoint): model.*, ema.*, optimizer.*
          meta.json                   step, configuration, model arguments, fingerprints, size of every file
        .tmp-0002000/                 a save that was interrupted; removed at the next start

A DiT is read from four kinds of folder (`read_transformer`):
    a checkpoint as above; a results folder (its newest checkpoint); an export (config.json + model.safetensors);
    a published folder (model_args.pth, consolidated.00-of-01.pth, consolidated_ema.00-of-01.pth).
Tensors bear the published names in all of them. No file is trusted: nothing unpickles into an arbitrary object.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from autoencoder.config import UserError, build, to_dict
from autoencoder.weights import read_state_dict
from svg_t2i import published
from svg_t2i.model import DiTConfig, SVGDiT, load_published_state_dict

log = logging.getLogger(__name__)

FORMAT = 1
META = "meta.json"
EXPORT_CONFIG, EXPORT_WEIGHTS = "config.json", "model.safetensors"


# ---------------------------------------------------------------------------------------------- own checkpoints


def save_checkpoint(root: Path, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
    """Write `root/{step:07d}` from all ranks: into a temporary folder first, then one rename.

    Args:
        root: the run's `checkpoints` folder, on storage that all ranks share.
        state: nested mapping of tensors; replicated tensors are written once, sharded ones by their owners.
        meta: JSON-able facts; `step`, `format` and `files` are added.
    """
    final, temporary = root / f"{step:07d}", root / f".tmp-{step:07d}"
    if _is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _barrier()
    with _quiet():
        dcp.save(dict(state), checkpoint_id=temporary, no_dist=not dist.is_initialized())
    if _is_main():
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        _write_json(temporary / META, {"format": FORMAT, "step": step, **meta, "files": sizes})
        if final.exists():  # a broken one, or the run was wound back: moved away so that the rename stays atomic
            final.rename(root / f".tmp-replaced-{step:07d}")
        os.replace(temporary, final)
        clean(root)
    _barrier()
    return final


def load_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Fill the tensors of `state` in place from a checkpoint of any world size.

    Raises:
        UserError: names missing in the checkpoint, or other shapes.
    """
    with _readable(folder):
        dcp.load(dict(state), storage_reader=SafeReader(folder), no_dist=not dist.is_initialized())


class SafeReader(dcp.FileSystemReader):
    """Reads shards like its parent (tensors, weights-only), but their index without trusting it.

    torch's reader unpickles `.metadata` freely, and any entry that claims not to be a tensor. A checkpoint may
    come from a stranger: here the index may name the classes it is made of and nothing else, and tensors only.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        entries = metadata.state_dict_metadata.items()
        others = [name for name, entry in entries if not isinstance(entry, TensorStorageMetadata)]
        if others:
            raise pickle.UnpicklingError(f"refused: {others[0]!r} is no tensor")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    CLASSES = {
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refused: it names {module}.{name}, and unpickling that can run code")


def newest_checkpoint(root: Path) -> Path | None:
    """The folder with the highest step that is whole, or None; broken ones are passed over with a warning."""
    folders = [path for path in root.glob("*") if path.is_dir() and re.fullmatch(r"\d{7,}", path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name), reverse=True):
        try:
            _read_checkpoint_meta(folder)
        except UserError as error:
            log.warning("%s; trying an older checkpoint", error)
        else:
            return folder
    return None


def _read_checkpoint_meta(folder: Path) -> dict[str, Any]:
    """`meta.json` of a checkpoint, after checking that every file it lists is there in full."""
    try:
        meta = json.loads((folder / META).read_text())
        sizes: dict[str, int] = meta["files"]
        short = [name for name, size in sizes.items() if (folder / name).stat().st_size != size]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: not a whole checkpoint ({type(error).__name__}: {error})") from error
    if short:
        raise UserError(f"{folder}: not a whole checkpoint (cut short: {', '.join(short)})")
    if meta.get("format") != FORMAT:
        raise UserError(f"{folder / META}: format {meta.get('format')!r}, this version reads {FORMAT}; update svg_t2i")
    return meta


def clean(root: Path) -> None:
    """Remove what interrupted saves left behind."""
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


# --------------------------------------------------------------------------------------- reading a transformer


def find_checkpoint(folder: str | os.PathLike) -> Path:
    """The folder that holds the weights: `folder` itself, or the newest checkpoint of the run it is.

    Raises:
        UserError: nothing of the kind is there.
    """
    folder = Path(folder)
    if any((folder / name).is_file() for name in (META, EXPORT_CONFIG, published.ARGUMENTS)):
        return folder
    newest = newest_checkpoint(folder / "checkpoints")
    if newest is None:
        raise UserError(
            f"{folder}: no DiT here; expected {META} (a checkpoint), checkpoints/ (a run), {EXPORT_CONFIG} (an export) "
            f"or {published.ARGUMENTS} (a published folder)"
        )
    return newest


def read_meta(folder: str | os.PathLike) -> dict[str, Any]:
    """What is recorded beside the weights: `model_args`, `fingerprints`, `step`, `config`. Published folders: nothing.

    Raises:
        UserError: nothing there, incomplete, or of a newer format.
    """
    folder = find_checkpoint(folder)
    if (folder / META).is_file():
        return _read_checkpoint_meta(folder)
    return _read_export_meta(folder) if (folder / EXPORT_CONFIG).is_file() else {}


def check_fingerprints(folder: str | os.PathLike, autoencoder: Mapping[str, Any], text_encoder: str) -> None:
    """Make sure that weights meet the frozen networks they were trained with. Published folders record none.

    Args:
        autoencoder, text_encoder: the `fingerprint()` of what is loaded now.

    Raises:
        UserError: naming the recorded and the present fingerprint.
    """
    recorded = read_meta(folder).get("fingerprints", {})
    before = {f"autoencoder's {key}": value for key, value in recorded.get("autoencoder", {}).items()}
    now: dict[str, Any] = {f"autoencoder's {key}": value for key, value in autoencoder.items()}
    if "text_encoder" in recorded:
        before["text encoder"], now["text encoder"] = recorded["text_encoder"], text_encoder
    other = [f"{name} was {before[name]} and is {now.get(name)}" for name in before if before[name] != now.get(name)]
    if other:
        raise UserError(
            f"{folder} was trained with other frozen networks than those loaded now: {'; '.join(other)}; "
            "give the ones it was trained with, or start a new run from it with init_from"
        )


@dataclass(frozen=True)
class TransformerFile:
    """A DiT's weights under the published names, its sizes, and what was recorded with them (`read_meta`)."""

    config: DiTConfig
    state: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)


def load_transformer(folder: str | os.PathLike, ema: bool = True) -> SVGDiT:
    """A DiT in evaluation mode, fp32, on the CPU, with averaged (`ema`) or raw weights.

    Raises:
        UserError: as `read_transformer`; or keys or shapes that are not the model's.
    """
    source = read_transformer(folder, ema)
    with torch.device("meta"):  # every weight is loaded: drawing random ones first would take minutes at full size
        model = SVGDiT(source.config)
    model.to_empty(device="cpu")
    load_published_state_dict(model, source.state)
    return model.eval()


def read_transformer(folder: str | os.PathLike, ema: bool = True) -> TransformerFile:
    """Read a DiT from a checkpoint, a results folder, an export or a published folder.

    Raises:
        UserError: the folder is none of these, is incomplete, or holds a pickle with anything but plain data.
    """
    folder = find_checkpoint(folder)
    if (folder / META).is_file():
        return _read_own(folder, ema)
    if (folder / EXPORT_CONFIG).is_file():
        return _read_export(folder)
    return TransformerFile(*published.read_published(folder, ema))


def _read_own(folder: Path, ema: bool) -> TransformerFile:
    meta = _read_checkpoint_meta(folder)
    config = build(DiTConfig, meta["model_args"], source=str(folder / META))
    prefix = "ema." if ema else "model."
    with _readable(folder):
        reader = SafeReader(folder)
        stored = reader.read_metadata().state_dict_metadata
        state = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in stored.items()
            if key.startswith(prefix)
        }
        dcp.load(state, storage_reader=reader, no_dist=True)
    return TransformerFile(config, {key.removeprefix(prefix): value for key, value in state.items()}, meta)


def _read_export_meta(folder: Path) -> dict[str, Any]:
    path = folder / EXPORT_CONFIG
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); export the model again") from error
    if not isinstance(meta, dict) or "model_args" not in meta:
        raise UserError(f"{path}: not the config.json of an exported DiT (it names no model_args)")
    return meta


def _read_export(folder: Path) -> TransformerFile:
    meta = _read_export_meta(folder)
    config = build(DiTConfig, meta["model_args"], source=str(folder / EXPORT_CONFIG))
    return TransformerFile(config, read_state_dict(folder / EXPORT_WEIGHTS, "exported DiT"), meta)


def init_from(model: nn.Module, folder: str | os.PathLike) -> TransformerFile:
    """Start `model` from the raw weights in `folder`, leaving out by name whatever is missing or of another shape.

    Raises:
        UserError: as `read_transformer`, or if not one tensor fits.
    """
    source = read_transformer(folder, ema=False)
    own = model.state_dict()
    other = [key for key, value in source.state.items() if key in own and own[key].shape != value.shape]
    fitting = {key: value for key, value in source.state.items() if key in own and key not in other}
    if not fitting:
        raise UserError(f"{folder}: not one of its {len(source.state)} tensors fits this model; check model and sizes")
    model.load_state_dict(fitting, strict=False)
    skipped = {
        "of another shape": other,
        "unknown to this model": [key for key in source.state if key not in own and key != "norm_final.weight"],
        "left as initialised": [key for key in own if key not in fitting],
    }
    for reason, keys in skipped.items():
        if keys:
            log.warning("%s: %d tensors %s: %s", folder, len(keys), reason, ", ".join(keys))
    log.info("started from %s: %d of %d tensors", folder, len(fitting), len(own))
    return source


# ------------------------------------------------------------------------------------------------------ writing


def export(folder: str | os.PathLike, out: str | os.PathLike, ema: bool = True) -> Path:
    """Write `out/config.json` and `out/model.safetensors` from anything `read_transformer` reads.

    Raises:
        UserError: as `load_transformer`, or if `out` is not empty.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; nothing was overwritten. Choose another folder")
    fingerprints = read_meta(folder).get("fingerprints", {})
    return save_transformer(
        load_transformer(folder, ema),
        out,
        autoencoder_fingerprint=fingerprints.get("autoencoder"),
        text_fingerprint=fingerprints.get("text_encoder"),
    )


def save_transformer(
    model: SVGDiT,
    out: str | os.PathLike,
    *,
    autoencoder_fingerprint: Mapping[str, Any] | None = None,
    text_fingerprint: str | None = None,
) -> Path:
    """Write `config.json` and `model.safetensors`, with the fingerprints of what the model belongs to, if known."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    fingerprints = {"autoencoder": autoencoder_fingerprint, "text_encoder": text_fingerprint}
    known = {name: value for name, value in fingerprints.items() if value is not None}
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, out / EXPORT_WEIGHTS)
    _write_json(out / EXPORT_CONFIG, {"format": FORMAT, "model_args": to_dict(model.config), "fingerprints": known})
    return out


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """A checkpoint that does not hold what is asked for becomes a `UserError` with the first cause."""
    try:
        with _quiet():
            yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()), error)
        raise UserError(f"{folder}: cannot be loaded here: {_first_line(cause)}") from error
    except (pickle.UnpicklingError, AttributeError, EOFError, TypeError, ValueError) as error:
        raise UserError(f"{folder / '.metadata'}: cannot be loaded here: {_first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is no process group: one process is a normal way to train."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _first_line(error: object) -> str:
    text = str(error[0] if isinstance(error, tuple) else error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
