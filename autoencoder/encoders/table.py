"""Table of encoders: families, names, and the configuration that chooses one. `docs/encoders.md` lists them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoencoder.common.config import ConfigError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Family:
    """Properties that the encoders of a family share.

    pattern: of their timm names. normalization: mean and deviation of RGB in [0, 1]. resizing: of learned positions,
    arguments of `resize_positions`. arguments: of the timm architecture.
    """

    pattern: str
    normalization: tuple[tuple[float, ...], tuple[float, ...]]
    resizing: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    "dinov3": Family(r"vit_.+_dinov3", IMAGENET),
    "dinov2": Family(r"vit_.+_patch14_dinov2", IMAGENET, {"offset": 0.1}),
    "dinov2_reg": Family(r"vit_.+_reg4_dinov2", IMAGENET, {"antialias": True}),
    "siglip": Family(r"vit_.+_siglip_gap_", HALF, arguments={"act_layer": "gelu_tanh"}),
    "mae": Family(r"vit_.+\.mae$", IMAGENET),
}

# model_name (of the release, of torch.hub or of the Hugging Face Hub) → timm name
MODELS = {
    "dinov3_vits16": "vit_small_patch16_dinov3_qkvb.lvd1689m",
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3_qkvb.lvd1689m",
    "dinov3_vitb16": "vit_base_patch16_dinov3_qkvb.lvd1689m",
    "dinov3_vitl16": "vit_large_patch16_dinov3_qkvb.lvd1689m",
    "dinov3_vith16plus": "vit_huge_plus_patch16_dinov3_qkvb.lvd1689m",
    "dinov3_vit7b16": "vit_7b_patch16_dinov3.lvd1689m",  # has no biases of q, k, v
    "dinov2_vits14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_vitb14": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_vitl14": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_vitg14": "vit_giant_patch14_dinov2.lvd142m",
    "dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2_vitb14_reg": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2_vitl14_reg": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov2_vitg14_reg": "vit_giant_patch14_reg4_dinov2.lvd142m",
    "siglip2_base_patch16_256": "vit_base_patch16_siglip_gap_256.v2_webli",
    "siglip2_base_patch16_512": "vit_base_patch16_siglip_gap_512.v2_webli",
    "siglip2_large_patch16_256": "vit_large_patch16_siglip_gap_256.v2_webli",
    "siglip2_large_patch16_512": "vit_large_patch16_siglip_gap_512.v2_webli",
    "siglip2_so400m_patch16_256": "vit_so400m_patch16_siglip_gap_256.v2_webli",
    "siglip2_so400m_patch16_512": "vit_so400m_patch16_siglip_gap_512.v2_webli",
    "siglip2_giant_opt_patch16_256": "vit_giantopt_patch16_siglip_gap_256.v2_webli",
    "siglip2_giant_opt_patch16_384": "vit_giantopt_patch16_siglip_gap_384.v2_webli",
    "mae_vitb16": "vit_base_patch16_224.mae",
    "mae_vitl16": "vit_large_patch16_224.mae",
    "mae_vith14": "vit_huge_patch14_224.mae",
}


@dataclass(frozen=True)
class EncoderConfig:
    """`dinoconfig` of the published YAML files.

    model_name: a key of MODELS, or a timm name of one of FAMILIES. weights: path of a `.pth` or `.safetensors` with the
    names of the authors, of timm or of transformers (or of an autoencoder checkpoint holding `encoder.` keys);
    "hub" or "hf-hub:owner/name" to download from the Hugging Face Hub; "random" for fixed random features; None when a
    checkpoint of the whole autoencoder brings them. overrides: arguments of the timm architecture such as embed_dim,
    depth, num_heads.

    layer: the block whose output, through the final norm, is taken, counted from 0 or, negative, from the end.
    average_last: mean over this many blocks, ending with `layer`.
    layers: instead of these two, the blocks whose outputs, each through the final norm, are summed (arXiv:2510.11690
    and what followed): "last", "last_k" for the last k of them, or a list of blocks, counted as for `layer`.
    """

    model_name: str = "dinov3_vits16plus"
    weights: str | None = None
    dinov3_location: str | None = None  # the release's clone of the DINOv3 repository: accepted, not needed
    overrides: dict[str, Any] = field(default_factory=dict)
    # -- own --
    layer: int = -1
    average_last: int = 1
    layers: str | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layers is None:
            return
        if (self.layer, self.average_last) != (-1, 1):
            raise ConfigError(
                f"dinoconfig.layers: {self.layers} chooses the blocks; leave out layer ({self.layer}) and average_last "
                f"({self.average_last})"
            )
        named = isinstance(self.layers, str) and re.fullmatch(r"last(_[1-9]\d*)?", self.layers)
        if not named and (isinstance(self.layers, str) or not self.layers):
            raise ConfigError(f'dinoconfig.layers: {self.layers!r}: give "last", "last_4" for the last four, or a list')

    def blocks(self, depth: int) -> tuple[int, ...]:
        """The blocks whose outputs are taken, of a network that has `depth` of them, ascending.

        Raises:
            ConfigError: it has no such blocks.
        """
        if self.layers is None:
            return self._mean_blocks(depth)
        if isinstance(self.layers, str):
            number = int(self.layers.partition("_")[2] or 1)
            chosen = tuple(range(-number, 0))
        else:
            chosen = self.layers
        if not all(-depth <= block < depth for block in chosen):
            raise ConfigError(f"dinoconfig.layers: {self.layers}: {self.model_name} has {depth} blocks")
        blocks = tuple(sorted({block % depth for block in chosen}))
        if len(blocks) < len(chosen):
            raise ConfigError(f"dinoconfig.layers: {self.layers} names a block of {self.model_name} twice")
        return blocks

    def _mean_blocks(self, depth: int) -> tuple[int, ...]:
        if not -depth <= self.layer < depth:
            raise ConfigError(f"dinoconfig.layer: {self.layer} is out of range of the {depth} of {self.model_name}")
        last = self.layer % depth
        if not 1 <= self.average_last <= last + 1:
            raise ConfigError(
                f"dinoconfig.average_last: {self.average_last} must be at least 1 and at most {last + 1}, the number "
                f"of layers up to layer {last} of {self.model_name}"
            )
        return tuple(range(last + 1 - self.average_last, last + 1))

    @property
    def architecture(self) -> str:
        """The timm name; ConfigError for a model of no known family."""
        import timm  # takes seconds, which --help need not wait for

        name = MODELS.get(self.model_name, self.model_name)
        if not timm.is_model(name) or not any(re.match(family.pattern, name) for family in FAMILIES.values()):
            raise ConfigError(
                f"dinoconfig.model_name: {self.model_name!r} is no known encoder; choose from: {', '.join(MODELS)}; or "
                "give a timm name of a DINOv3, DINOv2, SigLIP (siglip_gap) or MAE network"
            )
        return name

    @property
    def family(self) -> str:
        """Key of FAMILIES."""
        return next(name for name, family in FAMILIES.items() if re.match(family.pattern, self.architecture))
