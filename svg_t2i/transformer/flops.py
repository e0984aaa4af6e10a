"""Floating-point operations of a training step, for the model FLOP utilisation.

Counted as is customary (PaLM, arXiv:2204.02311, app. B): matrix products only, two operations a multiply-add, backward
twice forward, nothing for what is recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence

from svg_t2i.transformer.config import DiTConfig

# Dense bf16 peak of one device, in TFLOP/s, by a part of its name; from the vendors' data sheets.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}


def peak_tflops(device_name: str) -> float | None:
    """Peak of a device by its name; None if it is not in the table."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def training_flops(
    config: DiTConfig, image_tokens: Sequence[int], text_tokens: Sequence[int], frozen: bool = False
) -> int:
    """Operations of forward and backward for samples of so many image and text tokens (after patching).

    frozen: the weights get no gradients, as under an adapter, whose own few operations are left out.
    """
    samples = list(zip(image_tokens, text_tokens, strict=True))
    forward = sum(forward_flops(config, image, text) for image, text in samples)
    attending = sum(attention_flops(config, image, text) for image, text in samples)
    return 2 * forward + attending if frozen else 3 * forward


def attention_flops(config: DiTConfig, image: int, text: int) -> int:
    """Of them, in one forward pass, those without weights: q·kᵀ and the weighted sum of v."""
    joint, refiners = (text + image) ** 2, text**2 + image**2
    return 4 * config.dim * (config.n_layers * joint + config.n_refiner_layers * refiners)


def forward_flops(config: DiTConfig, image: int, text: int) -> int:
    """Operations of one forward pass for a sample of so many image and text tokens."""
    dim, patch = config.dim, config.patch_size**2 * config.in_channels
    heads = config.n_heads + 2 * config.kv_heads
    per_token = 2 * dim * (heads * config.head_dim + dim + 3 * config.ffn_dim)  # qkv, out; w1, w2, w3
    modulation = 2 * config.modulation_dim * 4 * dim  # of one block, once a sample

    joint = config.n_layers * ((text + image) * per_token + modulation)
    refiners = config.n_refiner_layers * ((text + image) * per_token + modulation)
    time = 2 * config.modulation_dim * (256 + config.modulation_dim + dim)  # embedder, final layer's scale
    embedders = 2 * dim * (text * config.cap_feat_dim + 2 * image * patch)  # in, and the final layer
    head = 2 * dim * (config.modulation_dim + image * patch) if config.aux_loss is not None else 0  # in training
    return joint + refiners + time + embedders + head + attention_flops(config, image, text)
