"""The steps of a sampling call: plan, encode, draw noise, solve, decode. `SVGT2IPipeline` is composed of them.

Latents are normalised, one fp32 tensor (C, h, w) an image; images have sides 16h and 16w.
"""

from __future__ import annotations

import logging
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from autoencoder.common.config import UserError
from autoencoder.images.files import LATENT_PIXELS, to_pil
from svg_t2i.sampling.denoising import Conditions, count_steps, denoise
from svg_t2i.sampling.networks import Networks, stage
from svg_t2i.sampling.options import SamplingOptions, check_side
from svg_t2i.text.encoder import build_prompt
from svg_t2i.transformer.packing import TextFeatures

log = logging.getLogger(__name__)

OutputType = Literal["pil", "np", "pt", "latent"]
StepEnd = Callable[[int, float, dict[str, Any]], "dict[str, Any] | None"]  # (step, t, {"latents", "indices"})
MAX_RANDOM_SEED = 2**32


@dataclass(frozen=True)
class Running:
    """How the steps of a call run, beside its settings.

    packed: whether images may share a forward pass. Small ones are faster so, and differ in their last bits.
    scheduler: a scheduler of diffusers instead of a solver.
    on_step_end: gets the latents of the images `indices` after each step; a returned {"latents": …} replaces them.
    progress_bar: (total=…) → a bar with `update`, entered for the solution.
    interrupted: asked after each step; true ends the solution, with the latents as they are.
    """

    packed: bool = False
    scheduler: Any = None
    on_step_end: StepEnd | None = None
    progress_bar: Callable[..., AbstractContextManager] = partial(tqdm, disable=True)
    interrupted: Callable[[], bool] = bool


@dataclass(frozen=True)
class Request:
    """The B images of a call: prompt, latent size (h, w) and seed of each."""

    prompts: list[str]
    sizes: list[tuple[int, int]]
    seeds: list[int]


