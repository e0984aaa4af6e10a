"""The release's checkpoint folders: model_args.pth, consolidated.00-of-01.pth and consolidated_ema.00-of-01.pth.

Weights are read weights-only. `model_args.pth` is a pickled `argparse.Namespace`; that class alone is let through.
"""

from __future__ import annotations

import argparse
import os
import pickle
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import safe_globals

from autoencoder.common.config import UserError, first_line
from autoencoder.common.weights import read_state_dict
from svg_t2i.transformer.config import MODELS, DiTConfig
from svg_t2i.transformer.model import SVGDiT, published_state_dict

ARGUMENTS = "model_args.pth"
WEIGHTS = {"model": "consolidated.00-of-01.pth", "ema": "consolidated_ema.00-of-01.pth"}


def read_published(folder: Path, ema: bool) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Sizes and weights of a published DiT. The release stores a name and flags; widths are read off the weights.

    Raises:
        UserError: a file is missing, damaged, or holds more than it should; or the model's name is unknown.
    """
    arguments = vars(_read_namespace(folder / ARGUMENTS))
    name = arguments.get("model")
    if name not in MODELS:
        raise UserError(f"{folder / ARGUMENTS}: unknown model {name!r}; known: {', '.join(MODELS)}")
    path, other = (folder / WEIGHTS["ema" if average else "model"] for average in (ema, not ema))
    if not path.is_file() and other.is_file():
        asked, there = ("averaged", "raw") if ema else ("raw", "averaged")
        raise UserError(
            f"{folder} has no {asked} weights ({path.name}), only {there} ones ({other.name}): take those (use_ema, "
            "--raw_weights), or link them under the other name, too"
        )
    state = read_state_dict(path, "EMA weights of the DiT" if ema else "weights of the DiT")
    for key in ("x_embedder.weight", "cap_embedder.1.weight"):
        if key not in state:
            raise UserError(f"{path}: not the weights of a DiT ({key} is missing)")
    config = replace(
        MODELS[name],
        in_channels=state["x_embedder.weight"].shape[1] // MODELS[name].patch_size ** 2,
        cap_feat_dim=state["cap_embedder.1.weight"].shape[1],
        qk_norm=bool(arguments.get("qk_norm", True)),
    )
    return config, state


def _read_namespace(path: Path) -> argparse.Namespace:
    """The pickled `argparse.Namespace` of the release; a pickle that names any other class is refused unexecuted."""
    try:
        with safe_globals([argparse.Namespace]):
            arguments = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, because it holds more than an argparse.Namespace of plain values, and unpickling that "
            f"can run code ({first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); copy it again") from error
    if not isinstance(arguments, argparse.Namespace):
        raise UserError(f"{path}: expected an argparse.Namespace, found {type(arguments).__name__}")
    return arguments


def published_name(config: DiTConfig) -> str:
    """Name in `MODELS` of a model of these sizes, which is all that a published folder records of them.

    Raises:
        UserError: it has none.
    """
    other = {"prediction": config.prediction, "guidance_embed": config.guidance_embed}
    if other != {"prediction": "velocity", "guidance_embed": False}:
        raise UserError(
            f"a published folder cannot say {other}, and would be read as a model that predicts the velocity and takes "
            "no guidance scale; export it without --published"
        )
    free = {"in_channels": config.in_channels, "cap_feat_dim": config.cap_feat_dim, "qk_norm": config.qk_norm}
    for name, sizes in MODELS.items():
        if replace(sizes, **free) == config:
            return name
    raise UserError(
        f"a published folder names its model, and this one (dim {config.dim}, {config.n_layers} layers) is none of "
        f"{', '.join(MODELS)}; export it without --published"
    )


def export_published(model: SVGDiT, ema: SVGDiT, out: str | os.PathLike) -> Path:
    """Write the release's own file names, for tools that read those.

    Raises:
        UserError: the model has no published name.
    """
    arguments = argparse.Namespace(model=published_name(model.config), qk_norm=model.config.qk_norm)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(published_state_dict(model), out / WEIGHTS["model"])
    torch.save(published_state_dict(ema), out / WEIGHTS["ema"])
    torch.save(arguments, out / ARGUMENTS)
    return out
