"""Quantised weights, by torchao: of the linear layers in the blocks of the transformer and of the text encoder.

    int8          weights in 8-bit integers, one scale for each output channel; arithmetic in the dtype of activations
    fp8           weights in 8-bit floats, likewise
    fp8_dynamic   weights and activations in 8-bit floats, with 8-bit matrix products: GPUs of compute capability 8.9 on

What is small stays as it is: embeddings, norms, modulation by time, the last layer, and the autoencoder.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from autoencoder.common.config import UserError, first_line
from autoencoder.common.weights import is_quantized

KINDS = ("int8", "fp8", "fp8_dynamic")
OF_BLOCKS = (".attention.", ".feed_forward.", "attn", "mlp", "Attention", "DenseReluDense", "fc1", "fc2")


def quantize(kind: str, *models: nn.Module) -> None:
    """Quantise the weights of the models in place.

    Raises:
        UserError: an unknown kind, torchao is not installed, or this device cannot do it.
    """
    if kind not in KINDS:
        raise UserError(f"quantization = {kind!r}; choose one of {', '.join(KINDS)}")
    try:
        from torchao.quantization import quantize_
    except ImportError as error:
        raise UserError(f"quantization needs torchao ({error}): pip install torchao") from error
    try:
        for model in models:
            quantize_(model, _config(kind), filter_fn=_is_of_a_block)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"quantization = {kind!r} is not possible here: {first_line(error)}") from error


def _config(kind: str) -> Any:
    from torchao import quantization

    if kind == "int8":
        return quantization.Int8WeightOnlyConfig()
    if kind == "fp8":
        return quantization.Float8WeightOnlyConfig()
    return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())


def _is_of_a_block(module: nn.Module, name: str) -> bool:
    inside = any(part in f".{name}." for part in OF_BLOCKS) and not any(
        part in name for part in ("t_embedder", "lora_")
    )
    return isinstance(module, nn.Linear) and inside


def count_quantizable(model: nn.Module) -> int:
    """How many weights of a model `quantize` would keep in 8 bits."""
    return sum(module.weight.numel() for name, module in model.named_modules() if _is_of_a_block(module, name))


def quantized_layers(model: nn.Module) -> list[str]:
    """The names of the weights that are quantised."""
    return [name for name, weight in model.named_parameters() if is_quantized(weight)]
