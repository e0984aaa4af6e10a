"""SVGDiT: the NextDiT transformer of SVG-T2I on packed sequences.

Unusual here:
- All samples of a batch are one sequence of tokens; nothing is padded and no step loops over samples. The index tables
  that make this possible come from `packing`.
- The scale before and the gate after a sub-layer both multiply an RMS-normalised vector, so they are folded into the
  norm's weight once per sample.

Shapes: B samples, T tokens of all samples, D dim, H heads, d head_dim, C latent channels, p patch size. Time is 0 at
noise and 1 at data; the output is the velocity data - noise, also of a network that predicts the data. State-dict keys
are the published ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.common.config import UserError, first_line
from autoencoder.common.weights import load_strictly
from svg_t2i.transformer.attention import BACKENDS, CUDNN_STEP, Segments, attention
from svg_t2i.transformer.config import MODELS, DiTConfig
from svg_t2i.transformer.cpu_kernels import (
    attended_heads,
    gated_product,
    per_token,
    rms_norm,
    rotated_heads,
    works_fast,
)
from svg_t2i.transformer.packing import Packing, RefinedText, Sizes, TextFeatures, plan_packing

QK_NORM_EPS = 1e-6
UNUSED_KEY = "norm_final.weight"  # in published weights, of a layer that nothing runs
MIN_NOISE = 0.05  # of a network that predicts clean latents: the least 1 - t that a velocity is divided by


# --------------------------------------------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    """RMS norm, its weight times a gain where given: (B, D) for the samples of `segments`, or (1, D) for all.

    A residual (T, D) is added to the result. Without x, the weight itself, for a kernel that normalises on its own:
    asked for by a call, it is there even where weights are on the device only while their module runs.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(
        self,
        x: Tensor | None = None,
        gain: Tensor | None = None,
        segments: Segments | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        if x is None:
            return self.weight
        weight = self.weight if gain is None else (self.weight * gain).to(x.dtype)
        return rms_norm(x, weight, self.eps, segments, residual)


class Attention(nn.Module):
    """Grouped-query self-attention with RMS-normalised queries and keys and 3-axis rotary positions."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.n_heads, config.kv_heads, config.kv_heads
        self.qkv = nn.Linear(config.dim, sum(self.heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.normed, self.backend = config.qk_norm, "auto"
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, QK_NORM_EPS)
            self.k_norm = RMSNorm(config.head_dim, QK_NORM_EPS)

    def forward(self, x: Tensor, segments: Segments, rope: Tensor) -> Tensor:  # (T, D) -> (T, D)
        heads = self.qkv(x).unflatten(-1, (sum(self.heads), -1))  # (T, Hq + 2 Hkv, d)
        weights = (self.q_norm(), self.k_norm()) if self.normed else None
        if self.normed and self.backend == "auto" and works_fast(heads, *weights):
            attended = attended_heads(heads, self.heads, weights, QK_NORM_EPS, rope, segments)
        else:
            q, k, v = rotated_heads(heads, self.heads, weights, QK_NORM_EPS, rope)
            attended = attention(q, k, v, segments, self.backend)
        return self.out(attended.flatten(1))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(gated_product(self.w1(x), self.w3(x)))


class Block(nn.Module):
    """Transformer block with norms before and after each sub-layer, modulated by time if `modulated`.

    x += tanh(gate_a) · N2(attention(N1(x) · (1 + scale_a))), x += tanh(gate_m) · N4(ffn(N3(x) · (1 + scale_m))).
    """

    def __init__(self, config: DiTConfig, modulated: bool) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.attention_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.attention_norm2 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm2 = RMSNorm(config.dim, config.norm_eps)
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.modulation_dim, 4 * config.dim))

    def forward(self, x: Tensor, segments: Segments, rope: Tensor, t_emb: Tensor | None = None) -> Tensor:
        scale_a = gate_a = scale_m = gate_m = None
        if t_emb is not None:
            scale_a, gate_a, scale_m, gate_m = self.adaLN_modulation(t_emb).float().chunk(4, dim=1)  # (B, D) each
            scale_a, gate_a, scale_m, gate_m = 1 + scale_a, gate_a.tanh(), 1 + scale_m, gate_m.tanh()
        attended = self.attention(self.attention_norm1(x, scale_a, segments), segments, rope)
        x = self.attention_norm2(attended, gate_a, segments, residual=x)
        fed = self.feed_forward(self.ffn_norm1(x, scale_m, segments))
        return self.ffn_norm2(fed, gate_m, segments, residual=x)


class TimestepEmbedder(nn.Module):
    """256 sinusoids of t (raw, in [0, 1]; cosines first, longest period 2π·10000), then a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:  # (B,) -> (B, width)
        half = self.frequencies // 2
        exponents = torch.arange(half, device=timesteps.device, dtype=torch.float32) / half
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    """LayerNorm without affine, scaled by time, then the projection to patches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.modulation_dim, config.dim))

    def forward(self, x: Tensor, owner: Tensor, t_emb: Tensor) -> Tensor:
        gain = per_token((1 + self.adaLN_modulation(t_emb).float()).to(x.dtype), owner)  # (T, D) or (1, D)
        return self.linear((F.layer_norm(x, x.shape[-1:], eps=1e-6) * gain).to(x.dtype))


# ---------------------------------------------------------------------------------------------------------- model


def velocity_to(clean: Tensor, tokens: Tensor, timesteps: Tensor, owner: Tensor) -> Tensor:
    """(clean - x_t) / (1 - t), the velocity from tokens x_t (T, C) to the clean ones (arXiv:2605.21981).

    1 - t counts as MIN_NOISE where it is less. timesteps (B,) of the samples `owner` (T,), or (1,) of all.
    """
    noise = (1 - timesteps.float()).clamp_min(MIN_NOISE)
    return (clean - tokens) / per_token(noise[:, None].to(tokens.dtype), owner)


class SVGDiT(nn.Module):
    """Velocity of latents at given times, conditioned on caption features."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = nn.Linear(config.patch_size**2 * config.in_channels, config.dim)
        self.t_embedder = TimestepEmbedder(config.modulation_dim)
        if config.guidance_embed:
            self.guidance_embedder = TimestepEmbedder(config.modulation_dim)
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.cap_feat_dim, config.norm_eps), nn.Linear(config.cap_feat_dim, config.dim)
        )
        self.noise_refiner = nn.ModuleList(Block(config, modulated=True) for _ in range(config.n_refiner_layers))
        self.context_refiner = nn.ModuleList(Block(config, modulated=False) for _ in range(config.n_refiner_layers))
        self.layers = nn.ModuleList(Block(config, modulated=True) for _ in range(config.n_layers))
        self.final_layer = FinalLayer(config)
        if config.aux_loss is not None:
            self.aux_head = FinalLayer(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Published initialisation: every modulated block starts as the identity and the output as zero.

        So does the embedding of a guidance scale, but not the output of a head for features, whose direction counts.
        """
        zero = {
            "final_layer.linear",
            "guidance_embedder.mlp.2",
            *(["aux_head.linear"] if self.config.aux_loss == "flow" else []),
        }
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            if not isinstance(module, nn.Linear):
                continue
            if "adaLN_modulation" in name or name in zero:
                nn.init.zeros_(module.weight)
            elif name.startswith(("t_embedder", "guidance_embedder")):
                nn.init.normal_(module.weight, std=0.02)
            elif name.startswith("cap_embedder"):
                nn.init.trunc_normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, latents: Tensor | Sequence[Tensor], timesteps: Tensor, text: TextFeatures, guidance: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """latents (B, C, h, w) or a list of (C, h_i, w_i), timesteps (B,) in [0, 1] -> velocity, structured alike.

        timesteps (1,) hold for all samples, and so do guidance scales, for a model that wants these. text may have been
        through `refine`, which saves doing it at every step.
        """
        tokens, sizes = self.pack(latents)
        velocity = self.unpack(self.forward_packed(tokens, sizes, timesteps, text, guidance=guidance), sizes)
        return torch.stack(velocity) if isinstance(latents, Tensor) else velocity

    def forward_packed(
        self,
        tokens: Tensor,
        sizes: Sizes,
        timesteps: Tensor,
        text: TextFeatures,
        aux: bool = False,
        guidance: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens (T, p·p·C) from `pack`, timesteps (B,), text of B captions -> velocity tokens (T, p·p·C).

        aux: also what the auxiliary head gives, alike: a velocity, or features (`DiTConfig.aux_loss`).
        guidance: scales (B,) or (1,), given where `DiTConfig.guidance_embed`, and only there.
        """
        if len(sizes) != len(text.lengths) or len(timesteps) not in (1, len(sizes)):
            raise ValueError(f"{len(sizes)} latents, {len(timesteps)} timesteps, {len(text.lengths)} captions")
        packing = self.plan(sizes, text.lengths, tokens.device)
        if (guidance is None) == self.config.guidance_embed:
            raise ValueError(f"guidance is {guidance}, and the model's guidance_embed {self.config.guidance_embed}")
        t_emb = self.t_embedder(timesteps)
        if guidance is not None:
            t_emb = t_emb + self.guidance_embedder(guidance)
        image = self.x_embedder(tokens.to(t_emb.dtype).index_select(0, packing.image_index))  # (T_images, D)
        caption = text.features.to(t_emb.dtype).index_select(0, packing.caption_index)
        if not isinstance(text, RefinedText):
            caption = self._refine(caption, packing)  # (T_captions, D)
        for block in self.noise_refiner:
            image = block(image, packing.images, packing.image_rope, t_emb)
        x = torch.cat([caption, image]).index_select(0, packing.joint_index)  # (T, D)
        for number, block in enumerate(self.layers, start=1):
            x = block(x, packing.joint, packing.joint_rope, t_emb)
            if aux and number == self.config.aux_block:
                middle = x

        def predicted(head: FinalLayer, x: Tensor) -> Tensor:  # (T, D) -> (T_images, p·p·C)
            image = x.index_select(0, packing.output_index)
            return head(image, packing.output_owner, t_emb).to(tokens.dtype)

        def velocity(prediction: Tensor) -> Tensor:
            if self.config.prediction == "velocity":
                return prediction
            return velocity_to(prediction, tokens, timesteps, packing.output_owner)

        last = velocity(predicted(self.final_layer, x))
        if not aux:
            return last
        early = predicted(self.aux_head, middle)
        return last, velocity(early) if self.config.aux_loss == "flow" else early

    def refine(self, text: TextFeatures) -> RefinedText:
        """Captions embedded and refined, once for all steps: neither depends on time or on the latents."""
        features = text.features.to(self.x_embedder.weight.dtype)
        smallest = ((self.config.patch_size,) * 2,) * len(text.lengths)
        packing = self.plan(smallest, text.lengths, features.device)
        refined = self._refine(features.index_select(0, packing.caption_index), packing)
        return RefinedText(refined.index_select(0, packing.caption_index.argsort()), text.lengths)

    def _refine(self, features: Tensor, packing: Packing) -> Tensor:  # in entry order
        if features.shape[1] != self.config.cap_feat_dim:
            raise UserError(
                f"caption features have {features.shape[1]} channels, the model's cap_feat_dim is "
                f"{self.config.cap_feat_dim}: use the text encoder that the model was trained with"
            )
        caption = self.cap_embedder(features)  # (T_captions, D)
        for block in self.context_refiner:
            caption = block(caption, packing.captions, packing.caption_rope)
        return caption

    def set_attention_backend(self, backend: str, device: torch.device | None = None) -> None:
        """Compute attention by the kernel of this name (`attention.attention`).

        device: on which that will be; by default where the weights are.

        Raises:
            UserError: there is none, or it cannot do that there, in the dtype of the weights.
        """
        if backend not in BACKENDS:
            raise UserError(f"attention = {backend!r}: choose one of {', '.join(BACKENDS)}")
        device, dtype = device or self.x_embedder.weight.device, self.x_embedder.weight.dtype
        first = next(module for module in self.modules() if isinstance(module, Attention))
        head_dim = self.config.dim // first.heads[0]
        length = 2 * CUDNN_STEP  # for a few tokens torch would take another kernel
        q, k, v = (torch.zeros(length, heads, head_dim, device=device, dtype=dtype) for heads in first.heads)
        ends = torch.tensor([0, length], dtype=torch.int32, device=device)
        try:
            attention(q, k, v, Segments.build((length,), ends, ends.new_zeros(length)), backend)
        except RuntimeError as error:
            raise UserError(
                f"attention = {backend!r} cannot compute {dtype} with {head_dim} channels a head on "
                f"{device.type} ({first_line(error)}); choose another"
            ) from error
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def plan(self, sizes: Sizes, lengths: Sequence[int], device: torch.device) -> Packing:
        """Index tables for latents of `sizes` with captions of `lengths` tokens (see `packing.plan_packing`)."""
        config = self.config
        return plan_packing(tuple(sizes), tuple(lengths), config.patch_size, config.axes_dims, config.axes_lens, device)

    def pack(self, latents: Tensor | Sequence[Tensor]) -> tuple[Tensor, Sizes]:
        """Latents (B, C, h, w) or a list of (C, h_i, w_i) -> tokens (T, p·p·C), row-major per sample, and their sizes.

        Channel order within a token is (row in patch, column in patch, C). Raises UserError on a wrong shape.
        """
        groups = [latents] if isinstance(latents, Tensor) else [x[None] for x in latents]
        for x in groups:
            self._check_latents(x)
        p = self.config.patch_size
        tokens = [
            x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1).reshape(-1, p * p * x.shape[1])
            for x in groups
        ]
        return torch.cat(tokens), tuple((x.shape[2], x.shape[3]) for x in groups for _ in range(x.shape[0]))

    def unpack(self, tokens: Tensor, sizes: Sizes) -> list[Tensor]:
        """Inverse of `pack`: a (C, h, w) latent per sample."""
        p = self.config.patch_size
        counts = [h * w // p**2 for h, w in sizes]
        return [
            x.reshape(h // p, w // p, p, p, -1).permute(4, 0, 2, 1, 3).reshape(-1, h, w)
            for x, (h, w) in zip(tokens.split(counts), sizes, strict=True)
        ]

    def _check_latents(self, x: Tensor) -> None:
        p, channels = self.config.patch_size, self.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % p or x.shape[3] % p:
            raise UserError(
                f"latents of shape {tuple(x.shape)}: expected (B, {channels}, h, w) or a list of ({channels}, h, w) "
                f"with h and w divisible by the patch size {p}"
            )


def without_aux_head(model: SVGDiT) -> SVGDiT:
    """`model` without its auxiliary head, changed in place: the velocity does not need it."""
    if model.config.aux_loss is not None:
        del model.aux_head
        model.config = replace(model.config, aux_loss=None, aux_block=None)
    return model


def load_published_state_dict(model: SVGDiT, state: Mapping[str, Tensor], source: str = "state dict") -> None:
    """Load a published state dict strictly, as `load_strictly`; `norm_final.weight` is unused and may be dropped."""
    kept = {key: value for key, value in state.items() if key != UNUSED_KEY}
    load_strictly(model, kept, source, "The model's name and sizes must be its own.", state.keys() - kept.keys())


def published_state_dict(model: SVGDiT) -> dict[str, Tensor]:
    """The model's state dict with the published key set, that is with `norm_final.weight` (ones)."""
    state = model.state_dict()
    return state | {UNUSED_KEY: torch.ones_like(state["layers.0.ffn_norm2.weight"])}


def build_model(name: str, in_channels: int = 384, cap_feat_dim: int = 2304, qk_norm: bool = True) -> SVGDiT:
    """A freshly initialised model of the table of sizes; raises UserError for an unknown name."""
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
    return SVGDiT(replace(MODELS[name], in_channels=in_channels, cap_feat_dim=cap_feat_dim, qk_norm=qk_norm))
