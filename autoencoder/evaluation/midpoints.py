"""iFID: the Fréchet distance of images decoded half-way between a latent and its nearest neighbour (arXiv:2603.05630).

A latent space in which a straight line between two images leaves what images look like is hard to generate in, however
well each image is reconstructed: rFID does not see it, this does. Neighbours are those with the most similar latents
(cosine, averaged over the cells) among the images of the same size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from autoencoder.common.processes import World
from autoencoder.common.workers import WorkerLoader
from autoencoder.evaluation.crops import Crops
from autoencoder.evaluation.metrics import FrechetDistance, to_8bit
from autoencoder.images.files import to_float
from autoencoder.model import SVGAutoencoder

CHUNK = 2048  # rows of the table of similarities at a time


class PooledLatents:
    """What one process has seen of one resolution: a row for each image, its place, and the size of its latent."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.rows: list[Tensor] = []

    def add(self, places: Sequence[int], latents: Tensor) -> None:
        """latents (n, D, h, w) of the images of these places."""
        self.places += places
        self.sizes += [(latents.shape[2], latents.shape[3])] * len(places)
        self.rows.append(latents.float().mean(dim=(2, 3)).cpu())

    def pairs(self, world: World) -> list[list[tuple[int, int]]]:
        """For each size, (place, place of its nearest neighbour) of all images that have one, on every process."""
        rows = torch.cat(self.rows) if self.rows else torch.zeros(0, 1)
        gathered = world.gather((self.places, self.sizes, rows))

        def of_all() -> list[list[tuple[int, int]]]:
            entries = sorted(
                (size, place, row) for places, sizes, rows in gathered for place, size, row in zip(places, sizes, rows)
            )
            by_size: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
            for size, place, row in entries:
                by_size.setdefault(size, []).append((place, row))
            return [nearest(*zip(*group)) for group in by_size.values() if len(group) > 1]

        return world.from_main(of_all)


def nearest(places: Sequence[int], rows: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(place, place of the most similar other row), two or more of them."""
    table = nn.functional.normalize(torch.stack(list(rows)).double(), dim=1)
    best = []
    for start in range(0, len(table), CHUNK):
        similarity = table[start : start + CHUNK] @ table.T
        own = torch.arange(len(similarity))
        similarity[own, start + own] = -torch.inf
        best += similarity.argmax(dim=1).tolist()
    return [(place, places[other]) for place, other in zip(places, best, strict=True)]


class _Pairs(Dataset):
    """The crops of pairs of places at one resolution."""

    def __init__(self, crops: Crops, number: int) -> None:
        self.crops, self.number = crops, number

    def __getitem__(self, pair: tuple[int, int]) -> tuple[Tensor, Tensor]:
        one, other = (self.crops[place][1][self.number] for place in pair)
        return one, other


@torch.no_grad()
def interpolated_distance(
    autoencoder: SVGAutoencoder,
    crops: Crops,
    number: int,
    pooled: PooledLatents,
    inception: nn.Module,
    world: World,
    batch_size: int,
    num_workers: int,
) -> float | None:
    """iFID at resolution `number` of the crops, on every process; None where no image has a neighbour.

    A second pass over the images, each of which is read twice: once for itself, once or more as a neighbour.
    """
    device = next(autoencoder.parameters()).device
    groups = pooled.pairs(world)
    batches = [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]
    if sum(map(len, batches)) < 2:
        return None
    frechet = FrechetDistance(inception, device)
    own = batches[world.rank :: world.size]
    for ones, others in WorkerLoader(_Pairs(crops, number), batch_sampler=own, num_workers=num_workers):
        ones, others = ones.to(device, non_blocking=True), others.to(device, non_blocking=True)
        latents = [autoencoder.encode(to_float(images)) for images in (ones, others)]
        frechet.update(ones, to_8bit(autoencoder.decode((latents[0] + latents[1]) / 2)))
    return frechet.distance(frechet.sums_of_all(world))
