"""Every family against transformers' own implementation, through files that transformers saves; and other namings."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from autoencoder.common.config import UserError
from autoencoder.encoders.encoder import EncoderConfig, FrozenEncoder, build_encoder
from autoencoder.encoders.published_keys import canonical, from_official, to_official

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 192}
TIMM = {"embed_dim": 48, "depth": 3, "num_heads": 3}
SIDE = 5  # of the table of learned positions


def randomized(twin: torch.nn.Module) -> torch.nn.Module:
    """All weights random, so that every one of them matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return twin.eval()


@pytest.fixture(scope="module")
def images():
    """Not square: a grid of 3 rows and 6 columns."""
    return torch.rand(2, 3, 48, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1


def normalized(images, normalization):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalization)
    return ((images + 1) / 2 - mean) / std


def fit_to_patches_of_14(images):
    size = [side // 16 * 14 for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)


def load(twin, folder, name, **overrides) -> FrozenEncoder:
    twin.save_pretrained(folder)
    return build_encoder(EncoderConfig(name, str(folder / "model.safetensors"), overrides=TIMM | overrides))


def to_map(tokens: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Patch tokens (B, N, D) → (B, D, h, w)."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *(side // 16 for side in images.shape[2:]))


@pytest.mark.parametrize("name", ["dinov3_vits16", "dinov3_vits16plus", "dinov3_vit7b16"])
def test_dinov3(name, images, tmp_path):
    gated, biases = name != "dinov3_vits16", "7b" not in name
    config = DINOv3ViTConfig(
        **SIZES, use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", num_register_tokens=4,
        query_bias=biases, key_bias=False, value_bias=biases,
    )  # fmt: skip
    twin = randomized(DINOv3ViTModel(config))
    encoder = load(twin, tmp_path, name, mlp_ratio=4)
    rope = next(module for module in twin.modules() if hasattr(module, "inv_freq"))
    rope.inv_freq = 1 / encoder.state_dict()["rope_embed.periods"]
    fitted = normalized(images, IMAGENET)
    with torch.no_grad():
        expected = twin(fitted).last_hidden_state  # class, registers, patches
    torch.testing.assert_close(encoder(images), to_map(expected[:, 5:], images), atol=3e-5, rtol=1e-5)
    tokens = encoder.forward_tokens(fitted)
    torch.testing.assert_close(tokens.cls, expected[:, 0], atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.registers, expected[:, 1:5], atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "swiglu"])
def test_dinov2(gated, images, tmp_path):
    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=4, patch_size=14, image_size=14 * SIDE,
        use_swiglu_ffn=gated,
    )  # fmt: skip
    twin = randomized(Dinov2Model(config))
    name = "dinov2_vitg14" if gated else "dinov2_vitb14"
    encoder = load(twin, tmp_path, name, img_size=14 * SIDE)
    released = encoder(images)
    encoder.family = replace(encoder.family, resizing={})  # transformers leaves out the released code's offset of 0.1
    with torch.no_grad():
        expected = twin(normalized(fit_to_patches_of_14(images), IMAGENET)).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder(images), to_map(expected, images), atol=3e-5, rtol=1e-5)
    assert 1e-3 < (released - encoder(images)).abs().max() < 1
    square = images[:, :, :, :48].repeat(1, 1, 2, 2)[:, :, : 16 * SIDE, : 16 * SIDE]
    same_grid = encoder(square)
    encoder.family = replace(encoder.family, resizing={"offset": 0.1})
    assert torch.equal(encoder(square), same_grid)


def test_dinov2_with_registers(images, tmp_path):
    config = Dinov2WithRegistersConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=4, patch_size=14, image_size=14 * SIDE,
        num_register_tokens=4,
    )  # fmt: skip
    twin = randomized(Dinov2WithRegistersModel(config))
    encoder = load(twin, tmp_path, "dinov2_vits14_reg", img_size=14 * SIDE)
    fitted = normalized(fit_to_patches_of_14(images), IMAGENET)
    with torch.no_grad():
        expected = twin(fitted).last_hidden_state  # class, registers, patches
    torch.testing.assert_close(encoder(images), to_map(expected[:, 5:], images), atol=3e-5, rtol=1e-5)
    tokens = encoder.forward_tokens(fitted)
    torch.testing.assert_close(tokens.cls, expected[:, 0], atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.registers, expected[:, 1:5], atol=3e-5, rtol=1e-5)


def siglip_twin() -> SiglipModel:
    """With its text tower, as it is published."""
    config = SiglipConfig(
        text_config=SIZES | {"vocab_size": 7}, vision_config=SIZES | {"patch_size": 16, "image_size": 16 * SIDE}
    )
    return randomized(SiglipModel(config))


