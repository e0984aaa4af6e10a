"""Key mapping of encoder weights: every published naming → the names that our files use; pure functions of dicts.

Our files name a DINOv3 as its authors do (`storage_tokens`, `blocks.0.ls1.gamma`, `blocks.0.attn.qkv.bias_mask`, …),
because the published autoencoder checkpoints do, and every other encoder as timm does. `canonical` brings a file to
these names, whether it comes from the authors, from timm or from transformers; `from_official` and `to_official`
map a DINOv3's names to timm's and back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from autoencoder.common.config import UserError

# All that a file may hold besides the encoder, dropped by the beginnings of names
DROPPED = (
    "local_cls_norm.",  # DINOv3 7B: a norm for the class token of local crops, used in its training only
    "projectors.",  # EUPE, distilled DINOv3: heads of the distillation
    "attn_pool.",  # SigLIP: the pooling head
    "decoder",  # MAE: decoder_embed, decoder_blocks, decoder_pos_embed, …; decoder. in transformers
    "text_model.",  # SigLIP, and the next two
    "logit_scale",
    "logit_bias",
)
# What official DINOv3 files hold, and copies by timm and transformers leave out because it can be computed
ONLY_OFFICIAL = ("mask_token", "rope_embed.periods")


def canonical(state: Mapping[str, Tensor], dinov3: bool) -> dict[str, Tensor]:
    """Weights under the names of their authors, of timm or of transformers → under those of our files.

    dinov3: whether they are of that family. Drops what DROPPED names, and the mask token of other families.
    """
    if any(".patch_embedding" in f".{name}" for name in state):
        state = from_transformers(state)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(DROPPED)}
    if dinov3:
        return to_official(state) if "reg_token" in state else state
    state.pop("mask_token", None)
    if "register_tokens" in state:  # DINOv2: timm adds the class token's position to it once and for all
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    packed = ((".mlp.w12.", ".mlp.fc1."), (".mlp.w3.", ".mlp.fc2."))  # DINOv2 giant
    return {_replace(name, packed): tensor for name, tensor in state.items()}


# ---- DINOv3: official names ↔ timm's -------------------------------------------------------------------------------

RENAMED = (
    ("storage_tokens", "reg_token"),
    ("rope_embed.periods", "rope.periods"),
    ("ls1.gamma", "gamma_1"),
    ("ls2.gamma", "gamma_2"),
)
RENAMED_GATED = (("mlp.w1.", "mlp.fc1_g."), ("mlp.w2.", "mlp.fc1_x."), ("mlp.w3.", "mlp.fc2."))  # SwiGLU only


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official DINOv3 names → timm's.

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
            block, (q, _, v) = name.removesuffix("qkv.bias"), tensor.chunk(3)
            renamed |= {block + "q_bias": q, block + "v_bias": v}
        else:
            renamed[_replace(name, RENAMED + RENAMED_GATED)] = tensor
    return renamed


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names → official DINOv3 names; inverse of `from_official`."""
    gated = any(".mlp.fc1_g." in name for name in state)
    table = [(timm_name, official) for official, timm_name in RENAMED + (RENAMED_GATED if gated else ())]
    renamed = {}
    for name, tensor in state.items():
        if name.endswith("attn.q_bias"):
            block, v = name.removesuffix("q_bias"), state[name.replace("q_bias", "v_bias")]
            zeros, ones = torch.zeros_like(tensor), torch.ones_like(tensor)
            renamed[block + "qkv.bias"] = torch.cat([tensor, zeros, v])
            renamed[block + "qkv.bias_mask"] = torch.cat([ones, zeros, ones])
        elif not name.endswith("attn.v_bias"):
            renamed[_replace(name, table)] = tensor
    return renamed


# ---- transformers --------------------------------------------------------------------------------------------------

# Applied in this order. The models are DINOv3ViT, Dinov2, Dinov2WithRegisters, Siglip and ViTMAE.
TRANSFORMERS = (
    (r"^(?:vit|vision_model|model)\.", ""),
    (r"^head\.", "attn_pool."),
    (r"^embeddings\.patch_embeddings?(?:\.projection)?\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings?(?:\.weight)?$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(?:layernorm|post_layernorm)\.", "norm."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.(?:layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(?:layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.(?:attention\.attention|attention|self_attn)\.([qkv])(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.(?:intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(?:output\.dense|mlp\.weights_out)\.", ".mlp.fc2."),
)
GATED = ((".mlp.gate_proj.", ".mlp.w1."), (".mlp.up_proj.", ".mlp.w2."), (".mlp.down_proj.", ".mlp.w3."))
PLAIN = ((".mlp.up_proj.", ".mlp.fc1."), (".mlp.down_proj.", ".mlp.fc2."))


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names → the authors' names (timm's for SigLIP); q, k and v are fused, absent k biases are zero."""
    mlp = GATED if any(".mlp.gate_proj." in name for name in state) else PLAIN
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        renamed[_replace(name, mlp)] = tensor
    for name in [name for name in renamed if ".attn.q." in name]:
        q, k, v = (renamed.pop(name.replace(".q.", f".{part}."), None) for part in "qkv")
        renamed[name.replace(".q.", ".qkv.")] = torch.cat([q, torch.zeros_like(q) if k is None else k, v])
    if "pos_embed" not in renamed:  # DINOv3
        renamed["storage_tokens"] = renamed.pop("register_tokens")
        renamed["mask_token"] = renamed["mask_token"].flatten(0, 1)  # (1, 1, D) → (1, D)
        biases = {name: tensor for name, tensor in renamed.items() if name.endswith(".attn.qkv.bias")}
        for name, bias in biases.items():
            q, k, v = torch.ones_like(bias).chunk(3)
            renamed[f"{name}_mask"] = torch.cat([q, 0 * k, v])
    elif renamed["pos_embed"].ndim == 2:  # SigLIP: (N, D)
        renamed["pos_embed"] = renamed["pos_embed"][None]
    return renamed


def _replace(name: str, table: Iterable[tuple[str, str]]) -> str:
    for old, new in table:
        name = name.replace(old, new)
    return name
