"""Bytes of a pass through a network, found by running it on tensors without values (torch's meta device).

Where a GPU would run one kernel, the meta device would run its parts and keep what they need: RMS norms and packed
attention are played by functions that keep what the kernels keep. Tests compare the result with CUDA tensors without
values at full size (`tests/cuda`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from svg_t2i.transformer import attention

META = torch.device("meta")
BLOCK = 512  # bytes; what CUDA's allocator rounds up to


@dataclass(frozen=True)
class PassBytes:
    """Bytes of one pass, besides the weights.

    Attributes:
        kept: after the forward pass, for backward.
        peak: most at any time; the gradient of a weight counts until it is complete.
        course: how many gradients (numbers) are complete, and the most bytes while it is so many.
    """

    kept: int
    peak: int
    course: tuple[tuple[int, int], ...] = ()

    def peak_with(self, gradient: float) -> float:
        """The peak where the first backward pass of a step leaves so many bytes for each number of a gradient."""
        return max([self.peak, *(most + gradient * complete for complete, most in self.course)])


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside; the storages of `known` are none of them."""

    def __init__(self, known: Any = ()):
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._sizes:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._sizes[storage._cdata] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _FusedNorm(torch.autograd.Function):
    """What the fused RMS norm keeps: its input, and a number for each row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Inside, networks on the meta device keep what they keep on a GPU; of its kernels the one that keeps most."""
    plain, half, kernels = F.rms_norm, attention.has_varlen_kernel, attention.packed_kernels
    F.rms_norm = lambda x, shape, weight=None, eps=None: _FusedNorm.apply(x, weight)
    attention.has_varlen_kernel = lambda q: True
    cudnn_from = min(attention.CUDNN_FROM.values())
    attention.packed_kernels = lambda device, longest: ("cudnn",) if longest >= cudnn_from else ("flash",)
    try:
        yield
    finally:
        F.rms_norm, attention.has_varlen_kernel, attention.packed_kernels = plain, half, kernels


class _Autocast(TorchFunctionMode):
    """The casts of `torch.autocast`, which does not know the meta device: products in bf16, some others in fp32."""

    LOW = frozenset({"conv2d", "linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention"})
    SINGLE = frozenset({"group_norm", "layer_norm", "pow", "__pow__", "sum", "norm", "exp", "rsqrt", "softmax"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        dtype = torch.bfloat16 if name in self.LOW else torch.float32 if name in self.SINGLE else None
        if dtype is not None:
            args = tuple(_cast(value, dtype) for value in args)
        return func(*args, **(kwargs or {}))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def measure_pass(
    network: nn.Module, run: Callable[[], Tensor], backward: bool = True, autocast: bool = False
) -> PassBytes:
    """Bytes of `run`, a pass through `network`, both on the meta device. autocast: as `torch.autocast` in bf16."""
    weights = list(network.parameters()) + list(network.buffers())
    with kernels_of_a_gpu(), torch.set_grad_enabled(backward), _LiveBytes(weights) as live:
        with _Autocast() if autocast else nullcontext():
            result = run()
        kept = live.now
        if not backward:
            return PassBytes(0, live.peak)
        trained = [weight for weight in network.parameters() if weight.requires_grad]
        course, most = _Course(live), live.peak
        hooks = [weight.register_post_accumulate_grad_hook(course) for weight in trained]
        live.peak = live.now
        result.sum().backward()
    for hook in hooks:
        hook.remove()
    return PassBytes(kept, max([most, *(peak for _, peak in course.points)]), tuple(course.points))


class _Course:
    """Called with a weight whose gradient is complete: notes the bytes until then, and drops the gradient."""

    def __init__(self, live: _LiveBytes):
        self.live, self.complete = live, 0
        self.points: list[tuple[int, int]] = []

    def __call__(self, weight: Tensor) -> None:
        self.points.append((self.complete, self.live.peak))
        self.complete += weight.numel()
        weight.grad = None
        self.live.peak = self.live.now
