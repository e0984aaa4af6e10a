"""The fast forms of element-wise arithmetic against float64, and against the formulas they replace."""

import pytest
import torch
import torch.nn.functional as F

from svg_t2i import fused
from svg_t2i.fused import gated_product, rms_norm, rotate, rotated_heads

OWNER = torch.tensor([1, 1, 1, 0, 0, 2, 2, 2, 2], dtype=torch.int32)


@pytest.fixture(params=["fast", "formula"])
def form(request, monkeypatch):
    """Each test runs on the fast form and on the formula."""
    if request.param == "formula":
        monkeypatch.setattr(fused, "works_fast", lambda *tensors: False)


def leaves(*shapes):
    """The same random values twice, to differentiate by: float32 and float64."""
    single = [torch.randn(shape, requires_grad=True) for shape in shapes]
    return single, [x.detach().double().requires_grad_() for x in single]


def assert_same(actual, expected, single, double):
    """Equal results and gradients, up to float32 rounding."""
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)
    upstream = torch.randn(actual.shape)
    actual.backward(upstream)
    expected.backward(upstream.double())
    for x, x64 in zip(single, double, strict=True):
        torch.testing.assert_close(x.grad.double(), x64.grad, atol=2e-5, rtol=0)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("weight_shape", [(12,), (1, 12), (3, 12)], ids=["weight", "one gain", "gain per sample"])
def test_rms_norm_equals_torch(weight_shape, residual):
    single, double = leaves((9, 12), weight_shape, *([(9, 12)] if residual else []))
    (x, weight, *rest), (x64, weight64, *rest64) = single, double
    per_token = weight64[OWNER] if len(weight_shape) == 2 and weight_shape[0] > 1 else weight64
    expected = F.rms_norm(x64, (12,), eps=1e-2) * per_token + (rest64[0] if residual else 0)
    assert_same(rms_norm(x, weight, 1e-2, OWNER, *rest), expected, single, double)


@pytest.mark.usefixtures("form")
def test_gated_product_equals_torch():
    single, double = leaves((5, 8), (5, 8))
    assert_same(gated_product(*single), F.silu(double[0]) * double[1], single, double)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("counts", [(4, 2, 2), (3, 3, 3), (2, 1, 1)])
def test_heads_are_normalised_and_turned(counts, normed):
    single, double = leaves((7, sum(counts), 6), *([(6,), (6,)] if normed else []))
    angles = torch.randn(7, 1, 3)
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1)
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)

    def reference(x, *weight):
        x = F.rms_norm(x, (6,), eps=1e-6) * weight[0] if weight else x
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2)).contiguous()) * turns).flatten(-2)

    q, k, v = double[0].split(counts, dim=1)
    expected = torch.cat([reference(q, *double[1:2]), reference(k, *double[2:3]), v], dim=1)
    actual = rotated_heads(single[0], counts, tuple(single[1:]) or None, 1e-6, rope)
    assert [x.shape[1] for x in actual] == list(counts)
    assert_same(torch.cat(actual, dim=1), expected, single, double)


@pytest.mark.parametrize("compiling", [False, True])
def test_rotate_turns_neighbouring_channels(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x, angles = torch.randn(5, 2, 6), torch.randn(5, 1, 3)
    rope = torch.stack((angles.cos(), angles.sin()), dim=-1)
    turned = rotate(x, rope)
    for i in range(3):
        matrix = torch.stack([rope[..., i, 0], -rope[..., i, 1], rope[..., i, 1], rope[..., i, 0]], -1).view(5, 2, 2)
        expected = torch.einsum("tij,thj->thi", matrix, x[..., 2 * i : 2 * i + 2])
        torch.testing.assert_close(turned[..., 2 * i : 2 * i + 2], expected)
