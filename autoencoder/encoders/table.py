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
    """

    model_name: str = "dinov3_vits16plus"
    weights: str | None = None
    dinov3_location: str | None = None  # the release's clone of the DINOv3 repository: accepted, not needed
    overrides: dict[str, Any] = field(default_factory=dict)
    # -- own --
    layer: int = -1
    average_last: int = 1

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
