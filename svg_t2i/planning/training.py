"""The plan of a training run of stage 2: memory by part, time and cost of every way to spread it over the GPUs.

Memory is that of tensors, from a pass without values (`planning.memory`), plus an allowance for the device's own. Time
is arithmetic at a stated utilisation, or communication where that takes longer; both are estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from autoencoder.common.config import UserError
from autoencoder.images.files import LATENT_PIXELS
from svg_t2i.checkpoints.adapters import LoraSettings
from svg_t2i.data.batching import largest_share, num_micro_batches
from svg_t2i.planning.gpus import GPU, own_share
from svg_t2i.planning.memory import PassBytes, measure_pass
from svg_t2i.planning.networks import (
    TransformerCounts,
    autoencoder_skeleton,
    count,
    size,
    text_size,
    transformer_counts,
    transformer_of,
    velocity,
)
from svg_t2i.training.settings import TrainConfig
from svg_t2i.training.sharding import checkpoint_activations
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.flops import forward_flops, training_flops
from svg_t2i.transformer.packing import Sizes

GB = 1e9
MACHINE = 8  # GPUs
UTILISATION = 0.33  # with encoding, compiled, of an H200 at 256 and at 1024 px: docs/benchmarks.md
MODES = ("ddp", "sdp", "fsdp", "hsdp")
CHECKPOINTING = {"none": 1.0, "selective": 1.2, "full": 4 / 3}  # arithmetic, times that without


@dataclass(frozen=True)
class Choice:
    """A way to spread a run.

    Attributes:
        memory: bytes on a GPU by part, at the moment when they are most.
        seconds: of a step.
        communication: seconds of it that the network is busy for, which mostly overlap with arithmetic.
    """

    data_parallel: str
    checkpointing: str
    memory: dict[str, float]
    seconds: float | None
    communication: float

    @property
    def total(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class TrainingPlan:
    """What `plan_training` finds. choices: those that fit first, and of each kind the fastest first."""

    parameters: int
    frozen_parameters: int
    text_assumed: bool
    image_tokens: int
    text_tokens: int
    flops_per_image: float
    micro_batches: int
    micro_batch_size: int
    idle_share: float
    checkpoint_bytes: float
    samples_per_step: int
    steps: int
    choices: tuple[Choice, ...]
    gpus: int
    gpu: GPU

    @property
    def best(self) -> Choice | None:
        """The fastest that fits."""
        fitting = [choice for choice in self.choices if choice.total <= self.gpu.memory * GB]
        return fitting[0] if fitting else None


def plan_training(
    config: TrainConfig, gpu: GPU, gpus: int, utilisation: float = UTILISATION, caption_tokens: int = 150
) -> TrainingPlan:
    """The plan of a run on so many GPUs.

    Raises:
        UserError: a setting of the configuration, or a number out of its range.
    """
    if gpus < 1 or not 0 < utilisation <= 1 or caption_tokens < 1:
        raise UserError(
            f"gpus = {gpus}, utilisation = {utilisation}, caption tokens = {caption_tokens}: must be positive"
        )
    autoencoder, text = autoencoder_skeleton(config.autoencoder), text_size(config.text_encoder)
    sizes = config.model_config(autoencoder.channels, text.width)
    loop, caption_tokens = config.train, min(caption_tokens, config.text_encoder.max_length)
    number = num_micro_batches(loop.global_batch_size, gpus, loop.micro_batch_size)
    share = largest_share(loop.global_batch_size, gpus)
    samples = -(-share // number)
    grid = (config.data.all_sources[0].resolution // LATENT_PIXELS,) * 2
    tokens = grid[0] * grid[1] // sizes.patch_size**2
    flops = training_flops(sizes, [tokens], [caption_tokens], frozen=config.lora is not None)
    counts = transformer_counts(sizes, config.lora)
    frozen = size(autoencoder) + text.parameters * _bytes(loop.precision)
    if config.distill is not None:  # a teacher of the student's size, and both its branches
        frozen += counts.all * _bytes(loop.precision)
        flops += 2 * forward_flops(sizes, tokens, caption_tokens)
    frozen /= gpus if config.parallel.shard_frozen else 1
    cache = config.text_encoder.cache_tokens * text.width * _bytes(loop.precision)
    choices = []
    for checkpointing, factor in CHECKPOINTING.items():
        activations = measure_training(
            sizes, (grid,) * samples, (caption_tokens,) * samples, checkpointing, config.lora
        )
        for mode in MODES[:1] if gpus == 1 else MODES if gpus > MACHINE else MODES[:3]:
            shards = {"ddp": 1, "hsdp": min(MACHINE, gpus)}.get(mode, gpus)
            memory = memory_of(config, counts, mode, shards) | {
                "activations": activations.peak * _bytes(loop.precision) / 2,
                "frozen networks": frozen + cache,
            }
            if number == 1:  # they come while the activations go
                memory["gradients"] = activations.peak_with(4 / shards) - activations.peak
            reserve = own_share(sum(memory.values()), gpus)
            busy = communication_seconds(mode, counts, number, gpus, gpu, loop.precision)
            seconds = None
            if gpu.tflops is not None:
                seconds = max(share * flops * factor / (gpu.tflops * 1e12 * utilisation), busy)
            choices.append(Choice(mode, checkpointing, memory | {"device's own": reserve}, seconds, busy))
    choices.sort(
        key=lambda c: (c.total > gpu.memory * GB, c.seconds or 0.0, CHECKPOINTING[c.checkpointing], c.communication)
    )
    return TrainingPlan(
        counts.trained, counts.all * (config.lora is not None) + count(autoencoder) + text.parameters, text.assumed,
        tokens, caption_tokens, flops, number, samples,
        1 - loop.global_batch_size / (gpus * share), (3 + len(loop.ema_decays)) * 4 * counts.trained,
        loop.global_batch_size, loop.max_steps, tuple(choices), gpus, gpu,
    )  # fmt: skip


def _bytes(precision: str) -> int:
    """Of a number in the networks."""
    return 2 if precision == "bf16" else 4


def memory_of(config: TrainConfig, counts: TransformerCounts, data_parallel: str, shards: int) -> dict[str, float]:
    """Bytes of what belongs to the weights on one GPU, in the model's phase of a step (see `training.sharding`)."""
    low, adapter = _bytes(config.train.precision), config.lora is not None
    own = 4 * counts.trained / shards
    frozen = low * counts.all / shards if adapter else 0
    if data_parallel in ("fsdp", "hsdp"):
        gathered = 2 * low * counts.block  # one in use, one on its way
    elif data_parallel == "sdp":  # the gathered weights
        gathered = low * (counts.all + counts.trained * adapter)
    else:  # copies that autocast makes of weights in fp32
        gathered = low * counts.trained if low < 4 else 0
    return {
        "weights": own + frozen,
        "in use": gathered,
        "gradients": own,
        "moments": 2 * own,
        "averages": len(config.train.ema_decays) * own,
    }


