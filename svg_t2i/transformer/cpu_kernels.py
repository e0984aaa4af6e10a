"""The element-wise parts of the DiT: plain formulas, and faster forms of them for the CPU.

On a CPU a fresh tensor costs more than the arithmetic that fills it. The fast forms work in place on memory of their
own, in float32 where they sum or rotate, go through a batch by runs of equally long samples, and keep less for the
backward pass, which can be run once through, not differentiated again. GPUs, other dtypes and compiled code take the
formulas; tests hold both to float64.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from svg_t2i.transformer.attention import Segments, by_runs, heads_by_runs

R = TypeVar("R")
Counts = tuple[int, int, int]  # heads that are queries, keys and values


def without_autocast(function: Callable[..., R]) -> Callable[..., R]:
    """The function, computing in the dtypes that it is given."""

    @wraps(function)
    def plain(*args: object) -> R:
        if not torch.is_autocast_enabled("cpu"):
            return function(*args)
        with torch.autocast("cpu", enabled=False):
            return function(*args)

    return plain


def given_dtypes(device: torch.device) -> AbstractContextManager:
    """Inside, autocast is off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def works_fast(*tensors: Tensor | None) -> bool:
    """Whether tensors are float32 or bfloat16 on the CPU, in eager mode."""
    if torch.compiler.is_compiling():
        return False
    return all(x is None or (x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)) for x in tensors)


# ----------------------------------------------------------------------------------------------------------- RMS norm


class _PerToken(torch.autograd.Function):
    """Rows of gain (B, D) by owner (T,). Backward is a matrix product: adding up rows one by one, as that of
    `index_select` does, takes atomic additions on a GPU, which are slow, round at every step and differ by run."""

    @staticmethod
    def forward(ctx, gain: Tensor, owner: Tensor) -> Tensor:
        ctx.save_for_backward(owner)
        ctx.samples = len(gain)
        return gain.index_select(0, owner)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (owner,) = ctx.saved_tensors
        samples = torch.arange(ctx.samples, dtype=owner.dtype, device=owner.device)
        with given_dtypes(grad.device):
            return (samples[:, None] == owner).to(grad.dtype) @ grad, None


def per_token(gain: Tensor, owner: Tensor | None) -> Tensor:
    """(B, D) per sample -> (T, D) per token; (1, D) or (D,), the same for all, stays as it is."""
    return gain if gain.ndim == 1 or len(gain) == 1 else _PerToken.apply(gain, owner)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps) over the last axis, which is kept with size 1."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm_backward_(grad: Tensor, x: Tensor, inverse: Tensor, along: Tensor) -> Tensor:
    """From grad of x / rms(x) to grad of x, in place; inverse = 1 / rms(x), along = sum(grad · x)."""
    return grad.mul_(inverse).addcmul_(x, inverse.pow(3).mul_(along).div_(-x.shape[-1]))


class _RMSNorm(torch.autograd.Function):
    """`rms_norm` of x (T, D); keeps x and 1 / rms(x)."""

    @staticmethod
    @without_autocast
    def forward(
        ctx, x: Tensor, weight: Tensor, eps: float, segments: Segments | None, residual: Tensor | None
    ) -> Tensor:
        single, per_sample = x.float(), weight.ndim == 2 and len(weight) > 1
        inverse, weights = inverse_rms(single, eps), weight.float()
        out = weights.index_select(0, segments.owner).mul_(single) if per_sample else weights * single
        out = out.mul_(inverse) if residual is None else torch.addcmul(residual.float(), out, inverse)
        ctx.save_for_backward(x, weight, inverse, segments.order if per_sample else None)
        ctx.runs = segments.runs if per_sample else ((1, len(x)),)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the result (T, D) -> gradients of x, weight and residual."""
        x, weight, inverse, order = ctx.saved_tensors
        weights = weight.float().view(1, -1) if order is None else weight.index_select(0, order).float()
        single, grad_x, along = x.float(), x.new_empty(x.shape, dtype=torch.float32), torch.empty_like(inverse)
        grad_weights = torch.empty_like(weights)
        views = by_runs(ctx.runs, single, grad.float(), grad_x, inverse, along)
        rows = (x[:, None].split([samples for samples, _ in ctx.runs]) for x in (weights, grad_weights))
        for tokens, weight_run, grad_weight_run in zip(views, *rows, strict=True):
            x_run, grad_run, product, inverse_run, along_run = tokens
            torch.mul(grad_run, x_run, out=product)
            torch.bmm(inverse_run.mT, product, out=grad_weight_run)  # summed over the tokens of each sample
            torch.bmm(product, weight_run.mT, out=along_run)
            torch.mul(grad_run, weight_run, out=product)
        rms_norm_backward_(grad_x, single, inverse, along)
        if order is not None:
            grad_weights = torch.empty_like(grad_weights).index_copy_(0, order, grad_weights)
        residual = grad if ctx.needs_input_grad[4] else None
        return grad_x.to(x.dtype), grad_weights.view(weight.shape), None, None, residual


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, segments: Segments | None = None, residual: Tensor | None = None
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis of x, plus residual, in x's dtype.

    weight: (D,) or (1, D) for all tokens, or (B, D) per sample for x (T, D), packed as `segments` say.
    """
    if x.ndim == 2 and works_fast(x, weight, residual):
        return _RMSNorm.apply(x, weight, eps, segments, residual)
    weight = per_token(weight.to(x.dtype), None if segments is None else segments.owner)
    with given_dtypes(x.device):  # autocast would make it float32, of twice the memory
        normed = F.rms_norm(x, x.shape[-1:], weight if weight.ndim == 1 else None, eps)
        normed = normed if weight.ndim == 1 else normed * weight
    return normed if residual is None else residual + normed


