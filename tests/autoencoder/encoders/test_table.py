"""The table of encoders against published sizes and docs/encoders.md; the demo configurations that swap encoders."""

import re
from functools import cache

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTMAEConfig,
    ViTMAEModel,
)

from autoencoder.common.config import load_config
from autoencoder.encoders.encoder import EncoderConfig, FrozenEncoder
from autoencoder.encoders.published_keys import ONLY_OFFICIAL, canonical
from autoencoder.encoders.table import MODELS
from autoencoder.model import SVGAutoencoder
from autoencoder.training.settings import AutoencoderTrainConfig


@cache
def on_meta(name: str) -> FrozenEncoder:
    with torch.device("meta"):
        return FrozenEncoder(EncoderConfig(name))


# name → width, layers, heads, MLP width, and what else the published config.json says
PUBLISHED = {
    "dinov3_vits16": (384, 12, 6, 1536, {}),
    "dinov3_vits16plus": (384, 12, 6, 1536, {"use_gated_mlp": True}),
    "dinov3_vitl16": (1024, 24, 16, 4096, {}),
    "dinov3_vith16plus": (1280, 32, 20, 5120, {"use_gated_mlp": True}),
    "dinov3_vit7b16": (4096, 40, 32, 8192, {"use_gated_mlp": True, "query_bias": False, "value_bias": False}),
    "dinov2_vitb14": (768, 12, 12, None, {}),
    "dinov2_vitg14": (1536, 40, 24, None, {"use_swiglu_ffn": True}),
    "siglip2_base_patch16_512": (768, 12, 12, 3072, {"image_size": 512}),
    "siglip2_so400m_patch16_256": (1152, 27, 16, 4304, {"image_size": 256}),
    "siglip2_giant_opt_patch16_384": (1536, 40, 16, 6144, {"image_size": 384}),
    "mae_vitl16": (1024, 24, 16, 4096, {}),
    "mae_vith14": (1280, 32, 16, 5120, {"patch_size": 14}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_the_published_files(name):
    width, layers, heads, mlp, options = PUBLISHED[name]
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads} | options
    sizes |= {"intermediate_size": mlp} if mlp else {}
    with torch.device("meta"):
        if name.startswith("dinov3"):
            twin = DINOv3ViTModel(DINOv3ViTConfig(**sizes, num_register_tokens=4))
        elif name.startswith("dinov2"):
            twin = Dinov2Model(Dinov2Config(**sizes, patch_size=14, image_size=518))
        elif name.startswith("siglip2"):
            twin = SiglipVisionModel(SiglipVisionConfig(**sizes, patch_size=16))
        else:
            twin = ViTMAEModel(ViTMAEConfig(**sizes))
    encoder, state = on_meta(name), twin.state_dict()
    if name.startswith("dinov2"):  # transformers 5 splits in memory what is one tensor in files
        for gate in [key for key in state if ".mlp.gate_proj." in key]:
            packed = torch.cat([state.pop(gate), state.pop(gate.replace("gate", "up"))])
            state[gate.replace("gate_proj", "weights_in")] = packed
    theirs = {key: tuple(value.shape) for key, value in canonical(state, name.startswith("dinov3")).items()}
    ours = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    assert {key: ours[key] for key in ONLY_OFFICIAL if key in ours} | theirs == ours
    assert {block.attn.num_heads for block in encoder.backbone.blocks} == {heads}


def test_documented_figures_are_the_models(repo_root):
    rows = re.findall(
        r"^\| `(\w+)`[^|]*\| `([^`]+)` \| ([\d.]+) M \| (\d+) \| ([^|]+) \|",
        (repo_root / "docs/encoders.md").read_text(),
        re.M,
    )
    assert [row[0] for row in rows] == list(MODELS)
    licences = {"dinov3": "DINOv3", "dinov2": "Apache-2.0", "siglip2": "Apache-2.0", "mae": "CC BY-NC 4.0"}
    for name, architecture, millions, channels, licence in rows:
        encoder = on_meta(name)
        assert architecture == MODELS[name]
        assert float(millions) == round(sum(p.numel() for p in encoder.backbone.parameters()) / 1e6, 1), name
        assert int(channels) == encoder.channels, name
        assert licence == licences[name.split("_")[0]]


def test_the_families_patterns_tell_the_names_apart():
    families = {name: EncoderConfig(name).family for name in MODELS}
    assert families["dinov3_vit7b16"] == "dinov3"
    assert {families[name] for name in MODELS if name.startswith("dinov3")} == {"dinov3"}
    assert {families[name] for name in MODELS if name.endswith("_reg")} == {"dinov2_reg"}
    assert families["dinov2_vitg14"] == "dinov2"
    assert {families[name] for name in MODELS if name.startswith("siglip2")} == {"siglip"}
    assert {families[name] for name in MODELS if name.startswith("mae")} == {"mae"}
    assert EncoderConfig("vit_so400m_patch14_siglip_gap_224.webli").family == "siglip"
    assert EncoderConfig("vit_large_patch16_dinov3_qkvb.sat493m").family == "dinov3"


@pytest.mark.parametrize(
    ("swap", "family"), [("dinov3_b", "dinov3"), ("dinov2_b", "dinov2_reg"), ("siglip2_b", "siglip"), ("mae_b", "mae")]
)
def test_demo_configurations_build(swap, family, repo_root):
    path = repo_root / f"configs/autoencoder/demo/svg_autoencoder_{swap}.yaml"
    config = load_config(AutoencoderTrainConfig, path)
    assert config.model.params.dinoconfig.weights == "hub"
    with torch.device("meta"):
        autoencoder = SVGAutoencoder.from_config(path, overrides=["model.params.dinoconfig.weights=null"])
    assert autoencoder.channels == 768
    assert autoencoder.encoder.config.family == family
    images = torch.zeros(1, 3, 32, 48, device="meta")
    autoencoder.encoder.loaded = True
    assert autoencoder.decode(autoencoder.encode(images)).shape == images.shape
