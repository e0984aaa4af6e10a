"""Flow matching: probability paths, training timesteps, the loss, and the random numbers they need.

Time runs from t = 0 (noise) to t = 1 (clean latents). A path blends x_t = alpha(t) * clean + sigma(t) * noise, and the
network learns its velocity dx_t/dt. Unusual here:

  * a batch is packed: (T, C) tokens of all samples in a row, with each sample's token count as host integers
    (`lengths`). Every function also takes plain (B, ...) tensors; nothing loops over samples or waits for the device;
  * random numbers are a pure function of (key, stream, element) instead of a generator's state, so that the noise of
    training sample 12345 is the same on any rank, in any micro-batch, after any resume.

B samples, T tokens, C channels per token. Times and coefficients keep their float dtype; losses are float32.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]  # (latents, t shared by the batch) -> dx/dt, shaped as the latents
TimeT = TypeVar("TimeT", float, Tensor)

# ------------------------------------------------------------------------------------------------------------- packing


class TokenIndex(NamedTuple):
    """Where the tokens of a packed batch belong; made once per `lengths` and device."""

    sample: Tensor  # (T,) index of the token's sample
    row: Tensor  # (T,) index of the token within its sample
    lengths: Tensor  # (B,) tokens per sample


@lru_cache(maxsize=32)
def _token_index(lengths: tuple[int, ...], device: torch.device) -> TokenIndex:
    with torch.inference_mode(False):  # a cached inference tensor could not serve a later training step
        counts = torch.tensor(lengths)
        if device.type == "cuda":
            counts = counts.pin_memory()  # a copy from pageable memory would wait for the device
        counts = counts.to(device, non_blocking=True)
        sample = torch.repeat_interleave(counts, output_size=sum(lengths))
        starts = counts.cumsum(0) - counts
        return TokenIndex(sample, torch.arange(len(sample), device=device) - starts[sample], counts)


def token_index(lengths: Sequence[int], device: torch.device) -> TokenIndex:
    """Index tensors of a packed batch with these token counts, cached."""
    return _token_index(tuple(lengths), torch.device(device))


def expand_samples(per_sample: Tensor, like: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Reshape (B,) to broadcast against (B, ...), or repeat it per token, (T, 1, ...), for a packed batch."""
    if per_sample.ndim == 0:
        return per_sample
    if lengths is not None:
        _check_lengths(lengths, like, per_sample)
        per_sample = per_sample[token_index(lengths, like.device).sample]  # (T,)
    return per_sample.view(-1, *[1] * (like.ndim - 1))


def sample_mean(values: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Mean over all elements of each sample: (B, ...), or packed (T, ...) with `lengths`, -> (B,) in fp32.

    Token means are laid out as (B, longest), each in a place of its own, and summed by row: unlike an atomic
    `index_add` this adds in the same order on every run.
    """
    values = values.float().flatten(1).mean(1) if values.ndim > 1 else values.float()  # (B,) | (T,)
    if lengths is None:
        return values
    _check_lengths(lengths, values)
    where = token_index(lengths, values.device)
    longest = max(lengths)
    table = values.new_zeros(len(lengths) * longest).scatter(0, where.sample * longest + where.row, values)
    return table.view(len(lengths), longest).sum(1) / where.lengths


def _check_lengths(lengths: Sequence[int], tokens: Tensor, per_sample: Tensor | None = None) -> None:
    if sum(lengths) != tokens.shape[0] or min(lengths, default=0) < 1:
        raise ValueError(f"lengths {tuple(lengths)} must be positive and sum to the {tokens.shape[0]} packed tokens")
    if per_sample is not None and len(per_sample) != len(lengths):
        raise ValueError(f"{len(per_sample)} per-sample values for {len(lengths)} lengths")


# --------------------------------------------------------------------------------------------------------------- paths


class Coefficients(NamedTuple):
    """x_t = alpha * clean + sigma * noise, and the time derivatives of both factors; all shaped like t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def _linear(t: Tensor) -> Coefficients:
    return Coefficients(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))


def _gvp(t: Tensor) -> Coefficients:
    angle = t * (math.pi / 2)
    sin, cos = angle.sin(), angle.cos()
    return Coefficients(sin, cos, math.pi / 2 * cos, -math.pi / 2 * sin)


