"""A scheduler of diffusers in the place of a solver.

Its sigma is 1 - t and its velocity, noise - data, is the opposite of ours. The time grid is the scheduler's own, with
`num_inference_steps` evaluations of the model; only with `use_dynamic_shifting` it is shifted by our `time_shift`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from autoencoder.common.config import UserError
from svg_t2i.flow.paths import Velocity
from svg_t2i.flow.solvers import SOLVERS


def check_scheduler(scheduler: Any) -> None:
    """UserError for a scheduler that does not integrate a flow, or draws noise of its own."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    if config is None or not hasattr(scheduler, "set_timesteps"):
        raise UserError(f"scheduler = {name}: give a scheduler of diffusers, such as FlowMatchEulerDiscreteScheduler")
    flow = config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
    if not (name.startswith("FlowMatch") or flow):
        raise UserError(
            f"scheduler = {name}: it predicts {config.get('prediction_type', 'something else')}, and this model is a "
            "flow; give FlowMatchEulerDiscreteScheduler, or one with prediction_type='flow_prediction' and "
            "use_flow_sigmas=True"
        )
    if config.get("stochastic_sampling") or str(config.get("algorithm_type", "")).startswith("sde"):
        raise UserError(f"scheduler = {name}: it draws noise at every step, which seeds do not reach; give one without")


def prepare(scheduler: Any, num_inference_steps: int, shift: float | None) -> tuple[Any, list[float]]:
    """A copy of the scheduler with its time grid set, and that grid: n + 1 times from noise to 1."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler, grid = copy.deepcopy(scheduler), {}
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        grid["sigmas"] = [1 - i / num_inference_steps for i in range(num_inference_steps)]  # before its shift
    if scheduler.config.get("use_dynamic_shifting"):
        grid["mu"] = math.log(SOLVERS["euler"].default_shift if shift is None else shift)
    scheduler.set_timesteps(None if "sigmas" in grid else num_inference_steps, **grid)
    return scheduler, [1 - sigma for sigma in scheduler.sigmas.tolist()]


def integrate(
    scheduler: Any,
    times: list[float],
    velocity: Velocity,
    x: Tensor,
    callback: Callable[[int, float, Tensor], Tensor | None] | None,
    start: float,
) -> Tensor:
    """From x at the time `start` of the grid to the clean latents, as `flow.solvers.sample` does.

    scheduler, times: of `prepare`.
    """
    steps = range(0, len(times) - 1, getattr(scheduler, "order", 1))  # a step of order 2 has two evaluations
    first = next((i for i in reversed(steps) if times[i] <= start), 0)
    if start > times[first]:
        times[first] = start
        scheduler.sigmas[first] = 1 - start
    scheduler.set_begin_index(first)
    for i in range(first, len(times) - 1):
        x = scheduler.step(-velocity(x, times[i]), scheduler.timesteps[i], x, return_dict=False)[0]
        if callback is not None:
            replaced = callback(i - first + 1, times[i + 1], x)
            x = x if replaced is None else replaced
    return x
