"""Frozen vision foundation models through timm: images (B, 3, H, W) in [-1, 1] → latents (B, D, H/16, W/16).

Latents are the patch tokens after the final LayerNorm, class and register tokens dropped, row-major over the grid; of
the last layer, or of an inner one, or averaged or summed over several. A cell is always 16 px of the image: for a
network with other patches the image is resized first. Blocks and weights are timm's; `docs/encoders.md` lists the
networks. What differs from timm's defaults, because the networks were trained that way:

* DINOv3 (Siméoni et al. 2025, arXiv:2508.10104): only the `…_qkvb` variants carry the q and v biases, without which
  the outputs are off by 0.6; the rotary periods are rounded to bfloat16 (`positions.Rotary`), off by 1.6e-3 otherwise.
* DINOv2 (arXiv:2304.07193) and MAE (arXiv:2111.06377): positions are resized as in their released code.
* SigLIP2 (arXiv:2502.14786): GELU in its tanh form in all sizes; timm has the exact one in B and L.

State dicts speak the names of `published_keys`, so that published checkpoints load and ours load elsewhere.
Shapes: B batch, D channels, H×W pixels, h×w latent cells, N = h·w tokens, R registers, P patch size of the network.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.common.config import ConfigError, UserError, locate
from autoencoder.common.hub import announce
from autoencoder.common.weights import Float32Buffers, fingerprint, load_strictly, read_state_dict
from autoencoder.encoders.positions import Rotary, resize_positions
from autoencoder.encoders.published_keys import ONLY_OFFICIAL, canonical, from_official, to_official
from autoencoder.encoders.table import FAMILIES, EncoderConfig, Family

PIXELS_PER_CELL = 16
RANDOM_SEED = 0


class Tokens(NamedTuple):
    """Outputs of the final LayerNorm."""

    patches: Tensor  # (B, N, D)
    cls: Tensor | None  # (B, D); SigLIP has none
    registers: Tensor  # (B, R, D)


class FrozenEncoder(Float32Buffers):
    """A vision transformer that is never trained: always in eval mode, always without gradients, weights fixed.

    forward: images (B, 3, H, W) in [-1, 1], sides divisible by 16 → raw latents (B, D, H/16, W/16).
    Weights have no values until some are loaded, unless `initialize`: then they are timm's random ones.
    """

    def __init__(self, config: EncoderConfig, initialize: bool = False) -> None:
        super().__init__()
        self.config = config
        self.family = FAMILIES[config.family]
        self.backbone = _build_backbone(config, self.family, initialize)
        self.blocks = config.blocks(len(self.backbone.blocks))  # whose outputs are taken
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in self.family.normalization)
        self.register_buffer("image_scale", 0.5 / std, persistent=False)
        self.register_buffer("image_shift", (0.5 - mean) / std, persistent=False)
        self.loaded = initialize  # whether weights were given: random ones only count when asked for
        self._fingerprint: str | None = None
        self.requires_grad_(False)
        self.train(False)
        self.register_state_dict_post_hook(_emit_published)
        self.register_load_state_dict_pre_hook(_accept_published)

    @property
    def channels(self) -> int:
        """D, the number of latent channels."""
        return self.backbone.embed_dim

    @property
    def patch_size(self) -> int:
        """Pixels per latent cell and side: 16, unless `overrides` ask for another patch size."""
        return self.config.overrides.get("patch_size", PIXELS_PER_CELL)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stays in eval mode whatever a surrounding module is switched to."""
        return super().train(False)

    def normalize_images(self, images: Tensor) -> Tensor:
        """[-1, 1] → ((x + 1)/2 − mean)/std as one multiply-add in fp32, in the weights' dtype; any image size."""
        normalized = torch.addcmul(self.image_shift, images.float(), self.image_scale)
        return normalized.to(self.backbone.norm.weight.dtype)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → features (B, channels, H/16, W/16). UserError for other shapes."""
        sides = images.shape[2:]
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.patch_size or not side for side in sides):
            raise UserError(
                f"the encoder wants images (B, 3, H, W) with H and W divisible by {self.patch_size}, "
                f"got {tuple(images.shape)}; resize or crop them"
            )
        grid = [side // self.patch_size for side in sides]
        patch = self.backbone.patch_embed.patch_size[0]
        if patch != self.patch_size:
            size = [cells * patch for cells in grid]
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True)  # (B, 3, P·h, P·w)
            images = images.clamp(-1, 1)  # bicubic filters overshoot
        patches = self.forward_tokens(self.normalize_images(images)).patches  # (B, N, D)
        return patches.mT.unflatten(2, grid).contiguous(memory_format=torch.channels_last)  # (B, D, h, w)

    @torch.no_grad()
    def forward_tokens(self, normalized: Tensor) -> Tokens:
        """Normalised images (B, 3, P·h, P·w) → all tokens after the final LayerNorm."""
        self._require_weights()
        tokens, options = self._embed(normalized)  # (B, 1 + R + N, D): class, registers, patches
        outputs = []
        for index, block in enumerate(self.backbone.blocks[: self.blocks[-1] + 1]):
            tokens = block(tokens, **options)
            if index in self.blocks:
                outputs.append(self.backbone.norm(tokens))
        if len(outputs) > 1:
            together = torch.stack(outputs)
            tokens = together.mean(0) if self.config.layers is None else together.sum(0)
        else:
            tokens = outputs[0]
        classes, prefix = int(self.backbone.cls_token is not None), self.backbone.num_prefix_tokens
        return Tokens(tokens[:, prefix:], tokens[:, 0] if classes else None, tokens[:, classes:prefix])

    def _embed(self, normalized: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens with their positions, as the first block reads them, and what every block is told besides."""
        net, options = self.backbone, {}
        patches = net.patch_embed(normalized)  # (B, h, w, D)
        grid, patches = patches.shape[1:3], patches.flatten(1, 2)
        prefix = [token for token in (net.cls_token, net.reg_token) if token is not None]
        if net.pos_embed is None:
            options = {"rope": net.rope.get_embed(grid)}
        else:
            first = 0 if net.no_embed_class or not prefix else 1  # the class token may have a position of its own
            patches = patches + resize_positions(net.pos_embed[:, first:], grid, **self.family.resizing)
            if first:
                prefix[0] = prefix[0] + net.pos_embed[:, :1]
        return torch.cat([*(token.expand(len(patches), -1, -1) for token in prefix), patches], dim=1), options

    def fingerprint(self) -> str:
        """16 hex digits that name this encoder: architecture and weights, the same in fp32 and bf16."""
        self._require_weights()
        if self._fingerprint is None:
            identity = [self.config.architecture.split(".")[0], self.config.overrides]  # without a tag of timm weights
            if self.blocks != (len(self.backbone.blocks) - 1,):
                mean = self.config.layers is None
                identity.append([self.blocks[0], self.blocks[-1]] if mean else ["sum", *self.blocks])
            used = {name: tensor for name, tensor in self.state_dict().items() if name != "mask_token"}
            self._fingerprint = fingerprint(identity, used)
        return self._fingerprint

    def _require_weights(self) -> None:
        if not self.loaded:
            raise UserError(
                f"the encoder {self.config.model_name} has no weights yet: set dinoconfig.weights to the path of the "
                'official file, to "hub" (download from the Hugging Face Hub) or to "random", or load an autoencoder '
                "checkpoint"
            )