@lru_cache(maxsize=64)
def measure_training(
    sizes: DiTConfig, grids: Sizes, lengths: Sequence[int], checkpointing: str, lora: LoraSettings | None = None
) -> PassBytes:
    """Bytes of forward and backward in bf16 for latents of such grids with captions of so many tokens."""
    model = transformer_of(sizes, lora)
    if checkpointing != "none":
        checkpoint_activations(model, checkpointing)
    return measure_pass(model, lambda: velocity(model, grids, lengths, timesteps=len(grids)))


def communication_seconds(
    data_parallel: str, counts: TransformerCounts, micro_batches: int, gpus: int, gpu: GPU, precision: str
) -> float:
    """Seconds that the links are busy in a step: every byte of weights or gradients goes through each GPU once."""
    if gpus == 1:
        return 0.0
    link = (gpu.link if gpus <= MACHINE else gpu.network) * GB
    weights, gradients = _bytes(precision) * counts.all, 4 * counts.trained
    if data_parallel == "ddp":
        return 2 * gradients / link
    if data_parallel == "sdp":
        return (weights + micro_batches * gradients) / link
    if data_parallel == "fsdp":
        return micro_batches * (2 * weights + gradients) / link
    inside = micro_batches * (2 * weights + gradients) / (gpu.link * GB)
    return inside + 2 * gradients / min(MACHINE, gpus) / link
