"""Packed attention against plain softmax attention, sample by sample."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from svg_t2i.transformer import attention as attention_module
from svg_t2i.transformer.attention import Segments, attention, attention_by_runs


def make_segments(lengths, device="cpu"):
    lengths = torch.tensor(lengths)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    owner = torch.arange(len(lengths)).repeat_interleave(lengths).int()
    return Segments.build(lengths.tolist(), offsets.to(device), owner.to(device))


def plain_attention(q, k, v, lengths):
    """softmax(q kᵀ / √D) v in float64, one sample and one head at a time."""
    outputs, start = [], 0
    group = q.shape[1] // k.shape[1]
    for length in lengths:
        q_i, k_i, v_i = (x[start : start + length].double() for x in (q, k, v))
        heads = []
        for head in range(q.shape[1]):
            scores = q_i[:, head] @ k_i[:, head // group].T / math.sqrt(q.shape[-1])
            heads.append(scores.softmax(dim=-1) @ v_i[:, head // group])
        outputs.append(torch.stack(heads, dim=1))
        start += length
    return torch.cat(outputs)


def random_qkv(tokens, heads, kv_heads, head_dim=8, **options):
    return [torch.randn(tokens, h, head_dim, requires_grad=True, **options) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [1, 4, 4, 9], [6, 2, 6, 1, 2]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_matches_plain_attention_and_its_gradients(lengths, heads, kv_heads):
    qkv = random_qkv(sum(lengths), heads, kv_heads)
    actual, expected = attention(*qkv, make_segments(lengths)), plain_attention(*qkv, lengths)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=0)
    weights = torch.randn_like(actual)
    for grad, reference in zip(
        torch.autograd.grad(actual, qkv, weights),
        torch.autograd.grad(expected, qkv, weights.double()),
        strict=True,
    ):
        torch.testing.assert_close(grad, reference, atol=5e-6, rtol=0)


def test_runs_join_neighbours_of_equal_length():
    segments = make_segments([2, 2, 5, 2])
    assert segments.runs == ((2, 2), (1, 5), (1, 2))
    assert segments.max_length == 5
    assert segments.lengths == (2, 2, 5, 2)


def test_samples_do_not_see_each_other():
    lengths, (q, k, v) = [4, 6, 4], random_qkv(14, 2, 2)
    before = attention(q, k, v, make_segments(lengths))
    with torch.no_grad():
        v[4:10] += 100
        k[4:10] *= -3
    after = attention(q, k, v, make_segments(lengths))
    changed = (before != after).flatten(1).any(dim=1)
    assert not changed[:4].any()
    assert changed[4:10].all()
    assert not changed[10:].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "flash", "cudnn"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_variable_length_kernel_matches_plain_attention(dtype, heads, kv_heads, backend):
    lengths = [1, 17, 130, 17, 300]
    qkv = random_qkv(sum(lengths), heads, kv_heads, head_dim=32, dtype=dtype, device="cuda")
    segments = make_segments(lengths, "cuda")
    actual, by_runs = attention(*qkv, segments, backend), attention_by_runs(*qkv, segments)
    expected = plain_attention(*qkv, lengths)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(by_runs.double(), expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn_like(actual)
    for grad, reference in zip(
        torch.autograd.grad(actual, qkv, weights),
        torch.autograd.grad(expected, qkv, weights.double()),
        strict=True,
    ):
        torch.testing.assert_close(grad, reference.to(dtype), atol=5 * tolerance, rtol=5 * tolerance)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "expected"),
    [
        ("cuda", torch.bfloat16, 8, True),
        ("cuda", torch.float16, 64, True),
        ("cuda", torch.float32, 64, False),
        ("cuda", torch.float64, 64, False),
        ("cuda", torch.bfloat16, 12, True),  # padded: the kernel wants multiples of 8
        ("cpu", torch.bfloat16, 64, False),
    ],
)
def test_half_precision_on_cuda_takes_the_variable_length_kernel(monkeypatch, device, dtype, head_dim, expected):
    """Fake tensors have a device and no values, so no GPU is needed."""
    calls = []

    def varlen_attn(q, k, v, cu_q, cu_k, longest_q, longest_k, **_):
        assert {x.shape[-1] % 8 for x in (q, k, v)} == {0}
        calls.append((cu_q is cu_k is segments.cu_seqlens, longest_q, longest_k))
        return q

    monkeypatch.setattr(attention_module, "varlen_attn", varlen_attn)
    segments = make_segments([2, 5, 3])
    with FakeTensorMode():
        q = torch.empty(10, 4, head_dim, device=device, dtype=dtype)
        assert attention(q, q, q, segments).shape == q.shape
    assert calls == ([(True, 5, 5)] if expected else [])


@pytest.mark.parametrize("head_dim", [8, 12, 108])
def test_padded_heads_give_the_same_result(monkeypatch, head_dim):
    """The kernel is played by torch's dense attention; values and gradients, with shared key heads."""
    segments = make_segments([2, 5, 3])

    def varlen_attn(q, k, v, *_, scale=None, enable_gqa=False):
        assert q.shape[-1] % 8 == 0
        parts = [x.split(segments.lengths) for x in (q, k, v)]
        dense = torch.nn.functional.scaled_dot_product_attention
        outputs = [
            dense(*(x.transpose(0, 1) for x in part), scale=scale, enable_gqa=enable_gqa).transpose(0, 1)
            for part in zip(*parts, strict=True)
        ]
        return torch.cat(outputs)

    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(10, heads, head_dim, generator=generator, requires_grad=True) for heads in (6, 2, 2)]
    weight = torch.randn(10, 6, head_dim, generator=generator)
    results = []
    for kernel in (False, True):
        monkeypatch.setattr(attention_module, "has_varlen_kernel", lambda q, kernel=kernel: kernel)
        monkeypatch.setattr(attention_module, "varlen_attn", varlen_attn)
        out = attention(*qkv, segments)
        results.append([out, *torch.autograd.grad((out * weight).sum(), qkv)])
    for ours, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("knows_gqa", [True, False])
