"""Distances against plain double loops, scipy and what the definitions say of known distributions."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.kid import poly_mmd

from svg_t2i.evaluation import distances
from svg_t2i.evaluation.distances import frechet_distance, median_distance, mmd, polynomial_mmd, precision_recall


def kernel_mean(x, y, bandwidth, skip):
    pairs = [(a, b) for (i, a), (j, b) in itertools.product(enumerate(x), enumerate(y)) if not skip(i, j)]
    return np.mean([np.exp(-((a - b) ** 2).sum() / (2 * bandwidth**2)) for a, b in pairs])


def test_mmd_is_the_double_sum(monkeypatch):
    monkeypatch.setattr(distances, "CHUNK", 4)  # several blocks
    x, y = torch.randn(9, 5), torch.randn(7, 5) + 0.5
    a, b = x.numpy(), y.numpy()
    expected = kernel_mean(a, a, 1.3, int.__eq__) + kernel_mean(b, b, 1.3, int.__eq__)
    assert mmd(x, y, 1.3) == pytest.approx(expected - 2 * kernel_mean(a, b, 1.3, lambda i, j: False), abs=1e-6)
    own = [0, 0, 0, 4, 4, 4, 6, 6, 6]  # three images of each of three captions
    expected = kernel_mean(a, a, 1.3, lambda i, j: own[i] == own[j]) + kernel_mean(b, b, 1.3, int.__eq__)
    expected -= 2 * kernel_mean(a, b, 1.3, lambda i, j: own[i] == j)
    assert mmd(x, y, 1.3, own) == pytest.approx(expected, abs=1e-6)


def test_mmd_is_unbiased():
    """Means over many draws: zero for equal distributions, the closed form for two shifted normal ones."""
    shift, bandwidth = 1.0, 1.0
    equal = [mmd(torch.randn(6, 1), torch.randn(6, 1), bandwidth) for _ in range(1500)]
    assert np.mean(equal) == pytest.approx(0, abs=3 * np.std(equal) / len(equal) ** 0.5)
    assert min(equal) < 0
    pairs = [(x, x + 0.1 * torch.randn(6, 1)) for x in torch.randn(1500, 6, 1)]  # equal up to little: 1.00 and 1.005
    shared = [mmd(x, y, bandwidth, range(6)) for x, y in pairs]
    assert np.mean(shared) == pytest.approx(0, abs=3 * np.std(shared) / len(shared) ** 0.5 + 1e-3)
    assert np.mean([mmd(x, y, bandwidth) for x, y in pairs]) < -0.05  # what leaving out the shared pairs is for
    apart = [mmd(torch.randn(6, 1) + shift, torch.randn(6, 1), bandwidth) for _ in range(1500)]
    # E k(a, b) for a − b ~ N(m, 2): sqrt(σ²/(σ²+2)) · exp(−m²/(2(σ²+2)))
    scale = (bandwidth**2 / (bandwidth**2 + 2)) ** 0.5
    expected = 2 * scale * (1 - np.exp(-(shift**2) / (2 * (bandwidth**2 + 2))))
    assert np.mean(apart) == pytest.approx(expected, abs=4 * np.std(apart) / len(apart) ** 0.5)


def test_polynomial_mmd_is_torchmetrics_kernel_distance(monkeypatch):
    monkeypatch.setattr(distances, "CHUNK", 4)
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64) + 0.5
    assert polynomial_mmd(x, y) == pytest.approx(poly_mmd(x, y).item(), rel=1e-9)
    assert polynomial_mmd(x, y, range(9)) != pytest.approx(polynomial_mmd(x, y), rel=1e-3)


def test_precision_and_recall_are_their_definition(monkeypatch):
    monkeypatch.setattr(distances, "CHUNK", 4)
    made, real = torch.randn(11, 2), 1.5 * torch.randn(14, 2) + 0.7

    def share(rows, others):
        inside = 0
        for row in rows:
            for other in others:
                radius = sorted((other - others).norm(dim=1).tolist())[3]
                if (row - other).norm().item() <= radius:
                    inside += 1
                    break
        return inside / len(rows)

    assert precision_recall(made, real) == pytest.approx((share(made, real), share(real, made)))
    assert precision_recall(real, real) == (1.0, 1.0)
    one = real[:1].repeat(14, 1) + 1e-4 * torch.randn(14, 2)  # one picture over and over: true to life, no variety
    precision, recall = precision_recall(one, real)
    assert precision > 0.9
    assert recall < 0.2
    with pytest.raises(ValueError, match="need more than 3 rows; got 3 and 14"):
        precision_recall(real[:3], real)


@pytest.mark.parametrize(("rows", "others"), [(200, 300), (5, 40), (3, 4)])
def test_frechet_distance_is_the_matrix_root_formula(rows, others):
    x = torch.randn(rows, 12, dtype=torch.float64)
    y = 2 * torch.randn(others, 12, dtype=torch.float64) + torch.linspace(0, 1, 12)
    one, other = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = scipy.linalg.sqrtm(one @ other + (0 if min(rows, others) > 12 else 1e-12 * np.eye(12)))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(one + other - 2 * root.real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(x, x + 3) == pytest.approx(9 * 12, rel=1e-9)


def test_median_distance():
    assert median_distance(torch.tensor([[0.0], [1.0], [3.0]])) == 2


@pytest.mark.parametrize("call", [
    lambda: mmd(torch.zeros(1, 2), torch.zeros(3, 2), 1.0),
    lambda: mmd(torch.zeros(3, 2), torch.zeros(3, 2), 0.0),
    lambda: frechet_distance(torch.zeros(1, 2), torch.zeros(3, 2)),
])  # fmt: skip
def test_too_little_is_refused(call):
    with pytest.raises(ValueError, match="two rows"):
        call()
