"""Frozen vision foundation models through timm: images (B, 3, H, W) in [-1, 1] → latents (B, D, H/16, W/16).

Latents are the normalised patch tokens of the last layer, class and register tokens dropped, row-major over the grid.
The network is timm's; three things about DINOv3 (Siméoni et al. 2025, arXiv:2508.10104) differ from timm's defaults:

* only the `…_qkvb` variants carry the q and v biases, without which the outputs are off by 0.6;
* the released weights hold the rotary periods rounded to bfloat16, which timm recomputes in float32 (off by 1.6e-3):
  `Rotary` takes the stored periods over, and rounds where none are stored;
* state dicts speak the official names (`storage_tokens`, `ls1.gamma`, `attn.qkv.bias_mask`, …), through
  `from_official` and `to_official`, so that published checkpoints load and ours load elsewhere.

Shapes: B batch, D channels, H×W pixels, h×w latent cells, N = h·w tokens, R registers.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from autoencoder.config import ConfigError, UserError
from autoencoder.weights import Float32Buffers, load_strictly, read_state_dict

# Published model_name → timm architecture.
MODELS = {
    "dinov3_vits16": "vit_small_patch16_dinov3_qkvb",
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3_qkvb",
    "dinov3_vitb16": "vit_base_patch16_dinov3_qkvb",
    "dinov3_vitl16": "vit_large_patch16_dinov3_qkvb",
    "dinov3_vith16plus": "vit_huge_plus_patch16_dinov3_qkvb",
}
IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet, of RGB in [0, 1]
IMAGE_STD = (0.229, 0.224, 0.225)
RANDOM_SEED = 0


@dataclass(frozen=True)
class EncoderConfig:
    """`dinoconfig` of the published YAML files.

    weights: path of the official `.pth` (or of an autoencoder checkpoint holding `encoder.` keys); "hub" or
    "hf-hub:owner/name" to download through timm; "random" for fixed random features; None when a checkpoint of the
    whole autoencoder brings them. overrides: arguments of the timm architecture such as embed_dim, depth, num_heads.
    """

    model_name: str = "dinov3_vits16plus"
    weights: str | None = None
    dinov3_location: str | None = None  # the release's clone of the DINOv3 repository: accepted, not needed
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The timm name; ConfigError for a model that is not a DINOv3."""
        name = MODELS.get(self.model_name, self.model_name)
        if "_dinov3" not in name or not timm.is_model(name):
            known = ", ".join([*MODELS, *timm.list_models("*_dinov3*")])
            raise ConfigError(f"dinoconfig.model_name: {self.model_name!r} is no known encoder; choose from: {known}")
        return name


class Tokens(NamedTuple):
    """Outputs of the final LayerNorm."""

    patches: Tensor  # (B, N, D)
    cls: Tensor  # (B, D)
    registers: Tensor  # (B, R, D)


class Rotary(Float32Buffers):
    """Axial rotary tables from stored periods, in fp32 whatever the precision of the model; stands in for timm's.

    Angles are 2π·c/period with patch centres c mapped to [-1, 1] separately for rows and columns.
    """

    MAX_TABLES = 64

    def __init__(self, head_dim: int, base: float = 100.0) -> None:
        super().__init__()
        exponents = torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 4)
        self.register_buffer("periods", (base**exponents).bfloat16().float())  # rounded as in the released weights
        self._tables: dict[tuple[int, int], Tensor] = {}

    def get_embed(self, shape: tuple[int, int]) -> Tensor:
        """sin and cos side by side for a grid of (h, w) patches: (N, 2·head_dim), fp32."""
        key = (int(shape[0]), int(shape[1]))
        if key not in self._tables:
            if len(self._tables) >= self.MAX_TABLES:
                self._tables.clear()
            self._tables[key] = self._compute(*key)
        return self._tables[key]

    def _compute(self, h: int, w: int) -> Tensor:
        rows, columns = (
            2 * ((torch.arange(n, device=self.periods.device, dtype=torch.float32) + 0.5) / n) - 1 for n in (h, w)
        )
        centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
        angles = (2 * math.pi * centres[:, :, None] / self.periods).flatten(1).tile(2)  # (N, head_dim)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (N, 2·head_dim)

    def _apply(self, fn: Any, recurse: bool = True) -> Rotary:
        self._tables.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._tables.clear()
        super()._load_from_state_dict(*args, **kwargs)


