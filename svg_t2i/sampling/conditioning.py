"""The texts of a call: prompts, or features given in their place, and what the images are conditioned on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoencoder.common.config import UserError
from svg_t2i.sampling.denoising import Conditions
from svg_t2i.sampling.networks import Networks, stage
from svg_t2i.sampling.options import SamplingOptions
from svg_t2i.text.encoder import build_prompt
from svg_t2i.transformer.packing import TextFeatures

log = logging.getLogger(__name__)


def as_prompts(prompt: Any) -> list[Any]:
    """One prompt or several as a list: texts, or features of texts. UserError for anything else, and for none."""
    one = isinstance(prompt, (str, TextFeatures))
    if not one and not isinstance(prompt, (list, tuple)):
        raise UserError(f"prompt = {prompt!r}: give a text or a list of texts")
    prompts = [prompt] if one else list(prompt)
    if not prompts:
        raise UserError("prompt is an empty list; give at least one")
    for i, text in enumerate(prompts):
        if not isinstance(text, (str, TextFeatures)):
            raise UserError(f"prompt[{i}] = {text!r}: give a text")
    return prompts


def encode_prompts(
    networks: Networks,
    prompts: Sequence[str | TextFeatures],
    options: SamplingOptions,
    others: Sequence[str] | None = None,
    weights: Sequence[float] = (),
    *,
    negatives: Sequence[TextFeatures] | None = None,
    max_length: int | None = None,
    packed: bool = False,
) -> Conditions:
    """What the images of these prompts are conditioned on. Every distinct text is encoded once.

    others, weights: a second prompt per image, whose velocity gets this weight and the first one the rest.
    negatives: features of the negative prompts, one an image, instead of those of `options`.
    max_length: most tokens of a text; None for the text encoder's own limit.
    packed: whether the texts may be encoded together.
    """
    count = len(prompts)
    guide = networks.guide if options.is_guided else None
    if guide is not None and (negatives is not None or any(options.negative_prompts(count))):
        raise UserError("negative_prompt does nothing under autoguidance; leave it out, or set_guide(None)")
    columns = [prompts] if others is None else [prompts, others]
    distilled = networks.transformer.config.guidance_embed
    if distilled and (negatives is not None or any(options.negative_prompts(count))):
        raise UserError("negative_prompt does nothing with a distilled model, which guides on its own; leave it out")
    branches = options.is_guided and guide is None and not distilled
    if branches:
        columns = [*columns, options.negative_prompts(count) if negatives is None else negatives]
    given: dict[Any, str | TextFeatures] = {}  # text, or identity of features → what they are
    keys = []
    for column in columns:
        texts = [build_prompt(text, options.system_prompt) if isinstance(text, str) else text for text in column]
        keys.append([text if isinstance(text, str) else id(text) for text in texts])
        given |= dict(zip(keys[-1], texts))
    features = encode_texts(networks, list(given.values()), max_length, packed)
    places = {key: place for place, key in enumerate(given)}
    rows = [tuple(places[key] for key in column) for column in keys]
    negative = rows.pop() if branches else None
    mixing = () if others is None else (tuple(1 - weight for weight in weights), tuple(weights))
    captions = tuple(prompt if isinstance(prompt, str) else "prompt_embeds" for prompt in prompts)
    return Conditions(features, tuple(rows), negative, guide, options.guidance_scales(count), mixing, captions)


def texts_or_features(name: str, texts: Any, embeds: Any, mask: Tensor | None, width: int) -> list[Any]:
    """The prompts of a call, or the features given in their place, one of a text each.

    embeds: padded (B, L, width) with a mask (B, L), nonzero at tokens; a list of (L, width); or packed.

    Raises:
        UserError: both or neither are given, or features of another form; names `name`.
    """
    if (texts is None) == (embeds is None):
        raise UserError(f"give either {name} or {name}_embeds" + ("" if texts is None else ", not both"))
    if embeds is None:
        return as_prompts(texts)
    if isinstance(embeds, TextFeatures):
        return [embeds.select([i]) for i in range(len(embeds.lengths))]
    if isinstance(embeds, Tensor) and embeds.ndim == 3:
        mask = torch.ones(embeds.shape[:2]) if mask is None else mask
        if tuple(mask.shape) != tuple(embeds.shape[:2]) or not mask.any(dim=1).all():
            raise UserError(
                f"{name}_attention_mask of {tuple(mask.shape)}: wants {tuple(embeds.shape[:2])}, and a token"
            )
        embeds = [row[kept.bool().to(row.device)] for row, kept in zip(embeds, mask)]
    fits = isinstance(embeds, (list, tuple)) and all(isinstance(x, Tensor) and x.ndim == 2 for x in embeds)
    if not fits or not embeds or any(x.shape[1] != width or not len(x) for x in embeds):
        shape = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise UserError(f"{name}_embeds = {shape}: give (B, L, {width}) with a mask, or a list of (L, {width})")
    return [TextFeatures(x, (len(x),)) for x in embeds]


def negative_features(
    embeds: Any, mask: Tensor | None, text: Any, settings: SamplingOptions, images: int, width: int
) -> list[TextFeatures] | None:
    """The features given in place of negative prompts, one an image, or None. Warns of what does nothing.

    text: the negative prompt that the call names. settings: what came of it.
    """
    if (text or embeds is not None) and not settings.is_guided:
        log.warning("the negative prompt does nothing: guidance_scale = %s is no guidance", settings.guidance_scale)
    if embeds is None:
        return None
    given = texts_or_features("negative_prompt", text or None, embeds, mask, width)
    if images % len(given):
        raise UserError(f"{len(given)} negative_prompt_embeds for {images} images; give one, or one per prompt")
    return [given[i * len(given) // images] for i in range(images)]


def padded_features(
    networks: Networks, prompts: Sequence[str], system_prompt: str, repeats: int, max_length: int | None
) -> tuple[Tensor, Tensor]:
    """Features (B, L, D) of prompts, each `repeats` times, and the mask (B, L) of their tokens."""
    texts = [build_prompt(prompt, system_prompt) for prompt in prompts for _ in range(repeats)]
    features = encode_texts(networks, texts, max_length)
    padded = torch.nn.utils.rnn.pad_sequence(features.features.split(features.lengths), batch_first=True)
    lengths = torch.tensor(features.lengths, device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


def encode_texts(
    networks: Networks, texts: Sequence[str | TextFeatures], max_length: int | None = None, packed: bool = False
) -> TextFeatures:
    """Packed features of texts, system prompts included, on the device; what is features already passes through."""
    encoder, device = networks.text_encoder, networks.device
    with stage("encoding the prompts"):
        if packed and (words := [text for text in texts if isinstance(text, str)]):
            together = encoder.encode(words, max_length).to(device)
            given = {text: together.select([i]) for i, text in enumerate(words)}
        else:
            given = {x: networks.texts.encode(encoder, x, max_length, device) for x in texts if isinstance(x, str)}
        return TextFeatures.cat([given[x] if isinstance(x, str) else x.to(device, networks.dtype) for x in texts])
