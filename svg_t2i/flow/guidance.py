"""Classifier-free guidance. A guided model is again a velocity, so solvers take it as it is.

    v = v_u + s (v_c - v_u)                    standard (Ho & Salimans, arXiv:2207.12598)
    v <- v min(1, r |v_c| / |v|)               renormalised: bounds the guided velocity by the conditional one
    v = v_m + s (v_e - v_m)                    internal: v_e of the whole network, v_m of a head behind its first
                                               layers, both from one pass (arXiv:2512.24176)
    v = v_c          outside lo <= t < hi      in an interval only (Kynkäänniemi et al., arXiv:2404.07724); truncated
                                               where hi < 1: steps outside cost one branch instead of two

v_u is the velocity without a prompt, with a negative one, or that of a weaker model with the same prompt
(autoguidance, Karras et al., arXiv:2406.02507). An end `hi` of 1 cuts nothing, although Heun's rule evaluates t = 1
and dopri5 even beyond: one unguided evaluation at the end of a guided run would bend its last step.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from svg_t2i.flow.paths import Velocity, expand_samples, sample_mean

VelocityPair = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # (latents, t) -> (conditional, unconditional)


def combine(
    v_cond: Tensor,
    v_uncond: Tensor,
    guidance_scale: float | Tensor,
    renorm_cfg: float = 1.0,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Guided velocity of a batch, shaped as its inputs.

    Args:
        v_cond, v_uncond: (B, ...), or packed tokens (T, C) with `lengths`.
        guidance_scale: s, or (B,) one a sample; 1 gives the conditional velocity, 0 the unconditional one.
        renorm_cfg: r, the largest allowed |v| / |v_c|, norms per sample over all its elements; 0 for no bound.
        lengths: tokens of each sample of a packed batch, host integers that sum to T.
    """
    if isinstance(guidance_scale, Tensor):
        guidance_scale = expand_samples(guidance_scale, v_cond, lengths)
    guided = v_uncond + guidance_scale * (v_cond - v_uncond)
    if renorm_cfg == 0:
        return guided
    # Root mean squares instead of norms: the element count cancels in the ratio.
    cond_rms, rms = (sample_mean(v.float().square(), lengths).sqrt() for v in (v_cond, guided))  # (B,)
    factor = (renorm_cfg * cond_rms / rms.clamp_min(torch.finfo(rms.dtype).tiny)).clamp_max(1)
    return (guided * expand_samples(factor, guided, lengths)).to(guided.dtype)


def is_guided_at(t: float, interval: tuple[float, float] = (0.0, 1.0), cfg_trunc: float = 1.0) -> bool:
    """Whether there is guidance at time t, with these settings of `guided_velocity`."""
    begin, end = interval[0], min(interval[1], cfg_trunc)
    return begin <= t and (t < end or end >= 1)


def guided_velocity(
    pair: VelocityPair,
    conditional: Velocity,
    guidance_scale: float | Tensor,
    renorm_cfg: float = 1.0,
    cfg_trunc: float = 1.0,
    lengths: Sequence[int] | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """The velocity that solvers integrate.

    Args:
        pair: both branches, evaluated in one batch.
        conditional: the conditional branch alone. It runs where guidance is off, and everywhere when the guidance
            scale is the number 1 and the bound (0 or at least 1) changes nothing.
        guidance_scale, renorm_cfg, lengths: see `combine`.
        cfg_trunc: no guidance for t >= this time; 1 (or more) never truncates.
        interval: guidance for lo <= t < hi only, as far as `cfg_trunc` allows.
    """
    if not isinstance(guidance_scale, Tensor) and guidance_scale == 1 and (renorm_cfg == 0 or renorm_cfg >= 1):
        return conditional

    def velocity(latents: Tensor, t: float) -> Tensor:
        if not is_guided_at(t, interval, cfg_trunc):
            return conditional(latents, t)
        return combine(*pair(latents, t), guidance_scale, renorm_cfg, lengths)

    return velocity