def test_key_heads_are_shared_by_the_kernel_or_repeated_for_it(monkeypatch, knows_gqa):
    given = []
    monkeypatch.setattr(attention_module, "VARLEN_KNOWS_GQA", knows_gqa)
    monkeypatch.setattr(attention_module, "has_varlen_kernel", lambda q: True)
    monkeypatch.setattr(attention_module, "varlen_attn", lambda *tensors, **options: given.append((tensors, options)))
    q, k, v = (x.detach() for x in random_qkv(5, 6, 2, 8))
    attention(q, k, v, make_segments([5]))
    attention(q, q, q, make_segments([5]))
    (tensors, options), (_, plain) = given
    assert options == ({"enable_gqa": True} if knows_gqa else {})
    assert plain == {}  # equally many heads need no sharing
    kept = k if knows_gqa else k[:, [0, 0, 0, 1, 1, 1]]
    assert torch.equal(tensors[1], kept)
    assert torch.equal(tensors[2], v if knows_gqa else v[:, [0, 0, 0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("generation", "longest", "expected"),
    [
        (9, 2047, ("flash", "cudnn")),
        (9, 2048, ("cudnn", "flash")),
        (10, 4224, ("flash", "cudnn")),  # not measured there
        (None, 4224, ("flash",)),  # torch has no such kernel for the GPU, or at all
    ],
)
def test_kernels_are_ordered_by_the_measured_table(monkeypatch, generation, longest, expected):
    monkeypatch.setattr(attention_module, "_has_packed_cudnn", lambda device: generation is not None)
    monkeypatch.setattr(attention_module, "_generation", lambda device: generation)
    assert attention_module.packed_kernels(torch.device("cuda", 0), longest) == expected


def test_torch_is_asked_whether_it_has_the_kernel_of_cudnn(monkeypatch):
    asked = []
    monkeypatch.setattr(attention_module.varlen, "_should_use_cudnn", lambda index: asked.append(index) or True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert attention_module.packed_kernels(torch.device("cpu"), 5000) == ("flash",)
    assert attention_module.packed_kernels(torch.device("cuda", 3), 5000) == ("cudnn", "flash")
    monkeypatch.delattr(attention_module.varlen, "_should_use_cudnn")
    assert attention_module.packed_kernels(torch.device("cuda", 3), 5000) == ("flash",)
    assert asked == [3]


@pytest.mark.parametrize(
    ("backend", "kernels", "shared", "told"),
    [
        ("auto", ("flash", "cudnn"), True, 5),
        ("auto", ("cudnn", "flash"), False, 128),
        ("cudnn", ("flash", "cudnn"), False, 128),
        ("flash", ("cudnn", "flash"), True, 5),
        ("cudnn", ("flash",), None, None),  # one dense call per run of samples instead
    ],
)
def test_cudnn_is_given_heads_of_its_own_and_rounded_lengths(monkeypatch, backend, kernels, shared, told):
    given, dense = [], []
    monkeypatch.setattr(attention_module, "packed_kernels", lambda device, longest: kernels)
    monkeypatch.setattr(attention_module, "VARLEN_KNOWS_GQA", True)
    monkeypatch.setattr(attention_module, "has_varlen_kernel", lambda q: True)
    monkeypatch.setattr(attention_module, "attention_by_runs", lambda *_: dense.append(True))
    monkeypatch.setattr(attention_module, "varlen_attn", lambda *tensors, **options: given.append((tensors, options)))
    q, k, v = (x.detach() for x in random_qkv(8, 6, 2, 8))
    attention(q, k, v, make_segments([3, 5]), backend)
    if shared is None:
        assert dense == [True]
        assert given == []
        return
    ((tensors, options),) = given
    assert options == ({"enable_gqa": True} if shared else {})
    assert torch.equal(tensors[1], k if shared else k[:, [0, 0, 0, 1, 1, 1]])
    assert torch.equal(tensors[2], v if shared else v[:, [0, 0, 0, 1, 1, 1]])
    assert tensors[5:] == (told, told)
