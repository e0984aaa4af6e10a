"""Adapters of peft and diffusers: several of them, with weights, from the command line as well."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from autoencoder.common.config import UserError
from svg_t2i import sample
from svg_t2i.pipeline import SVGT2IPipeline
from tests.svg_t2i.drawing import PROMPT, pixels


def test_peft_adapters_go_on_and_come_off(loaded, pipeline, tmp_path):
    plain = pixels(pipeline)
    loaded.transformer.add_adapter(LoraConfig(r=4, target_modules=["qkv", "out", "w1", "w2", "w3"]))
    for name, weight in loaded.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    adapted = pixels(loaded)
    assert not torch.equal(adapted, plain)
    loaded.transformer.disable_adapters()
    assert torch.equal(pixels(loaded), plain)
    loaded.transformer.enable_adapters()
    loaded.transformer.save_lora_adapter(tmp_path)
    loaded.transformer.delete_adapters("default")
    assert torch.equal(pixels(loaded), plain)
    loaded.transformer.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(pixels(loaded), adapted)


@pytest.fixture
def loras(saved_pipeline, tmp_path):
    """Two adapters of other ranks and layers, each in a folder of its own, as a pipeline saves them."""
    folders = []
    for i, targets in enumerate((["qkv", "out"], ["w1", "w2", "w3"])):
        made = SVGT2IPipeline.from_pretrained(saved_pipeline)
        made.transformer.add_adapter(LoraConfig(r=2 + i, lora_alpha=4, target_modules=targets))
        for name, weight in made.transformer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(i))
        folders.append(tmp_path / f"lora{i}")
        made.save_lora_weights(folders[i], transformer_lora_layers=get_peft_model_state_dict(made.transformer))
    return folders


def test_several_adapters_with_weights(loaded, pipeline, loras):
    plain = pixels(pipeline)
    for i, folder in enumerate(loras):
        loaded.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name=f"a{i}")
    loaded.set_adapters(["a0", "a1"], [0.5, 2.0])
    both = pixels(loaded)
    layer = loaded.transformer.layers[0].attention.qkv
    change = 0.5 * layer.lora_B["a0"].weight @ layer.lora_A["a0"].weight
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ change.T)
    loaded.fuse_lora(adapter_names=["a0", "a1"])
    loaded.unload_lora_weights()
    torch.testing.assert_close(pixels(loaded), both, atol=1e-4, rtol=0)
    assert (both - plain).abs().mean() > 1e-3


def test_adapters_of_the_command_line(saved_pipeline, loras, tmp_path):
    def draw(name, *adapters):
        options = [option for adapter in adapters for option in ("--lora", str(adapter))]
        sample.main(
            ["--checkpoint", str(saved_pipeline), "--prompt", PROMPT, "--output", str(tmp_path / name), *options]
        )
        settings = json.loads((tmp_path / name / "settings.json").read_text())
        return np.asarray(Image.open(next((tmp_path / name / "images").iterdir())), int), settings["model"]

    plain, first, half, both = (
        draw("plain"), draw("first", loras[0]), draw("half", f"{loras[0]}:0.5"),
        draw("both", loras[0] / "pytorch_lora_weights.safetensors", f"{loras[1]}:2"),
    )  # fmt: skip
    images = [image for image, _ in (plain, first, half, both)]
    assert all((a != b).any() for i, a in enumerate(images) for b in images[:i])
    assert "adapters" not in plain[1]
    assert [sorted(model["adapters"].values()) for _, model in (first, half, both)] == [[1.0], [0.5], [1.0, 2.0]]
    with pytest.raises(UserError, match="other settings"):
        draw("half", loras[0])
    for wrong, message in (
        (tmp_path / "none", "no such file or folder"),
        (f"{loras[0]}:much", "'much' is no weight"),
        (tmp_path, "0 safetensors files in this folder"),
        (saved_pipeline / "transformer" / "config.json", "only safetensors are read"),
        (saved_pipeline / "autoencoder" / "model.safetensors", "is no adapter of this model"),
    ):
        with pytest.raises(UserError, match=message):
            draw("wrong", wrong)