def plan_request(
    prompt: Any, height: Any, width: Any, num_images_per_prompt: int, seed: Any, options: SamplingOptions
) -> Request:
    """One prompt, size and seed per image, from the arguments of a call.

    Args:
        prompt: one or several; in place of a text, the features of one.
        seed: None draws seeds from torch's global generator, a new one for every image.

    Raises:
        UserError: a value of a wrong type or out of range, or what does not fit together; names it.
    """
    prompts = as_prompts(prompt)
    count = as_whole("num_images_per_prompt", num_images_per_prompt)
    if count < 1:
        raise UserError(f"num_images_per_prompt = {count}: must be at least 1")
    sides = []
    for name, value in (("height", height), ("width", width)):
        value = getattr(options, name) if value is None else value
        several = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str)
        per_prompt = [as_whole(name, one) for one in value] if several else [as_whole(name, value)] * len(prompts)
        if len(per_prompt) != len(prompts):
            raise UserError(f"{name} = {list(value)}: give one value, or as many as prompts ({len(prompts)})")
        for one in per_prompt:
            check_side(name, one)
        sides.append([one // LATENT_PIXELS for one in per_prompt])
    repeated = [i for i in range(len(prompts)) for _ in range(count)]
    sizes = [(sides[0][i], sides[1][i]) for i in repeated]
    return Request([prompts[i] for i in repeated], sizes, _seeds(seed, len(repeated), count))


def _seeds(seed: Any, images: int, per_prompt: int) -> list[int]:
    """One seed per image: counted up from a single one within each prompt, or drawn."""
    if seed is None:
        return torch.randint(MAX_RANDOM_SEED, (images,)).tolist()
    if isinstance(seed, (Sequence, np.ndarray, Tensor)) and not isinstance(seed, str) and np.ndim(seed):
        seeds = [as_whole("seed", one) for one in seed]
    else:
        seeds = [as_whole("seed", seed) + i % per_prompt for i in range(images)]
    if not all(0 <= one < 2**63 for one in seeds):
        raise UserError(f"seed = {seed}: whole numbers from 0 to 2^63 - 1")
    if len(seeds) != images:
        raise UserError(f"{len(seeds)} seeds for {images} images; give one per image, or a single one")
    return seeds


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


def as_whole(name: str, value: Any) -> int:
    """A whole number of any library as an int. UserError for anything else, True and False included."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise UserError(f"{name} = {value!r}: give a whole number")
    return int(value)


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
    if options.is_guided and guide is None:
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
    negative = rows.pop() if options.is_guided and guide is None else None
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
    embeds: Any, mask: Tensor | None, options: Mapping[str, Any], settings: SamplingOptions, images: int, width: int
) -> list[TextFeatures] | None:
    """The features of the negative prompts, one an image, or None. Warns of a negative prompt that does nothing.

    options: what the call names, settings: what came of it.
    """
    text = options.get("negative_prompt")
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
    words = [text for text in texts if isinstance(text, str)]
    batches = [words] if packed and words else [[text] for text in words]
    with stage("encoding the prompts"):
        encoded = [networks.text_encoder.encode(batch, max_length).to(networks.device) for batch in batches]
        single = iter([features.select([i]) for features in encoded for i in range(len(features.lengths))])
        device, dtype = networks.device, networks.dtype
        return TextFeatures.cat([next(single) if isinstance(x, str) else x.to(device, dtype) for x in texts])


def encode_images(networks: Networks, images: Sequence[Tensor], packed: bool = False) -> list[Tensor]:
    """Images (3, H, W) in [-1, 1] → latents. `packed`: images of equal size are encoded together."""
    latents: list[Any] = list(images)
    with stage("encoding the images"):
        for rows in _rows_by_shape(images) if packed else ([i] for i in range(len(images))):
            batch = torch.stack([images[i] for i in rows]).to(networks.device)
            for i, x in zip(rows, networks.autoencoder.normalize(networks.autoencoder.encode(batch).float())):
                latents[i] = x
    return latents


def draw_noise(
    networks: Networks,
    request: Request,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: Tensor | Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """N(0, 1) noise (C, h, w) an image, drawn on the CPU: the same on every device and in every batch.

    latents: use these instead of drawing; UserError if their shapes are not those of the request.
    """
    shapes = [(networks.transformer.config.in_channels, *size) for size in request.sizes]
    if latents is not None:
        if not all(isinstance(x, Tensor) for x in latents):
            raise UserError(f"latents = {latents!r}: give a tensor (B, C, h, w), or a list of (C, h, w)")
        if [tuple(x.shape) for x in latents] != shapes:
            raise UserError(f"latents of shapes {[tuple(x.shape) for x in latents]}: expected {shapes}")
        return [x.to(networks.device, torch.float32) for x in latents]
    if generator is None:
        generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
    else:
        several = isinstance(generator, (list, tuple))
        generators = list(generator) if several else [generator] * len(shapes)
    if not all(isinstance(one, torch.Generator) for one in generators):
        raise UserError(f"generator = {generator!r}: give a torch.Generator or a list of them")
    if len(generators) != len(shapes):
        raise UserError(f"{len(generators)} generators for {len(shapes)} images; give one or as many")
    return [
        torch.randn(shape, generator=one, device=one.device).to(networks.device)
        for shape, one in zip(shapes, generators)
    ]


def solve(
    networks: Networks,
    latents: list[Tensor],
    conditions: Conditions,
    options: SamplingOptions,
    running: Running,
    *,
    start: float = 0.0,
    rows: Sequence[int] | None = None,
    **inpainting: Any,
) -> list[Tensor]:
    """Latents at time `start` → clean latents: `denoise` as a stage, with a progress bar and a callback.

    rows: which of the call's images these are, where they are not all of them; `indices` are among these.
    inpainting: `known` and `repaint` of `denoise`.

    Raises:
        UserError: the latents of an image are not finite; names the prompt and the step.
    """
    finite = _Finite()
    total = count_steps(options, tuple((x.shape[1], x.shape[2]) for x in latents), start, running.scheduler)
    with stage("denoising"), running.progress_bar(total=total) as bar:

        def on_step(step: int, t: float, group: list[Tensor], indices: list[int]) -> list[Tensor] | None:
            bar.update()
            finite.note(step, group, indices)
            if running.on_step_end is None:
                return None
            named = indices if rows is None else [rows[i] for i in indices]
            answer = running.on_step_end(step - 1, t, {"latents": stack(group), "indices": named}) or {}
            if set(answer) - {"latents", "indices"}:
                raise UserError(f"callback_on_step_end returned {sorted(answer)}; only latents can be replaced")
            return list(answer["latents"]) if "latents" in answer else None

        how = {"scheduler": running.scheduler, "packed": running.packed, "interrupted": running.interrupted}
        solved = denoise(
            networks.transformer, latents, conditions, options, start=start, on_step=on_step, **how, **inpainting
        )
    finite.check(conditions.captions)
    return solved


class _Finite:
    """From which step on the latents of an image are not finite; noted on the device, which is asked at the end."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[int], Tensor]] = []

    def note(self, step: int, latents: Sequence[Tensor], images: list[int]) -> None:
        self.seen.append((step, images, torch.stack([x.isfinite().all() for x in latents])))

    def check(self, prompts: Sequence[str]) -> None:
        """UserError for the first that is not."""
        if not self.seen:
            return
        flags = iter(torch.cat([finite for _, _, finite in self.seen]).tolist())
        for step, images, _ in self.seen:
            for image in images:
                if not next(flags):
                    raise UserError(
                        f"the latents of image {image + 1}, {prompts[image][:80]!r}, are not finite from step {step} "
                        "on; use precision fp32 or a lower guidance_scale, or look whether the weights are finite"
                    )


def decode_latents(networks: Networks, latents: Sequence[Tensor]) -> list[Tensor]:
    """Latents → images (3, 16h, 16w), nominally in [-1, 1]. One at a time: none depends on the others.

    Raises:
        UserError: an image is not finite, which would be written as a black one.
    """
    autoencoder, device, dtype = networks.autoencoder, networks.device, networks.dtype
    with stage("decoding"), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        images = [autoencoder.decode(autoencoder.denormalize(x[None]))[0].float() for x in latents]
    finite = torch.stack([image.isfinite().all() for image in images]).tolist()
    if not all(finite):
        raise UserError(
            f"image {finite.index(False) + 1} is not finite after decoding; decode in fp32, or look whether the "
            "autoencoder's weights and the latents' statistics are finite"
        )
    return images


def check_output_type(output_type: str) -> None:
    """UserError unless it is one of `OutputType`."""
    if output_type not in get_args(OutputType):
        raise UserError(f"output_type = {output_type!r}; choose one of {', '.join(get_args(OutputType))}")


def as_output_type(images: Sequence[Tensor], output_type: OutputType) -> Any:
    """Images (3, H, W) in [-1, 1] as `SVGT2IOutput.images` of the type "pil", "np" or "pt"."""
    if output_type == "pil":
        return [to_pil(image) for image in images]
    in_unit_range = stack([(image / 2 + 0.5).clamp(0, 1) for image in images])
    if output_type == "pt":
        return in_unit_range
    arrays = [image.permute(1, 2, 0).cpu().numpy() for image in in_unit_range]  # (3, H, W) → (H, W, 3)
    return np.stack(arrays) if isinstance(in_unit_range, Tensor) else arrays


def stack(tensors: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """One tensor where all shapes are equal, else a list."""
    same = len({x.shape for x in tensors}) == 1
    return torch.stack(list(tensors)) if same else [x.clone() for x in tensors]


def _rows_by_shape(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of the tensors of each shape."""
    rows: dict[torch.Size, list[int]] = {}
    for i, x in enumerate(tensors):
        rows.setdefault(x.shape, []).append(i)
    yield from rows.values()
