"""Loading a pipeline: folders and Hub names → transformer, autoencoder, text encoder.

`find_sources` knows four layouts:

    a saved pipeline      model_index.json, transformer/, autoencoder/, text_encoder/, tokenizer/ (`saved`)
    a training run        checkpoints/…, or one checkpoint; it recorded its autoencoder and text encoder
    an exported DiT       config.json, diffusion_pytorch_model.safetensors; name the other parts
    the published one     pre-trained/autoencoder/*.yaml, *.ckpt; DiT folders with model_args.pth anywhere below;
                          dinov3_s16p_layer_patchtoken_stats_dist.pt; optionally a gemma-2-2b folder
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar

import torch

from autoencoder.common.config import UserError, build, find_config, first_line, locate
from autoencoder.common.hub import announce, folder_or_hub_name, nearest
from svg_t2i.checkpoints import published
from svg_t2i.checkpoints import weights as checkpoints
from svg_t2i.features.settings import AutoencoderSource, TextSource
from svg_t2i.loading.saved import read_index
from svg_t2i.sampling.memory import memory_stage
from svg_t2i.sampling.options import PRESETS, SamplingOptions, trained_options
from svg_t2i.text.encoder import TextEncoder
from svg_t2i.text.loading import checked_source, load_model, load_tokenizer

P = TypeVar("P", bound=PurePath)

DEFAULT_AUTOENCODER = "P_stage3_1024"
AUTOENCODER_OF_STAGE = {"stage1": "P_stage1_256", "stage2": "P_stage2_512"}
PUBLISHED_STATS = "dinov3_s16p_layer_patchtoken_stats_dist.pt"
GEMMA = "google/gemma-2-2b"
_OPTIONS = {"checkpoint": "autoencoder_checkpoint", "stats": "latent_stats"}


@dataclass(frozen=True)
class Sources:
    """Sources of a pipeline's parts, and the sampling defaults that belong to them."""

    transformer: Path
    autoencoder: AutoencoderSource
    text_encoder: TextSource
    options: SamplingOptions
    guide: Path | None = None

    def check(self) -> None:
        """UserError for a part that is not there; looks at no weights. A Hub id passes: it may be there."""
        if not locate(self.autoencoder.config).is_dir():
            find_config(self.autoencoder.config)
        for name in ("checkpoint", "stats"):
            path = getattr(self.autoencoder, name)
            if path is not None and not locate(path).exists():
                raise UserError(f"autoencoder.{name} = {path}: no such file; give it as --{_OPTIONS[name]}")
        checked_source(self.text_encoder.path)


def download_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """What concerns a download, taken out of the arguments of a call."""
    names = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    return {name: arguments.pop(name) for name in names if arguments.get(name) is not None}


def fetch(name: str | os.PathLike, subfolder: str | None = None, use_ema: bool = True, **download: Any) -> Path:
    """`name` as a local folder; a Hub id `owner/name` that is no folder here is downloaded (or found in the cache).

    Of a release with several DiTs only the one that `find_transformer` would take is downloaded, averaged or raw.

    download: revision, token, cache_dir, local_files_only, force_download, as everywhere.

    Raises:
        UserError: there is no such folder, and the Hub has it neither; or it has several DiTs.
    """
    wanted = "a folder that holds a DiT, or the name of one on the Hugging Face Hub (owner/name)"
    source = folder_or_hub_name(name, "checkpoint", wanted)
    if Path(source).is_dir():
        return Path(source)
    if "/" not in source:
        raise UserError(f"checkpoint = {source!r}: no such folder{nearest(source)}; give {wanted}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    announce(source)
    if unused := unused_files(_files_on_hub(source, download), source, subfolder, use_ema):
        download = {**download, "ignore_patterns": unused}
    try:
        return Path(snapshot_download(source, **download))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"checkpoint = {source!r}: no such folder here{nearest(source)}, and the Hugging Face Hub did not give it: "
            f"{first_line(error)}"
        ) from error


def _files_on_hub(name: str, download: Mapping[str, Any]) -> list[str]:
    """The names of the files of a repository; none where it cannot be asked."""
    if download.get("local_files_only"):
        return []
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(name, revision=download.get("revision"), token=download.get("token"))
    except Exception:  # every HTTP client has its own; the download that follows says it, or finds all in the cache
        return []