def test_siglip2(images, tmp_path):
    twin = siglip_twin()
    encoder = load(twin, tmp_path, "siglip2_base_patch16_256", img_size=16 * SIDE)
    fitted = normalized(images, HALF)
    with torch.no_grad():
        expected = twin.vision_model(fitted, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(encoder(images), to_map(expected, images), atol=3e-5, rtol=1e-5)
    tokens = encoder.forward_tokens(fitted)
    assert tokens.cls is None
    assert tokens.registers.shape == (2, 0, 48)


def test_mae(images, tmp_path):
    config = ViTMAEConfig(
        **SIZES, patch_size=16, image_size=16 * SIDE, mask_ratio=0.0, layer_norm_eps=1e-6, decoder_hidden_size=48,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32,
    )  # fmt: skip
    twin = randomized(ViTMAEForPreTraining(config))
    encoder = load(twin, tmp_path, "mae_vitb16", img_size=16 * SIDE)
    order = torch.arange(18.0).expand(2, -1)  # keeps the order of the patches, of which none is masked
    with torch.no_grad():
        fitted = normalized(images, IMAGENET)
        expected = twin.vit(fitted, noise=order, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(encoder(images), to_map(expected[:, 1:], images), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dinov2_vitb14", "siglip2_base_patch16_256", "mae_vitb16"])
def test_a_tables_grid_needs_no_resizing_and_positions_matter(name):
    patch = 14 if "14" in name else 16
    config = EncoderConfig(name, "random", overrides=TIMM | {"img_size": patch * SIDE})
    with pytest.warns(UserWarning, match="RANDOM ENCODER"):
        encoder = build_encoder(config)
    images = torch.rand(1, 3, 16 * SIDE, 16 * SIDE) * 2 - 1
    before = encoder(images)
    encoder.family = replace(encoder.family, resizing={"antialias": True})  # without effect on the table's own grid
    assert torch.equal(encoder(images), before)
    torch.nn.init.ones_(encoder.backbone.pos_embed)
    assert not torch.allclose(encoder(images), before, atol=1e-3)


def official_dinov2(state: dict, registers: bool) -> dict:
    """Our names → the names in the authors' files."""
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        class_position = torch.randn(1, 1, 48)
        state["cls_token"] = state["cls_token"] - class_position
        state["pos_embed"] = torch.cat([class_position, state["pos_embed"]], dim=1)
    return state | {"mask_token": torch.ones(1, 48)}


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_the_authors_dinov2_files_load(name, images, tmp_path):
    config = EncoderConfig(name, overrides=TIMM | {"img_size": 70})
    encoder = FrozenEncoder(config, initialize=True)
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save(official_dinov2(dict(encoder.state_dict()), registers=name.endswith("reg")), path)
    loaded = build_encoder(replace(config, weights=str(path)))
    torch.testing.assert_close(loaded(images), encoder(images), atol=1e-5, rtol=1e-5)


def test_the_authors_mae_files_load_with_or_without_the_decoder(images, tmp_path):
    config = EncoderConfig("mae_vitb16", overrides=TIMM | {"img_size": 80})
    encoder = FrozenEncoder(config, initialize=True)
    extra = {name: torch.ones(1) for name in ("mask_token", "decoder_blocks.0.norm1.weight", "decoder_pos_embed")}
    path = tmp_path / "mae_pretrain_vit_base.pth"
    for state in (encoder.state_dict(), encoder.state_dict() | extra):
        torch.save({"model": dict(state)}, path)
        assert torch.equal(build_encoder(replace(config, weights=str(path)))(images), encoder(images))


def test_timm_files_of_dinov3_lack_what_is_computed(images, tmp_path):
    config = EncoderConfig("dinov3_vits16plus", overrides=TIMM)
    encoder = FrozenEncoder(config, initialize=True)
    own = from_official(encoder.state_dict())
    own = {name: own[name] for name in own if name not in ("rope.periods", "mask_token")}
    assert {"reg_token", "blocks.0.gamma_1", "blocks.2.attn.q_bias", "blocks.0.mlp.fc1_g.weight"} <= set(own)
    save_file({name: value.contiguous() for name, value in own.items()}, tmp_path / "model.safetensors")
    loaded = build_encoder(replace(config, weights=str(tmp_path / "model.safetensors")))
    assert torch.equal(loaded(images), encoder(images))
    assert loaded.fingerprint() == encoder.fingerprint()


def test_extras_of_the_7b_are_dropped_by_name_and_nothing_else(tmp_path):
    config = EncoderConfig("dinov3_vit7b16", overrides=TIMM)
    encoder = FrozenEncoder(config, initialize=True)
    state = dict(encoder.state_dict())
    assert not any(".attn.qkv.bias" in name for name in state)
    path = tmp_path / "dinov3_vit7b16_pretrain_lvd1689m.pth"
    torch.save(state | {"local_cls_norm.weight": torch.ones(48), "local_cls_norm.bias": torch.ones(48)}, path)
    assert build_encoder(replace(config, weights=str(path))).fingerprint() == encoder.fingerprint()
    torch.save(state | {"global_cls_norm.weight": torch.ones(48)}, path)
    with pytest.raises(UserError, match="1 unexpected: global_cls_norm.weight"):
        build_encoder(replace(config, weights=str(path)))


def test_names_of_a_saved_siglip_need_no_more_than_the_vision_tower(tmp_path):
    siglip_twin().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    vision = {name: value for name, value in state.items() if name.startswith("vision_model.")}
    assert len(vision) < len(state)
    names = canonical(state, dinov3=False)
    assert set(names) == set(canonical(vision, dinov3=False))
    assert names["blocks.2.attn.qkv.bias"].shape == (144,)
    assert not [name for name in names if not name.startswith(("patch_embed.", "pos_embed", "blocks.", "norm."))]


def test_official_and_timm_names_are_inverse():
    own = {
        name: torch.randn(3) for name in ("reg_token", "norm.bias", "rope.periods", "blocks.0.gamma_2", "mask_token")
    }
    own |= {f"blocks.1.attn.{part}_bias": torch.randn(6) for part in "qv"} | {"blocks.1.mlp.fc1_x.bias": torch.randn(2)}
    own |= {"blocks.1.mlp.fc1_g.bias": torch.randn(2), "blocks.1.mlp.fc2.bias": torch.randn(2)}
    official = to_official(own)
    expected = {"storage_tokens", "blocks.0.ls2.gamma", "blocks.1.attn.qkv.bias_mask", "blocks.1.mlp.w2.bias"}
    assert expected <= set(official)
    back = from_official(official)
    assert set(back) == set(own)
    assert all(torch.equal(back[name], own[name]) for name in own)
