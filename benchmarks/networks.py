"""The frozen networks at published sizes, with random weights: nothing is downloaded."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autoencoder.latents.statistics import LatentStats
from autoencoder.model import SVGAutoencoder
from svg_t2i.text.encoder import TextEncoder
from svg_t2i.text.toy import make_toy_text_encoder

SMALL_DECODER = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1]}


def random_autoencoder(channels: int, decoder: Mapping[str, Any], **encoder: Any) -> SVGAutoencoder:
    """DINOv3 ViT-S+/16 and a convolutional decoder, on the CPU.

    decoder: fields of `ddconfig` besides z_channels; none for the published sizes.
    encoder: fields of `dinoconfig`: `overrides`, for a smaller one.
    """
    params: dict[str, Any] = {"embed_dim": channels, "ddconfig": {"z_channels": channels, **decoder}}
    params["dinoconfig"] = {"model_name": "dinov3_vits16plus", "weights": "random", **encoder}
    stats = LatentStats(torch.zeros(channels), torch.ones(channels))
    return SVGAutoencoder.from_config({"model": {"params": params}}, stats=stats)


def random_text_encoder(device: torch.device, dtype: torch.dtype, small: bool = False) -> TextEncoder:
    """A model of Gemma-2-2b's size, 2304 channels, or a small one of 256; it knows the one word "word"."""
    from transformers import Gemma2Config, Gemma2Model

    with tempfile.TemporaryDirectory() as folder:
        make_toy_text_encoder(["word"], Path(folder), hidden_size=256)
        toy = TextEncoder.from_pretrained(folder)
    if small:
        return TextEncoder(toy.model.to(device, dtype), toy.tokenizer, max_length=256)
    with torch.device(device):
        model = Gemma2Model(Gemma2Config(attn_implementation="eager")).to(dtype)
    return TextEncoder(model, toy.tokenizer, max_length=256)
