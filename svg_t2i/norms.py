"""RMS norm as a function of tensors, with a fast backward pass on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class _FastRMSNorm(torch.autograd.Function):
    """rms_norm for float32 on the CPU, where autograd's backward pass of F.rms_norm takes twice as long."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        inverse_rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * inverse_rms
        return normed * weight, normed, inverse_rms

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad: Tensor, *_) -> tuple[Tensor, Tensor, None]:
        weight, normed, inverse_rms = ctx.saved_tensors
        grad_weight = grad * normed
        along = torch.linalg.vecdot(grad_weight, weight)[..., None]
        grad_x = (grad * weight).addcmul_(normed, along, value=-1 / normed.shape[-1]).mul_(inverse_rms)
        return grad_x, grad_weight.sum_to_size(weight.shape), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, in x's dtype; weight broadcasts to x."""
    trains_on_cpu = torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if trains_on_cpu and not torch.compiler.is_compiling():
        return _FastRMSNorm.apply(x, weight, eps)[0]
    return (F.rms_norm(x, x.shape[-1:], eps=eps) * weight).to(x.dtype)
