import math

import numpy as np
import pytest
import torch
from scipy import stats

from svg_t2i.flow import paths as flow
from svg_t2i.flow.paths import PATHS, LossBins, random_keys, random_normal, random_uniform

paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


# --------------------------------------------------------------------------------------------------------------- paths


@paths
def test_path_goes_from_noise_to_data(path):
    start, end = path.coefficients(torch.zeros(())), path.coefficients(torch.ones(()))
    assert start.sigma == pytest.approx(1, abs=1e-4)
    assert abs(start.alpha) < 0.01  # the VP path keeps a trace of the data
    assert end.alpha == pytest.approx(1)
    assert end.sigma == pytest.approx(0, abs=1e-7)


@paths
def test_derivatives_match_autograd(path):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    c = path.coefficients(t)
    for value, derivative in ((c.alpha, c.d_alpha), (c.sigma, c.d_sigma)):
        (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative.detach(), expected)


@paths
def test_conversions_recover_noise_score_and_velocity(path):
    clean, noise = torch.randn(9, 3, 2, dtype=torch.float64), torch.randn(9, 3, 2, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    x_t, velocity = path.interpolate(clean, noise, t)
    torch.testing.assert_close(path.noise_from_velocity(velocity, x_t, t), noise)
    score = -noise / path.coefficients(t).sigma[:, None, None]
    torch.testing.assert_close(path.score_from_velocity(velocity, x_t, t), score)
    torch.testing.assert_close(path.velocity_from_score(score, x_t, t), velocity)


@paths
def test_score_is_finite_at_pure_noise(path):
    clean, noise, t = torch.randn(4, 3), torch.randn(4, 3), torch.zeros(4)
    x_t, velocity = path.interpolate(clean, noise, t)
    score = path.score_from_velocity(velocity, x_t, t)
    torch.testing.assert_close(score, -noise, atol=1e-3, rtol=1e-3)


def test_diffusion_forms_are_finite_except_sbdm_at_zero():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    for form in flow.DIFFUSION_FORMS:
        w = flow.LINEAR.diffusion(t, form, norm=0.5)
        assert w.shape == t.shape
        assert torch.isfinite(w).all() == (form != "SBDM")
    with pytest.raises(ValueError, match="choose from"):
        flow.LINEAR.diffusion(t, "cubic")


# ----------------------------------------------------------------------------------------------------------- timesteps


def test_shift_fixes_the_ends_and_moves_toward_noise():
    t = torch.linspace(0, 1, 101)
    for num_tokens in (16, 256, 4096):
        shifted = flow.shift_timesteps(t, num_tokens)
        assert shifted[0] == 0
        assert shifted[-1] == 1
        assert (shifted[1:-1] < t[1:-1]).all()
        assert (shifted.diff() > 0).all()
    assert flow.shift_time(0.5, 3.0) == pytest.approx(0.25)


def test_shift_accepts_a_token_count_per_sample():
    t = torch.rand(3)
    counts = torch.tensor([64, 256, 1024])
    expected = torch.stack([flow.shift_timesteps(x, n) for x, n in zip(t, counts.tolist())])
    torch.testing.assert_close(flow.shift_timesteps(t, counts), expected)


def test_lognorm_times_are_logistic_of_a_normal():
    t = flow.draw_timesteps(random_keys(3, torch.arange(20000)), "lognorm", mu=0.7)
    assert stats.kstest(torch.logit(t.double()).numpy(), stats.norm(0.7, 1).cdf).pvalue > 0.01


@pytest.mark.parametrize(("snr_type", "low", "high"), [("uniform", 0, 1), ("uniform_0.2_0.7", 0.2, 0.7)])
def test_uniform_times_fill_their_range(snr_type, low, high):
    t = flow.draw_timesteps(random_keys(4, torch.arange(20000)), snr_type)
    assert stats.kstest(t.numpy(), stats.uniform(low, high - low).cdf).pvalue > 0.01


@pytest.mark.parametrize("name", ["unifrom", "uniform_0.7_0.2", "uniform_0_2", "uniform_a_b", "uniform_0.1", ""])
def test_unknown_timestep_distribution_is_an_error(name):
    with pytest.raises(ValueError, match="snr_type"):
        flow.sample_timesteps(torch.rand(3), name)


def test_vp_times_stay_below_one():
    t = flow.sample_timesteps(torch.ones(2), "uniform", path=flow.VP)
    assert (t < 1).all()


# ---------------------------------------------------------------------------------------------------------------- loss

LENGTHS = (6, 1, 4, 6)


def packed_batch(channels=5):
    total = sum(LENGTHS)
    return torch.randn(total, channels), torch.randn(total, channels), torch.rand(len(LENGTHS))


@paths
def test_packed_list_and_dense_batches_agree(path):
    clean, noise, t = packed_batch()
    x_t, target = flow.interpolate(clean, noise, t, LENGTHS, path)
    prediction = torch.randn_like(target)
    loss = flow.flow_loss(prediction, target, LENGTHS)
    lists = flow.interpolate(list(clean.split(LENGTHS)), list(noise.split(LENGTHS)), t, path=path)
    torch.testing.assert_close(torch.cat(lists[0]), x_t)
    torch.testing.assert_close(torch.cat(lists[1]), target)
    torch.testing.assert_close(flow.flow_loss(list(prediction.split(LENGTHS)), lists[1]), loss)
    for i, (c, n, p) in enumerate(zip(clean.split(LENGTHS), noise.split(LENGTHS), prediction.split(LENGTHS))):
        x, v = flow.interpolate(c[None], n[None], t[i : i + 1], path=path)
        torch.testing.assert_close(x[0], x_t.split(LENGTHS)[i])
        torch.testing.assert_close(flow.flow_loss(p[None], v)[0], loss[i])


def test_packed_loss_has_the_gradient_of_per_sample_means():
    prediction, target, _ = packed_batch()
    prediction.requires_grad_()
    (grad,) = torch.autograd.grad(flow.flow_loss(prediction, target, LENGTHS).mean(), prediction)
    plain = sum((p - q).square().mean() for p, q in zip(prediction.split(LENGTHS), target.split(LENGTHS))) / 4
    torch.testing.assert_close(grad, torch.autograd.grad(plain, prediction)[0])


def test_loss_of_half_precision_is_summed_in_float32():
    prediction = torch.full((4096, 8), 1.0, dtype=torch.bfloat16)
    loss = flow.flow_loss(prediction, torch.zeros_like(prediction), (4095, 1))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, torch.ones(2))


