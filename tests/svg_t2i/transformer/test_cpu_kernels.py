"""The fast forms of element-wise arithmetic against float64, and against the formulas they replace."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from svg_t2i.transformer import cpu_kernels as fused
from svg_t2i.transformer.attention import Segments, attention
from svg_t2i.transformer.cpu_kernels import attended_heads, gated_product, rms_norm, rotate, rotated_heads

LENGTHS = (2, 2, 5)
OWNER = torch.tensor([1, 0, 2], dtype=torch.int32).repeat_interleave(torch.tensor(LENGTHS))
SEGMENTS = Segments.build(LENGTHS, torch.tensor([0, 2, 4, 9], dtype=torch.int32), OWNER)


@pytest.fixture(params=["fast", "formula"])
def form(request, monkeypatch):
    """Each test runs on the fast form and on the formula."""
    if request.param == "formula":
        monkeypatch.setattr(fused, "works_fast", lambda *tensors: False)


def leaves(*shapes, dtype=torch.float32):
    """The same random values twice, to differentiate by: in dtype and in float64."""
    single = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return single, [x.detach().double().requires_grad_() for x in single]


def assert_same(actual, expected, single, double, atol=1e-5):
    """Equal results and gradients, up to rounding."""
    torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=0)
    upstream = torch.randn(actual.shape).to(actual.dtype)
    actual.backward(upstream)
    expected.backward(upstream.double())
    for x, x64 in zip(single, double, strict=True):
        assert x.grad.dtype == x.dtype
        torch.testing.assert_close(x.grad.double(), x64.grad, atol=2 * atol, rtol=0)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("weight_shape", [(12,), (1, 12), (3, 12)], ids=["weight", "one gain", "gain per sample"])
def test_rms_norm_equals_torch(weight_shape, residual):
    single, double = leaves((9, 12), weight_shape, *([(9, 12)] if residual else []))
    (x, weight, *rest), (x64, weight64, *rest64) = single, double
    per_token = weight64[OWNER.long()] if len(weight_shape) == 2 and weight_shape[0] > 1 else weight64
    expected = F.rms_norm(x64, (12,), eps=1e-2) * per_token + (rest64[0] if residual else 0)
    assert_same(rms_norm(x, weight, 1e-2, SEGMENTS, *rest), expected, single, double)


@pytest.mark.usefixtures("form")
def test_gated_product_equals_torch():
    single, double = leaves((5, 8), (5, 8))
    assert_same(gated_product(*single), F.silu(double[0]) * double[1], single, double)


def attended(heads, counts, weights, rope):
    """Both forms, as the model chooses between them."""
    if weights and fused.works_fast(heads):
        return attended_heads(heads, counts, weights, 1e-6, rope, SEGMENTS)
    return attention(*rotated_heads(heads, counts, weights or None, 1e-6, rope), SEGMENTS)


def reference_attention(heads, counts, weights, angles):
    """What `attended_heads` computes, a sample at a time, in float64."""
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)

    def turned(x, *weight):
        x = F.rms_norm(x, x.shape[-1:], eps=1e-6) * weight[0] if weight else x
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

    q, k, v = heads.split(counts, dim=1)
    q, k = turned(q, *weights[:1]), turned(k, *weights[1:])
    k, v = (x.repeat_interleave(counts[0] // counts[1], dim=1) for x in (k, v))
    attended = []
    for q_i, k_i, v_i in zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q_i, k_i) / q.shape[-1] ** 0.5
        attended.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v_i))
    return torch.cat(attended)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("counts", [(4, 2, 2), (3, 3, 3), (2, 1, 1)])
def test_heads_are_normalised_turned_and_attended(counts, normed):
    single, double = leaves((9, sum(counts), 6), *([(6,), (6,)] if normed else []))
    angles = torch.randn(9, 1, 3)
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1)
    actual = attended(single[0], counts, tuple(single[1:]), rope)
    assert_same(actual, reference_attention(double[0], counts, double[1:], angles), single, double)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_loses_no_more_than_its_rounding(autocast):
    angles = torch.randn(9, 1, 4)
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1)
    x, double = leaves((9, 32), (3, 32), (8,), (8,), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        gained = rms_norm(x[0], x[1], 1e-5, SEGMENTS, residual=x[0])
        heads = attended(gained.view(9, 4, 8), (2, 1, 1), tuple(x[2:]), rope)
        actual = gated_product(heads, heads)
    gained = double[0] + F.rms_norm(double[0], (32,), eps=1e-5) * double[1][OWNER.long()]
    heads = reference_attention(gained.view(9, 4, 8), (2, 1, 1), double[2:], angles)
    assert actual.dtype == torch.bfloat16
    assert_same(actual, F.silu(heads) * heads, x, double, atol=0.2)


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


@pytest.mark.parametrize(
    ("device", "dtype", "fast"),
    [
        ("cpu", torch.float32, True),
        ("cpu", torch.bfloat16, True),
        ("cpu", torch.float16, False),
        ("cpu", torch.float64, False),
        ("cuda", torch.float32, False),
        ("cuda", torch.bfloat16, False),
    ],
)
def test_fast_forms_are_for_single_and_bfloat16_on_the_cpu(device, dtype, fast, monkeypatch):
    """Fake tensors have a device and no values, so no GPU is needed."""
    with FakeTensorMode():
        x, single = torch.empty(3, 4, device=device, dtype=dtype), torch.empty(4)
    assert fused.works_fast(x) is fused.works_fast(single, x) is fused.works_fast(x, None, single) is fast
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not fused.works_fast(x)


def test_on_cuda_the_formulas_are_taken():
    with FakeTensorMode():
        x = torch.empty(9, 12, device="cuda", requires_grad=True)
        assert type(rms_norm(x, torch.empty(12, device="cuda"), 1e-5).grad_fn).__name__ != "_RMSNormBackward"
        assert type(gated_product(x, x).grad_fn).__name__ == "MulBackward0"
    x = torch.ones(9, 12, requires_grad=True)
    assert type(rms_norm(x, torch.ones(12), 1e-5).grad_fn).__name__ == "_RMSNormBackward"
    assert type(gated_product(x, x).grad_fn).__name__ == "_GatedProductBackward"
