"""Reconstruct many images and measure the result, in one pass that is split over processes and merged exactly.

Single images are measured where they are reconstructed; their values are put together in the order of the images and
averaged then. What rFID needs are sums that do not depend on their order (see `metrics.FrechetDistance`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.common.config import UserError
from autoencoder.common.processes import World
from autoencoder.evaluation.artefacts import Artefacts, flat_colours
from autoencoder.evaluation.crops import Crops, read_chunks
from autoencoder.evaluation.metrics import (
    PER_IMAGE,
    FrechetDistance,
    ImageMetrics,
    Unavailable,
    build_inception,
    build_lpips,
    to_8bit,
)
from autoencoder.evaluation.midpoints import PooledLatents, interpolated_distance
from autoencoder.images.files import to_float
from autoencoder.latents.statistics import StatsAccumulator, pooled
from autoencoder.model import SVGAutoencoder


@dataclass
class Networks:
    """The metrics' own networks; `missing` says why one is None."""

    lpips: nn.Module | None = None
    inception: nn.Module | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def build(cls, device: torch.device) -> Networks:
        """All that can be had."""
        networks, missing = {}, {}
        for metric, build in (("lpips", build_lpips), ("rfid", build_inception)):
            try:
                networks[metric] = build().to(device)
            except Unavailable as error:
                missing[metric] = str(error)
        return cls(networks.get("lpips"), networks.get("rfid"), missing)


@dataclass
class Result:
    """What was measured at one resolution.

    places: (N,) numbers of the images. values: (N, 6) fp64, their PER_IMAGE. missing: reasons, by metric.
    latents: their moments, if the autoencoder has statistics to compare them with. artefacts: see `artefacts`.
    """

    resolution: int
    places: Tensor
    values: Tensor
    rfid: float | None
    missing: dict[str, str]
    latents: StatsAccumulator
    artefacts: dict[str, Any]
    ifid: float | None = None  # where it was asked for

    def summary(self) -> dict[str, Any]:
        """Means over images; None where there is no number, with the reason in `unavailable`."""
        means = dict(zip(PER_IMAGE, self.values.mean(dim=0).tolist()))
        reasons = dict(self.missing)
        exact = int(self.values[:, 0].isinf().sum())
        if exact:
            reasons["psnr"] = f"{exact} images are reproduced exactly, which makes the mean infinite"
        numbers = {"rfid": self.rfid} | {name: means[name] for name in ("psnr", "ssim", "lpips")}
        return {
            "resolution": self.resolution,
            "images": len(self.places),
            **{name: None if name in reasons else value for name, value in numbers.items()},
            "colour_shift": [means[f"shift_{channel}"] for channel in "rgb"],
            "ifid": self.ifid,
            "artefacts": self.artefacts,
            "unavailable": reasons,
        }


def group_means(result: Result, tags: Sequence[tuple[str, ...]]) -> dict[str, dict[str, float | int | None]]:
    """Tag → number of images that have it, and the means of their PSNR, SSIM and LPIPS; None where there is none.

    tags: of each image of the result. An image with several counts for each of them.
    """
    found = {}
    for tag in sorted({word for words in tags for word in words}):
        values = result.values[[tag in words for words in tags]]  # (images with the tag, 6)
        means = dict(zip(PER_IMAGE, values.mean(dim=0).tolist()))
        numbers = {name: means[name] if math.isfinite(means[name]) else None for name in ("psnr", "ssim", "lpips")}
        found[tag] = {"images": len(values), **numbers}
    return found