class FrozenEncoder(Float32Buffers):
    """A DINOv3 that is never trained: always in eval mode, always without gradients, weights fixed.

    forward: images (B, 3, H, W) in [-1, 1], sides divisible by 16 → raw latents (B, D, H/16, W/16).
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        try:
            self.backbone = timm.create_model(config.architecture, num_classes=0, **config.overrides)
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(
                f"dinoconfig.overrides: {config.overrides} do not fit {config.architecture}: {error}"
            ) from error
        heads = self.backbone.blocks[0].attn.num_heads
        if self.channels % (4 * heads):
            raise ConfigError(
                f"dinoconfig.overrides: embed_dim={self.channels} must be a multiple of 4·num_heads={4 * heads}, "
                "because the rotary embedding splits each head in four"
            )
        self.backbone.rope = Rotary(self.channels // heads)
        self.register_buffer("mask_token", torch.zeros(1, self.channels))  # of the pre-training; in the files, unused
        mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
        self.register_buffer("image_scale", (0.5 / std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_shift", ((0.5 - mean) / std).view(1, 3, 1, 1), persistent=False)
        self.loaded = False  # whether weights were given: random ones only count when asked for
        self._fingerprint: str | None = None
        self.requires_grad_(False)
        self.train(False)
        self.register_state_dict_post_hook(_emit_official)
        self.register_load_state_dict_pre_hook(_accept_official)

    @property
    def channels(self) -> int:
        """D, the number of latent channels."""
        return self.backbone.embed_dim

    @property
    def patch_size(self) -> int:
        """Pixels per latent cell and side."""
        return self.backbone.patch_embed.patch_size[0]

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stays in eval mode whatever a surrounding module is switched to."""
        return super().train(False)

    def normalize_images(self, images: Tensor) -> Tensor:
        """[-1, 1] → ImageNet-normalised: ((x + 1)/2 − mean)/std as one multiply-add in fp32, in the weights' dtype."""
        normalized = torch.addcmul(self.image_shift, images.float(), self.image_scale)
        return normalized.to(self.backbone.cls_token.dtype)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        sides = images.shape[2:]
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.patch_size or not side for side in sides):
            raise UserError(
                f"the encoder wants images (B, 3, H, W) with H and W divisible by {self.patch_size}, "
                f"got {tuple(images.shape)}; resize or crop them"
            )
        grid = [side // self.patch_size for side in sides]
        patches = self.forward_tokens(self.normalize_images(images)).patches  # (B, N, D)
        return patches.mT.unflatten(2, grid).contiguous(memory_format=torch.channels_last)  # (B, D, h, w)

    @torch.no_grad()
    def forward_tokens(self, normalized: Tensor) -> Tokens:
        """ImageNet-normalised images (B, 3, H, W) → all tokens after the final LayerNorm."""
        self._require_weights()
        tokens = self.backbone.forward_features(normalized)  # (B, 1 + R + N, D): class, registers, patches
        prefix = self.backbone.num_prefix_tokens
        return Tokens(tokens[:, prefix:], tokens[:, 0], tokens[:, 1:prefix])

    def fingerprint(self) -> str:
        """16 hex digits that name this encoder: architecture and weights, the same in fp32 and bf16."""
        self._require_weights()
        if self._fingerprint is None:
            identity = [self.config.architecture.split(".")[0], self.config.overrides]  # without a tag of timm weights
            digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
            for name, tensor in sorted(self.state_dict().items()):
                if name != "mask_token":
                    digest.update(name.encode())
                    digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().data)
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def _require_weights(self) -> None:
        if not self.loaded:
            raise UserError(
                f"the encoder {self.config.model_name} has no weights yet: set dinoconfig.weights to the path of the "
                'official .pth, to "hub" (download through timm) or to "random", or load an autoencoder checkpoint'
            )