def _build_backbone(config: EncoderConfig, family: Family, initialize: bool) -> nn.Module:
    """timm's network; without `initialize` its weights are only allocated, which for L takes 0.1 s instead of 2.4 s."""
    import timm

    device = torch.get_default_device()
    try:
        with nullcontext() if initialize else torch.device("meta"):
            backbone = timm.create_model(
                config.architecture, num_classes=0, dynamic_img_size=True, **{**family.arguments, **config.overrides}
            )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"dinoconfig.overrides: {config.overrides} do not fit {config.architecture}: {error}"
        ) from error
    if config.family == "dinov3":
        heads = backbone.blocks[0].attn.num_heads
        if backbone.embed_dim % (4 * heads):
            raise ConfigError(
                f"dinoconfig.overrides: embed_dim={backbone.embed_dim} must be a multiple of 4·num_heads={4 * heads}, "
                "because the rotary embedding splits each head in four"
            )
        del backbone.rope
    if not initialize:
        backbone.to_empty(device=device)
        for buffer in backbone.buffers():  # only DINOv3's k biases
            buffer.zero_()
    if config.family == "dinov3":
        backbone.rope = Rotary(backbone.embed_dim // heads)
        backbone.register_buffer("mask_token", torch.zeros(1, backbone.embed_dim))  # of the pre-training; never used
    return backbone


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
            return FrozenEncoder(config, initialize=True)
    encoder = FrozenEncoder(config)
    if config.weights is not None:
        state = _read_weights(config)
        own = encoder.state_dict()
        computed = {name: own[name] for name in ONLY_OFFICIAL if name in own}
        load_strictly(
            encoder,
            computed | canonical(state, dinov3=config.family == "dinov3"),
            f"encoder weights {config.weights}",
            f"dinoconfig.model_name ({config.model_name}) and overrides must name the model that they belong to",
        )
    return encoder


def _read_weights(config: EncoderConfig) -> Mapping[str, Tensor]:
    """Weights from a file or the Hub, under whatever names they have there; without `encoder.` of an autoencoder."""
    if config.weights == "hub" or config.weights.startswith("hf-hub:"):
        import timm

        hub_id = timm.get_pretrained_cfg(config.architecture).hf_hub_id
        source = hub_id if config.weights == "hub" else config.weights.removeprefix("hf-hub:")
        announce(source)
        try:
            return timm.models.load_state_dict_from_hf(source)
        except Exception as error:  # the Hub's client raises many unrelated types
            raise UserError(
                f"dinoconfig.weights: {source} could not be downloaded from the Hugging Face Hub "
                f"({type(error).__name__}: {error}). Where a licence must be accepted first, do so on its page and log "
                "in; without a network, download the official file elsewhere and give its path"
            ) from error
    state = read_state_dict(locate(config.weights), "encoder weights (dinoconfig.weights)")
    if "encoder.patch_embed.proj.weight" not in state:
        return state
    return {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}


def _emit_published(module: FrozenEncoder, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    start = f"{prefix}backbone."
    own = {name.removeprefix(start): state.pop(name) for name in list(state) if name.startswith(start)}
    published = to_official(own) if module.config.family == "dinov3" else own
    state.update({prefix + name: tensor for name, tensor in published.items()})


def _accept_published(module: FrozenEncoder, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    published = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    own = from_official(published) if module.config.family == "dinov3" else published
    state.update({f"{prefix}backbone.{name}": tensor for name, tensor in own.items()})
    module.loaded |= bool(own)
    module._fingerprint = None