class Measurement:
    """What one process has seen of one resolution."""

    def __init__(self, networks: Networks, device: torch.device) -> None:
        self.metrics = ImageMetrics(networks.lpips)
        self.frechet = FrechetDistance(networks.inception, device) if networks.inception is not None else None
        self.places: list[int] = []
        self.values: list[Tensor] = []
        self.latents = StatsAccumulator()
        self.artefacts = Artefacts()
        self.pooled = PooledLatents()

    def add(self, places: Sequence[int], images: Tensor, recons: Tensor) -> None:
        """images: uint8 (n, 3, H, W); recons: floats of the same shape, nominally in [-1, 1]."""
        levels = to_8bit(recons)
        values = self.metrics(images, levels)  # (n, 6)
        broken = ~recons.isfinite().flatten(1).all(dim=1)  # (n,); would look like some colour in 8 bit
        self.values.append(values.masked_fill(broken[:, None], torch.nan))
        self.places += places
        if self.frechet is not None:
            self.frechet.update(images, levels)

    def merged(self, world: World, resolution: int, missing: Mapping[str, str]) -> Result | None:
        """Of all processes together, on the main one."""
        values = torch.cat(self.values).cpu() if self.values else torch.zeros(0, len(PER_IMAGE), dtype=torch.float64)
        artefacts = self.artefacts.merged(world)
        parts = world.gather((torch.tensor(self.places, dtype=torch.int64), values, self.latents.state()))
        sums = {}
        if self.frechet is not None:
            sums = self.frechet.sums_of_all(world)
        if not world.is_main:
            return None
        places, values = (torch.cat(tensors) for tensors in list(zip(*parts))[:2])
        order = places.argsort()  # sums in the order of the images do not depend on who measured them
        latents = pooled(StatsAccumulator.from_state(state) for _, _, state in parts)
        missing, rfid = dict(missing), None
        try:
            rfid = self.frechet.distance(sums) if self.frechet is not None else None
        except Unavailable as error:
            missing["rfid"] = str(error)
        return Result(resolution, places[order], values[order], rfid, missing, latents, artefacts)


@torch.no_grad()
def evaluate(
    autoencoder: SVGAutoencoder,
    crops: Crops,
    networks: Networks,
    world: World,
    batch_size: int = 16,
    num_workers: int = 0,
    midpoints: bool = False,
) -> list[Result]:
    """A result per resolution of the crops, on the main process; [] on the others.

    midpoints: with the iFID, for which all images are read once more.

    Raises:
        UserError: no image was readable, or reconstructions are not finite.
    """
    device = next(autoencoder.parameters()).device
    measurements = [Measurement(networks, device) for _ in crops.resolutions]
    for _, resolutions in read_chunks(crops, batch_size, world, num_workers):
        for measurement, groups in zip(measurements, resolutions):
            for group in groups:
                images = group.images.to(device, non_blocking=True)
                latents = autoencoder.encode(to_float(images))
                if autoencoder.stats is not None:
                    measurement.latents.update(latents)
                if midpoints:
                    measurement.pooled.add(group.places, latents)
                recons = autoencoder.decode(latents)
                measurement.add(group.places, images, recons)
                measurement.artefacts.add(autoencoder, group.places, images, recons)
    results = [
        measurement.merged(world, resolution, networks.missing)
        for measurement, resolution in zip(measurements, crops.resolutions)
    ]
    if midpoints and networks.inception is not None:
        for number, measurement in enumerate(measurements):
            distance = interpolated_distance(
                autoencoder, crops, number, measurement.pooled, networks.inception, world, batch_size, num_workers
            )
            if results[number] is not None:
                results[number].ifid = distance
    for result in results if world.is_main else []:
        if not len(result.places):
            raise UserError(f"{crops.source.name}: none of the {len(crops)} images is readable")
        broken = result.values[:, 0].isnan()
        if broken.any():
            first = crops.sample(int(result.places[broken][0])).path
            raise UserError(
                f"{int(broken.sum())} of {len(broken)} reconstructions at {result.resolution} px hold values that are "
                f"not finite (the first: {first}); the checkpoint is broken, or the precision too low: --precision fp32"
            )
        result.artefacts |= flat_colours(autoencoder, result.resolution, device)
    return results if world.is_main else []