def _vp(t: Tensor) -> Coefficients:
    """Variance preserving (arXiv:2011.13456, eq. 33) run backwards: beta falls from 20 at t = 0 to 0.1 at t = 1."""
    beta_min, beta_max = 0.1, 20.0
    s = 1 - t
    log_alpha = -0.25 * (beta_max - beta_min) * s**2 - 0.5 * beta_min * s
    alpha = log_alpha.exp()
    sigma = (-torch.expm1(2 * log_alpha)).sqrt()
    d_alpha = 0.5 * (beta_min + (beta_max - beta_min) * s) * alpha
    return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)


DIFFUSION_FORMS: dict[str, Callable[["Path", Tensor, float], Tensor]] = {
    "constant": lambda path, t, norm: norm * torch.ones_like(t),
    "sigma": lambda path, t, norm: norm * path.coefficients(t).sigma,
    "linear": lambda path, t, norm: norm * (1 - t),
    "decreasing": lambda path, t, norm: 0.25 * (norm * (math.pi * t).cos() + 1).square(),
    "increasing-decreasing": lambda path, t, norm: norm * (math.pi * t).sin().square(),
    "SBDM": lambda path, t, norm: norm * path.drift_variance(t),
}


@dataclass(frozen=True)
class Path:
    """A probability path and what follows from it (Stochastic Interpolants, arXiv:2303.08797; SiT, arXiv:2401.08740).

    `t` is () or (B,), on any device; x, velocity and score are (B, ...). Conversions are written without dividing by
    alpha, so they hold at t = 0; those that divide by sigma are infinite at t = 1, as the score itself is.
    """

    name: str
    coefficients: Callable[[Tensor], Coefficients]
    t_max: float = 1.0  # training times are scaled to end here

    def interpolate(
        self, clean: Tensor, noise: Tensor, t: Tensor, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """-> (x_t, target velocity), both shaped and typed as `clean`; packed tokens with `lengths`."""
        alpha, sigma, d_alpha, d_sigma = (expand_samples(c, clean, lengths) for c in self.coefficients(t))
        return (alpha * clean + sigma * noise).to(clean.dtype), (d_alpha * clean + d_sigma * noise).to(clean.dtype)

    def log_alpha_slope(self, t: Tensor) -> Tensor:
        """d log(alpha)/dt; infinite at t = 0 on the Linear and GVP paths."""
        c = self.coefficients(t)
        return c.d_alpha / c.alpha

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """Linear drift of the time-reversed diffusion that shares the path's marginals: -(d log(alpha)/dt) x."""
        return -expand_samples(self.log_alpha_slope(t), x) * x

    def drift_variance(self, t: Tensor) -> Tensor:
        """Half the squared diffusion coefficient of that process: (d log(alpha)/dt) sigma^2 - sigma d_sigma."""
        c = self.coefficients(t)
        return c.sigma * (c.d_alpha * c.sigma / c.alpha - c.d_sigma)

    def noise_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """E[noise | x_t], by eliminating the clean latents from x_t and its velocity."""
        alpha, sigma, d_alpha, d_sigma = (expand_samples(c, x) for c in self.coefficients(t))
        return (d_alpha * x - alpha * velocity) / (d_alpha * sigma - alpha * d_sigma)

    def score_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x) = -E[noise | x_t] / sigma."""
        return -self.noise_from_velocity(velocity, x, t) / expand_samples(self.coefficients(t).sigma, x)

    def velocity_from_score(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Inverse of `score_from_velocity`; needs t > 0 on the Linear and GVP paths."""
        return expand_samples(self.drift_variance(t), x) * score - self.drift(x, t)

    def diffusion(self, t: Tensor, form: str, norm: float = 1.0) -> Tensor:
        """Diffusion w(t) of the stochastic sampler dx = (v + w score) dt + sqrt(2 w) dW, shaped as t.

        "SBDM" is infinite at t = 0 on the Linear and GVP paths; the other forms are finite everywhere.
        """
        if form not in DIFFUSION_FORMS:
            raise ValueError(f"diffusion form {form!r} is unknown; choose from {sorted(DIFFUSION_FORMS)}")
        return DIFFUSION_FORMS[form](self, t, norm)


LINEAR = Path("Linear", _linear)
GVP = Path("GVP", _gvp)
VP = Path("VP", _vp, t_max=1 - 1e-5)  # its velocity is infinite at t = 1
PATHS = {path.name: path for path in (LINEAR, GVP, VP)}

# ----------------------------------------------------------------------------------------------------------- timesteps


