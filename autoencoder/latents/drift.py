"""Drift: distance of two latent statistics, between resolutions or between a file and the images at hand.

Seen through reference statistics, latents with other statistics have, per channel,

    shift = (mean − mean_ref) / std_ref      the mean of the normalised latents, 0 if they agree
    scale = std / std_ref                    their deviation, 1 if they agree
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from autoencoder.common.weights import replacing
from autoencoder.latents.statistics import LatentStats

NOTABLE = 0.1  # size from which on a diffusion model would notice


class Drift(NamedTuple):
    """shift, scale: (D,) each."""

    shift: Tensor
    scale: Tensor

    @property
    def size(self) -> float:
        """Root mean square over channels of the shift or of log(scale), whichever is larger; 0 without any drift."""
        return max(_rms(self.shift), _rms(self.scale.log()))

    @property
    def notable(self) -> bool:
        return self.size > NOTABLE

    def numbers(self) -> dict[str, float]:
        """A summary for reports."""
        return {
            "shift_rms": _rms(self.shift),
            "shift_max": self.shift.abs().max().item(),
            "scale_min": self.scale.min().item(),
            "scale_max": self.scale.max().item(),
            "scale_mean": self.scale.mean().item(),
        }

    def __str__(self) -> str:
        values = self.numbers()
        worst = self.shift.abs().argmax().item()
        return (
            f"normalised latents have means of {values['shift_rms']:.3f} rms (at most {values['shift_max']:.2f}, "
            f"channel {worst}) instead of 0, and deviations from {values['scale_min']:.2f} to "
            f"{values['scale_max']:.2f} instead of 1"
        )


def drift(reference: LatentStats, measured: LatentStats) -> Drift:
    """The drift of `measured` as seen through `reference`; both of the same channels, on the CPU afterwards."""
    mean, std = reference.mean.cpu(), reference.std.cpu()
    return Drift((measured.mean.cpu() - mean) / std, measured.std.cpu() / std)


def plot_stats(stats: Mapping[str, LatentStats], reference: str, path: Path) -> None:
    """A PNG of mean and deviation of every channel, and below them of their drift from `stats[reference]`.

    Channels are sorted by the reference's mean: latents have hundreds, in no order. `stats` is labelled by its keys.
    """
    from matplotlib.figure import Figure  # half a second, and only plots need it

    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    order = stats[reference].mean.cpu().argsort()
    for label, one in stats.items():
        style = {"label": label, "linewidth": 1.5 if label == reference else 0.8}
        lines = (one.mean.cpu(), one.std.cpu(), *drift(stats[reference], one))
        for axis, values in zip(axes.flat, lines):
            axis.plot(values[order].numpy(), **style)
    titles = ("mean", "deviation", "shift: mean seen through {}", "scale: deviation seen through {}")
    for axis, title in zip(axes.flat, titles):
        axis.set_title(title.format(reference))
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel(f"channel, sorted by the mean of {reference}")
    axes[0, 0].legend()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
