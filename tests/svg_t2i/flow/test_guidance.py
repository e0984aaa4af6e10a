import pytest
import torch

from svg_t2i.flow.guidance import combine, guided_velocity
from svg_t2i.flow.solvers import SOLVERS
from svg_t2i.sampling.options import PRESETS, SamplingOptions, dynamic_shift


@pytest.fixture
def branches():
    return torch.randn(3, 5, 4, 2), torch.randn(3, 5, 4, 2)


def norms(x):
    return x.double().flatten(1).norm(dim=1)


def test_scale_one_is_conditional_and_zero_unconditional(branches):
    v_cond, v_uncond = branches
    torch.testing.assert_close(combine(v_cond, v_uncond, 1.0, renorm_cfg=0), v_cond)
    torch.testing.assert_close(combine(v_cond, v_uncond, 0.0, renorm_cfg=0), v_uncond)


def test_unbounded_guidance_extrapolates(branches):
    v_cond, v_uncond = branches
    expected = v_uncond + 4 * (v_cond - v_uncond)
    torch.testing.assert_close(combine(v_cond, v_uncond, 4.0, renorm_cfg=0), expected)


@pytest.mark.parametrize("bound", [0.6, 1.0])
def test_renormalised_velocity_keeps_direction_and_bound(branches, bound):
    v_cond, v_uncond = branches
    v_cond[0] *= 100  # here the bound is loose: the guided norm is below it or not, per sample
    v_uncond[0] = 0.9 * v_cond[0]
    v_uncond[1] = 2 * v_cond[1]  # guided = -2 v_cond: twice the conditional norm, opposite direction
    free = combine(v_cond, v_uncond, 4.0, renorm_cfg=0)
    bounded = combine(v_cond, v_uncond, 4.0, renorm_cfg=bound)
    expected = torch.minimum(norms(free), bound * norms(v_cond))
    torch.testing.assert_close(norms(bounded), expected, rtol=1e-5, atol=0)
    cosine = (free * bounded).flatten(1).sum(1).double() / (norms(free) * norms(bounded))
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-5, atol=0)


def test_bound_that_is_not_reached_changes_nothing():
    v_cond = torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(combine(v_cond, 2 * v_cond, 1.5, renorm_cfg=1.0), 0.5 * v_cond)


def test_zero_velocities_stay_finite():
    zero = torch.zeros(2, 3)
    assert torch.equal(combine(zero, zero, 4.0), zero)
    assert torch.equal(combine(zero, torch.ones(2, 3), 4.0), zero)  # bound 0


def test_packed_tokens_are_bounded_per_sample():
    lengths = (4, 1, 7)
    v_cond, v_uncond = torch.randn(12, 6), torch.randn(12, 6) * 3
    packed = combine(v_cond, v_uncond, 4.0, 0.8, lengths)
    alone = [
        combine(c[None], u[None], 4.0, 0.8)[0]  # (1, L, C)
        for c, u in zip(v_cond.split(lengths), v_uncond.split(lengths))
    ]
    torch.testing.assert_close(packed, torch.cat(alone))


def test_half_precision_stays_half_precision(branches):
    v_cond, v_uncond = (b.bfloat16() for b in branches)
    guided = combine(v_cond, v_uncond, 4.0)
    assert guided.dtype == torch.bfloat16
    torch.testing.assert_close(guided.float(), combine(v_cond.float(), v_uncond.float(), 4.0), rtol=3e-2, atol=3e-2)


class Branches:
    """Counts how often the pair and the conditional branch run."""

    def __init__(self):
        self.pairs = self.singles = 0

    def pair(self, x, t):
        self.pairs += 1
        return x + t, -x

    def conditional(self, x, t):
        self.singles += 1
        return x + t


@pytest.mark.parametrize(("t", "pairs"), [(0.0, 1), (0.49, 1), (0.5, 0), (1.0, 0)])
def test_truncation_runs_one_branch(t, pairs):
    b = Branches()
    x = torch.randn(2, 3)
    v = guided_velocity(b.pair, b.conditional, 3.0, renorm_cfg=0, cfg_trunc=0.5)(x, t)
    assert (b.pairs, b.singles) == (pairs, 1 - pairs)
    torch.testing.assert_close(v, -x + 3 * (2 * x + t) if pairs else x + t)


@pytest.mark.parametrize("t", [1.0, 1.02])  # Heun looks at t = 1, dopri5 beyond
def test_no_truncation_guides_to_the_very_end(t):
    b = Branches()
    guided_velocity(b.pair, b.conditional, 3.0, cfg_trunc=1.0)(torch.randn(2, 3), t)
    assert (b.pairs, b.singles) == (1, 0)