def unused_files(files: Iterable[str], where: object, subfolder: str | None, use_ema: bool) -> list[str]:
    """Patterns of those of a release's files that a pipeline does not read, 10 GB and more each: other DiTs than the
    one it takes, its weights of the other kind, and what an optimiser keeps.

    Raises:
        UserError: as `find_transformer`.
    """
    paths = [PurePosixPath(file) for file in files]
    transformers = [path.parent for path in paths if path.name == published.ARGUMENTS]
    inside = [path for path in transformers if subfolder is None or path.is_relative_to(subfolder)]
    if not transformers:
        return []
    if not inside:
        names = ", ".join(map(str, sorted(transformers)))
        raise UserError(f"{where} has no DiT in subfolder = {subfolder!r}; it has {names}")
    chosen = _choose(sorted(inside), where)
    taken, other = (published.WEIGHTS["ema" if average else "model"] for average in (use_ema, not use_ema))
    unused = [path / "*" for path in transformers if not chosen.is_relative_to(path)]
    unused.append(chosen / "optimizer*")
    if chosen / taken in paths:
        unused.append(chosen / other)
    return list(map(str, unused))


def find_sources(
    folder: Path,
    *,
    subfolder: str | None = None,
    autoencoder: str | os.PathLike | None = None,
    autoencoder_checkpoint: str | os.PathLike | None = None,
    latent_stats: str | os.PathLike | None = None,
    text_encoder: str | os.PathLike | None = None,
    guide: str | os.PathLike | None = None,
) -> Sources:
    """The sources of all parts, those given by the caller first, then what the folder says.

    Raises:
        UserError: nothing there, several DiTs of which none was named, or a part that is not named.
    """
    folder = folder / subfolder if subfolder else folder
    given = {"config": autoencoder, "checkpoint": autoencoder_checkpoint, "stats": latent_stats}
    given = {name: str(value) for name, value in given.items() if value is not None}
    sources = _find_parts(folder, given, text_encoder)
    return sources if guide is None else replace(sources, guide=find_transformer(guide))


def _find_parts(folder: Path, given: Mapping[str, str], text_encoder: str | os.PathLike | None) -> Sources:
    index = read_index(folder)
    if index is not None:
        options, max_length = index
        return Sources(
            folder / "transformer",
            build(AutoencoderSource, {"config": str(folder / "autoencoder"), **given}, source="autoencoder"),
            TextSource(str(text_encoder or folder / "text_encoder"), max_length),
            options,
        )
    transformer = find_transformer(folder)
    meta = checkpoints.read_meta(transformer)
    if not meta:
        return _published_parts(transformer, given, text_encoder)
    trained_with = meta.get("config", {})
    recorded = {} if "config" in given else dict(trained_with.get("autoencoder", {}))
    text = build(TextSource, trained_with.get("text_encoder", {}), source=str(transformer))
    if text_encoder is not None or "text_encoder" not in trained_with:
        text = replace(text, path=str(_require(text_encoder, "text_encoder", transformer)))
    else:
        _require_value("text_encoder", text.path, transformer)
        text = replace(text, path=_still_there(text.path, transformer))
    for name, value in recorded.items():
        if name not in given:
            _require_value(_OPTIONS.get(name, "autoencoder"), value, transformer)
    if recorded.get("stats") is not None:
        recorded["stats"] = _still_there(recorded["stats"], transformer)
    _require({**recorded, **given}.get("config"), "autoencoder", transformer)
    source = build(AutoencoderSource, {**recorded, **given}, source="autoencoder")
    return Sources(transformer, source, text, trained_options(trained_with))


def find_transformer(folder: str | os.PathLike) -> Path:
    """The DiT in `folder`, or the one below it: that of a saved pipeline, the only one, or the fine-tuned of stage 4.

    Raises:
        UserError: there is none, or there are several; names them.
    """
    folder = locate(folder)
    try:
        return checkpoints.find_checkpoint(folder if read_index(folder) is None else folder / "transformer")
    except UserError:
        below = sorted(path.parent.relative_to(folder) for path in folder.glob(f"**/{published.ARGUMENTS}"))
        if not below:
            raise
    return folder / _choose(below, folder)


def _choose(transformers: Sequence[P], where: object) -> P:
    """The fine-tuned DiT of stage 4 among the folders of several, or the only one. UserError where that is neither."""
    final = [path for path in transformers if "stage4" in path.name.lower() or "sft" in path.name.lower()]
    if len(final) == 1:
        return final[0]
    if len(transformers) > 1:
        names = ", ".join(map(str, transformers))
        raise UserError(
            f"{where} holds several DiTs ({names}); choose one: give its folder, or its name as --subfolder"
        )
    return transformers[0]


def _still_there(recorded: str, transformer: Path) -> str:
    """The recorded path of a part, or where nothing is there any more, that of the same name in the run's folder.

    Training makes statistics and random text encoders in `results_dir`: they move with it.
    """
    moved = (folder / Path(recorded).name for folder in transformer.resolve().parents[:2])
    return recorded if locate(recorded).exists() else str(next((path for path in moved if path.exists()), recorded))


