"""Solvers of dx/dt = v(x, t) from noise at t = 0 to latents at t = 1.

Each solver is a pure function (velocity, noise, times, callback) -> latents. Times are Python floats, so the fixed-step
solvers never wait for the device; `dopri5` reads one number per step, from which it chooses the next. Latents may have
any shape. Guidance and time shift happen outside: see guidance.py and the grids below. What a callback returns takes
the place of the latents (not in dopri5, whose steps do not stop at the grid); None leaves them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from svg_t2i.flow.paths import LINEAR, Path, Velocity, shift_time

Callback = Callable[[int, float, Tensor], Tensor | None]  # (grid index, t, latents there), after each step
Step = Callable[[Tensor, float, float], Tensor]  # (latents, t, dt) -> latents at t + dt

# --------------------------------------------------------------------------------------------------------------- grids


def time_grid(num_points: int, shift: float = 1.0) -> list[float]:
    """`num_points` times from 0 to 1, evenly spaced, then shifted toward noise by `shift_time`."""
    if num_points < 2:
        raise ValueError(f"a time grid needs at least 2 points, not {num_points}")
    return [shift_time(i / (num_points - 1), shift) for i in range(num_points)]


def dpm_times(num_steps: int, shift: float = 1.0) -> list[float]:
    """`num_steps` + 1 times for `dpm`, from just above 0 (0.001 unshifted, where log(alpha/sigma) is finite) to 1."""
    if num_steps < 1:
        raise ValueError(f"dpm needs at least 1 step, not {num_steps}")
    return [shift_time(1 - 0.999 * (1 - i / num_steps), shift) for i in range(num_steps + 1)]


def sde_times(num_points: int, last_step_size: float = 0.04) -> list[float]:
    """`num_points` times from 0 to 1 - `last_step_size`, evenly spaced, for `sde`."""
    return [t * (1 - last_step_size) for t in time_grid(num_points)]


# ---------------------------------------------------------------------------------------------------------- fixed step


def euler(velocity: Velocity, noise: Tensor, times: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Order 1, one evaluation per step."""

    def step(x: Tensor, t: float, dt: float) -> Tensor:
        return x + dt * velocity(x, t)

    return _walk(step, noise, times, callback)


