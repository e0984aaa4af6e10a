"""Attention over packed sequences: the only attention function of svg_t2i.

All samples of a batch lie one behind the other in a single (T, heads, head_dim) tensor, without padding; `Segments`
says where each one begins. Shapes: T tokens of all samples, Hq query heads, Hkv key/value heads, D head_dim.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.nn.attention.varlen import varlen_attn

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
BACKENDS = ("auto", "sdpa", *KERNELS)
HEAD_DIM_MULTIPLE = 8  # of the variable-length kernel
VARLEN_KNOWS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not yet in torch 2.10

# By major compute capability, the tokens of the longest sample from which cuDNN is worth more than flash, although it
# wants a key/value head for each query head. Measured: "Attention" in docs/benchmarks.md. Other GPUs take flash.
CUDNN_FROM = {9: 2048}
CUDNN_STEP = 128  # cuDNN prepares itself for every new longest length, so it is told the next multiple


@dataclass(frozen=True)
class Segments:
    """Positions of each sample's tokens in a packed sequence.

    Lengths are host integers, so that nothing has to be read back from the device. The CPU path works on runs of
    neighbours of equal length: sort the samples by length, and there are as many runs as distinct lengths.
    """

    lengths: tuple[int, ...]
    max_length: int
    runs: tuple[tuple[int, int], ...]  # (samples, tokens per sample), in order of appearance
    cu_seqlens: Tensor  # (samples + 1,) int32, on the device: cumulative lengths
    owner: Tensor  # (T,) int32, on the device: index into the batch of the sample that a token belongs to
    order: Tensor  # (samples,) int64, on the device: index into the batch of each sample, as they lie here
    packed_kernels: tuple[str, ...]  # that take all samples in one call, in half precision on CUDA; the fastest first

    @classmethod
    def build(cls, lengths: Sequence[int], cu_seqlens: Tensor, owner: Tensor) -> Segments:
        lengths = tuple(int(length) for length in lengths)
        runs = tuple((len(list(run)), length) for length, run in groupby(lengths))
        order = owner.index_select(0, cu_seqlens[:-1]).long()
        longest = max(lengths)
        return cls(lengths, longest, runs, cu_seqlens, owner, order, packed_kernels(cu_seqlens.device, longest))


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: str = "auto") -> Tensor:
    """softmax(q kᵀ / √D) v within each sample. q (T, Hq, D), k and v (T, Hkv, D) -> (T, Hq, D), Hq a multiple of Hkv.

    Each key/value head serves Hq / Hkv consecutive query heads.

    backend: one of `BACKENDS`. In half precision on CUDA auto takes the fastest variable-length kernel
        (`packed_kernels`), and flash and cudnn take theirs where there is one; all else is one dense call per run of
        equally long samples, by the kernel of that name, or with auto and sdpa by the one that torch chooses.
    """
    kernel = segments.packed_kernels[0] if backend == "auto" else backend
    if kernel in segments.packed_kernels and has_varlen_kernel(q):
        return _varlen(q, k, v, segments.cu_seqlens, segments.max_length, kernel)
    return attention_by_runs(q, k, v, segments, backend)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, kernel: str) -> Tensor:
    head_dim, options = q.shape[-1], {}
    if missing := -head_dim % HEAD_DIM_MULTIPLE:  # NextDiT_3B has 108; zeros change no product and no sum
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
        options["scale"] = head_dim**-0.5
    if kernel == "cudnn":
        longest = -(-longest // CUDNN_STEP) * CUDNN_STEP
    if q.shape[1] != k.shape[1]:
        if VARLEN_KNOWS_GQA and kernel == "flash":  # torch passes over cuDNN where heads are shared
            options["enable_gqa"] = True
        else:
            k, v = _repeat_heads(q, k, v)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    return out[..., :head_dim] if missing else out


def _repeat_heads(q: Tensor, *shared: Tensor) -> Iterator[Tensor]:
    """A key/value head for each query head."""
    return (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in shared)


def packed_kernels(device: torch.device, longest: int) -> tuple[str, ...]:
    """The variable-length kernels of torch on a device, the fastest first for samples of up to `longest` tokens.

    cuDNN's is there from the versions of torch and of cuDNN on, and on the GPUs, for which torch itself chooses it.
    """
    if not _has_packed_cudnn(device):
        return ("flash",)
    return ("cudnn", "flash") if longest >= CUDNN_FROM.get(_generation(device), math.inf) else ("flash", "cudnn")


def _has_packed_cudnn(device: torch.device) -> bool:
    known = getattr(varlen, "_should_use_cudnn", None)
    return device.type == "cuda" and known is not None and known(device.index or 0)


def _generation(device: torch.device) -> int:
    """The major compute capability: 8 is Ampere and Ada, 9 Hopper, 10 and 12 Blackwell."""
    return torch.cuda.get_device_capability(device)[0]


def has_varlen_kernel(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


@torch.compiler.disable  # the runs differ from batch to batch: as constants of a graph they would force recompiling
def attention_by_runs(q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: str = "auto") -> Tensor:
    """`attention` with one dense call per run of equally long samples; auto works on every device and dtype."""
    outputs, kernel = [], KERNELS.get(backend)
    if kernel is not None:  # with enable_gqa torch passes over some of them
        k, v = _repeat_heads(q, k, v)
    with nullcontext() if kernel is None else sdpa_kernel(kernel):
        for q_run, k_run, v_run in heads_by_runs(segments.runs, q, k, v):
            out = F.scaled_dot_product_attention(q_run, k_run, v_run, enable_gqa=q.shape[1] != k.shape[1])
            outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def heads_by_runs(runs: Sequence[tuple[int, int]], *packed: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`by_runs` of packed (T, H, …) tensors, with heads before tokens: (n, H, L, …)."""
    for part in by_runs(runs, *packed):
        yield tuple(x.transpose(1, 2) for x in part)


def by_runs(runs: Sequence[tuple[int, int]], *packed: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For each run of n samples of L tokens its part of packed (T, …) tensors, as (n, L, …)."""
    tokens = [n * length for n, length in runs]
    parts = zip(*(x.split(tokens) for x in packed), strict=True) if len(runs) > 1 else [packed]
    for (n, length), part in zip(runs, parts, strict=True):
        yield tuple(x.view(n, length, *x.shape[1:]) for x in part)
