"""Latent statistics: per-channel mean and standard deviation that bring raw latents to the diffusion model's scale.

    normalised = (latents − mean) / (std + 1e-8)        latents = normalised · std + mean

always in fp32 (the release rounds to bf16 in training only). Shapes: latents (B, D, h, w) or (D, h, w); mean, std (D,).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoencoder.common.config import UserError
from autoencoder.common.weights import Float32Buffers, read_file, replacing

EPSILON = 1e-8


class LatentStats(Float32Buffers):
    """Mean and deviation of each latent channel; moves with the model but stays fp32, and is in no state dict.

    mean, std: (D,). encoder: fingerprint of the encoder they were measured on, None if unknown (published files).
    resolutions: of the images they were measured on, in pixels; () if unknown.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Tensor, std: Tensor, encoder: str | None = None, resolutions: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        if mean.ndim != 1 or mean.shape != std.shape:
            raise UserError(f"latent statistics: mean {tuple(mean.shape)} and std {tuple(std.shape)} must both be (D,)")
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise UserError(
                "latent statistics: every mean must be finite and every std positive; measure them again on more "
                "images (python -m autoencoder.measure_latents)"
            )
        self.encoder, self.resolutions = encoder, resolutions
        self.register_buffer("mean", mean.detach().float().clone(), persistent=False)
        self.register_buffer("std", std.detach().float().clone(), persistent=False)

    @property
    def channels(self) -> int:
        return self.mean.numel()

    def normalize(self, latents: Tensor) -> Tensor:
        """Raw → about zero mean and unit deviation per channel; fp32."""
        return (latents.float() - self.mean[:, None, None]) / (self.std[:, None, None] + EPSILON)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalised → raw; fp32."""
        return torch.addcmul(self.mean[:, None, None], latents.float(), self.std[:, None, None])

    def fingerprint(self) -> str:
        """16 hex digits that name these statistics."""
        values = torch.cat([self.mean, self.std]).cpu().numpy()
        return hashlib.sha256(values.tobytes()).hexdigest()[:16]

    @classmethod
    def load(cls, path: str | Path, channels: int, num_layer: int = -1, made_up: int = 0) -> LatentStats:
        """Our `.safetensors`, or the published `.pt`: a dictionary of `mean` and `std`, each (layers, D).

        channels: what the autoencoder has. num_layer: the row taken. made_up: how many channels at the end a published
        file may lack; as in the release, each gets the mean over channels of both. UserError for what does not fit.
        """
        content = read_file(path, "latent statistics")
        if not all(isinstance(content.get(name), Tensor) for name in ("mean", "std")):
            raise UserError(f"latent statistics {path}: expected tensors mean and std, found {', '.join(content)}")
        rows = [_row(content[name], name, num_layer, path) for name in ("mean", "std")]
        own = Path(path).suffix == ".safetensors"
        if not own and made_up and channels == rows[0].numel() + made_up:
            rows = [torch.cat([row, row.mean().expand(made_up)]) for row in rows]
        if rows[0].numel() != channels:
            lacking = ". If they lack the residual branch's only, extra_vit_config.published_stats: true makes these up"
            remedy = lacking if not own and rows[0].numel() < channels else ""
            raise UserError(
                f"latent statistics {path} have {rows[0].numel()} channels, the autoencoder has {channels}: they "
                f"belong to another encoder; measure this one's with python -m autoencoder.measure_latents{remedy}"
            )
        metadata = {}
        if own:
            with safe_open(Path(path).expanduser(), framework="pt") as file:
                metadata = file.metadata() or {}
        return cls(*rows, metadata.get("encoder"), tuple(map(int, metadata.get("resolution", "").split())))

    def save(self, path: str | Path, notes: Mapping[str, str] | None = None) -> None:
        """Write all of it as `.safetensors`, atomically; `notes` as metadata."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise UserError(f"latent statistics are saved as .safetensors, got {path}")
        origin = {"encoder": self.encoder, "resolution": " ".join(map(str, self.resolutions))}
        metadata = {**(notes or {}), "kind": "latent_stats"} | {key: value for key, value in origin.items() if value}
        with replacing(path) as partial:
            save_file({"mean": self.mean.cpu(), "std": self.std.cpu()}, partial, metadata)


def _row(tensor: Tensor, name: str, num_layer: int, path: Any) -> Tensor:
    """(D,) as it is, or row `num_layer` of (layers, D)."""
    if tensor.ndim == 1:
        return tensor
    if tensor.ndim != 2 or not -len(tensor) <= num_layer < len(tensor):
        raise UserError(
            f"latent statistics {path}: {name} is {tuple(tensor.shape)}, expected (layers, D) with a layer "
            f"num_layer={num_layer}; -1 is the last"
        )
    return tensor[num_layer]


class StatsAccumulator:
    """Per-channel mean and deviation of a stream in one pass, in fp64 on the latents' device, without syncs.

    Batches are combined by the pairwise update of Chan, Golub & LeVeque (1979), which does not cancel.
    """

    def __init__(self) -> None:
        self.count = 0  # positions seen: B·h·w
        self._mean: Tensor | float = 0.0  # (D,) fp64
        self._squares: Tensor | float = 0.0  # (D,) fp64: sum of squared deviations from the mean

    def update(self, latents: Tensor) -> None:
        """Add raw latents (B, D, h, w)."""
        values = latents.detach().double().transpose(0, 1).flatten(1)  # (D, B·h·w)
        mean = values.mean(dim=1)
        self._combine(values.shape[1], mean, (values - mean[:, None]).square().sum(dim=1))

    def merge(self, other: StatsAccumulator) -> None:
        """Add everything another accumulator has seen (another process's share of the images)."""
        if other.count:
            self._combine(other.count, other._mean, other._squares)

    def _combine(self, count: int, mean: Tensor | float, squares: Tensor | float) -> None:
        total = self.count + count
        delta = mean - self._mean
        self._mean = self._mean + delta * (count / total)
        self._squares = self._squares + squares + delta * delta * (self.count * count / total)
        self.count = total

    def state(self) -> dict[str, Tensor]:
        """All that was seen, on the CPU: for another process, or a file."""
        values = {"count": self.count, "mean": self._mean, "squares": self._squares}
        return {name: torch.as_tensor(value, device="cpu") for name, value in values.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> StatsAccumulator:
        """The accumulator whose `state` this is."""
        accumulator = cls()
        accumulator.count = int(state["count"])
        accumulator._mean, accumulator._squares = state["mean"], state["squares"]
        return accumulator

    def result(self, encoder: str | None = None, resolutions: tuple[int, ...] = ()) -> LatentStats:
        """The statistics so far, of latents that this encoder (its fingerprint) made of images of these resolutions."""
        return LatentStats(*self.moments(), encoder, resolutions)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation, with Bessel's correction: (D,) fp64 each."""
        if self.count < 2:
            raise UserError(f"latent statistics need at least 2 latent positions, got {self.count}; give more images")
        return self._mean, (self._squares / (self.count - 1)).sqrt()


def pooled(accumulators: Iterable[StatsAccumulator]) -> StatsAccumulator:
    """All of them together; every latent position counts the same."""
    total = StatsAccumulator()
    for accumulator in accumulators:
        total.merge(accumulator)
    return total
