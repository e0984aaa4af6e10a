"""The plan of drawing images: memory of each stage, resident and with networks taking turns, and time on a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autoencoder.common.config import UserError
from autoencoder.images.files import LATENT_PIXELS
from svg_t2i.loading.quantization import count_quantizable
from svg_t2i.planning.gpus import GPU, own_share
from svg_t2i.planning.memory import META, measure_pass
from svg_t2i.planning.networks import autoencoder_skeleton, count, size, text_size, transformer_of, velocity
from svg_t2i.training.settings import TrainConfig
from svg_t2i.transformer.flops import forward_flops

UTILISATION = 0.41  # of an H200 at 1024 px with guidance: docs/benchmarks.md


@dataclass(frozen=True)
class SamplingPlan:
    """What `plan_sampling` finds, for weights and activations in bf16.

    Attributes:
        resident: most bytes with all networks on the card. taking_turns: with model offload. Both with its own share.
        in_8_bits: the same two with quantised weights.
        stages: bytes of each stage besides weights.
        seconds: of a batch, without encoding and decoding; None where the card's peak is not known.
    """

    parameters: int
    text_assumed: bool
    weights: dict[str, int]
    stages: dict[str, int]
    resident: float
    taking_turns: float
    in_8_bits: tuple[float, float]
    flops: float
    seconds: float | None


def plan_sampling(
    config: TrainConfig, gpu: GPU, side: int, images: int = 1, steps: int = 50, utilisation: float = UTILISATION,
    caption_tokens: int = 150,
) -> SamplingPlan:  # fmt: skip
    """The plan of a batch of square images with guidance, of the networks that a training configuration names.

    Raises:
        UserError: a side that is no multiple of 16, or another number out of its range.
    """
    if side < LATENT_PIXELS or side % LATENT_PIXELS:
        raise UserError(f"--sample {side}: a side is a positive multiple of {LATENT_PIXELS} pixels")
    if min(images, steps, caption_tokens) < 1 or not 0 < utilisation <= 1:
        raise UserError(f"images = {images}, steps = {steps}, utilisation = {utilisation}: must be positive")
    autoencoder, text = autoencoder_skeleton(config.autoencoder), text_size(config.text_encoder)
    sizes = config.model_config(autoencoder.channels, text.width)
    transformer, grid = transformer_of(sizes), (side // LATENT_PIXELS,) * 2
    tokens = grid[0] * grid[1] // sizes.patch_size**2
    lengths = (caption_tokens,) * images + (1,) * images  # the empty prompt of the guiding branch

    def both_branches() -> Tensor:
        return velocity(transformer, (grid,) * len(lengths), lengths, timesteps=1)

    weights = {
        "text encoder": 2 * text.parameters, "transformer": size(transformer), "autoencoder": size(autoencoder),
    }  # fmt: skip
    decoder, latents = autoencoder.decoder, torch.empty(1, autoencoder.channels, *grid, device=META)
    copies = size(decoder) // 2  # in bf16, which autocast makes of the fp32 weights and keeps
    stages = {
        "denoising": measure_pass(transformer, both_branches, backward=False).peak,
        "decoding": measure_pass(decoder, lambda: decoder(latents), backward=False, autocast=True).peak + copies,
    }
    saved = {"text encoder": text.in_blocks, "transformer": count_quantizable(transformer)}  # one byte of two each
    small = {name: nbytes - saved.get(name, 0) for name, nbytes in weights.items()}
    flops = images * steps * sum(forward_flops(sizes, tokens, n) for n in (caption_tokens, 1))
    return SamplingPlan(
        count(transformer), text.assumed, weights, stages,
        *_peaks(weights, stages), _peaks(small, stages), flops,
        None if gpu.tflops is None else flops / (gpu.tflops * 1e12 * utilisation),
    )  # fmt: skip


def _peaks(weights: Mapping[str, int], stages: Mapping[str, int]) -> tuple[float, float]:
    """Most bytes with all networks on the card, and with one at a time."""
    turns = [
        weights["text encoder"],
        weights["transformer"] + stages["denoising"],
        weights["autoencoder"] + stages["decoding"],
    ]
    resident, taking_turns = sum(weights.values()) + max(stages.values()), max(turns)
    return resident + own_share(resident), taking_turns + own_share(taking_turns)
