"""The residual branch of the "R" autoencoders: images → a few channels of detail, added to the frozen encoder's.

A small trained ViT (timm or torchvision) and a projection to 8 channels, which are brought to the distribution of the
encoder's features. State dicts speak the published names through `from_published` and `to_published`. Surprises:

* `vit-rope-s` has no absolute positions: every layer and head rotates queries and keys by its own learned plane waves
  (mixed RoPE, Heo et al. 2024, arXiv:2403.13298), angle = x·f_x + y·f_y with x the column and y the row of a patch;
* the release normalises over the whole batch, so that an image's latent depends on its neighbours (`outnorm: batch`).

Shapes: B batch, D features, R residual channels, H×W pixels, h×w latent cells, N = h·w, C width of the trunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autoencoder.common.config import ConfigError, UserError

EPSILON = 1e-6
# All that a load may leave out: an unused classifier, and patch coordinates that are recomputed
DROPPED = ("head.", "freqs_t_x", "freqs_t_y")
ROPE_VIT = {"init_values": 1e-4}  # overrides of timm's vit_small_patch16_rope_mixed_224
PLAIN_VIT = {
    "image_size": 256,
    "patch_size": 16,
    "num_layers": 6,
    "num_heads": 8,
    "hidden_dim": 384,
    "mlp_dim": 1536,
    "dropout": 0.1,
}


@dataclass(frozen=True)
class ResidualConfig:
    """`extra_vit_config` of the published YAML files, and own fields.

    mask_ratio: in training mode, this share of the latent cells, drawn anew each time, has its residual channels
    zeroed, so that the decoder keeps using the encoder's. use_outnorm: match the channels to the encoder's features.
    frozen: not trained.
    """

    output_dim: int = 8
    mask_ratio: float = 0.0
    use_outnorm: bool = True
    frozen: bool = False
    vit_type: Literal["vit-rope-s", "vit-s"] = "vit-rope-s"
    # -- own --
    # What use_outnorm takes statistics over. As published, "batch": an image's latent depends on its neighbours.
    outnorm: Literal["batch", "per_image"] = "batch"
    # Accept latent statistics that lack the residual channels, and fill them in as the release does.
    published_stats: bool = False
    # As published, 1024: images with as many patches as a square of this many pixels get the coordinates of the square,
    # whatever their shape. None: every patch has its own row and column.
    published_grid: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)  # arguments of the architecture: embed_dim, depth, …

    def __post_init__(self) -> None:
        if self.output_dim < 1 or not 0 <= self.mask_ratio < 1:
            raise UserError(
                f"output_dim = {self.output_dim} must be at least 1 and mask_ratio = {self.mask_ratio} in [0, 1)"
            )
        if self.vit_type == "vit-s" and self.published_grid is not None:
            raise UserError("published_grid concerns the rotary vit-rope-s only; leave it out for vit-s")


def match_distribution(
    residual: Tensor, features: Tensor, over: Literal["batch", "per_image"] = "batch", eps: float = EPSILON
) -> Tensor:
    """v ← (v − m_v)/(s_v + eps)·s_h + m_h: give the residual channels the location and scale of the features.

    m and s are the means over channels of each channel's mean and deviation (Bessel-corrected) over all positions of
    the batch, or of the image alone. They are taken in fp32 and are constants for the gradient.

    Args:
        residual: v, (B, R, N) or (B, R, h, w). features: h, (B, D, …) on the same positions.

    Raises:
        UserError: a single position, which has no deviation.
    """
    dims = (0, 2) if over == "batch" else (2,)
    shift, scale = [], []
    for values in (residual, features):
        values = values.detach().float().flatten(2)  # (B, channels, N)
        if values.shape[2] * (values.shape[0] if over == "batch" else 1) < 2:
            raise UserError(
                "a residual branch with use_outnorm needs at least 2 latent cells to take a deviation of: give images "
                "larger than one patch"
            )
        deviation, mean = torch.std_mean(values, dim=dims)  # (channels,) or (B, channels)
        per_sample = (-1,) + (1,) * (residual.ndim - 1)
        shift.append(mean.mean(-1).view(per_sample))
        scale.append(deviation.mean(-1).view(per_sample))
    matched = (residual.float() - shift[0]) / (scale[0] + eps) * scale[1] + shift[1]
    return matched.to(features.dtype)


class ResidualViT(nn.Module):
    """Normalised images (B, 3, H, W) and encoder features (B, D, h, w) → residual channels (B, R, h, w).

    The images are normalised like the encoder's. UserError for images of another size than `vit-s` was built for.
    """

    def __init__(self, config: ResidualConfig) -> None:
        super().__init__()
        self.config = config
        build = _rope_vit if config.vit_type == "vit-rope-s" else _plain_vit
        try:
            self.trunk, width = build(config)
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(
                f"extra_vit_config.overrides: {config.overrides} do not fit {config.vit_type}: {error}"
            ) from error
        self.heads = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.output_dim))
        self.register_state_dict_post_hook(_emit_published)
        self.register_load_state_dict_pre_hook(_accept_published)
        if config.frozen:
            self.requires_grad_(False)
            self.train(False)

    @property
    def patch_size(self) -> int:
        """Pixels per latent cell and side."""
        patches = self.trunk.patch_embed.proj if self.config.vit_type == "vit-rope-s" else self.trunk.conv_proj
        return patches.stride[0]

    def train(self, mode: bool = True) -> ResidualViT:
        """A frozen one stays in eval mode."""
        return super().train(mode and not self.config.frozen)

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        residual = self.project(images)
        if self.config.use_outnorm:
            residual = match_distribution(residual, features, self.config.outnorm)
        if self.training and self.config.mask_ratio > 0:
            cells = torch.rand_like(residual[:, :1], dtype=torch.float32)
            residual = residual * (cells >= self.config.mask_ratio)
        return residual.to(features.dtype)

    def project(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → residual channels as they come, (B, R, h, w)."""
        grid = [side // self.patch_size for side in images.shape[2:]]
        return self.heads(self.forward_tokens(images)[:, 1:]).mT.unflatten(2, grid)

    def forward_tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → all tokens after the final norm, class token first, (B, 1 + N, C)."""
        if self.config.vit_type == "vit-rope-s":
            return self.trunk.forward_features(images)
        side = self.trunk.image_size
        if images.shape[2:] != (side, side):
            raise UserError(
                f"extra_vit_config.vit_type: vit-s knows the positions of {side}×{side} images only, got "
                f"{images.shape[3]}×{images.shape[2]}; crop the images to that or use vit-rope-s"
            )
        patches = self.trunk.conv_proj(images).flatten(2).mT  # (B, N, C)
        return self.trunk.encoder(torch.cat([self.trunk.class_token.expand(len(images), -1, -1), patches], dim=1))


def _rope_vit(config: ResidualConfig) -> tuple[nn.Module, int]:
    """ViT-S/16 with mixed RoPE, 12 layers, for any image size; and its width."""
    import timm

    from autoencoder.encoders.mixed_rotary import MixedRotary

    arguments = {**ROPE_VIT, **config.overrides}
    trunk = timm.create_model("vit_small_patch16_rope_mixed_224", num_classes=0, dynamic_img_size=True, **arguments)
    timms, square = trunk.rope, None
    if config.published_grid is not None:
        square = config.published_grid // trunk.patch_embed.patch_size[0]
    trunk.rope = MixedRotary(timms.dim, timms.depth, timms.num_heads, timms.temperature, square=square)
    return trunk, trunk.embed_dim


def _plain_vit(config: ResidualConfig) -> tuple[nn.Module, int]:
    """The older ViT with 6 layers, for squares of 256 px; and its width."""
    from torchvision.models import VisionTransformer

    trunk = VisionTransformer(**{**PLAIN_VIT, **config.overrides})
    trunk.heads = nn.Identity()
    return trunk, trunk.hidden_dim


# ---- key mapping: published names ↔ names in ResidualViT -----------------------------------------------------------


def from_published(state: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Published names → names in ResidualViT, without DROPPED. `heads` of the trunk split `freqs` (2, depth, C/2)."""
    renamed = {}
    for name, tensor in state.items():
        if name == "freqs":
            renamed["trunk.rope.freqs"] = tensor.unflatten(2, (heads, -1))  # (2, depth, heads, head_dim/2)
        elif not name.startswith(DROPPED):
            renamed[name if name.startswith("heads.") else f"trunk.{name}"] = tensor
    return renamed


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names in ResidualViT → published names; inverse of `from_published`."""
    renamed = {name.removeprefix("trunk."): tensor for name, tensor in state.items()}
    if "rope.freqs" in renamed:
        renamed["freqs"] = renamed.pop("rope.freqs").flatten(2)
    return renamed


def _emit_published(module: ResidualViT, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    state.update({prefix + name: tensor for name, tensor in to_published(own).items()})


def _accept_published(module: ResidualViT, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    heads = module.trunk.rope.num_heads if module.config.vit_type == "vit-rope-s" else 1
    state.update({prefix + name: tensor for name, tensor in from_published(own, heads).items()})
