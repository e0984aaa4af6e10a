"""Schedulers of diffusers in the place of our solvers."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from autoencoder.common.config import UserError
from svg_t2i.flow.solvers import SOLVERS
from svg_t2i.sampling import schedulers
from tests.svg_t2i.drawing import PROMPT


def on_the_grid_of(scheduler, solver, steps):
    """The latents of one of our solvers on a scheduler's own grid."""
    return lambda velocity, x, _: SOLVERS[solver].solve(velocity, x, schedulers.prepare(scheduler, steps, None)[1])


@pytest.mark.parametrize("start", [{}, {"t": 0.35}])
@pytest.mark.parametrize(
    ("scheduler", "solver", "points", "shift"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=6.0), "euler", 9, 6.0),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "euler", 9, 3.0),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=6.0),
            "dpm",
            8,
            6.0,
        ),
    ],
)
def test_a_scheduler_gives_what_our_solver_of_its_kind_gives(pipeline, scheduler, solver, points, shift, start):
    settings = {"seed": 1, "output_type": "latent", "time_shift": shift}
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    call = (
        (lambda **own: pipeline.variation(image, **start, **own)) if start else (lambda **own: pipeline(PROMPT, **own))
    )
    seen = []
    ours = call(solver=solver, num_inference_steps=points, **settings).images
    theirs = call(
        scheduler=scheduler, num_inference_steps=8, callback_on_step_end=lambda *args: seen.append(args[1]), **settings
    ).images
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert seen == list(range(len(seen)))
    if not start:
        assert len(seen) == 8
        pipeline.scheduler = scheduler  # as a component
        again = call(num_inference_steps=8, **settings).images
        assert torch.equal(again, theirs)


def test_a_scheduler_of_second_order(pipeline):
    """Heun's rule on the scheduler's grid, whose inner times are there twice."""
    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    times = list(dict.fromkeys(schedulers.prepare(scheduler, 8, None)[1]))

    def velocity(x, t):
        return torch.sin(3 * x) - t * x

    noise = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for start in (0.0, 0.4):
        own = [start, *(t for t in times if t > start)] if start else times
        prepared, grid = schedulers.prepare(scheduler, 8, None)
        x = schedulers.integrate(prepared, grid, velocity, noise, None, start)
        expected = SOLVERS["heun"].solve(velocity, noise, own[:-1])  # its last step is Euler's
        expected = expected + (1 - own[-2]) * velocity(expected, own[-2])
        torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EulerDiscreteScheduler(), "it predicts epsilon, and this model is a flow"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "draws noise at every step"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(pipeline, scheduler, message):
    with pytest.raises(UserError, match=message):
        pipeline(PROMPT, scheduler=scheduler)