# ------------------------------------------------------------------------------------------------------- feed-forward


class _GatedProduct(torch.autograd.Function):
    """`gated_product`; keeps its two factors, and takes silu(gate) anew."""

    @staticmethod
    def forward(ctx, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return F.silu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        grad_silu = grad * value
        grad_gate = torch.ops.aten.silu_backward.grad_input(grad_silu, gate, grad_input=grad_silu)
        return grad_gate, F.silu(gate).mul_(grad)


def gated_product(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) · value, the middle of SwiGLU (Shazeer 2020); both of one shape."""
    return _GatedProduct.apply(gate, value) if works_fast(gate, value) else F.silu(gate) * value


# ----------------------------------------------------------------------------------------------------- attention heads


class _AttendedHeads(torch.autograd.Function):
    """`attended_heads` by torch's flash attention for CPUs; backward in float32, which is faster than in bfloat16."""

    @staticmethod
    @without_autocast
    def forward(
        ctx, heads: Tensor, counts: Counts, q_weight: Tensor, k_weight: Tensor, eps: float, rope: Tensor,
        segments: Segments,
    ) -> Tensor:  # fmt: skip
        """The arguments of `attended_heads`, weights one by one -> (T, queries, d)."""
        queries, keys, _ = counts
        weights = torch.cat([q_weight.repeat(queries), k_weight.repeat(keys)]).float()  # per channel
        normed, values = heads.split([queries + keys, keys], dim=1)
        single = normed.float()
        inverse, turned = inverse_rms(single, eps), single.new_empty(single.shape)
        torch.mul(single.flatten(1), weights, out=turned.flatten(1))
        turn_(turned.mul_(inverse), torch.view_as_complex(rope))
        turned = turned.to(heads.dtype)
        outputs, logsumexps = [], []
        for qkv in heads_by_runs(segments.runs, *turned.split([queries, keys], dim=1), values):
            out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*qkv)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
            logsumexps.append(logsumexp)
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        ctx.save_for_backward(heads, weights, inverse, rope, turned, out, *logsumexps)
        ctx.counts, ctx.runs = counts, segments.runs
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the result (T, queries, d) -> gradients of heads and of both norms' weights."""
        heads, weights, inverse, rope, turned, out, *logsumexps = ctx.saved_tensors
        queries, keys, _ = ctx.counts
        normed, values = heads.float().split([queries + keys, keys], dim=1)
        grad_heads = torch.empty_like(heads, dtype=torch.float32)
        qk = turned.float().split([queries, keys], dim=1)
        runs = heads_by_runs(ctx.runs, grad.float(), *qk, values, out.float())
        parts = grad_heads.split([n * length for n, length in ctx.runs])
        for tensors, logsumexp, part in zip(runs, logsumexps, parts, strict=True):
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, logsumexp, 0.0, False)
            torch.cat([x.transpose(1, 2).flatten(0, 1) for x in grads], dim=1, out=part)
        grad_turned = grad_heads[:, : queries + keys]
        turn_(grad_turned, torch.view_as_complex(rope).conj().resolve_conj())  # the transpose turns the other way
        product = grad_turned * normed
        columns = torch.block_diag(*weights.view(queries + keys, -1, 1))  # (channels, heads)
        along = product.flatten(1) @ columns
        grad_weights = product.mul_(inverse).sum(dim=0)
        grad_turned.flatten(1).mul_(weights)
        rms_norm_backward_(grad_turned, normed, inverse, along[..., None])
        grad_q_weight, grad_k_weight = (x.sum(dim=0) for x in grad_weights.split([queries, keys]))
        return grad_heads.to(heads.dtype), None, grad_q_weight, grad_k_weight, None, None, None


def turn_(x: Tensor, rope: Tensor) -> Tensor:
    """Turn channels (2i, 2i + 1) of x (T, H, d) by the angle of the complex rope (T, 1, d/2), in place."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(rope)
    return x


def attended_heads(
    heads: Tensor, counts: Counts, weights: tuple[Tensor, Tensor], eps: float, rope: Tensor, segments: Segments
) -> Tensor:
    """`attention` of `rotated_heads`, (T, queries, d), where the latter's arguments work fast."""
    return _AttendedHeads.apply(heads, counts, *weights, eps, rope, segments)


def rotated_heads(
    heads: Tensor, counts: Counts, weights: tuple[Tensor, Tensor] | None, eps: float, rope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """heads (T, H, d) -> queries, keys and values, counts of each; the former two RMS-normalised and rotated.

    weights: of the norms of queries and keys, (d,) each, or None for no norm. Channels (2i, 2i + 1) turn by angle i of
    rope (T, 1, d/2, 2), in float32.
    """
    q, k, v = heads.split(counts, dim=1)
    if weights is not None:
        q, k = rms_norm(q, weights[0], eps), rms_norm(k, weights[1], eps)
    return rotate(q, rope), rotate(k, rope), v


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding in float32: channels (2i, 2i + 1) of x (T, H, d) turn by angle i, rope (T, 1, d/2, 2)."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # inductor fuses real arithmetic only; eagerly, complex is several times faster
        (even, odd), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x.dtype)
