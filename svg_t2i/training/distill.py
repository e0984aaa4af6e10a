"""Guidance distillation: a model learns to give, in one pass, the velocity that its teacher needs two passes for.

The student has the guidance scale as a further input (`DiTConfig.guidance_embed`) and learns, at scales drawn anew for
every sample, v_u + s (v_c - v_u) of the frozen teacher (Meng et al., arXiv:2210.03142, stage one). Its second branch
costs nothing any more, neither in sampling nor in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder.common.config import UserError
from autoencoder.common.processes import World
from svg_t2i.checkpoints import weights
from svg_t2i.features.frozen import FrozenNetworks, MicroBatch
from svg_t2i.flow.guidance import combine
from svg_t2i.flow.paths import GUIDANCE, random_uniform
from svg_t2i.loading.sources import find_transformer
from svg_t2i.training.settings import DistillConfig, TrainConfig
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.transformer.packing import TextFeatures

RECORD = "teacher"  # in meta.json: folder and digest of the teacher's weights


class Teacher:
    """A frozen model, and the features (1 text) that its unguided branch sees."""

    def __init__(self, model: SVGDiT, unguided: TextFeatures, settings: DistillConfig):
        self.model, self.unguided, self.settings = model, unguided, settings

    def scales(self, keys: Tensor) -> Tensor:
        """The guidance scale of each sample, (B,) from its random key: evenly over `settings.scales`."""
        low, high = self.settings.scales
        return low + (high - low) * random_uniform(keys, stream=GUIDANCE)

    @torch.no_grad()
    def velocity(
        self, noisy: Tensor, batch: MicroBatch, timesteps: Tensor, scales: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """The guided velocity of packed tokens `noisy` (T, p·p·C), fp32, by one pass of both branches."""
        unguided = self.unguided.select([0] * len(batch.sizes))
        both = self.model.forward_packed(
            torch.cat([noisy, noisy]), batch.sizes * 2, timesteps.repeat(2), TextFeatures.cat([batch.text, unguided])
        )
        return combine(*both.float().chunk(2), scales, self.settings.renorm_cfg, lengths)


def load_teacher(
    config: TrainConfig, frozen: FrozenNetworks, newest: Path | None, world: World
) -> tuple[Teacher | None, dict[str, Any]]:
    """The teacher with its averaged weights, in the precision of the run, and what a checkpoint records of it.

    None and nothing where the run has none. newest: the checkpoint that is resumed, whose teacher it has to be.

    Raises:
        UserError: no model there, one with other weights than before, of other networks, or itself a student.
    """
    settings = config.distill
    if settings is None:
        return None, {}
    recorded = {} if newest is None else weights.read_meta(newest).get(RECORD, {})
    folder = find_transformer(settings.teacher).resolve()
    model, digest = weights.load_base(folder, recorded.get("digest"))
    if model.config.guidance_embed:
        raise UserError(f"distill.teacher = {settings.teacher}: it is distilled already, and has no second branch")
    weights.check_fingerprints(folder, frozen.fingerprints["autoencoder"], frozen.fingerprints["text_encoder"])
    model = model.to(world.device, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    with frozen.whole():
        unguided = frozen.captions.encoder.encode([""])  # what dropped captions became
    teacher = Teacher(model.requires_grad_(False), unguided.to(world.device), settings)
    return teacher, {RECORD: {"folder": str(folder), "digest": digest}}
