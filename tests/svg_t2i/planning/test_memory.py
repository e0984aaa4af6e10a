"""Bytes of passes that can be counted by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svg_t2i.planning.memory import META, _FusedNorm, kernels_of_a_gpu, measure_pass
from svg_t2i.transformer import attention

KIB = 1024


def linear(layers):
    with META:
        return nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(layers)])


def test_a_chain_of_products_keeps_their_inputs():
    """Rows of 256 numbers: each product keeps its input, and the result is there too."""
    for layers in (1, 4):
        network = linear(layers)
        found = measure_pass(network, lambda network=network: network(torch.empty(1024, 256, device=META)))
        assert found.kept == (layers + 1) * 1024 * KIB
        assert found.kept <= found.peak <= found.kept + 4 * 1024 * KIB
        assert all(weight.grad is None for weight in network.parameters())


def test_gradients_come_while_inputs_go():
    """Four products of 256×256 on 1024 rows: an input of 1 MiB goes for each gradient that comes."""
    network = linear(4)
    found = measure_pass(network, lambda: network(torch.empty(1024, 256, device=META)))
    assert [complete for complete, _ in found.course] == [256 * 256 * n for n in range(4)]
    assert found.peak_with(0) == found.peak
    assert found.peak_with(4) < found.peak + 4 * 4 * 256 * 256  # not all of both at one time
    assert found.peak_with(1000) >= 3 * 1000 * 256 * 256


def test_without_gradients_two_are_there_at_a_time():
    found = measure_pass(linear(6), lambda: linear(6)(torch.empty(1024, 256, device=META)), backward=False)
    assert found.kept == 0
    network = linear(6)
    found = measure_pass(network, lambda: network(torch.empty(1024, 256, device=META)), backward=False)
    assert 2 * 1024 * KIB <= found.peak <= 3 * 1024 * KIB


def test_the_norm_keeps_its_input_and_a_number_for_each_row():
    x, weight = torch.empty(64, 32, device=META, requires_grad=True), torch.empty(32, device=META, requires_grad=True)
    out = _FusedNorm.apply(x, weight)
    assert [tuple(kept.shape) for kept in out.grad_fn.saved_tensors] == [(64, 32), (32,), (64,)]
    out.sum().backward()
    assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)


def test_the_stand_ins_are_gone_afterwards():
    before = F.rms_norm, F.group_norm, F.conv2d, attention.has_varlen_kernel, attention.packed_kernels
    with kernels_of_a_gpu():
        assert F.rms_norm is not before[0]
    with pytest.raises(RuntimeError, match="reduction dim|shape|size"), kernels_of_a_gpu():
        torch.empty(2, 3, device=META) @ torch.empty(4, 5, device=META)
    assert (F.rms_norm, F.group_norm, F.conv2d, attention.has_varlen_kernel, attention.packed_kernels) == before
