"""Fewer evaluations of a velocity: every other step follows the last two of them.

It is a Taylor forecast of first order, as TaylorSeer (arXiv:2503.06923) makes of a network's features, and gives a
velocity again, so that solvers take it. Which steps are evaluated follows from the times alone: nothing waits for the
device, and images of a batch stay apart.
"""

from __future__ import annotations

from torch import Tensor

from svg_t2i.flow.paths import Velocity


def forecast(velocity: Velocity, reach: float, last: float) -> Velocity:
    """A velocity that is evaluated at the first two times, at `last`, after each forecast, and where none reaches.

    A forecast is linear in time through the last two evaluations.

    Args:
        reach: the longest way of a forecast beyond the last evaluation, in distances between the last two.
        last: the time of the last step, whose result is final.
    """
    known: list[tuple[float, Tensor]] = []  # the last two evaluations
    forecasted = False

    def sometimes(x: Tensor, t: float) -> Tensor:
        nonlocal forecasted
        if len(known) == 2 and not forecasted and t < last:
            (t0, v0), (t1, v1) = known
            if 0 < t - t1 <= reach * (t1 - t0):
                forecasted = True
                return v1 + (v1 - v0) * ((t - t1) / (t1 - t0))
        v, forecasted = velocity(x, t), False
        known[:] = [*known[-1:], (t, v)]
        return v

    return sometimes