def shift_time(t: TimeT, factor: float | Tensor) -> TimeT:
    """Move times in [0, 1] toward noise: t / (t + k (1 - t)), both ends fixed (arXiv:2403.03206, eq. 23)."""
    return t / (t + factor * (1 - t))


def flux_shift_factor(num_tokens: TimeT) -> TimeT:
    """Shift factor k that grows with the latent's tokens: log k is 0.5 at 256, 1.15 at 4096, linear throughout."""
    exponent = 0.5 + (1.15 - 0.5) / (4096 - 256) * (num_tokens - 256)
    return exponent.exp() if isinstance(exponent, Tensor) else math.exp(exponent)


def dimension_shift_factor(dimension: TimeT) -> TimeT:
    """Shift factor k = √(dimension / 4096) for latents of tokens · channels numbers (arXiv:2510.11690)."""
    return (dimension / 4096) ** 0.5


def shift_timesteps(t: Tensor, num_tokens: int | Tensor, exponent: float = 1.0) -> Tensor:
    """`shift_time` by the flux factor. `num_tokens` is shared, or (B,) like t.

    `exponent` sharpens the noise odds (1 - t)/t before the shift.
    """
    factor = flux_shift_factor(num_tokens)
    clean_odds, noise_odds = t**exponent, (1 - t) ** exponent
    return clean_odds / (clean_odds + factor * noise_odds)


def timestep_range(snr_type: str) -> tuple[float, float] | None:
    """(low, high) of "uniform" and "uniform_LOW_HIGH", None for "lognorm".

    Raises:
        ValueError: for any other name, or bounds outside 0 <= low < high <= 1.
    """
    if snr_type == "lognorm":
        return None
    if snr_type == "uniform":
        return 0.0, 1.0
    number = r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"  # whatever float() reads, but for signs, inf and nan
    named = re.fullmatch(f"uniform_{number}_{number}", snr_type)
    if named and 0 <= float(named[1]) < float(named[2]) <= 1:
        return float(named[1]), float(named[2])
    raise ValueError(f"snr_type {snr_type!r}: use 'uniform', 'lognorm' or 'uniform_LOW_HIGH', 0 <= LOW < HIGH <= 1")


def sample_timesteps(
    draws: Tensor,
    snr_type: str = "uniform",
    mu: float = 0.0,
    num_tokens: int | Tensor | None = None,
    path: Path = LINEAR,
) -> Tensor:
    """Training times (B,) from base draws (B,).

    Args:
        draws: U(0, 1) for the uniform types, N(0, 1) for "lognorm", whose times are sigmoid(mu + draw).
        num_tokens: tokens per sample for the resolution shift; None for no shift.
    """
    bounds = timestep_range(snr_type)
    t = torch.sigmoid(mu + draws) if bounds is None else bounds[0] + (bounds[1] - bounds[0]) * draws
    t = t * path.t_max
    return t if num_tokens is None else shift_timesteps(t, num_tokens)


def draw_timesteps(keys: Tensor, snr_type: str = "uniform", mu: float = 0.0) -> Tensor:
    """`sample_timesteps` with the base draws that belong to the samples' random keys (B,)."""
    draws = random_normal(keys, (1,), stream=TIME)[:, 0] if snr_type == "lognorm" else random_uniform(keys, stream=TIME)
    return sample_timesteps(draws, snr_type, mu)


# ---------------------------------------------------------------------------------------------------------------- loss

Latents = Tensor | list[Tensor]


def interpolate(
    clean: Latents,
    noise: Latents,
    timesteps: Tensor,
    lengths: Sequence[int] | None = None,
    path: Path = LINEAR,
) -> tuple[Latents, Latents]:
    """The training pair (x_t, target velocity) of a (B, ...) tensor, packed (T, C) tokens, or a list of B tensors."""
    if isinstance(clean, Tensor):
        return path.interpolate(clean, noise, timesteps, lengths)
    pairs = [path.interpolate(c, n, t) for c, n, t in zip(clean, noise, timesteps, strict=True)]
    return [x_t for x_t, _ in pairs], [target for _, target in pairs]


def flow_loss(prediction: Latents, target: Latents, lengths: Sequence[int] | None = None) -> Tensor:
    """Mean squared error of each sample over all its elements: (B,), fp32. The training loss is its mean."""
    if isinstance(prediction, Tensor):
        return sample_mean((prediction.float() - target.float()).square(), lengths)
    return torch.stack([(p.float() - q.float()).square().mean() for p, q in zip(prediction, target, strict=True)])


