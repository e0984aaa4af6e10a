"""The networks of the recipe at full size on a pretended device: Gemma-2-2B, the autoencoder, the caption lengths."""

from __future__ import annotations

import torch
from transformers import Gemma2Config, Gemma2Model

from autoencoder.decoders.convolutional import DecoderConfig
from autoencoder.encoders.table import EncoderConfig
from autoencoder.latents.statistics import LatentStats
from autoencoder.model import ModelConfig, SVGAutoencoder
from svg_t2i.text import encoder as text_module
from svg_t2i.text.encoder import TextEncoder


class Tokenizer:
    """As many tokens as the number says that a text begins with; one for the empty text."""

    pad_token_id, truncation_side, model_max_length = 0, "right", 8192

    def __call__(self, texts, **_):
        return {"input_ids": [[1] * int(text.split()[0]) if text else [1] for text in texts]}

    def num_special_tokens_to_add(self):
        return 1


def gemma() -> TextEncoder:
    """The text encoder in bf16, without values."""
    config = Gemma2Config(
        vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256,
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Gemma2Model(config)
    torch.set_default_dtype(torch.float32)
    text_module._fingerprint = lambda *_: "none"  # of values
    return TextEncoder(model, Tokenizer(), 256)


def make_autoencoder() -> SVGAutoencoder:
    """Published sizes on the CPU; call it outside the mode, `fake_cuda.on_device` takes it inside."""
    encoder = EncoderConfig(model_name="dinov3_vits16plus", weights="random")
    autoencoder = SVGAutoencoder(ModelConfig(ddconfig=DecoderConfig(), dinoconfig=encoder))
    autoencoder.set_stats(LatentStats(torch.zeros(384), torch.ones(384)))
    autoencoder.fingerprint = lambda: {}
    return autoencoder
