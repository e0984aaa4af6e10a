"""Forecast velocities: where they are exact, which steps are evaluated, and how near they stay."""

import pytest
import torch

from svg_t2i.flow.caching import forecast
from svg_t2i.flow.solvers import SOLVERS, solver_times


def counted(velocity):
    """The velocity, and the times at which it was evaluated."""
    times = []

    def counting(x, t):
        times.append(t)
        return velocity(x, t)

    return counting, times


@pytest.mark.parametrize("solver", ["dpm", "euler"])
def test_a_velocity_that_is_linear_in_time_is_forecast_exactly(solver):
    slope, noise = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    velocity, evaluated = counted(lambda x, t: 2 * slope * t - 1)
    times = solver_times(solver, 13, 1.0)
    plain = SOLVERS[solver].solve(velocity, noise, times)
    assert evaluated == times[: len(evaluated)]
    all_steps = len(evaluated)
    evaluated.clear()
    fast = SOLVERS[solver].solve(forecast(velocity, 1.5, times[-2]), noise, times)
    torch.testing.assert_close(fast, plain)
    expected = [t for i, t in enumerate(times[:-1]) if i < 2 or i % 2 == 1 or i == len(times) - 2]
    assert evaluated == expected
    assert len(evaluated) < 0.7 * all_steps


def test_a_forecast_reaches_no_further_than_it_may():
    """Steps that grow by a half: with a reach of 1.4 none is forecast, with 1.6 every other one is."""
    times = [0.0]
    for i in range(8):
        times.append(times[-1] + 1.5**i / 50)
    for reach, forecasts in ((1.4, 0), (1.6, 3)):
        velocity, evaluated = counted(lambda x, t: x)
        sometimes = forecast(velocity, reach, times[-2])
        for t in times[:-1]:
            sometimes(torch.ones(3), t)
        assert len(times) - 1 - len(evaluated) == forecasts
        assert times[-2] in evaluated


def test_a_smooth_velocity_changes_little():
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def velocity(x, t):
        return torch.sin(2 * x + t) - x

    times = solver_times("dpm", 24, 3.0)
    plain = SOLVERS["dpm"].solve(velocity, noise, times)
    fast = SOLVERS["dpm"].solve(forecast(velocity, 1.5, times[-2]), noise, times)
    assert 0 < (fast - plain).abs().max() < 0.02
