"""Solvers against analytic solutions, torchdiffeq, diffusers and, for the stochastic one, exact Gaussian marginals."""

import math

import pytest
import torch
import torchdiffeq
from diffusers import DPMSolverMultistepScheduler

from svg_t2i.flow.paths import GVP, LINEAR, random_normal
from svg_t2i.flow.solvers import (
    SOLVERS,
    dopri5,
    dpm,
    dpm_times,
    euler,
    heun,
    heun3,
    midpoint,
    sample,
    sde,
    sde_times,
    solver_times,
    time_grid,
)


def field(x, t):
    return torch.sin(3 * x) + t * x


def start(*shape):
    return torch.randn(*shape or (2, 3, 4), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------- order, exactness


def growth(x, t):
    """dx/dt = x / (1 + t)^2, solved by x(0) exp(t / (1 + t))."""
    return x / (1 + t) ** 2


def order(errors):
    """Observed order from the errors at n, 2n, 4n steps: the last pair counts, the first shows the trend."""
    assert errors[0] > errors[1] > errors[2] > 0
    return math.log2(errors[1] / errors[2])


@pytest.mark.parametrize(("solve", "expected"), [(euler, 1), (midpoint, 2), (heun, 2), (heun3, 3)])
def test_fixed_step_order(solve, expected):
    x = start()
    exact = x * math.exp(0.5)
    errors = [(solve(growth, x, time_grid(n + 1)) - exact).abs().max().item() for n in (80, 160, 320)]
    assert order(errors) == pytest.approx(expected, abs=0.1)


class Gaussian:
    """Data N(mean, std^2) per element: the exact velocity on a path, and the exact solution of its ODE."""

    def __init__(self, mean=0.7, std=0.3, path=LINEAR):
        self.mean, self.std, self.path = mean, std, path

    def spread(self, t):
        coefficients = self.path.coefficients(torch.tensor(t, dtype=torch.float64))
        alpha, sigma, d_alpha, d_sigma = (c.item() for c in coefficients)
        total = math.sqrt((alpha * self.std) ** 2 + sigma**2)
        return alpha, total, d_alpha, (alpha * d_alpha * self.std**2 + sigma * d_sigma) / total

    def velocity(self, x, t):
        alpha, total, d_alpha, d_total = self.spread(t)
        return d_alpha * self.mean + d_total / total * (x - alpha * self.mean)

    def at(self, z, t):
        alpha, total, _, _ = self.spread(t)
        return alpha * self.mean + total * z


def test_dpm_order():
    data, z = Gaussian(), start()
    errors = []
    for n in (160, 320, 640):
        times = [0.1 + 0.8 * i / n for i in range(n + 1)]
        errors.append((dpm(data.velocity, data.at(z, 0.1), times) - data.at(z, 0.9)).abs().max().item())
    assert order(errors) == pytest.approx(2, abs=0.1)


def test_dpm_converges_from_noise_to_data():
    data, z = Gaussian(), start()
    errors = [(dpm(data.velocity, z, dpm_times(n, 3.0)) - data.at(z, 1.0)).abs().max().item() for n in (5, 20, 80, 320)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 27 * errors[3]


@pytest.mark.parametrize("times", [[0.001, 1.0], [0.0, 1.0], [0.0, 0.3, 0.8, 1.0], dpm_times(7, 10.0)])
def test_dpm_lands_on_a_single_data_point_in_any_number_of_steps(times):
    point = start()
    velocity = lambda x, t: (point - x) / (1 - t)  # noqa: E731
    torch.testing.assert_close(dpm(velocity, start(), times), point)


def test_dopri5_order_of_error_against_work():
    x = start()
    exact = x * math.exp(0.5)
    errors, work, calls = [], [], []
    for rtol in (1e-5, 1e-10):
        calls.clear()
        result = dopri5(lambda x, t: calls.append(t) or growth(x, t), x, [0.0, 1.0], rtol=rtol, atol=rtol)
        errors.append((result - exact).abs().max().item())
        work.append(len(calls))
    assert errors[1] < 1e-9
    assert math.log(errors[0] / errors[1]) / math.log(work[1] / work[0]) > 4


# ---------------------------------------------------------------------------------------------------- independent peers


def torchdiffeq_states(method, x, times, **tolerances):
    calls = []

    def f(t, x):
        calls.append(t.item())
        return field(x, t)

    return torchdiffeq.odeint(f, x, torch.tensor(times, dtype=torch.float64), method=method, **tolerances), calls


def our_states(solve, x, times, **tolerances):
    calls, states = [], [x]
    final = solve(lambda x, t: calls.append(t) or field(x, t), x, times, lambda i, t, x: states.append(x), **tolerances)
    assert final is states[-1]
    return torch.stack(states), calls


@pytest.mark.parametrize("name", ["euler", "midpoint", "heun2", "heun3"])
@pytest.mark.parametrize("shift", [1.0, 6.0])
def test_fixed_step_matches_torchdiffeq(name, shift):
    x, times = start(), time_grid(9, shift)
    expected, calls = torchdiffeq_states(name, x, times)
    states, our_calls = our_states(SOLVERS[name].solve, x, times)
    torch.testing.assert_close(states, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(our_calls, calls, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e-7])  # large: steps are rejected; tiny: the smallest first step
@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_dopri5_matches_torchdiffeq_step_by_step(scale, rtol):
    x, times = scale * start(), time_grid(12, 3.0)
    expected, calls = torchdiffeq_states("dopri5", x, times, rtol=rtol, atol=1e-3 * rtol)
    states, our_calls = our_states(dopri5, x, times, rtol=rtol, atol=1e-3 * rtol)
    torch.testing.assert_close(our_calls, calls, rtol=0, atol=1e-9)
    torch.testing.assert_close(states, expected, rtol=1e-9, atol=1e-9 * scale)


def test_dopri5_rejects_steps_like_torchdiffeq():
    """A sharp turn at t = 0.5 makes the solver step back."""
    x, times = start(), [0.0, 1.0]
    turn = lambda x, t: x * torch.tanh(torch.as_tensor(200 * (t - 0.5)))  # noqa: E731
    calls, theirs = [], []
    ours = dopri5(lambda x, t: calls.append(t) or turn(x, t), x, times)
    expected = torchdiffeq.odeint(
        lambda t, x: theirs.append(t.item()) or turn(x, t), x, torch.tensor(times), rtol=1e-3, atol=1e-6
    )
    assert any(b < a for a, b in zip(calls, calls[1:]))
    assert len(calls) == len(theirs)
    torch.testing.assert_close(ours, expected[-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 25])
def test_dpm_matches_diffusers(steps):
    """diffusers' DPM-Solver++ with flow-matching sigmas; its velocity is noise minus data."""
    times = dpm_times(steps, 3.0)
    scheduler = DPMSolverMultistepScheduler(
        solver_order=2,
        prediction_type="flow_prediction",
        algorithm_type="dpmsolver++",
        use_flow_sigmas=True,
        final_sigmas_type="zero",
        lower_order_final=True,
        euler_at_final=True,
    )
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.tensor([1 - t for t in times], dtype=torch.float64)
    x = noise = start(1, 3, 4)
    for t, timestep in zip(times, scheduler.timesteps):
        x = scheduler.step(-field(x, t), timestep, x).prev_sample
    torch.testing.assert_close(dpm(field, noise, times), x, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- housekeeping


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_callback_sees_every_grid_point_and_the_result(name):
    seen = []
    chosen = SOLVERS[name]
    times = chosen.grid(6, 3.0)
    result = chosen.solve(field, start(), times, lambda i, t, x: seen.append((i, t, x)))
    assert [(i, t) for i, t, _ in seen] == list(enumerate(times))[1:]
    assert torch.equal(seen[-1][2], result)


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"dopri5"}))
def test_fixed_step_solvers_never_read_the_device(name):
    """The meta device holds no values: any synchronisation would raise."""
    times = []
    x = torch.zeros(2, 3, 4, 4, device="meta")
    result = sample(name, lambda x, t: times.append(t) or field(x, t), x, 5)
    assert result.shape == x.shape
    assert all(type(t) is float for t in times)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_input_noise_is_left_alone(name):
    noise = start()
    copy = noise.clone()
    sample(name, field, noise, 4)
    assert torch.equal(noise, copy)