def midpoint(velocity: Velocity, noise: Tensor, times: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Order 2, two evaluations per step: the velocity half-way."""

    def step(x: Tensor, t: float, dt: float) -> Tensor:
        half_way = x + dt / 2 * velocity(x, t)
        return x + dt * velocity(half_way, t + dt / 2)

    return _walk(step, noise, times, callback)


def heun(velocity: Velocity, noise: Tensor, times: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Order 2, two evaluations per step: the mean of the velocities at both ends."""

    def step(x: Tensor, t: float, dt: float) -> Tensor:
        v = velocity(x, t)
        return x + dt / 2 * (v + velocity(x + dt * v, t + dt))

    return _walk(step, noise, times, callback)


def heun3(velocity: Velocity, noise: Tensor, times: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Order 3, three evaluations per step: Heun's third-order rule, with nodes 0, 1/3 and 2/3."""

    def step(x: Tensor, t: float, dt: float) -> Tensor:
        v1 = velocity(x, t)
        v2 = velocity(x + dt / 3 * v1, t + dt / 3)
        v3 = velocity(x + 2 * dt / 3 * v2, t + 2 * dt / 3)
        return x + dt / 4 * (v1 + 3 * v3)

    return _walk(step, noise, times, callback)


def _walk(step: Step, x: Tensor, times: Sequence[float], callback: Callback | None) -> Tensor:
    for i, (t, t_next) in enumerate(zip(times, times[1:]), start=1):
        x = _report(callback, i, t_next, step(x, t, t_next - t))
    return x


def _report(callback: Callback | None, i: int, t: float, x: Tensor) -> Tensor:
    """Show the latents to the callback; they may come back changed."""
    changed = callback(i, t, x) if callback else None
    return x if changed is None else changed


def dpm(velocity: Velocity, noise: Tensor, times: Sequence[float], callback: Callback | None = None) -> Tensor:
    """DPM-Solver++(2M), order 2, one evaluation per step (arXiv:2211.01095, algorithm 2), on the linear path.

    The first and the last step have order 1; the last lands on the predicted clean latents when it ends at t = 1.
    """

    def log_snr(t: float) -> float:  # lambda = log(alpha / sigma)
        return math.log(t / (1 - t)) if t > 0 else -math.inf

    x, previous = noise, None
    for i, (t, t_next) in enumerate(zip(times, times[1:]), start=1):
        clean = x + (1 - t) * velocity(x, t)
        ahead = clean
        if previous is not None and i < len(times) - 1:
            ratio = (log_snr(t_next) - log_snr(t)) / (log_snr(t) - log_snr(times[i - 2]))
            ahead = clean + ratio / 2 * (clean - previous)  # half a step beyond, along the last change
        keep = (1 - t_next) / (1 - t)  # the noise level falls by this factor
        x = keep * x + (t_next - keep * t) * ahead
        previous = clean
        x = _report(callback, i, t_next, x)
    return x


# ------------------------------------------------------------------------------------------------------------ adaptive

# Dormand & Prince 1980, table 2 (RK5(4)7M): nodes, stages (the last is the solution), and its error estimate.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (  # solution minus the embedded fourth-order one of Shampine 1986, "Some practical Runge-Kutta formulas"
    35 / 384 - 1951 / 21600,
    0.0,
    500 / 1113 - 22642 / 50085,
    125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300,
    -1 / 60,
)
_MIDDLE = (  # fourth-order solution at half a step, same source
    6025192743 / 60171106304,
    0.0,
    51252292925 / 130801643196,
    -2691868925 / 90256659456,
    187940372067 / 3189068634112,
    -1776094331 / 39487288512,
    11237099 / 470086768,
)


def dopri5(
    velocity: Velocity,
    noise: Tensor,
    times: Sequence[float],
    callback: Callback | None = None,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    overshoot: bool = True,
) -> Tensor:
    """Dormand-Prince 5(4), adaptive: steps as long as the RMS of error / (atol + rtol |x|) over all latents is <= 1.

    Steps do not stop at `times`: the states there are read off a quartic through each step. With `overshoot` not even
    the last time stops them, so the velocity may be asked for t slightly above 1. The whole batch shares one step
    size: solve samples one by one where a result must not depend on its neighbours.

    Raises:
        FloatingPointError: if the velocity is not a number, or no step is short enough.
    """
    *stages, to_error, to_middle = (noise.new_tensor(weights) for weights in (*_STAGES, _ERROR, _MIDDLE))
    x, t = noise, times[0]
    v = velocity(x, t)
    dt = _first_step(velocity, x, v, t, rtol, atol)
    slopes = x.new_empty(*x.shape, 7)  # summed in one go: on easy steps the error estimate is of rounding size
    for i, goal in enumerate(times[1:], start=1):
        while t < goal:
            to_end = math.inf if overshoot else times[-1] - t
            ends, dt = dt >= to_end, min(dt, to_end)
            slopes[..., 0] = v
            for stage, (node, weights) in enumerate(zip(_NODES, stages), start=1):
                x_next = x + _advance(slopes, weights, dt)
                slopes[..., stage] = v_next = velocity(x_next, t + node * dt)
            tolerance = atol + rtol * torch.maximum(x.abs(), x_next.abs())
            error = _rms(_advance(slopes, to_error, dt) / tolerance).item()
            if math.isnan(error) or t + dt <= t:
                raise FloatingPointError(f"dopri5 is stuck at t={t:.6g}: velocity not finite, or step {dt} too short")
            if error <= 1:
                dense = (t, dt, x, x_next, x + _advance(slopes, to_middle, dt), v, v_next)
                x, v, t = x_next, v_next, times[-1] if ends else t + dt
            growth = 0.9 * error**-0.2 if error > 0 else math.inf
            dt *= min(10.0, max(1.0 if error < 1 else 0.2, growth))
        state = _quartic(*dense, goal)
        if callback:
            callback(i, goal, state)
    return state


def _advance(slopes: Tensor, weights: Tensor, dt: float) -> Tensor:
    """dt times the weighted sum of the first len(weights) slopes, which lie along the last axis."""
    return (slopes[..., : len(weights)] * (weights * dt)).sum(-1)


def _first_step(velocity: Velocity, x: Tensor, v: Tensor, t: float, rtol: float, atol: float) -> float:
    """Starting step of Hairer, Norsett & Wanner, "Solving Ordinary Differential Equations I", section II.4."""
    scale = atol + rtol * x.abs()
    size, slope = _rms(x / scale), _rms(v / scale)
    trial = torch.where(torch.minimum(size, slope) < 1e-5, 1e-6, 0.01 * size / slope).item()
    curvature = _rms((velocity(x + trial * v, t + trial) - v) / scale) / trial
    steepest = torch.maximum(slope, curvature)
    step = torch.where(steepest <= 1e-15, max(1e-6, 1e-3 * trial), (0.01 / steepest) ** 0.2).item()
    return min(100 * trial, step)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _quartic(t: float, dt: float, x0: Tensor, x1: Tensor, middle: Tensor, v0: Tensor, v1: Tensor, at: float) -> Tensor:
    """The quartic through x0, middle and x1 with slopes v0 and v1 at its ends, at time `at` in [t, t + dt]."""
    s = (at - t) / dt
    a = 2 * dt * (v1 - v0) - 8 * (x1 + x0) + 16 * middle
    b = dt * (5 * v0 - 3 * v1) + 18 * x0 + 14 * x1 - 32 * middle
    c = dt * (v1 - 4 * v0) - 11 * x0 - 5 * x1 + 16 * middle
    return x0 + s * (dt * v0 + s * (c + s * (b + s * a)))


# ---------------------------------------------------------------------------------------------------------- stochastic


def sde(
    velocity: Velocity,
    noise: Tensor,
    times: Sequence[float],
    step_noise: Callable[[int], Tensor],
    method: Literal["euler", "heun"] = "euler",
    form: str = "sigma",
    norm: float = 1.0,
    last_step: Literal["mean", "euler", "tweedie"] | None = "mean",
    path: Path = LINEAR,
    callback: Callback | None = None,
) -> Tensor:
    """Stochastic sampler dx = (v + w score) dt + sqrt(2 w) dW, which has the ODE's marginals (arXiv:2401.08740, eq. 5).

    Args:
        times: see `sde_times`; the last one is followed by one noiseless step to t = 1.
        step_noise: index of the step, from 0, -> N(0, 1) numbers shaped as the latents.
        method: "heun" adds the noise first, then averages the drift at both ends (two evaluations per step).
        form, norm: the diffusion w(t), see `Path.diffusion`.
        last_step: "mean" follows the drift, "euler" the velocity, "tweedie" takes E[clean | x]; None: no such step.

    Raises:
        ValueError: unknown settings, or a diffusion or score that is infinite at a time to be visited: "SBDM" at
            t = 0 of the Linear and GVP paths, any form at t = 1.
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"sde: method {method!r} is unknown; choose euler or heun")
    if last_step not in ("mean", "euler", "tweedie", None):
        raise ValueError(f"sde: last_step {last_step!r} is unknown; choose mean, euler, tweedie or None")
    scored = len(times) if method == "heun" or last_step in ("mean", "tweedie") else len(times) - 1
    grid = torch.tensor(times, dtype=torch.float64)  # on the host: its values enter device arithmetic as constants
    w = _finite_diffusion(path, grid, form, norm, scored)

    def drift(x: Tensor, i: int) -> Tensor:
        v = velocity(x, times[i])
        return v + w[i] * path.score_from_velocity(v, x, grid[i])

    x = noise
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        dt = t_next - t
        kick = (2 * w[i] * dt).sqrt() * step_noise(i)
        if method == "euler":
            x = x + dt * drift(x, i) + kick
        else:
            x = x + kick
            slope = drift(x, i)
            x = x + dt / 2 * (slope + drift(x + dt * slope, i + 1))
        x = _report(callback, i + 1, t_next, x)
    if last_step == "mean":
        x = x + (1 - times[-1]) * drift(x, -1)
    elif last_step == "euler":
        x = x + (1 - times[-1]) * velocity(x, times[-1])
    elif last_step == "tweedie":
        alpha, sigma, _, _ = path.coefficients(grid[-1])
        x = (x - sigma * path.noise_from_velocity(velocity(x, times[-1]), x, grid[-1])) / alpha
    return x


def _finite_diffusion(path: Path, grid: Tensor, form: str, norm: float, scored: int) -> Tensor:
    """w on the grid; an error unless w and the score are finite at its first `scored` times."""
    w, sigmas = path.diffusion(grid, form, norm), path.coefficients(grid).sigma
    for t, w_t, sigma in zip(grid.tolist()[:scored], w.tolist(), sigmas.tolist()):
        if not (math.isfinite(w_t) and w_t >= 0 and sigma > 0):
            raise ValueError(
                f"sde: diffusion form {form!r} with norm {norm} is {w_t:.3g} at t={t:.3g}, where sigma is {sigma:.3g}: "
                "choose another form, a norm >= 0, and times that end before 1"
            )
    return w


# --------------------------------------------------------------------------------------------------------------- table


class Solver(NamedTuple):
    """A row of `SOLVERS`."""

    solve: Callable[..., Tensor]  # (velocity, noise, times, callback) -> latents
    grid: Callable[[int, float], list[float]]  # (num_steps, shift) -> times
    default_shift: float
    adaptive: bool = False  # one step size for the whole batch, chosen on the way
    ends_at_clean: bool = False  # its last step is x + (1 - t) v, the clean latents that are predicted at t


SOLVERS = {
    "dpm": Solver(dpm, dpm_times, 10.0, ends_at_clean=True),
    "euler": Solver(euler, time_grid, 6.0, ends_at_clean=True),
    "midpoint": Solver(midpoint, time_grid, 6.0),
    "heun": Solver(heun, time_grid, 6.0),
    "heun2": Solver(heun, time_grid, 6.0),
    "heun3": Solver(heun3, time_grid, 6.0),
    "dopri5": Solver(dopri5, time_grid, 6.0, adaptive=True),
}


def sample(
    solver: str,
    velocity: Velocity,
    noise: Tensor,
    num_steps: int,
    shift: float | None = None,
    callback: Callback | None = None,
    start: float = 0.0,
    last: float = 1.0,
) -> Tensor:
    """Solve from noise to latents with a solver of the table, on its own time grid.

    Args:
        num_steps: as in the release, model evaluations for "dpm", grid points (both ends included, one more than
            steps) for all others. "dopri5" only reports at these points; its steps follow from its tolerances.
        shift: time shift toward noise, > 0, 1 for none; None for the solver's default.
        start: where on the grid to begin; `noise` is then x_t at that time: half-noised latents.
        last: no evaluation after this time, and if it is below 1 the last step ends at the clean latents that are
            predicted there: for networks whose velocity is made from those, and is of no use near t = 1.

    Raises:
        ValueError: unknown solver, too few steps, a shift that is not positive, or a start outside [0, 1).
    """
    times = solver_times(solver, num_steps, shift, start, last)
    chosen = SOLVERS[solver]
    if last == 1 or chosen.ends_at_clean:
        return chosen.solve(velocity, noise, times, callback)
    x = noise
    if len(times) > 2:
        x = chosen.solve(velocity, noise, times[:-1], callback, **({"overshoot": False} if chosen.adaptive else {}))
    return _report(callback, len(times) - 1, 1.0, euler(velocity, x, times[-2:]))


def solver_times(
    solver: str, num_steps: int, shift: float | None = None, start: float = 0.0, last: float = 1.0
) -> list[float]:
    """The time grid of `sample`: that of the solver from `start` on, which becomes its first time.

    All but the final 1 are scaled about the first where the one before it would lie beyond `last`.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; choose from {sorted(SOLVERS)}")
    chosen = SOLVERS[solver]
    shift = chosen.default_shift if shift is None else shift
    if not shift > 0:
        raise ValueError(f"time shift {shift} must be greater than 0")
    if not 0 <= start < 1:
        raise ValueError(f"start {start} must lie in [0, 1)")
    times = chosen.grid(num_steps, shift)
    first, before = times[0], times[-2]
    if before > last > first:
        times = [first + (t - first) * ((last - first) / (before - first)) for t in times[:-2]] + [last, times[-1]]
    return [start] + [t for t in times if t > start] if start > times[0] else times
