"""Sharding of frozen networks: each rank keeps a share of each weight; the whole is gathered for its use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from autoencoder.common.processes import World


class ShardedAtRest:
    """Frozen modules of which every rank keeps a share of each weight, whole only inside `whole()`.

    All ranks enter `whole()` equally often; what they do inside is their own affair.
    """

    def __init__(self, modules: Iterable[nn.Module], world: World):
        self.world = world
        weights = {id(weight): weight for module in modules for weight in module.parameters()}  # tied ones once
        self._shares = [(weight, weight.shape, self._share(weight)) for weight in weights.values()]
        self._release()

    def _share(self, weight: Tensor) -> Tensor:
        flat = weight.detach().flatten()
        padded = nn.functional.pad(flat, (0, -len(flat) % self.world.size))
        return padded.chunk(self.world.size)[self.world.rank].clone()

    def _release(self) -> None:
        for weight, _, share in self._shares:
            weight.data = share.new_empty(0)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather all weights for as long as the context lasts."""
        for weight, shape, share in self._shares:
            weight.data = self.world.join_shares(share)[: shape.numel()].view(shape)
        try:
            yield
        finally:
            self._release()