def test_sample_uses_each_solvers_grid_and_default_shift():
    x = start()
    assert torch.equal(sample("dpm", field, x, 8), dpm(field, x, dpm_times(8, 10.0)))
    assert torch.equal(sample("euler", field, x, 8), euler(field, x, time_grid(8, 6.0)))
    assert torch.equal(sample("heun", field, x, 8, 2.0), heun(field, x, time_grid(8, 2.0)))


@pytest.mark.parametrize(
    ("name", "steps", "shift"),
    [("ddim", 8, 1.0), ("euler", 1, 1.0), ("dpm", 0, 1.0), ("dpm", 4, 0.0), ("dpm", 4, -2.0)],
)
def test_impossible_settings_are_errors(name, steps, shift):
    with pytest.raises(ValueError, match=r"choose from|at least|greater than 0"):
        sample(name, field, start(), steps, shift)


def test_grids_end_where_they_should():
    assert time_grid(5, 6.0)[0] == 0
    assert time_grid(5, 6.0)[-1] == 1
    times = dpm_times(10, 3.0)
    assert len(times) == 11
    assert times[0] == pytest.approx(0.001 / (0.001 + 3 * 0.999))
    assert times[-1] == 1
    assert sde_times(12, 0.04)[-1] == pytest.approx(0.96)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_dopri5_stops_at_a_velocity_that_is_not_finite(bad):
    with pytest.raises(FloatingPointError, match="dopri5"):
        dopri5(lambda x, t: x * (bad if t > 0.3 else 1.0), start(), [0.0, 1.0])


