"""The model card of an export: README.md as the Hugging Face Hub shows it, from what the checkpoint records.

It says what the model was trained from, on what and how, how it is sampled, what was measured, and whose licences
count. Paths of the training machine are shortened to their last names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoencoder.common.config import UserError, short_path
from svg_t2i.transformer.config import DiTConfig

CARD = "README.md"
CODE = "SVG-T2I"  # the package that reads the model
LICENCES = {
    "dinov3": "DINOv3 License",
    "dinov2": "Apache-2.0",
    "siglip": "Apache-2.0",
    "mae": "CC BY-NC 4.0: no commercial use",
    "gemma": "Gemma Terms of Use",
}


def model_card(
    meta: Mapping[str, Any],
    sizes: DiTConfig,
    parameters: int,
    *,
    name: str,
    weights: str,
    licence: str | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> str:
    """The text of a card.

    Args:
        meta: what is recorded beside the weights (`weights.read_meta`): step, config, fingerprints; maybe nothing.
        parameters: how many the model has.
        name: title of the card.
        weights: which were exported: "raw", "averaged" (with the decay of `meta`), or other words for them.
        licence: of these weights, an identifier of the Hub such as apache-2.0; None: not stated.
        metrics: name → number, as `svg_t2i.benchmark` writes them; what is no number is left out.
    """
    config = meta.get("config") or {}
    head = ({"license": licence} if licence else {}) | {
        "pipeline_tag": "text-to-image",
        "tags": "[svg-t2i, diffusion, flow-matching, vision-foundation-model]",
    }
    parts = [
        "---\n" + "".join(f"{key}: {value}\n" for key, value in head.items()) + "---",
        f"# {name}",
        f"A text-to-image diffusion transformer of {_millions(parameters)} parameters. It generates the features of a "
        "frozen vision model, which a decoder turns into pixels; there is no variational autoencoder "
        "([SVG-T2I](https://arxiv.org/abs/2512.11749)).",
        "## Use",
        _use(config),
        "## Training",
        _table(_training(meta, config, weights)) if config else "The folder that was exported records no training.",
        "## Model",
        _table(_model(sizes)),
        "## Frozen networks",
        _table(_frozen(meta, config)),
        "## Metrics",
        _metrics(metrics),
        "## Licence",
        _licence(config, licence),
        "## Limits",
        "The model shows what its images and captions show, with their mistakes and their bias. What its decoder "
        "cannot draw, small text and small faces first, it cannot draw either.",
    ]
    return "\n\n".join(parts) + "\n"


def read_metrics(path: Path) -> dict[str, Any]:
    """A `metrics.json` of `svg_t2i.benchmark`.

    Raises:
        UserError: not there, or no mapping with a number in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--metrics {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not numbers(found):
        raise UserError(f"--metrics {path} holds no numbers; give the metrics.json that svg_t2i.benchmark wrote")
    return found


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of the metrics that are numbers."""
    return {
        key: value for key, value in metrics.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _use(config: Mapping[str, Any]) -> str:
    samples = config.get("samples") or {}
    settings = {key: samples[key] for key in ("num_inference_steps", "guidance_scale", "time_shift") if key in samples}
    arguments = "".join(f", {key}={value!r}" for key, value in settings.items() if value is not None)
    resolution = (config.get("data") or {}).get("resolution", 1024)
    return (
        "```python\nfrom svg_t2i.pipeline import SVGT2IPipeline\n\n"
        'pipeline = SVGT2IPipeline.from_pretrained("this folder", autoencoder="its autoencoder", '
        'text_encoder="its text encoder")\n'
        f'image = pipeline("a prompt", height={resolution}, width={resolution}{arguments}).images[0]\n```'
    )


def _training(meta: Mapping[str, Any], config: Mapping[str, Any], weights: str) -> dict[str, Any]:
    data, loop, optim, flow = (config.get(key) or {} for key in ("data", "train", "optim", "flow"))
    sources = [source.get("path") for source in data.get("sources") or ()] or [data.get("path")]
    step, batch = meta.get("step"), loop.get("global_batch_size")
    adapted = "an adapter of " if config.get("lora") else ""
    return {
        "Began with": adapted + (_last(config.get("init_from")) or "random weights"),
        "Data": ", ".join(_last(source) for source in sources if source),
        "Resolution": f"{data.get('resolution')} px",
        "Steps": f"{step:,}" if step is not None else None,
        "Batch": f"{batch:,} images" if batch else None,
        "Images seen": f"{step * batch:,}" if step is not None and batch else None,
        "Learning rate": f"{optim.get('lr')}, {optim.get('schedule')}",
        "Weight decay": optim.get("weight_decay"),
        "Precision": loop.get("precision"),
        "Weights": f"averaged, decay {loop.get('ema_decay')}" if weights == "averaged" else weights,
        "Times": f"{flow.get('snr_type')}, shift: {flow.get('shift_rule') if flow.get('shift') else 'none'}",
        "Captions dropped": data.get("caption_dropout_prob"),
        "Auxiliary head": (config.get("aux") or {}).get("loss"),
        "Distilled from": _last((config.get("distill") or {}).get("teacher")),
        "Seed": loop.get("seed"),
        "Code": f"{CODE} {meta['code']}" if meta.get("code") else None,
        "torch": meta.get("torch"),
    }


def _model(sizes: DiTConfig) -> dict[str, Any]:
    return {
        "Width, layers": f"{sizes.dim}, {sizes.n_layers} and {sizes.n_refiner_layers} refiners of each kind",
        "Heads": f"{sizes.n_heads}, {sizes.kv_heads} for keys and values",
        "Channels of the latents": sizes.in_channels,
        "Width of the text features": sizes.cap_feat_dim,
        "Predicts": sizes.prediction,
    }


def _frozen(meta: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    autoencoder, text = (config.get(key) or {} for key in ("autoencoder", "text_encoder"))
    prints = meta.get("fingerprints") or {}
    latents = prints.get("autoencoder") or {}
    known = [str(latents[key]) for key in ("encoder", "stats") if key in latents]
    return {
        "Autoencoder": _last(autoencoder.get("checkpoint")) or _last(autoencoder.get("config")),
        "Fingerprints of encoder and statistics": ", ".join(known),
        "Text encoder": _last(text.get("path")),
        "Fingerprint of the text encoder": prints.get("text_encoder"),
    }


def _metrics(metrics: Mapping[str, Any] | None) -> str:
    found = numbers(metrics or {})
    return _table({key: f"{value:.4g}" for key, value in found.items()}) if found else "None were given at the export."


def _licence(config: Mapping[str, Any], licence: str | None) -> str:
    networks = [*(config.get("autoencoder") or {}).values(), (config.get("text_encoder") or {}).get("path")]
    named = " ".join(str(path) for path in networks).lower()
    lines = [f"These weights: {licence}." if licence else "No licence was stated at the export."]
    words = re.findall(r"[a-z]+\d*", named)
    lines += [f"- {key}: {text}" for key, text in LICENCES.items() if any(w.startswith(key) for w in words)]
    lines += ["", "Licences of the frozen networks and of the training data count as well."]
    return "\n".join(lines)


def _table(rows: Mapping[str, Any]) -> str:
    kept = [(key, value) for key, value in rows.items() if value not in (None, "")]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in kept)])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _last(path: str | None) -> str:
    """No folders of the training machine."""
    return short_path(path) if path else ""


def _millions(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"
