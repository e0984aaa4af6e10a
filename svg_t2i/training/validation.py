"""The loss on samples that are not trained on: the same samples, noise and times at every measurement.

What changes from one measurement to the next is the model alone, so that differences far below the noise of the
training loss can be seen. The result does not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from autoencoder.common.config import UserError
from autoencoder.common.processes import World
from svg_t2i.data.sources import TrainBatch, make_datasets, open_sources
from svg_t2i.features.frozen import FrozenNetworks
from svg_t2i.training.settings import TrainConfig, ValidationConfig
from svg_t2i.transformer.model import SVGDiT

TIMES = tuple((i + 0.5) / 8 for i in range(8))  # of every sample, from noise to data


class Validation:
    """The held-out samples of a run.

    Args:
        settings: the `validation` section.

    Raises:
        UserError: the data cannot be read, or holds nothing.
    """

    def __init__(self, config: TrainConfig, settings: ValidationConfig, world: World):
        self.config, self.world = config, world
        fixed = {"crops_per_image": 1, "caption_dropout_prob": 0.0, "caption_mix": None, "feature_cache": None}
        resolution = config.data.resolutions[-1]
        data = replace(config.data, path=settings.path, sources=(), resolution=resolution, **fixed)
        (self.dataset,) = make_datasets(data, open_sources(data), config.train.seed, config.text_encoder.max_length)
        if not len(self.dataset):
            raise UserError(f"validation.path = {settings.path!r} holds no samples")
        number = min(settings.num_samples, len(self.dataset))
        self.places = np.linspace(0, len(self.dataset) - 1, number).round().astype(int).tolist()

    def batches(self) -> Iterator[tuple[TrainBatch, bool]]:
        """This process's share, and whether each counts: all processes take part in the same number of passes."""
        size, world = self.config.train.micro_batch_size, self.world
        starts = range(0, len(self.places), size)
        for first in range(0, len(starts), world.size):
            own = first + world.rank
            start = starts[own] if own < len(starts) else 0
            places = list(enumerate(self.places))[start : start + size]
            yield self.dataset.collate([self.dataset[place] for place in places]), own < len(starts)

    @torch.no_grad()
    def measure(self, objective: nn.Module, transformer: SVGDiT, frozen: FrozenNetworks) -> list[float]:
        """The mean loss at each of `TIMES`; the same on every process.

        objective: the parallelised `FlowObjective` of `transformer`.
        """
        device = self.world.device
        sums = torch.zeros(len(TIMES) + 1, device=device)  # and the number of samples
        objective.eval()
        with torch.compiler.set_stance("force_eager"):  # blocks would be compiled again for passes without gradients
            for batch, counted in self.batches():
                (prepared,) = frozen.prepare([batch], transformer, device)
                losses = [objective(prepared, t)[0] for t in TIMES]
                if counted:
                    sums += torch.stack([*(loss.sum() for loss in losses), losses[0].new_tensor(len(batch))])
        objective.train()
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # which a pass without a backward leaves whole
        *totals, samples = self.world.reduce_sum(sums).tolist()
        return [total / samples for total in totals]