def test_interpolation_keeps_the_latents_dtype():
    clean = torch.randn(2, 3).bfloat16()
    x_t, target = flow.interpolate(clean, clean, torch.rand(2))
    assert x_t.dtype == target.dtype == torch.bfloat16


@pytest.mark.parametrize("lengths", [(3, 3), (7, 0), (-1, 8), ()])
def test_lengths_that_do_not_fit_are_an_error(lengths):
    with pytest.raises(ValueError, match="lengths"):
        flow.sample_mean(torch.randn(7, 2), lengths)


def test_times_must_be_one_per_sample():
    with pytest.raises(ValueError, match="per-sample"):
        flow.interpolate(torch.randn(7, 2), torch.randn(7, 2), torch.rand(3), (3, 4))


def test_keys_must_be_one_per_sample():
    with pytest.raises(ValueError, match="keys"):
        random_normal(torch.arange(3), (2,), (3, 4))


def test_index_made_under_inference_mode_serves_training():
    flow._token_index.cache_clear()
    with torch.inference_mode():
        flow.sample_mean(torch.randn(7, 2), (3, 4))
    x = torch.randn(7, 2, requires_grad=True)
    flow.sample_mean(x, (3, 4)).sum().backward()
    torch.testing.assert_close(x.grad.sum(), torch.tensor(2.0))


def test_nothing_on_the_training_path_reads_the_device():
    """The meta device holds no values: any .item(), .tolist() or boolean mask would raise."""
    meta = torch.device("meta")
    keys = torch.zeros(4, dtype=torch.int64, device=meta)
    clean = torch.zeros(sum(LENGTHS), 5, device=meta)
    t = flow.shift_timesteps(flow.draw_timesteps(keys, "lognorm"), torch.zeros(4, device=meta))
    x_t, target = flow.interpolate(clean, random_normal(keys, (5,), LENGTHS), t, LENGTHS)
    loss = flow.flow_loss(x_t, target, LENGTHS)
    LossBins(device=meta).update(t, loss)
    assert loss.shape == (4,)


def test_loss_bins_match_a_histogram():
    bins = LossBins(20)
    times, losses = np.random.default_rng(0).random(400) * 0.9, np.random.default_rng(1).random(400)
    times[:2] = 0.0, 0.05  # bin edges belong to the upper bin
    for part in range(4):
        rows = slice(part * 100, part * 100 + 100)
        bins.update(torch.tensor(times[rows]), torch.tensor(losses[rows]))
    expected = stats.binned_statistic(times, losses, "mean", 20, (0, 1)).statistic  # nan above 0.9
    np.testing.assert_allclose(bins.pop(), expected, rtol=1e-5)
    assert all(math.isnan(x) for x in bins.pop())


def test_one_bad_loss_spoils_its_own_bin_only():
    bins = LossBins(4)
    bins.update(torch.tensor([0.1, 0.6, 1.0]), torch.tensor([1.0, math.nan, 3.0]))
    assert str(bins.pop()) == "[1.0, nan, nan, 3.0]"


# -------------------------------------------------------------------------------------------------------------- random


