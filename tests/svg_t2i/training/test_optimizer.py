"""Schedules, averages, AdamW with moments made in advance, and the guard against bad gradients."""

import copy
import math

import pytest
import torch

from autoencoder.common.config import UserError
from svg_t2i.training.optimizer import UpdateGuard, ema_decay, ema_update, learning_rate, make_optimizer
from svg_t2i.training.settings import OptimConfig


def rates(steps, **settings):
    return [learning_rate(step, OptimConfig(lr=1.0, **settings), steps) for step in range(steps)]


def test_warm_up_is_linear_then_constant():
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(2) == [1.0, 1.0]


def test_cosine_follows_torch():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8, eta_min=0.1)
    expected = []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates(8, schedule="cosine", final_lr=0.1) == pytest.approx(expected)
    assert rates(10, schedule="cosine", final_lr=0.1, warmup_steps=2)[2:] == pytest.approx(expected)


def test_wsd_is_constant_and_then_descends():
    actual = rates(8, schedule="wsd", decay_steps=4, warmup_steps=2, final_lr=0.2)
    assert actual == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4])


def test_rate_stays_at_its_end_beyond_the_last_step():
    optim = OptimConfig(lr=1.0, schedule="wsd", decay_steps=4, final_lr=0.2)
    assert learning_rate(20, optim, max_steps=8) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "settings", [{"schedule": "wsd"}, {"decay_steps": 3}, {"final_lr": 2.0}, {"warmup_steps": -1}, {"lr": 0.0}]
)
def test_settings_that_say_nothing_sensible_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings)) if "schedule" not in settings else "decay_steps"):
        OptimConfig(**{"lr": 1.0} | settings)


def test_ema_update_is_the_weighted_mean():
    weights, ema = [torch.randn(3, 5), torch.randn(7)], [torch.randn(3, 5), torch.randn(7)]
    expected = [0.95 * e.double() + 0.05 * w.double() for e, w in zip(ema, weights)]
    ema_update(ema, weights, 0.95)
    for actual, value in zip(ema, expected):
        torch.testing.assert_close(actual.double(), value, atol=1e-7, rtol=0)


def test_ema_decay_rises_to_its_value():
    assert [ema_decay(step, 0.5, warmup=True) for step in (0, 2, 8, 100)] == [0.1, 0.25, 0.5, 0.5]
    assert ema_decay(0, 0.5, warmup=False) == 0.5


def test_optimizer_matches_plain_adamw():
    """Moments made in advance, and the skip flag at 0, change nothing about AdamW."""
    module = torch.nn.Linear(4, 3)
    plain = copy.deepcopy(module)
    optimizer = make_optimizer(module.parameters(), OptimConfig(lr=1e-2, weight_decay=0.1))
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.1)
    optimizer.found_inf = torch.zeros(())
    x = torch.randn(8, 4)
    for _ in range(5):
        for model, one in ((module, optimizer), (plain, reference)):
            model(x).square().mean().backward()
            one.step()
            one.zero_grad()
    torch.testing.assert_close(module.weight, plain.weight, atol=1e-6, rtol=0)


def test_guard_skips_what_is_not_finite():
    guard = UpdateGuard(None, torch.device("cpu"))
    assert [guard.skip(torch.tensor(norm)).item() for norm in (1.0, math.inf, math.nan, 1e30)] == [0, 1, 1, 0]


def test_guard_skips_spikes_and_gets_used_to_them():
    guard = UpdateGuard(3.0, torch.device("cpu"))
    norms = [math.nan, 1.0, 1.1, 2.9, 10.0, math.inf, 1.0]
    assert [guard.skip(torch.tensor(norm)).item() for norm in norms] == [1, 0, 0, 0, 1, 1, 0]
    mean = guard.mean_norm.item()
    assert 1 < mean < 1.2
    skipped = [guard.skip(torch.tensor(10.0)).item() for _ in range(60)]
    assert skipped[0] == 1
    assert skipped[-1] == 0  # norms that stay high are the new normal
