"""A DiT on disk: reading it from every kind of folder (`KINDS`), starting a model from it, exporting it.

Tensors have the published names in all of them. A results folder stands for its newest checkpoint. The checkpoint of an
adapter stands for the model it was trained on with the adapter added.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from autoencoder.common.config import UserError, build, locate, to_dict
from autoencoder.common.weights import read_state_dict, report_load, share_weights, weights_digest, write_json
from svg_t2i.checkpoints import published
from svg_t2i.checkpoints.adapters import FILE as ADAPTER_FILE
from svg_t2i.checkpoints.adapters import LoraSettings, merge_adapter
from svg_t2i.checkpoints.card import CARD, model_card
from svg_t2i.checkpoints.index import SafeReader
from svg_t2i.checkpoints.run import (
    META,
    newest_checkpoint,
    read_checkpoint_meta,
    readable,
    stored_tensors,
)
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.model import UNUSED_KEY, SVGDiT, load_published_state_dict, without_aux_head

BASE = "base"  # in the meta.json of an adapter: folder and digest of the model it was trained on
EXPORT_CONFIG = "config.json"
# The files of a diffusers model: one, or several with an index. Exports of before have one of another name.
EXPORT_WEIGHTS, OLD_EXPORT_WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
EXPORT_INDEX = f"{EXPORT_WEIGHTS}.index.json"
MAX_SHARD_SIZE = "10GB"  # diffusers' own


@dataclass(frozen=True)
class TransformerFile:
    """A DiT's weights under the published names, its sizes, and what was recorded with them (`read_meta`)."""

    config: DiTConfig
    state: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)


def _read_checkpoint(folder: Path, ema: bool | float) -> TransformerFile:
    meta = read_checkpoint_meta(folder)
    config = build(DiTConfig, meta["model_args"], source=str(folder / META))
    prefix = _part(meta, ema, folder) + "."
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored_tensors(folder).items()
        if key.startswith(prefix)
    }
    with readable(folder):
        dcp.load(state, storage_reader=SafeReader(folder), no_dist=True)
    state = {key.removeprefix(prefix): value for key, value in state.items()}
    return TransformerFile(config, _adapted(state, meta, folder) if BASE in meta else state, meta)


def _adapted(adapter: Mapping[str, Tensor], meta: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """The weights of the model that was adapted (averaged ones, where it has such), with the adapter added to them."""
    settings = build(LoraSettings, meta["config"].get("lora"), source=str(folder / META))
    _check_bases(folder)
    try:
        base, _ = load_base(meta[BASE]["folder"], meta[BASE]["digest"])
    except UserError as error:
        raise UserError(
            f"{folder} is an adapter without the model it was trained on: {error}. Bring that back, or give another of "
            f"its kind and the adapter's file: --checkpoint MODEL --lora RUN/{ADAPTER_FILE}"
        ) from error
    return merge_adapter(base, settings, adapter).state_dict()


def _check_bases(folder: Path) -> None:
    """UserError where adapters of adapters lead nowhere: a checkpoint may come from a stranger."""
    seen: list[Path] = []
    while (meta := read_meta(folder)).get(BASE) is not None:
        seen.append(Path(folder).resolve())
        base = meta[BASE]
        named = isinstance(base, dict) and all(isinstance(base.get(name), str) for name in ("folder", "digest"))
        if not named or locate(base["folder"]).resolve() in seen:
            raise UserError(f"{Path(folder) / META}: base = {base!r} names no model that an adapter could be of")
        folder = locate(base["folder"])
        if not folder.is_dir():
            return  # `load_base` says so


def load_base(folder: str | os.PathLike, digest: str | None = None) -> tuple[SVGDiT, str]:
    """The model that an adapter or a student is trained on, and its digest: averaged weights, fp32, on the CPU.

    An auxiliary head counts for the digest, and is then left out.

    digest: `weights_digest` of its weights, where they have to be certain ones.

    Raises:
        UserError: as `load_transformer`, or other weights.
    """
    base = load_transformer(locate(folder))
    found = weights_digest(dict(base.named_parameters()))
    if digest is not None and found != digest:
        raise UserError(f"{folder} holds other weights than then ({found}, were {digest})")
    return without_aux_head(base), found


def _part(meta: Mapping[str, Any], ema: bool | float, folder: Path) -> str:
    """Which part of a checkpoint holds the weights asked for."""
    if isinstance(ema, bool):
        return "ema" if ema else "model"
    kept = meta["config"].get("train", {}).get("ema_decay", ())
    kept = kept if isinstance(kept, list) else [kept]
    if ema not in kept:
        raise UserError(f"{folder} has no average with decay {ema}, only {', '.join(map(str, kept))}")
    return "ema" if ema == kept[0] else f"ema_{ema:g}"


def _read_export_meta(folder: Path) -> dict[str, Any]:
    """`model_args` and `fingerprints` of config.json, which holds the sizes themselves as diffusers wants them."""
    path = folder / EXPORT_CONFIG
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); export the model again") from error
    if isinstance(meta, dict) and meta.get("_class_name") == SVGDiT.__name__:
        sizes = {key: value for key, value in meta.items() if not key.startswith("_") and key != "fingerprints"}
        return {"model_args": sizes, "fingerprints": meta.get("fingerprints") or {}}
    if not isinstance(meta, dict) or "model_args" not in meta:
        raise UserError(f"{path}: not the config.json of an exported DiT (it names no model_args)")
    return meta