# ----------------------------------------------------------------------------------------------------------- stochastic

FORMS = ["constant", "sigma", "linear", "decreasing", "increasing-decreasing"]


def run_sde(data, form, num_points=100, count=20000, **settings):
    """Final samples for Gaussian data; keys are step and sample, so that no generator state is involved."""
    keys = torch.arange(count)
    noise = random_normal(keys, (1,), stream=99)
    return sde(
        data.velocity,
        noise,
        sde_times(num_points, 0.04),
        lambda i: random_normal(keys, (1,), stream=i),
        form=form,
        path=data.path,
        **settings,
    ).double()


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("form", FORMS)
def test_sde_keeps_the_data_distribution(form, method):
    data = Gaussian(mean=0.7, std=0.5)
    x = run_sde(data, form, method=method, norm=0.5, last_step="euler")
    assert x.mean() == pytest.approx(0.7, abs=0.02)
    assert x.std() == pytest.approx(0.5, abs=0.03)


def test_sde_serves_the_gvp_path():
    x = run_sde(Gaussian(mean=-0.4, std=0.6, path=GVP), "sigma")
    assert x.mean() == pytest.approx(-0.4, abs=0.03)
    assert x.std() == pytest.approx(0.6, abs=0.03)


def test_sde_without_noise_is_the_ode():
    x, times = start(), sde_times(9, 0.1)
    nothing = lambda i: torch.zeros_like(x)  # noqa: E731
    result = sde(field, x, times, nothing, method="heun", norm=0.0, last_step="euler")
    torch.testing.assert_close(result, euler(field, heun(field, x, times), [times[-1], 1.0]))
    assert torch.equal(sde(field, x, times, nothing, norm=0.0, last_step=None), euler(field, x, times))


