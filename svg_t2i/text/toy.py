"""A small random text encoder for tests and examples: nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from autoencoder.common.config import UserError
from autoencoder.common.weights import share_weights
from svg_t2i.text.encoder import SYSTEM_PROMPTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def make_toy_text_encoder(
    captions: Iterable[str],
    folder: str | os.PathLike,
    hidden_size: int = 128,
    layers: int = 2,
    seed: int = 0,
) -> Path:
    """Save a small random Gemma-2 and a word tokenizer made from captions; `TextEncoder.from_pretrained` reads it.

    Nothing is learned, yet a DiT can tell the words apart: token embeddings are drawn with deviation 1/2, so that
    after Gemma's scaling by √hidden_size they outweigh what the random layers add. The vocabulary holds the words of
    the captions and of the system prompts, lower-case; other words become `<unk>`.

    Args:
        captions: all texts the vocabulary is made from.
        folder: written in Hugging Face format; created if needed.
        hidden_size: feature width, a multiple of 32.
        layers: number of layers of which the last is never run; ≥ 2 lets a word's features see the words before it.
        seed: fixes all weights.
    """
    from transformers import Gemma2Config, Gemma2Model

    if hidden_size < 32 or hidden_size % 32 or layers < 1:
        raise UserError(f"toy text encoder: hidden_size={hidden_size} must be a multiple of 32, layers={layers} ≥ 1")
    tokenizer = _word_tokenizer([*SYSTEM_PROMPTS.values(), *captions])
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        head_dim=32,
        query_pre_attn_scalar=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma2Model(config)
        nn.init.normal_(model.embed_tokens.weight, std=0.5)
        for name, weight in model.named_parameters():
            if "norm" in name:
                nn.init.zeros_(weight)  # Gemma scales by 1 + weight; transformers 4 starts at 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    share_weights(Path(folder), Path(folder, "config.json"))
    return Path(folder)


def _word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per lower-case word or punctuation mark (or Chinese character); `<bos>` starts every text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    splitter = pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate(special + sorted(words - set(special)))}
    words_to_ids = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_to_ids.normalizer = normalizer
    words_to_ids.pre_tokenizer = splitter
    words_to_ids.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words_to_ids, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
