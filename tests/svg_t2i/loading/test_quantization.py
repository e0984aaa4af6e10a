"""Weights in 8 bits: by torchao, and by diffusers' layerwise casting."""

from __future__ import annotations

import sys

import pytest
import torch

from autoencoder.common.config import UserError
from svg_t2i import sample
from svg_t2i.loading.quantization import quantized_layers
from svg_t2i.pipeline import SVGT2IPipeline
from tests.svg_t2i.drawing import latents


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.03), ("fp8", 0.15)])
def test_quantised_weights_change_little(saved_pipeline, pipeline, kind, most):
    loaded = SVGT2IPipeline.from_pretrained(saved_pipeline, quantization=kind)
    assert len(quantized_layers(loaded.transformer)) == 5 * 6  # qkv, out, w1, w2, w3 of 2 + 2 refiners and 2 layers
    assert quantized_layers(loaded.text_encoder)
    assert not quantized_layers(loaded.autoencoder)
    plain, quantised = latents(pipeline), latents(loaded)
    assert 1e-4 < (quantised - plain).norm() / plain.norm() < most
    described, before = loaded.networks.describe(), pipeline.networks.describe()
    assert described["transformer"] != before["transformer"]
    assert described["text_encoder"] == before["text_encoder"]
    assert torch.equal(latents(loaded.to("cpu")), quantised)


def multiplies_8_bits_by_rows() -> bool:
    """Whether torch's CPU has 8-bit products with a scale for each row: from a version after 2.10 on."""
    number = torch.ones(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(number, number.T, torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not multiplies_8_bits_by_rows(), reason="this torch has no such products on a CPU")
def test_products_in_8_bits_change_little(saved_pipeline, monkeypatch):
    """fp8_dynamic: torch has these products on a CPU too, slow ones; torchao's demand of a GPU is left out here."""
    for module in ("torchao.quantization.quant_api", "torchao.float8.inference"):
        monkeypatch.setattr(f"{module}._check_hardware_support", lambda granularities: None)
    plain = SVGT2IPipeline.from_pretrained(saved_pipeline, dtype="bf16")
    loaded = SVGT2IPipeline.from_pretrained(saved_pipeline, dtype="bf16", quantization="fp8_dynamic")
    assert len(quantized_layers(loaded.transformer)) == 5 * 6
    for one in (plain, loaded):
        one.set_progress_bar_config(disable=True)
    expected, found = latents(plain), latents(loaded)
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.15
    with pytest.raises(UserError, match="quantization = 'fp8_dynamic' is not possible here: PerRow .* bfloat16"):
        SVGT2IPipeline.from_pretrained(saved_pipeline, quantization="fp8_dynamic")


def test_plain_weights_are_not_copied_to_be_identified(pipeline, monkeypatch):
    """`dequantize` of a tensor in bf16 makes one in fp32: at full size, ten gigabytes."""
    before = pipeline.networks.describe()
    monkeypatch.setattr(torch.Tensor, "dequantize", lambda self: pytest.fail("copied"))
    assert pipeline.networks.describe() == before


def test_what_cannot_be_quantised_or_saved_so(saved_pipeline, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="quantization = 'int3'; choose one of int8, fp8, fp8_dynamic"):
        SVGT2IPipeline.from_pretrained(saved_pipeline, quantization="int3")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="quantization = 'fp8_dynamic' is not possible here"):
            SVGT2IPipeline.from_pretrained(saved_pipeline, quantization="fp8_dynamic")
    loaded = SVGT2IPipeline.from_pretrained(saved_pipeline, quantization="int8")
    with pytest.raises(UserError, match="quantised weights are not saved"):
        loaded.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="pip install torchao"):
        SVGT2IPipeline.from_pretrained(saved_pipeline, quantization="int8")


def test_weights_kept_in_fp8_and_computed_in_fp32(saved_pipeline, tmp_path):
    """diffusers' layerwise casting: the blocks' linear layers take a quarter of the memory, and little is lost."""
    loaded = SVGT2IPipeline.from_pretrained(saved_pipeline)
    loaded.set_progress_bar_config(disable=True)
    call = {"prompt": "noise", "seed": 0, "num_inference_steps": 3, "output_type": "latent"}
    wanted = loaded(**call).images
    loaded.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    kept = {name for name, weight in loaded.transformer.named_parameters() if weight.dtype == torch.float8_e4m3fn}
    assert "layers.0.attention.qkv.weight" in kept
    assert not any("norm" in name or "embedder" in name for name in kept)
    assert loaded.dtype == torch.float32
    found = loaded(**call).images
    difference = (found - wanted).norm() / wanted.norm()
    assert 0 < difference < 0.2
    settings = ["--checkpoint", str(saved_pipeline), "--prompt", "noise", "--output", str(tmp_path / "out")]
    sample.main([*settings, "--num_inference_steps", "3", "--layerwise_casting", "--attention", "math"])
    assert len(list((tmp_path / "out" / "images").iterdir())) == 1
    with pytest.raises(UserError, match="give one of them"):
        sample.main([*settings, "--layerwise_casting", "--quantization", "int8"])