def test_mixer_is_splitmix64():
    state = 1234567 + flow._GOLDEN * torch.arange(1, 5)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [x % 2**64 for x in flow._mix(state).tolist()] == published


def test_noise_does_not_depend_on_batch_or_layout():
    keys = random_keys(7, torch.tensor([5, 0, 99, 1234567890123]))
    noise = random_normal(keys, (3, 4, 6))
    for i in range(4):
        assert torch.equal(random_normal(keys[i : i + 1], (3, 4, 6))[0], noise[i])
    lengths = (5, 12, 1, 7)
    packed = random_normal(keys, (6,), lengths)
    assert packed.shape == (25, 6)
    for part, length, sample in zip(packed.split(lengths), lengths, noise):
        assert torch.equal(part, sample.reshape(12, 6)[:length])
    patches = random_normal(keys, (2, 6), (2, 1, 6, 3))  # tokens of two rows
    assert torch.equal(patches.reshape(-1, 6)[:4], noise[0].reshape(12, 6)[:4])


def test_streams_seeds_and_positions_differ():
    positions = torch.arange(50)
    keys = torch.cat([random_keys(seed, positions) for seed in range(20)])
    assert keys.unique().numel() == 1000
    a, b = random_normal(keys, (8,), stream=0), random_normal(keys, (8,), stream=1)
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.numel())


def numbers(kind, count=40000):
    """The same generator read along different axes; keys are plain small integers, the hardest case."""
    if kind == "one key":
        return random_normal(torch.tensor([1]), (count // 100, 100)).flatten()
    if kind == "one element of many keys":
        return random_normal(torch.arange(count), (1,)).flatten()
    if kind == "second of a pair":
        return random_normal(torch.arange(count), (2,))[:, 1]
    return random_normal(torch.arange(count // 400) * 2**40, (20, 20)).flatten()  # "far keys"


@pytest.mark.parametrize("kind", ["one key", "one element of many keys", "second of a pair", "far keys"])
def test_numbers_are_normal(kind):
    x = numbers(kind).double().numpy()
    assert stats.kstest(x, "norm").pvalue > 0.01
    assert stats.kstest(x**2, stats.chi2(1).cdf).pvalue > 0.01
    assert abs(stats.kurtosis(x)) < 5 * math.sqrt(24 / len(x))
    assert 3.5 < np.abs(x).max() < 6.5


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_uniform_numbers_are_uniform_and_inside(stream):
    u = random_uniform(torch.arange(40000), stream).double().numpy()
    assert stats.kstest(u, "uniform").pvalue > 0.01
    assert u.min() > 0
    assert u.max() < 1
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 4 / math.sqrt(len(u))


def test_neighbours_are_uncorrelated():
    x = random_normal(torch.arange(400), (10, 16)).double().numpy()  # (keys, rows, channels)
    bound = 4 / math.sqrt(x.size)
    for name, a, b in (
        ("keys", x[1:], x[:-1]),
        ("rows", x[:, 1:], x[:, :-1]),
        ("channels", x[..., 1:], x[..., :-1]),
        ("pairs", x[..., :8], x[..., 8:]),
        ("pair sizes", x[..., :8] ** 2, x[..., 8:] ** 2),
    ):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 1.5 * bound, name


def test_covariance_of_samples_is_white():
    """Eigenvalues of a 64 x 64 sample covariance fill the Marchenko-Pastur range and no more."""
    x = random_normal(random_keys(0, torch.arange(4096)), (8, 8)).reshape(4096, 64).double()
    spectrum = torch.linalg.eigvalsh(x.T @ x / 4096)
    edge = math.sqrt(64 / 4096)
    assert (1 - edge) ** 2 - 0.03 < spectrum[0]
    assert spectrum[-1] < (1 + edge) ** 2 + 0.03


def test_random_numbers_stay_those_of_earlier_runs():
    """Numbers that must not change: noise and time of a training sample are these for ever."""
    keys = random_keys(3, torch.tensor([0, 1, 12345]))
    assert keys.tolist() == [-2886753501206757670, -3405980900428447358, 7162037103826835885]
    uniform = [0.9795532822608948, 0.04023104906082153, 0.04896467924118042]
    assert random_uniform(keys).tolist() == flow.draw_timesteps(keys).tolist() == uniform
    expected = torch.tensor([
        [[0.505425751209259, -2.5500130653381348], [0.6076088547706604, -0.4846951365470886]],
        [[-0.6595078110694885, 0.2125866860151291], [-0.4015534222126007, 0.6028248071670532]],
    ])  # fmt: skip
    torch.testing.assert_close(random_normal(keys[:2], (2, 2)), expected)
    other = torch.tensor([[0.19220159947872162, -1.4192496538162231, -0.06615014374256134]])
    torch.testing.assert_close(random_normal(keys[:1], (3,), stream=1), other)