def _published_parts(transformer: Path, given: Mapping[str, str], text_encoder: str | os.PathLike | None) -> Sources:
    """Parts of the release: looked for beside the DiT and in the folders around it, up to `pre-trained`."""
    stage = next((name for name in PRESETS if name in "/".join(transformer.parts[-2:]).lower()), "stage4")
    around = list(transformer.resolve().parents)[:3]
    found = dict(given)
    if "config" not in found:
        wanted = AUTOENCODER_OF_STAGE.get(stage, DEFAULT_AUTOENCODER)
        yaml = _first(around, f"autoencoder/*{wanted}.yaml")
        found["config"] = str(_require(yaml, "autoencoder", transformer))
    if "stats" not in found and (stats := _first(around, PUBLISHED_STATS, f"*/{PUBLISHED_STATS}")):
        found["stats"] = str(stats)
    gemma = text_encoder or _first(around, "gemma-2-2b/config.json", "*/gemma-2-2b/config.json")
    if isinstance(gemma, Path) and gemma.name == "config.json":
        gemma = gemma.parent
    return Sources(
        transformer,
        build(AutoencoderSource, found, source="autoencoder"),
        TextSource(str(gemma or GEMMA)),
        PRESETS[stage],
    )


def _first(folders: list[Path], *patterns: str) -> Path | None:
    return next((path for folder in folders for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def _require(value: Any, name: str, where: object) -> Any:
    if value is None:
        raise UserError(f"{where} does not say which {name} it was trained with; give {name} (--{name})")
    return value


def _require_value(name: str, recorded: Any, where: object) -> None:
    """UserError for text that a resolver would have to read: a checkpoint never reads this computer's environment."""
    if isinstance(recorded, str) and "${" in recorded:
        raise UserError(f"{where} was trained with {name} = {recorded!r}, written so; give {name} (--{name}) yourself")


# ------------------------------------------------------------------------------------------------------------ loading


def load_networks(sources: Sources, use_ema: bool, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of a pipeline: its networks, on the CPU, and its settings.

    Raises:
        UserError: anything missing, or networks whose fingerprints show that they do not belong together.
    """
    sources.check()
    text = sources.text_encoder
    with memory_stage("loading the weights"):
        autoencoder = sources.autoencoder.load()
        encoder = TextEncoder.from_pretrained(text.path, max_length=text.max_length, dtype=dtype)
        loaded = []
        for folder in filter(None, (sources.transformer, sources.guide)):
            checkpoints.check_fingerprints(folder, autoencoder.fingerprint(), encoder.fingerprint())
            loaded.append(load_component(folder, use_ema, dtype))
    return {
        "autoencoder": autoencoder,
        "transformer": loaded[0],
        "guide": loaded[1] if sources.guide else None,
        "text_encoder": encoder.model,
        "tokenizer": encoder.tokenizer,
        "sampling": sources.options,
        "max_length": text.max_length,
    }


def load_given(folder: Path, parts: Mapping[str, Any], use_ema: bool, dtype: torch.dtype) -> dict[str, Any]:
    """The components of a saved pipeline that the caller names otherwise: by a path, or as they are.

    Raises:
        UserError: anything missing.
    """
    given = {name: part for name, part in parts.items() if part is not None}
    components = {name: part for name, part in given.items() if not isinstance(part, (str, os.PathLike))}
    paths = {name: str(part) for name, part in given.items() if name not in components}
    if {"autoencoder", "autoencoder_checkpoint", "latent_stats"} & set(paths):
        names = {"config": "autoencoder", "checkpoint": "autoencoder_checkpoint", "stats": "latent_stats"}
        source = {ours: paths[theirs] for ours, theirs in names.items() if theirs in paths}
        source = build(AutoencoderSource, {"config": str(folder / "autoencoder"), **source}, source="autoencoder")
        components["autoencoder"] = source.load()
    if "text_encoder" in paths:
        source = checked_source(paths["text_encoder"])
        components |= {"text_encoder": load_model(source, dtype), "tokenizer": load_tokenizer(source)}
    if "guide" in paths:
        components["guide"] = load_component(find_transformer(paths["guide"]), use_ema, dtype)
    return components


def load_component(folder: str | os.PathLike, use_ema: bool, dtype: torch.dtype) -> Any:
    """The DiT of any folder as a component, with the fingerprints recorded there."""
    from svg_t2i.loading.components import SVGDiT  # diffusers takes seconds to import, and looking for folders none

    transformer = SVGDiT.adopt(checkpoints.load_transformer(folder, ema=use_ema).to(dtype))
    transformer.register_to_config(fingerprints=checkpoints.read_meta(folder).get("fingerprints") or {})
    return transformer
