"""Arguments that several commands share: which networks, and the settings of sampling."""

from __future__ import annotations

import argparse
import logging
import os
import re
from dataclasses import fields
from typing import Any

from autoencoder.common.config import UserError
from autoencoder.common.processes import World
from svg_t2i.flow.solvers import SOLVERS
from svg_t2i.loading.quantization import KINDS
from svg_t2i.loading.sources import fetch, find_sources
from svg_t2i.sampling.options import PRESET_NAMES, SamplingOptions, changed, check_side, preset_options
from svg_t2i.text.encoder import SYSTEM_PROMPTS
from svg_t2i.transformer.attention import BACKENDS

OWN = "the model's"


def add_parts(model: argparse._ArgumentGroup) -> None:
    """The arguments that say which networks `from_parts` loads."""
    own = "(default: the one trained with)"
    model.add_argument("--subfolder", help="which DiT, where --checkpoint holds several; has no default")
    model.add_argument("--autoencoder", help=f"autoencoder YAML or saved folder {own}")
    model.add_argument("--autoencoder_checkpoint", help="weights for --autoencoder (default: those its YAML names)")
    model.add_argument("--latent_stats", help=f"latent statistics, .safetensors or the published .pt {own}")
    model.add_argument("--text_encoder", help=f"Hugging Face folder or id {own}")
    model.add_argument("--guide", help="a weaker DiT for autoguidance (default: the unconditional branch guides)")
    model.add_argument(
        "--lora", action="append", default=[], metavar="PATH[:WEIGHT]", help="an adapter; may be repeated"
    )
    model.add_argument("--raw_weights", action="store_true", help="use the raw weights instead of their average (EMA)")
    model.add_argument("--quantization", choices=KINDS, help="weights in 8 bits (default: as --dtype says)")
    model.add_argument(
        "--attention", choices=BACKENDS, default="auto", help="kernel of attention (default: the fastest)"
    )
    model.add_argument(
        "--layerwise_casting", action="store_true", help="keep the transformer in fp8, and compute in --dtype"
    )
    model.add_argument("--verbose", action="store_true", help="show what the libraries say while they load")
    model.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 without")


def quiet_imports(verbose: bool) -> None:
    """Unless `verbose`, keep to themselves what diffusers and torchao say while they are imported; call it before."""
    if not verbose:
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def parts_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the arguments of `add_parts` name, but for the weights' kind and precision."""
    names = ("subfolder", "autoencoder", "autoencoder_checkpoint", "latent_stats", "text_encoder", "guide")
    return {name: getattr(arguments, name) for name in names}


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of `SamplingOptions` but for the size; `chosen_options` reads them."""
    how = parser.add_argument_group("how (default: the model's own settings, or those of --preset)")

    def add(name: str, help: str, **options: Any) -> None:
        how.add_argument(f"--{name}", help=f"{help} (default: {OWN})", **options)

    meaning = "settings for a model stage, or of the model but fast (default: the model's own)"
    how.add_argument("--preset", choices=PRESET_NAMES, help=meaning)
    add("negative_prompt", "what to guide away from")
    add("system_prompt", "instruction put before the prompts", choices=sorted(SYSTEM_PROMPTS))
    add("solver", "of the differential equation", choices=sorted(SOLVERS))
    add("num_inference_steps", "points of the time grid", type=int)
    add("guidance_scale", "strength of guidance; 1 is none", type=float)
    add("internal_guidance", "away from the model's own early prediction; 1 is none (aux.loss=flow)", type=float)
    interval = {"type": float, "nargs": 2, "metavar": ("LO", "HI")}
    add("guidance_interval", "times with guidance, in [0, 1] from noise to image", **interval)
    add("time_shift", 'a number, or "dynamic" for one that suits the image size', type=_time_shift)
    add("renorm_cfg", "bound of the guided velocity's norm; 0: none", type=float)
    add("step_cache", "forecast every other step, as far as so many distances; 0: never", type=float)
    add("cfg_trunc", "no guidance for t >= this; 1: never", type=float)


def sampling_changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `SamplingOptions` that the command line names; all checked, without any weight."""
    names = {field.name for field in fields(SamplingOptions)}
    changes = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    if getattr(arguments, "enhance", False):
        changes.setdefault("system_prompt", "align")
    changed(_preset(arguments, SamplingOptions()), changes)  # refuses what no model could take
    return changes


def chosen_options(arguments: argparse.Namespace, world: World) -> SamplingOptions:
    """The settings of a run: those of `--preset` or the model's own, with what the command line changes.

    Reads what the model recorded about itself, but no weights. UserError for a part that is not there.
    """
    changes = sampling_changes(arguments)
    with world.main_first():  # one process downloads, the others find the files
        folder = fetch(arguments.checkpoint, arguments.subfolder, not arguments.raw_weights)
        sources = find_sources(folder, **parts_of(arguments))
    sources.check()
    return changed(_preset(arguments, sources.options), changes)


def _preset(arguments: argparse.Namespace, own: SamplingOptions) -> SamplingOptions:
    return preset_options(arguments.preset, own) if arguments.preset else own


def parse_resolution(text: str) -> tuple[int, int]:
    """ "WxH" or "category:WxH" in pixels → (width, height). Both sides are positive multiples of 16."""
    match = re.fullmatch(r"(?:[^:]*:)?(\d+)x(\d+)", text.strip())
    if not match:
        raise UserError(f"--resolution {text!r}: expected WIDTHxHEIGHT such as 1024x768, or category:WIDTHxHEIGHT")
    width, height = int(match[1]), int(match[2])
    check_side(f"--resolution {text!r}: width", width)
    check_side(f"--resolution {text!r}: height", height)
    return width, height


def _time_shift(text: str) -> float | str:
    return text if text == "dynamic" else float(text)