def feature_loss(prediction: Tensor, clean: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """1 - cosine between predicted and clean tokens (T, C), mean of each sample: (B,), fp32 (arXiv:2410.06940)."""
    distance = 1 - torch.nn.functional.cosine_similarity(prediction.float(), clean.float(), dim=-1)
    return sample_mean(distance, lengths)


class LossBins:
    """Mean loss by timestep, in equal bins of [0, 1], gathered on the device and read once per log interval.

    `totals` (2, bins) holds the summed losses and the counts; sum it over ranks before reading for a global mean.
    """

    def __init__(self, bins: int = 20, device: torch.device | str = "cpu"):
        self.totals = torch.zeros(2, bins, device=device)

    @torch.no_grad()
    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Add one batch of times (B,) in [0, 1] and per-sample losses (B,)."""
        bins = self.totals.shape[1]
        index = (timesteps.float() * bins).long().clamp(0, bins - 1)
        member = index == torch.arange(bins, device=index.device)[:, None]  # (bins, B)
        self.totals += torch.stack((torch.where(member, losses.float(), 0.0).sum(1), member.sum(1)))

    def pop(self) -> list[float]:
        """Mean loss of each bin, nan where no sample fell, and start anew. Waits for the device."""
        sums, counts = self.totals.tolist()
        self.totals.zero_()
        return [total / count if count else math.nan for total, count in zip(sums, counts)]


# -------------------------------------------------------------------------------------------------------------- random

NOISE, TIME, GUIDANCE = 0, 1, 2  # streams: independent numbers for one key
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio; minus 2^64 because torch's integers are signed


def _mix(x: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64-bit integers, products modulo 2^64."""
    x = (x ^ _shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift_right(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts signed integers arithmetically


def _hash(keys: Tensor, stream: int, counters: Tensor) -> Tensor:
    """64 random bits for each (key, stream, counter): SplitMix64 started from the mixed key."""
    start = _mix(_mix(keys + _GOLDEN) ^ stream)
    return _mix(start + counters * _GOLDEN)


def random_keys(seed: int, positions: Tensor) -> Tensor:
    """Keys (B,) int64 of the samples at these positions of the training stream (or image indices) under one seed."""
    return _mix(_mix(torch.full_like(positions, seed, dtype=torch.int64)) + positions * _GOLDEN)


def random_uniform(keys: Tensor, stream: int = TIME) -> Tensor:
    """U(0, 1), ends excluded: keys (B,) int64 -> (B,) fp32, a multiple of 2^-24."""
    bits = _shift_right(_hash(keys, stream, torch.zeros_like(keys)), 41)  # 23 bits: the largest result is below 1
    return (2 * bits + 1).float() * 2.0**-24


def random_normal(
    keys: Tensor,
    shape: Sequence[int],
    lengths: Sequence[int] | None = None,
    stream: int = NOISE,
) -> Tensor:
    """N(0, 1) numbers that depend on nothing but (key, stream, row, channel), in fp32 on the keys' device.

    Args:
        keys: (B,) int64, see `random_keys`; any distinct integers, such as user seeds, serve as well.
        shape: of one sample; its last axis counts channels, the axes before it rows. With `lengths`, of one token.
        lengths: tokens of each sample of a packed batch, one per key.

    Returns:
        (B, *shape), or packed (T, *shape): the same numbers as (length, *shape) for each sample alone.
    """
    if lengths is not None and len(lengths) != len(keys):
        raise ValueError(f"{len(keys)} keys for {len(lengths)} lengths")
    *leading, channels = shape
    rows = math.prod(leading)
    if lengths is None:
        key, row = keys[:, None], torch.arange(rows, device=keys.device)  # (B, 1), (R,)
    else:
        where = token_index(lengths, keys.device)
        key, row = keys[where.sample, None], where.row[:, None] * rows + torch.arange(rows, device=keys.device)
    pairs = (channels + 1) // 2
    counters = row[..., None] * pairs + torch.arange(pairs, device=keys.device)  # (1 | T, R, pairs)
    bits = _hash(key[..., None], stream, counters)  # (B | T, R, pairs)
    # Box & Muller 1958: two uniforms of 32 bits, the first in (0, 1], give two independent normals.
    radius = ((_shift_right(bits, 32).float() + 0.5) * 2.0**-32).log_().mul_(-2).sqrt_()
    angle = (bits & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
    normal = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=-1)[..., :channels]
    return normal.reshape(-1, *shape)
