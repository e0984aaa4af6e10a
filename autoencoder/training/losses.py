"""The autoencoder's losses: L1 + LPIPS, and a patch discriminator balanced by an adaptive weight.

Everything here works on *groups*: a batch is a list of tensors (n, 3, H, W), one per image size, with values in
[-1, 1]. Images count equally whatever their size and grouping. Under several processes `average` makes λ and
g those of the global batch.

The adversarial term enters as  total = nll + λ·f·g  (VQGAN, arXiv 2012.09841, eq. 7) with λ the ratio of the two
gradients at the decoder's last layer and f = 0 before `disc_start`. Both gradients are taken once, at the
reconstructions, and reused for the backward pass through the decoder: LPIPS and the discriminator are
differentiated once per step instead of twice.

Log names are the published ones: total_loss, nll_loss, rec_loss, p_loss, logvar, d_weight, disc_factor, g_loss of the
generator; disc_loss, logits_real, logits_fake of the discriminator. All are detached tensors on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.common.config import UserError, build, resolve_target
from autoencoder.common.processes import group_size, mean_over_processes
from autoencoder.evaluation.metrics import build_lpips

Images = Sequence[Tensor]
Logs = dict[str, Tensor]


@dataclass(frozen=True)
class LossConfig:
    """`lossconfig.params`, with the published names. `disc_start` counts steps of both optimisers together."""

    disc_start: int = 5000
    disc_weight: float = 0.5
    disc_factor: float = 1.0
    perceptual_weight: float = 1.0
    logvar_init: float = 0.0
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    disc_num_layers: int = 3
    disc_ndf: int = 64  # channels after the discriminator's first convolution
    disc_in_channels: int = 3
    disc_per_image: bool = False  # BatchNorm statistics per image, as if each went alone through the discriminator

    def __post_init__(self) -> None:
        for name in ("disc_start", "disc_weight", "disc_factor", "perceptual_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} = {getattr(self, name)} must not be negative")

    @property
    def adversarial(self) -> bool:
        """Whether the discriminator ever plays a part."""
        return self.disc_weight > 0 and self.disc_factor > 0


# Targets a config may name, and what each changes in the defaults of `LossConfig`.
LOSSES: dict[str, dict[str, Any]] = {
    "autoencoder.training.losses.AutoencoderLoss": {},
    "autoencoder.losses.AutoencoderLoss": {},  # where it was
    "ldm.modules.losses.LPIPSWithDiscriminatorDecoder": {"disc_per_image": True},  # native-aspect images
    "ldm.modules.losses.LPIPSWithDiscriminatorDecoderIN": {},  # square batches
}


def build_loss(
    lossconfig: Mapping[str, Any],
    source: str = "config",
    norm: type[nn.BatchNorm2d] | None = None,
    perceptual: nn.Module | None = None,
) -> AutoencoderLoss:
    """The loss of a `lossconfig` mapping {target, params}; `norm` and `perceptual` as in AutoencoderLoss.

    Raises:
        ConfigError: unknown target or parameter.
        UserError: LPIPS is asked for and its weights cannot be had.
    """
    target = lossconfig.get("target", "autoencoder.training.losses.AutoencoderLoss")
    defaults = resolve_target(target, f"{source}: model.params.lossconfig.target", LOSSES)
    params = {**defaults, **(lossconfig.get("params") or {})}
    settings = build(LossConfig, params, f"{source}: model.params.lossconfig.params")
    return AutoencoderLoss(settings, perceptual, norm)


# -- networks ---------------------------------------------------------------------------------------------------------


class PerImageBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d as if the images of a batch came one by one: the statistics of each, in a single pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            variances, means = torch.var_mean(x.float(), dim=(2, 3))  # (n, C)
            left = (1 - self.momentum) ** torch.arange(len(x) - 1, -1, -1, device=x.device)  # of image i at the end
            for running, values in ((self.running_mean, means), (self.running_var, variances)):
                running.mul_((1 - self.momentum) ** len(x)).add_(self.momentum * (left @ values))
            self.num_batches_tracked += len(x)
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d over the batches of all processes, which have one shape. (torch's own works on GPUs only.)"""

    def forward(self, x: Tensor) -> Tensor:
        """As BatchNorm2d's, of (B, C, H, W); in training with the mean and variance of all processes."""
        if not self.training:
            return super().forward(x)
        values = x.float()
        mean = mean_over_processes(values.mean(dim=(0, 2, 3), keepdim=True))  # (1, C, 1, 1)
        variance = mean_over_processes((values - mean).square().mean(dim=(0, 2, 3), keepdim=True))
        with torch.no_grad():
            count = x.numel() // x.shape[1] * group_size()
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        normalised = (values - mean) * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias[:, None, None], normalised, self.weight[:, None, None]).to(x.dtype)


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): images (n, C, H, W) → one logit per patch, (n, 1, H/8 − 2, W/8 − 2) for 3 layers.

    Widths ndf·min(2^i, 8); 4×4 kernels; stride 2 in the first `n_layers` convolutions, then 1.
    """

    def __init__(
        self, in_channels: int = 3, ndf: int = 64, n_layers: int = 3, norm: type[nn.BatchNorm2d] = nn.BatchNorm2d
    ):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = ndf
        for i in range(1, n_layers + 1):
            stride, previous, width = 2 if i < n_layers else 1, width, ndf * min(2**i, 8)
            # BatchNorm takes over the bias.
            layers += [nn.Conv2d(previous, width, 4, stride, padding=1, bias=False), norm(width), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(width, 1, 4, padding=1)]
        self.main = nn.Sequential(*layers)
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    @property
    def smallest_side(self) -> int:
        """Pixels an image needs at least to get a logit."""
        strided = sum(isinstance(layer, nn.Conv2d) and layer.stride[0] == 2 for layer in self.main)
        return 3 * 2**strided

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


# -- the loss ---------------------------------------------------------------------------------------------------------


class ReconstructionTerms(NamedTuple):
    """Per image, (N,) each, in the order of the groups."""

    nll: Tensor  # summed over pixels and channels
    rec: Tensor  # |x − x̂| + perceptual_weight · LPIPS, mean over pixels and channels
    perceptual: Tensor  # LPIPS


class AutoencoderLoss(nn.Module):
    """Losses of both players. State: `perceptual_loss.*`, `discriminator.*`, `logvar`, as in published checkpoints.

    Args:
        config: weights and the discriminator's size.
        perceptual: replaces LPIPS; called with (x, x̂), returns (n, 1, 1, 1).
        norm: the discriminator's normalisation; by default BatchNorm2d, per image where the config says so.

    `perceptual_loss` and `discriminator` are None where the config gives them no weight. `average` is the mean of a
    tensor over the processes that share a batch, to be set where there are several.
    """

    def __init__(
        self, config: LossConfig, perceptual: nn.Module | None = None, norm: type[nn.BatchNorm2d] | None = None
    ):
        super().__init__()
        self.config = config
        self.average: Callable[[Tensor], Tensor] = lambda tensor: tensor
        self.perceptual_loss = (perceptual or build_lpips()) if config.perceptual_weight > 0 else None
        norm = norm or (PerImageBatchNorm if config.disc_per_image else nn.BatchNorm2d)
        size = (config.disc_in_channels, config.disc_ndf, config.disc_num_layers)
        self.discriminator = PatchDiscriminator(*size, norm) if config.adversarial else None
        self.logvar = nn.Parameter(torch.tensor(config.logvar_init), requires_grad=False)  # in no optimiser

    def train(self, mode: bool = True) -> AutoencoderLoss:
        super().train(mode)
        if self.perceptual_loss is not None:
            self.perceptual_loss.eval()  # it has dropout
        return self

    def disc_factor(self, step: int) -> float:
        """f: 0 before `disc_start`, then the configured factor. `step` counts steps of both optimisers."""
        return self.config.disc_factor if self.discriminator is not None and step >= self.config.disc_start else 0.0

    def generator_loss(self, images: Images, recons: Images, last_layer: Tensor, step: int) -> tuple[Tensor, Logs]:
        """Loss of the decoder.

        Args:
            images: groups of (n, 3, H, W) in [-1, 1].
            recons: reconstructions of the same shapes, with a graph that reaches `last_layer`.
            last_layer: weight of the decoder's last layer.
            step: steps taken by both optimisers together.

        Returns:
            The total to call backward on (once), and the logs.
        """
        terms = self.reconstruction(images, recons)
        nll, factor = terms.nll.mean(), self.disc_factor(step)
        logs = {"nll_loss": nll, "rec_loss": terms.rec.mean(), "p_loss": terms.perceptual.mean(), "logvar": self.logvar}
        total = nll
        if factor > 0:
            g_loss = self.adversarial(recons)
            nll_grads = torch.autograd.grad(nll, recons)
            g_grads = torch.autograd.grad(g_loss, recons)
            weight = self.adaptive_weight(nll_grads, g_grads, recons, last_layer)
            grads = [a + (weight * factor).to(b.dtype) * b for a, b in zip(nll_grads, g_grads)]
            total = _KnownGradient.apply((nll + weight * factor * g_loss).detach(), *grads, *recons)
            logs |= {"d_weight": weight, "disc_factor": torch.full_like(weight, factor), "g_loss": g_loss}
        logs = {"total_loss": total} | logs
        return total, {name: value.detach() for name, value in logs.items()}

    def discriminator_loss(self, images: Images, recons: Images, step: int) -> tuple[Tensor, Logs]:
        """Loss of the discriminator: images should score above 1, reconstructions below −1 (hinge)."""
        adversary = hinge_loss if self.config.disc_loss == "hinge" else vanilla_loss
        losses, logits, counts = [], [], []
        for x, y in zip(images, recons):
            real, fake = self.discriminator(x).float(), self.discriminator(y.detach()).float()
            losses.append(adversary(real, fake))
            logits.append(torch.stack([real.detach().mean(), fake.detach().mean()]))
            counts.append(len(x))
        share = [count / sum(counts) for count in counts]  # every image counts the same
        loss = self.disc_factor(step) * sum(s * value for s, value in zip(share, losses))
        real, fake = sum(s * value for s, value in zip(share, logits)).unbind()
        return loss, {"disc_loss": loss.detach(), "logits_real": real, "logits_fake": fake}

    def reconstruction(self, images: Images, recons: Images) -> ReconstructionTerms:
        """nll = Σ (rec / exp(logvar) + logvar) over an image's pixels and channels, rec = |x − x̂| + w·LPIPS."""
        rows = []
        for x, y in zip(images, recons):
            error = (x - y.float()).abs().flatten(1).mean(1)  # (n,)
            perceptual = torch.zeros_like(error)
            if self.perceptual_loss is not None:
                perceptual = self.perceptual_loss(x, y).float().flatten(1).mean(1)  # (n,)
            rec = error + self.config.perceptual_weight * perceptual
            nll = (rec / torch.exp(self.logvar) + self.logvar) * x[0].numel()
            rows.append(torch.stack([nll, rec, perceptual]))  # (3, n)
        return ReconstructionTerms(*torch.cat(rows, dim=1).unbind())

    def adversarial(self, recons: Images) -> Tensor:
        """g = −mean over all patch logits pooled: larger images count more, as published."""
        logits = torch.cat([self.discriminator(group).float().flatten() for group in recons])
        count = self.average(torch.full_like(logits[0], len(logits)))  # a process may have more than another
        return -logits.sum() / count

    def adaptive_weight(
        self, nll_grads: Sequence[Tensor], g_grads: Sequence[Tensor], recons: Sequence[Tensor], last_layer: Tensor
    ) -> Tensor:
        """λ = clamp(‖∂nll/∂W‖ / (‖∂g/∂W‖ + 1e-4), 0, 1e4) · disc_weight, from gradients at the reconstructions."""
        of_layer = [
            torch.autograd.grad(recons, last_layer, grads, retain_graph=True)[0].float().flatten()
            for grads in (nll_grads, g_grads)
        ]
        nll_norm, g_norm = self.average(torch.stack(of_layer)).norm(dim=1)
        return (nll_norm / (g_norm + 1e-4)).clamp(0.0, 1e4) * self.config.disc_weight


def hinge_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradients are known already: apply(value, *gradients, *tensors)."""

    @staticmethod
    def forward(ctx, value: Tensor, *gradients_and_tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients_and_tensors[: len(gradients_and_tensors) // 2])
        return value.clone()

    @staticmethod
    def backward(ctx, scale: Tensor):
        gradients = ctx.saved_tensors
        return None, *(None for _ in gradients), *(scale.to(grad.dtype) * grad for grad in gradients)