def test_tweedie_step_is_the_posterior_mean():
    data, x, t = Gaussian(mean=0.7, std=0.5), start(), 0.9
    result = sde(data.velocity, x, [t], None, last_step="tweedie")
    gain = t * 0.25 / (t**2 * 0.25 + (1 - t) ** 2)  # E[clean | x] of a Gaussian
    torch.testing.assert_close(result, 0.7 + gain * (x - t * 0.7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "SBDM"}, "t=0"),
        ({"form": "cubic"}, "choose from"),
        ({"norm": -1.0}, "norm"),
        ({"method": "rk4"}, "method"),
        ({"last_step": "leap"}, "last_step"),
        ({"times": [0.0, 0.5, 1.0], "method": "heun", "last_step": None}, "t=1"),
    ],
)
def test_sde_refuses_what_is_not_finite_or_unknown(settings, message):
    x = start()
    with pytest.raises(ValueError, match=message):
        sde(field, x, **{"times": sde_times(5), "step_noise": lambda i: x, **settings})


def test_sde_never_reads_the_device():
    x = torch.zeros(2, 3, device="meta")
    assert sde(field, x, sde_times(4), lambda i: x, method="heun", last_step="tweedie").shape == x.shape


@pytest.mark.parametrize("name", ["dpm", "euler", "heun", "dopri5"])
def test_starting_half_way_follows_the_same_curve(name):
    """dx/dt = -x from x(t0) at t0 = 0.4: the exact curve is known; the grid begins at t0."""
    start, x0 = 0.4, torch.tensor([[1.5, -2.0]], dtype=torch.float64)
    seen = []
    result = sample(name, lambda x, t: -x, x0, 200, 1.0, lambda i, t, x: seen.append(t), start=start)
    torch.testing.assert_close(result, x0 * math.exp(start - 1), rtol=2e-3, atol=0)
    assert seen[0] > start
    assert seen[-1] == 1.0
    assert solver_times(name, 200, 1.0, start)[0] == start
    with pytest.raises(ValueError, match="start 1"):
        sample(name, lambda x, t: -x, x0, 10, start=1.0)


@pytest.mark.parametrize("name", ["dpm", "euler", "heun3"])
def test_a_callback_may_replace_the_latents(name):
    replaced = sample(name, lambda x, t: x, torch.ones(1, 2), 5, 1.0, lambda i, t, x: torch.full_like(x, 7.0))
    assert replaced.tolist() == [[7.0, 7.0]]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("start", [0.0, 0.5, 0.97])
def test_no_evaluation_after_the_last_time(name, start):
    """Toward a fixed point c the velocity is (c - x) / (1 - t): bent after 0.9, and still every solver ends at c."""
    x0, clean, asked, seen = torch.tensor([[1.5, -2.0]], dtype=torch.float64), 0.25, [], []

    def velocity(x, t):
        asked.append(t)
        return (clean - x) / max(1 - t, 0.1)

    for steps in (2, 3, 40):
        asked.clear()
        seen.clear()
        end = sample(name, velocity, x0, steps, 1.0, lambda i, t, x: seen.append((i, t)), start, last=0.9)
        whole = solver_times(name, steps, 1.0, start, 0.9)
        assert seen == list(enumerate(whole))[1:]
        if start < 0.9:
            assert max(asked) <= 0.9 + 1e-12
            torch.testing.assert_close(end, torch.full_like(x0, clean), rtol=1e-9, atol=1e-9)
        assert max(asked) < 1


def test_a_grid_is_scaled_only_where_it_reaches_too_far():
    for name in SOLVERS:
        assert solver_times(name, 20, 6.0, last=0.95) == solver_times(name, 20, 6.0)
        assert solver_times(name, 60, 1.0, last=1.0) == solver_times(name, 60, 1.0)
    assert solver_times("euler", 21, 1.0, last=0.9) == pytest.approx([i / 19 * 0.9 for i in range(20)] + [1.0])
    assert solver_times("euler", 2, 1.0, last=0.9) == [0.0, 1.0]


def test_dopri5_without_overshoot_is_as_exact():
    x = start()
    asked = []

    def velocity(x, t):
        asked.append(t)
        return growth(x, t)

    end = dopri5(velocity, x, [0.0, 0.31, 1.0], rtol=1e-8, atol=1e-10, overshoot=False)
    torch.testing.assert_close(end, x * math.exp(0.5), rtol=1e-7, atol=1e-8)
    assert max(asked) == 1.0