def _read_export(folder: Path, ema: bool | float) -> TransformerFile:
    meta = _read_export_meta(folder)
    config = build(DiTConfig, meta["model_args"], source=str(folder / EXPORT_CONFIG))
    state: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        state |= read_state_dict(path, "exported DiT")
    return TransformerFile(config, state, meta)


def _weight_files(folder: Path) -> list[Path]:
    """The files of an export's weights. UserError for an index that names anything but files beside it."""
    index = folder / EXPORT_INDEX
    if not index.is_file():
        old = folder / OLD_EXPORT_WEIGHTS
        return [old if old.is_file() else folder / EXPORT_WEIGHTS]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is broken ({error!r}); export the model again") from error
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index} is refused: its weights are not files beside it ({', '.join(map(str, names))[:200]})")
    return [folder / name for name in names]


def _read_published(folder: Path, ema: bool | float) -> TransformerFile:
    return TransformerFile(*published.read_published(folder, bool(ema)))


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that holds a DiT.

    marker: the file that tells it from the others.
    read_meta, read: what is recorded beside the weights; the weights, averaged or raw.
    """

    name: str
    marker: str
    read_meta: Callable[[Path], dict[str, Any]]
    read: Callable[[Path, bool | float], TransformerFile]


KINDS = (
    FolderKind("a checkpoint", META, read_checkpoint_meta, _read_checkpoint),
    FolderKind("an export", EXPORT_CONFIG, _read_export_meta, _read_export),
    FolderKind("a published folder", published.ARGUMENTS, lambda folder: {}, _read_published),
)


def find_checkpoint(folder: str | os.PathLike) -> Path:
    """The folder that holds the weights: `folder` itself, or the newest checkpoint of the run it is.

    Raises:
        UserError: nothing of the kind is there.
    """
    return _find(folder)[1]


def _find(folder: str | os.PathLike) -> tuple[FolderKind, Path]:
    folder = Path(folder)
    for kind in KINDS:
        if (folder / kind.marker).is_file():
            return kind, folder
    newest = newest_checkpoint(folder / "checkpoints")
    if newest is None:
        known = ", ".join(f"{kind.marker} ({kind.name})" for kind in KINDS)
        raise UserError(f"{folder}: no DiT here; expected checkpoints/ (a run), {known}")
    return KINDS[0], newest


def read_meta(folder: str | os.PathLike) -> dict[str, Any]:
    """What is recorded beside the weights: `model_args`, `fingerprints`, `step`, `config`. Published folders: nothing.

    Raises:
        UserError: nothing there, incomplete, or of a newer format.
    """
    kind, folder = _find(folder)
    return kind.read_meta(folder)


def read_transformer(folder: str | os.PathLike, ema: bool | float = True) -> TransformerFile:
    """Read a DiT from any kind of folder.

    ema: averaged weights or raw ones; a number asks for the average with that decay, where a run keeps several.

    Raises:
        UserError: the folder is of no kind, is incomplete, or holds a pickle with anything but plain data.
    """
    kind, folder = _find(folder)
    return kind.read(folder, ema)


def load_transformer(folder: str | os.PathLike, ema: bool | float = True) -> SVGDiT:
    """A DiT in evaluation mode, fp32, on the CPU.

    Args:
        ema: averaged weights or raw ones; a number asks for the average with that decay, where a run keeps several.

    Raises:
        UserError: as `read_transformer`; or keys or shapes that are not the model's.
    """
    source = read_transformer(folder, ema)
    with torch.device("meta"):  # every weight is loaded: drawing random ones first would take minutes at full size
        model = SVGDiT(source.config)
    load_published_state_dict(model, source.state, f"DiT {folder}{_which(source, ema)}")
    return model.eval()


def _which(source: TransformerFile, ema: bool | float) -> str:
    """The step, where it is recorded, and whether these are averages."""
    step = f"step {source.meta['step']}, " if "step" in source.meta else ""
    average = f" with decay {ema}" if not isinstance(ema, bool) else ""
    return f" ({step}{'averaged' if ema else 'raw'} weights{average})"


def check_fingerprints(folder: str | os.PathLike, autoencoder: Mapping[str, Any], text_encoder: str) -> None:
    """Make sure that weights meet the frozen networks they were trained with. Published folders record none.

    Args:
        autoencoder, text_encoder: the `fingerprint()` of what is loaded now.

    Raises:
        UserError: naming the recorded and the present fingerprint.
    """
    compare_fingerprints(read_meta(folder).get("fingerprints", {}), autoencoder, text_encoder, str(folder))


def compare_fingerprints(
    recorded: Mapping[str, Any], autoencoder: Mapping[str, Any], text_encoder: str | None, source: str
) -> None:
    """`check_fingerprints` of what `source` recorded; a text encoder of None is not compared."""
    before = {f"autoencoder's {key}": value for key, value in (recorded.get("autoencoder") or {}).items()}
    now: dict[str, Any] = {f"autoencoder's {key}": value for key, value in autoencoder.items()}
    if recorded.get("text_encoder") and text_encoder is not None:
        before["text encoder"], now["text encoder"] = recorded["text_encoder"], text_encoder
    other = [f"{name} was {before[name]} and is {now.get(name)}" for name in before if before[name] != now.get(name)]
    if other:
        raise UserError(
            f"{source} was trained with other frozen networks than those loaded now: {'; '.join(other)}; "
            "give the ones it was trained with, or start a new run from it with init_from"
        )


def init_from(model: SVGDiT, folder: str | os.PathLike, ema: bool = False) -> TransformerFile:
    """Start `model` from the raw or averaged weights in `folder`; what is missing or of another shape is left out.

    Raises:
        UserError: as `read_transformer`, if not one tensor fits, or if that model predicts something else.
    """
    source = read_transformer(folder, ema)
    if source.config.prediction != model.config.prediction:
        raise UserError(
            f"{folder}: that model predicts {source.config.prediction}, this one {model.config.prediction}; set "
            f"model_overrides.prediction={source.config.prediction}, or start without init_from"
        )
    own = model.state_dict()
    other = [key for key, value in source.state.items() if key in own and own[key].shape != value.shape]
    fitting = {key: value for key, value in source.state.items() if key in own and key not in other}
    if not fitting:
        raise UserError(f"{folder}: not one of its {len(source.state)} tensors fits this model; check model and sizes")
    model.load_state_dict(fitting, strict=False)
    others = {
        "of another shape": other,
        "unknown to this model": [key for key in source.state if key not in own and key != UNUSED_KEY],
        "left as initialised": own.keys() - fitting.keys(),
    }
    report_load(f"init_from {folder}", len(fitting), others, total=len(own))
    return source


# ------------------------------------------------------------------------------------------------------ writing


def export(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    ema: bool | float = True,
    aux_head: bool = True,
    licence: str | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder that diffusers' models have (`save_transformer`) from anything `read_transformer` reads.

    Args:
        aux_head: with the auxiliary head, where there is one.
        licence, metrics: for its model card (`card.model_card`).

    Raises:
        UserError: as `load_transformer`, or if `out` is not empty.
    """
    out = _empty(out)
    meta = read_meta(folder)
    fingerprints = meta.get("fingerprints", {})
    model = load_transformer(folder, ema)
    model = model if aux_head else without_aux_head(model)
    save_transformer(
        model,
        out,
        autoencoder_fingerprint=fingerprints.get("autoencoder"),
        text_fingerprint=fingerprints.get("text_encoder"),
    )
    text = model_card(
        meta,
        model.config,
        sum(weight.numel() for weight in model.parameters()),
        name=out.resolve().name,
        weights="raw" if not ema else "averaged" if ema is True else f"averaged, decay {ema}",
        licence=licence,
        metrics=metrics,
    )
    (out / CARD).write_text(text, encoding="utf-8")
    return out


