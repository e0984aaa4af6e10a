"""What processes that train together compute together, besides the gradients that DDP averages.

Batches are equally large on all processes, so a mean over processes of means is the mean over the global batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean over all training processes, differentiable; the tensor itself where there is only one."""
    return _Mean.apply(tensor) if dist.is_available() and dist.is_initialized() else tensor


class _Mean(torch.autograd.Function):
    """y_r = 1/R · Σ_s x_s. Its own adjoint: the gradient of x_s is 1/R · Σ_r ∂/∂y_r."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Mean.apply(grad)


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d over the batches of all processes, which have one shape. (torch's own works on GPUs only.)"""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.float()
        mean = mean_over_processes(values.mean(dim=(0, 2, 3), keepdim=True))  # (1, C, 1, 1)
        variance = mean_over_processes((values - mean).square().mean(dim=(0, 2, 3), keepdim=True))
        with torch.no_grad():
            count = x.numel() // x.shape[1] * (dist.get_world_size() if dist.is_initialized() else 1)
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        normalised = (values - mean) * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias[:, None, None], normalised, self.weight[:, None, None]).to(x.dtype)