def build_encoder(config: EncoderConfig) -> FrozenEncoder:
    """The encoder with the weights that `config.weights` names (see EncoderConfig); UserError if they cannot be had."""
    if config.weights == "random":
        warnings.warn(
            f"RANDOM ENCODER: {config.model_name} gets fixed random weights (weights: random). Its features carry no "
            "semantics and fit no published checkpoint; good for tests and toys only.",
            stacklevel=2,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            encoder = FrozenEncoder(config)
        encoder.loaded = True
        return encoder
    encoder = FrozenEncoder(config)
    if config.weights == "hub" or (config.weights or "").startswith("hf-hub:"):
        state = {**_download(config), "rope.periods": encoder.backbone.rope.periods}  # the Hub copies lack them
        remedy = "dinoconfig.model_name and overrides must name the model that it holds"
        load_strictly(encoder.backbone, state, f"dinoconfig.weights {config.weights}", remedy)
        encoder.loaded = True
    elif config.weights is not None:
        state = read_state_dict(config.weights, "encoder weights (dinoconfig.weights)")
        inner = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
        load_strictly(
            encoder,
            inner or state,
            f"encoder weights {config.weights}",
            f"dinoconfig.model_name ({config.model_name}) and overrides must name the model that the file holds",
        )
    return encoder


def _download(config: EncoderConfig) -> dict[str, Tensor]:
    """timm's own weights of the architecture, or of the given Hub repository."""
    name = config.architecture if config.weights == "hub" else config.weights
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, **config.overrides).state_dict()
    except Exception as error:  # the Hub's client raises many unrelated types
        raise UserError(
            f"dinoconfig.weights: {name} could not be downloaded through timm ({type(error).__name__}: {error}). "
            "Without a network, download the official .pth elsewhere and give its path"
        ) from error


# ---- key mapping: official DINOv3 names ↔ timm's names -------------------------------------------------------------

RENAMED = (
    ("storage_tokens", "backbone.reg_token"),
    ("rope_embed.periods", "backbone.rope.periods"),
    ("ls1.gamma", "gamma_1"),
    ("ls2.gamma", "gamma_2"),
)
RENAMED_GATED = (("mlp.w1.", "mlp.fc1_g."), ("mlp.w2.", "mlp.fc1_x."), ("mlp.w3.", "mlp.fc2."))  # SwiGLU only


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official DINOv3 names → names in FrozenEncoder.

    `attn.qkv.bias` becomes q and v biases; its k part is dropped, as the official `bias_mask` zeroes it. UserError for
    any other mask: the official code fills it with NaN until weights are loaded.
    """
    renamed = {}
    for name, tensor in state.items():
        if name.endswith("attn.qkv.bias_mask"):
            q, k, v = tensor.float().chunk(3)
            if not tensor.is_meta and not (q.eq(1).all() and k.eq(0).all() and v.eq(1).all()):
                raise UserError(
                    f"encoder weights: {name} must be one for q and v and zero for k; these weights were saved from an "
                    "encoder that was never loaded, use the official file"
                )
        elif name.endswith("attn.qkv.bias"):
            q, _, v = tensor.chunk(3)
            block = "backbone." + name.removesuffix("qkv.bias")
            renamed |= {block + "q_bias": q, block + "v_bias": v}
        else:
            renamed[_rename(name, RENAMED + RENAMED_GATED)] = tensor
    return renamed


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names in FrozenEncoder → official DINOv3 names; inverse of `from_official`."""
    gated = any(".mlp.fc1_g." in name for name in state)
    table = [(timm_name, official) for official, timm_name in RENAMED + (RENAMED_GATED if gated else ())]
    renamed = {}
    for name, tensor in state.items():
        if name.endswith("attn.q_bias"):
            block = name.removeprefix("backbone.").removesuffix("q_bias")
            zeros, ones = torch.zeros_like(tensor), torch.ones_like(tensor)
            renamed[block + "qkv.bias"] = torch.cat([tensor, zeros, state[name.replace("q_bias", "v_bias")]])
            renamed[block + "qkv.bias_mask"] = torch.cat([ones, zeros, ones])
        elif not name.endswith("attn.v_bias"):
            renamed[_rename(name, table).removeprefix("backbone.")] = tensor
    return renamed


def _rename(name: str, table: Iterable[tuple[str, str]]) -> str:
    for old, new in table:
        name = name.replace(old, new)
    return name if name == "mask_token" or name.startswith("backbone.") else f"backbone.{name}"


def _emit_official(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    state.update({prefix + name: tensor for name, tensor in to_official(own).items()})


def _accept_official(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    state.update({prefix + name: tensor for name, tensor in from_official(own).items()})
    module.loaded |= bool(own)
    module._fingerprint = None