def export_as_published(folder: str | os.PathLike, out: str | os.PathLike, ema: bool | float = True) -> Path:
    """Write the release's files: raw weights, averaged weights, and the model's name (see `published`).

    They have no place for an auxiliary head, which is left out.

    Raises:
        UserError: as `load_transformer`; or `out` is not empty, or the model has no published name.
    """
    raw, average = (without_aux_head(load_transformer(folder, which)) for which in (False, ema))
    return published.export_published(raw, average, _empty(out))


def _empty(out: str | os.PathLike) -> Path:
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; nothing was overwritten. Choose another folder")
    return out


def save_transformer(
    model: SVGDiT,
    out: str | os.PathLike,
    *,
    autoencoder_fingerprint: Mapping[str, Any] | None = None,
    text_fingerprint: str | None = None,
) -> Path:
    """Write config.json and weights as diffusers does, with the fingerprints of what the model belongs to, if known."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    fingerprints = {"autoencoder": autoencoder_fingerprint, "text_encoder": text_fingerprint}
    known = {name: value for name, value in fingerprints.items() if value is not None}
    pattern = EXPORT_WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    save_torch_state_dict(model.state_dict(), out, filename_pattern=pattern, max_shard_size=MAX_SHARD_SIZE)
    config = {"_class_name": SVGDiT.__name__, **to_dict(model.config), "fingerprints": known}
    write_json(config, out / EXPORT_CONFIG)
    share_weights(out, out / EXPORT_CONFIG)
    return out
