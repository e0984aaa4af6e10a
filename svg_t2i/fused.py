"""The element-wise parts of the DiT: plain formulas, and faster forms of them for float32 on the CPU.

On a CPU a fresh tensor costs more than the arithmetic that fills it. The fast forms work in place on memory of their
own and keep less for the backward pass, which can be run once through, not differentiated again. Half precision, GPUs,
autocast and compiled code take the formulas; tests hold both to float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def works_fast(*tensors: Tensor | None) -> bool:
    """Whether tensors are all float32 on the CPU, in eager mode."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return all(x is None or (x.device.type == "cpu" and x.dtype == torch.float32) for x in tensors)


def per_token(gain: Tensor, owner: Tensor | None) -> Tensor:
    """(B, D) per sample -> (T, D) per token; (1, D) or (D,), the same for all, stays as it is."""
    return gain if gain.ndim == 1 or len(gain) == 1 else gain.index_select(0, owner)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps) over the last axis, which is kept with size 1."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm_backward_(grad: Tensor, x: Tensor, inverse: Tensor, along: Tensor) -> Tensor:
    """From grad of x / rms(x) to grad of x, in place; inverse = 1 / rms(x), along = sum(grad · x)."""
    return grad.mul_(inverse).addcmul_(x, inverse.pow(3).mul_(along).div_(-x.shape[-1]))


class _RMSNorm(torch.autograd.Function):
    """`rms_norm`; keeps x and 1 / rms(x), and gathers the weights per token anew."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, owner: Tensor | None, residual: Tensor | None) -> Tensor:
        inverse = inverse_rms(x, eps)
        weights = per_token(weight, owner)
        out = weights * x if weights is weight else weights.mul_(x)  # the gathered weights are our own
        ctx.save_for_backward(x, weight, inverse, owner)
        return out.mul_(inverse) if residual is None else torch.addcmul(residual, out, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, owner = ctx.saved_tensors
        grad_weights = (grad * x).mul_(inverse)
        if weight.ndim == 1 or len(weight) == 1:
            grad_weight = grad_weights.sum_to_size(weight.shape)
        else:
            grad_weight = torch.zeros_like(weight).index_add_(0, owner, grad_weights)
        weights = per_token(weight, owner)
        grad_normed = weights * grad if weights is weight else weights.mul_(grad)
        residual = grad if ctx.needs_input_grad[4] else None
        along = torch.linalg.vecdot(grad_normed, x)[..., None]
        return rms_norm_backward_(grad_normed, x, inverse, along), grad_weight, None, None, residual


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, owner: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis of x (T, D), plus residual (T, D), in x's dtype.

    weight: (D,) or (1, D) for all tokens, or (B, D) per sample with owner (T,), the sample of each token.
    """
    if works_fast(x, weight, residual):
        return _RMSNorm.apply(x, weight, eps, owner, residual)
    out = (F.rms_norm(x, x.shape[-1:], eps=eps) * per_token(weight, owner)).to(x.dtype)
    return out if residual is None else residual + out


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


class _NormedRotation(torch.autograd.Function):
    """The norm and rotation of `rotated_heads`; the gradients of queries, keys and values come back as one tensor."""

    @staticmethod
    def forward(ctx, heads: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float, queries: int):
        q_and_k = heads.shape[1] - (heads.shape[1] - queries) // 2
        normed = heads[:, :q_and_k]
        inverse = inverse_rms(normed, eps)
        out = normed.new_empty(normed.shape)
        torch.mul(normed[:, :queries], q_weight, out=out[:, :queries])
        torch.mul(normed[:, queries:], k_weight, out=out[:, queries:])
        turn_(out.mul_(inverse), torch.view_as_complex(rope))
        ctx.save_for_backward(heads, q_weight, k_weight, rope, inverse)
        return out[:, :queries], out[:, queries:], heads[:, q_and_k:]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        heads, q_weight, k_weight, rope, inverse = ctx.saved_tensors
        queries, q_and_k = grad_q.shape[1], inverse.shape[1]
        grad_heads = torch.cat([grad_q, grad_k, grad_v], dim=1)
        grad, normed = grad_heads[:, :q_and_k], heads[:, :q_and_k]
        turn_(grad, torch.view_as_complex(rope).conj().resolve_conj())  # a rotation's transpose turns the other way
        product = grad * normed
        along = torch.cat([product[:, :queries] @ q_weight, product[:, queries:] @ k_weight], dim=1)
        grad_weight = product.mul_(inverse).sum(dim=0)
        grad[:, :queries].mul_(q_weight)
        grad[:, queries:].mul_(k_weight)
        rms_norm_backward_(grad, normed, inverse, along[..., None])
        return grad_heads, grad_weight[:queries].sum(dim=0), grad_weight[queries:].sum(dim=0), None, None, None


def turn_(x: Tensor, rope: Tensor) -> Tensor:
    """Turn channels (2i, 2i + 1) of x (T, H, d) by the angle of the complex rope (T, 1, d/2), in place."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(rope)
    return x


def rotated_heads(
    heads: Tensor, counts: tuple[int, int, int], weights: tuple[Tensor, Tensor] | None, eps: float, rope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """heads (T, H, d) -> queries, keys and values, counts of each; the former two RMS-normalised and rotated.

    weights: of the norms of queries and keys, (d,) each, or None for no norm. Channels (2i, 2i + 1) turn by angle i of
    rope (T, 1, d/2, 2), in float32.
    """
    if weights is not None and works_fast(heads, *weights):
        return _NormedRotation.apply(heads, *weights, rope, eps, counts[0])
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