@pytest.mark.parametrize(("renorm_cfg", "pairs"), [(0, 0), (1.0, 0), (1.5, 0), (0.5, 1)])
def test_scale_one_skips_the_pair_where_the_bound_cannot_bite(renorm_cfg, pairs):
    b = Branches()
    x = torch.randn(2, 3)
    v = guided_velocity(b.pair, b.conditional, 1.0, renorm_cfg)(x, 0.3)
    assert (b.pairs, b.singles) == (pairs, 1 - pairs)
    torch.testing.assert_close(v, (x + 0.3) * (0.5 if pairs else 1.0))


def test_one_scale_a_sample(branches):
    v_cond, v_uncond = branches
    scales = [1.0, 2.5, 7.0]
    together = combine(v_cond, v_uncond, torch.tensor(scales))
    for i, scale in enumerate(scales):
        torch.testing.assert_close(together[i], combine(v_cond[i : i + 1], v_uncond[i : i + 1], scale)[0])


@pytest.mark.parametrize(
    ("interval", "cfg_trunc", "guided_at"),
    [
        ((0.0, 1.0), 1.0, [0.0, 0.25, 0.5, 0.75, 1.0, 1.01]),
        ((0.25, 0.75), 1.0, [0.25, 0.5]),
        ((0.25, 1.0), 0.5, [0.25]),
        ((0.5, 1.0), 1.0, [0.5, 0.75, 1.0, 1.01]),
    ],
)
def test_interval_decides_where_both_branches_run(branches, interval, cfg_trunc, guided_at):
    ran = []

    def pair(latents, t):
        ran.append(t)
        return branches

    velocity = guided_velocity(pair, lambda x, t: branches[0], 3.0, 0, cfg_trunc, interval=interval)
    for t in (0.0, 0.25, 0.5, 0.75, 1.0, 1.01):
        assert torch.equal(velocity(branches[0], t), branches[0]) == (t not in guided_at)
    assert ran == guided_at


PUBLISHED = {
    "height": 1024, "width": 1024, "num_inference_steps": 50, "guidance_scale": 4.0, "negative_prompt": "",
    "renorm_cfg": 1.0, "cfg_trunc": 1.0, "guidance_interval": (0.0, 1.0), "solver": "dpm", "time_shift": None,
    "system_prompt": "base", "step_cache": 0.0, "internal_guidance": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (None, {}),
        ("stage1", {"height": 256, "width": 256, "time_shift": "dynamic"}),
        ("stage2", {"height": 512, "width": 512, "time_shift": "dynamic"}),
        ("stage3", {}),
        ("stage4", {}),
        (
            "quickstart",
            {"height": 64, "width": 64, "num_inference_steps": 16, "guidance_scale": 2.0, "time_shift": 8.0}
            | {"system_prompt": "empty"},
        ),
    ],
)
def test_options_are_the_published_ones_unless_a_preset_says_otherwise(name, changes):
    assert vars(SamplingOptions() if name is None else PRESETS[name]) == PUBLISHED | changes


def test_time_shifts_are_the_published_ones_at_1024_pixels():
    shifts = {name: solver.default_shift for name, solver in SOLVERS.items()}
    assert shifts == {name: 10.0 if name == "dpm" else 6.0 for name in SOLVERS}
    assert {name: dynamic_shift(name, 4096) for name in SOLVERS} == shifts
    assert [dynamic_shift("dpm", cells) for cells in (256, 1024)] == [5.2, 5.9]


def test_unnamed_settings_bound_the_norm_by_the_conditional_one_and_guide_everywhere(branches):
    v_cond, v_uncond = branches
    bounded = combine(v_cond, v_uncond, 4.0, renorm_cfg=1.0)
    assert torch.equal(combine(v_cond, v_uncond, 4.0), bounded)
    velocity = guided_velocity(lambda x, t: branches, lambda x, t: v_cond, 4.0)
    assert all(torch.equal(velocity(v_cond, t), bounded) for t in (0.0, 0.5, 1.0))


@pytest.mark.parametrize(
    ("changes", "guided"),
    [
        ({}, True),
        ({"guidance_scale": 1.0}, False),
        ({"guidance_scale": (1.0, 1.0)}, False),
        ({"guidance_scale": (1.0, 3.0)}, True),
        ({"guidance_scale": 1.0, "renorm_cfg": 0.0}, False),
        ({"guidance_scale": 1.0, "renorm_cfg": 0.5}, True),  # the bound shortens the conditional velocity
        ({"cfg_trunc": 0.0}, False),
        ({"cfg_trunc": 0.1}, True),
        ({"guidance_interval": (0.5, 0.5)}, False),
        ({"guidance_interval": (0.5, 0.6), "cfg_trunc": 0.5}, False),
        ({"guidance_interval": (0.5, 0.6), "cfg_trunc": 0.51}, True),
    ],
)
def test_options_know_whether_a_second_branch_is_needed(changes, guided):
    assert SamplingOptions(**changes).is_guided is guided
