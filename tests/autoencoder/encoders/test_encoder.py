"""The frozen encoder: its latents, layers, weights and what it refuses (see test_published_keys for its oracles)."""

import pytest
import torch
from torch.nn import functional as F

from autoencoder.common.config import ConfigError, UserError
from autoencoder.encoders.encoder import EncoderConfig, FrozenEncoder, build_encoder

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def tiny_encoder(model_name="dinov3_vits16plus", **overrides) -> FrozenEncoder:
    """A tiny encoder in which every weight is random and matters, loaded through the official names."""
    encoder = FrozenEncoder(EncoderConfig(model_name, overrides=TINY | overrides))
    generator = torch.Generator().manual_seed(1)
    state = encoder.state_dict()
    for name, tensor in state.items():
        if not name.endswith(("bias_mask", "periods")):
            state[name] = torch.randn(tensor.shape, generator=generator) * 0.3
    encoder.load_state_dict(state)
    return encoder


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_latents_are_the_patch_tokens_of_imagenet_normalised_images(encoder, images):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    patches = encoder.forward_tokens(((images + 1) / 2 - mean) / std).patches
    latents = encoder(images)
    assert latents.shape == (2, 48, 3, 5)
    assert encoder.channels == 48
    torch.testing.assert_close(latents[:, :, 1, 2], patches[:, 1 * 5 + 2], atol=1e-5, rtol=1e-5)


def test_stored_periods_are_taken_over_and_survive_casts(encoder, images):
    state = encoder.state_dict()
    assert torch.equal(state["rope_embed.periods"], state["rope_embed.periods"].bfloat16().float())
    before = encoder(images)
    assert not torch.equal(state["rope_embed.periods"], 100.0 ** (torch.arange(4) / 4))  # what timm computes
    other = FrozenEncoder(encoder.config)
    other.load_state_dict(state | {"rope_embed.periods": torch.tensor([1.0, 3.3, 12.0, 40.0])})
    assert (other(images) - before).abs().max() > 1e-3
    table = other.backbone.rope.get_embed((3, 5))
    other.half()
    assert torch.equal(other.backbone.rope.get_embed((3, 5)), table)
    other.float()
    assert torch.equal(other.state_dict()["rope_embed.periods"], torch.tensor([1.0, 3.3, 12.0, 40.0]))
    assert torch.equal(other.backbone.rope.get_embed((3, 5)), table)
    other.load_state_dict(state)  # the cached tables must not outlive the periods
    torch.testing.assert_close(other(images), before)


def test_state_dict_names_survive_a_parent_and_a_round_trip(encoder, images):
    parent = torch.nn.ModuleDict({"encoder": encoder, "decoder": torch.nn.Linear(2, 2)})
    state = parent.state_dict()
    official = ("storage_tokens", "mask_token", "norm.bias")
    official += ("blocks.1.ls2.gamma", "blocks.0.attn.qkv.bias_mask", "blocks.0.mlp.w3.bias")
    assert {f"encoder.{name}" for name in official} <= set(state)
    assert not [name for name in state if "backbone" in name]
    twin = torch.nn.ModuleDict({"encoder": FrozenEncoder(encoder.config), "decoder": torch.nn.Linear(2, 2)})
    twin.load_state_dict(state, strict=True)
    assert torch.equal(twin["encoder"](images), encoder(images))
    assert twin["encoder"].fingerprint() == encoder.fingerprint()


def test_key_bias_is_dropped_and_a_never_loaded_mask_is_refused(encoder, images):
    state = encoder.state_dict()
    name = "blocks.0.attn.qkv.bias"
    other = FrozenEncoder(encoder.config)
    other.load_state_dict(state | {name: state[name] + torch.cat([torch.zeros(48), torch.ones(48), torch.zeros(48)])})
    assert torch.equal(other(images), encoder(images))
    other.load_state_dict(state | {name: state[name] + torch.cat([torch.ones(48), torch.zeros(96)])})
    assert not torch.equal(other(images), encoder(images))
    with pytest.raises(UserError, match="blocks.0.attn.qkv.bias_mask"):
        other.load_state_dict(state | {f"{name}_mask": torch.full((144,), torch.nan)})


def test_never_trains(encoder, images):
    parent = torch.nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    assert not encoder(images.clone().requires_grad_()).requires_grad


def test_random_weights_are_asked_for_reproducible_and_leave_the_global_generator_alone(images):
    config = EncoderConfig(weights="random", overrides=TINY)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="RANDOM ENCODER"):
        first = build_encoder(config)
    after = torch.rand(2)
    with pytest.warns(UserWarning, match="weights: random"):
        second = build_encoder(config)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(2))
    assert torch.equal(first(images), second(images))
    assert first(images).std() > 0.1


def test_fingerprint_names_architecture_and_weights_but_not_precision(encoder):
    original = encoder.fingerprint()
    assert len(original) == 16
    copy = tiny_encoder().bfloat16()
    assert copy.fingerprint() == original
    state = encoder.state_dict()
    state["blocks.1.norm1.bias"] = state["blocks.1.norm1.bias"] + 1
    copy.load_state_dict(state)
    assert copy.fingerprint() != original
    other_heads = FrozenEncoder(EncoderConfig(overrides=TINY | {"num_heads": 6}))
    other_heads.load_state_dict(encoder.state_dict() | {"rope_embed.periods": torch.ones(2)})
    assert other_heads.fingerprint() != original


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_weights_from_an_official_file_or_an_autoencoder_checkpoint(encoder, images, tmp_path, prefix):
    path = tmp_path / "weights.pth"
    state = {prefix + name: tensor for name, tensor in encoder.state_dict().items()}
    torch.save({"state_dict": state | {"decoder.x": torch.ones(1)}} if prefix else state, path)
    loaded = build_encoder(EncoderConfig(weights=str(path), overrides=TINY))
    assert torch.equal(loaded(images), encoder(images))


def test_plain_timm_model_without_biases_refuses_official_weights(encoder, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(encoder.state_dict(), path)
    config = EncoderConfig("vit_small_plus_patch16_dinov3", str(path), overrides=TINY)
    with pytest.raises(UserError, match="4 unexpected: blocks.0.attn.qkv.bias"):
        build_encoder(config)


def test_layers_are_normalised_and_averaged(images):
    deep = tiny_encoder(depth=4)
    state = deep.state_dict()

    def latents(**choice):
        encoder = FrozenEncoder(EncoderConfig(overrides=TINY | {"depth": 4}, **choice))
        encoder.load_state_dict(state)
        return encoder(images)

    cut = FrozenEncoder(EncoderConfig(overrides=TINY))  # 2 blocks
    cut.load_state_dict({name: value for name, value in state.items() if not name.startswith(("blocks.2", "blocks.3"))})
    assert torch.equal(latents(layer=1), cut(images))
    assert torch.equal(latents(layer=-3), cut(images))
    assert torch.equal(latents(), latents(layer=3))
    last_two = latents(average_last=2)
    torch.testing.assert_close(last_two, (latents(layer=2) + latents(layer=3)) / 2, atol=1e-5, rtol=1e-5)
    first_two = latents(layer=1, average_last=2)
    torch.testing.assert_close(first_two, (latents(layer=0) + latents(layer=1)) / 2, atol=1e-5, rtol=1e-5)
    assert (last_two - first_two).abs().max() > 0.1


@pytest.mark.parametrize("name", ["dinov3_vits16plus", "dinov2_vits14", "siglip2_base_patch16_256", "mae_vitb16"])
@pytest.mark.filterwarnings("ignore:RANDOM ENCODER")
def test_summed_layers_are_those_of_timm(name):
    deep = TINY | {"depth": 4}
    encoder = build_encoder(EncoderConfig(name, "random", overrides=deep, layers=(0, -1, 2)))
    plain = build_encoder(EncoderConfig(name, "random", overrides=deep))
    assert encoder.blocks == (0, 2, 3)
    cells, patch = encoder.backbone.patch_embed.grid_size[0], encoder.backbone.patch_embed.patch_size[0]
    images = torch.rand(1, 3, 16 * cells, 16 * cells) * 2 - 1  # of the network's own size: no position is resized
    resized = F.interpolate(images, [patch * cells] * 2, mode="bicubic", antialias=True).clamp(-1, 1)
    seen = encoder.normalize_images(images if patch == 16 else resized)
    options = {"indices": [0, 2, 3], "norm": True, "intermediates_only": True}
    with torch.no_grad():
        expected = sum(plain.backbone.forward_intermediates(seen, **options))
    torch.testing.assert_close(encoder(images), expected, atol=2e-4, rtol=1e-4)
    last = build_encoder(EncoderConfig(name, "random", overrides=deep, layers="last"))
    assert torch.equal(last(images), plain(images))
    four = build_encoder(EncoderConfig(name, "random", overrides=deep, layers="last_4"))
    assert four.blocks == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("first", "'first': give \"last\""),
        ("last_0", "'last_0': give"),
        ((), r"\(\): give"),
        ("last_3", "last_3: dinov3_vits16plus has 2 blocks"),
        ((0, 2), r"\(0, 2\): dinov3_vits16plus has 2 blocks"),
        ((1, -1), r"\(1, -1\) names a block of dinov3_vits16plus twice"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers, message):
    with pytest.raises(ConfigError, match=f"dinoconfig.layers: {message}"):
        FrozenEncoder(EncoderConfig(overrides=TINY, layers=layers))


def test_layers_take_the_place_of_the_other_two():
    with pytest.raises(ConfigError, match="leave out layer"):
        EncoderConfig(layers="last", average_last=2)


def test_fingerprint_names_the_layers(encoder):
    def name(**choice):
        other = FrozenEncoder(EncoderConfig(overrides=TINY, **choice))
        other.load_state_dict(encoder.state_dict())
        return other.fingerprint()

    assert name(layer=1) == name(layer=-1) == name(average_last=1) == encoder.fingerprint()
    assert len({name(), name(layer=0), name(average_last=2), name(layers="last_2"), name(layers=(0,))}) == 5
    assert name(layers="last") == name(layers=(1,)) == name(layers="last_1") == encoder.fingerprint()
    assert name(layers=(0, 1)) == name(layers=(-1, 0)) == name(layers="last_2")


@pytest.mark.parametrize(("name", "cells"), [("dinov2_vits14", 14), ("siglip2_base_patch16_256", 16)])
@pytest.mark.filterwarnings("ignore:RANDOM ENCODER")
def test_a_cell_is_16_pixels_whatever_the_patches(name, cells):
    encoder = build_encoder(EncoderConfig(name, "random", overrides=TINY))
    images = torch.rand(1, 3, 64, 32) * 2 - 1
    assert encoder.patch_size == 16
    assert encoder(images).shape == (1, 48, 4, 2)
    assert encoder.bfloat16()(images).dtype == torch.bfloat16
    with pytest.raises(UserError, match="divisible by 16"):
        encoder(images[:, :, :56, :28])
    size = [4 * cells, 2 * cells]
    seen = []
    encoder.float().backbone.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder(torch.sign(images))  # ±1: a bicubic filter overshoots
    assert list(seen[0].shape[2:]) == size
    within = encoder.normalize_images(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    assert (seen[0] >= within[:1] - 1e-6).all()
    assert (seen[0] <= within[1:] + 1e-6).all()
    resized = F.interpolate(torch.sign(images), size, mode="bicubic", antialias=True)
    assert (cells == 16) == bool(resized.abs().max() <= 1)


def test_without_weights_nothing_is_initialised(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("random numbers were drawn")

    for draw in ("normal_", "uniform_"):
        original = getattr(torch.Tensor, draw)

        def checked(tensor, *arguments, original=original, **named):
            return original(tensor, *arguments, **named) if tensor.is_meta else fail()

        monkeypatch.setattr(torch.Tensor, draw, checked)
    encoder = FrozenEncoder(EncoderConfig(overrides=TINY))
    assert not any(tensor.is_meta for tensor in [*encoder.parameters(), *encoder.buffers()])
    left = {name for name, _ in encoder.backbone.named_buffers() if not name.endswith(".attn.k_bias")}
    assert left == {"rope.periods", "mask_token"}  # which hold their values; k biases are zero
    assert not any(value.any() for name, value in encoder.backbone.named_buffers() if name.endswith("k_bias"))
    for name in ("dinov2_vitb14_reg", "siglip2_base_patch16_256", "mae_vitb16"):
        assert not list(FrozenEncoder(EncoderConfig(name, overrides=TINY)).backbone.buffers())


@pytest.mark.parametrize("name", ["dinov3_vits16plus", "mae_vitb16"])
def test_hub_weights_are_asked_for_by_name(name, monkeypatch, images):
    config = EncoderConfig(name, overrides=TINY)
    original, asked = FrozenEncoder(config, initialize=True), []
    state = original.backbone.state_dict()  # timm's names, and without what timm computes
    state = {key: value for key, value in state.items() if key not in ("rope.periods", "mask_token")}
    monkeypatch.setattr("timm.models.load_state_dict_from_hf", lambda source: asked.append(source) or dict(state))
    for weights in ("hub", "hf-hub:someone/copy"):
        loaded = build_encoder(EncoderConfig(name, weights, overrides=TINY))
        assert torch.equal(loaded(images), original(images))
    default = {"dinov3_vits16plus": "timm/vit_small_plus_patch16_dinov3_qkvb.lvd1689m"}
    assert asked == [default.get(name, "timm/vit_base_patch16_224.mae"), "someone/copy"]


def test_failed_download_says_what_to_do(monkeypatch):
    def offline(source):
        raise ConnectionError("no route")

    monkeypatch.setattr("timm.models.load_state_dict_from_hf", offline)
    with pytest.raises(UserError, match="timm/some could not be downloaded.*no route.*official file"):
        build_encoder(EncoderConfig(weights="hf-hub:timm/some", overrides=TINY))


def test_bad_input(encoder, tmp_path):
    with pytest.raises(UserError, match="divisible by 16"):
        encoder(torch.zeros(1, 3, 40, 32))
    with pytest.raises(UserError, match=r"\(B, 3, H, W\)"):
        encoder(torch.zeros(3, 32, 32))
    with pytest.raises(UserError, match="has no weights yet.*dinoconfig.weights"):
        build_encoder(EncoderConfig(overrides=TINY))(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="'dinov3_vits17'.*dinov3_vits16plus"):
        FrozenEncoder(EncoderConfig("dinov3_vits17"))
    with pytest.raises(ConfigError, match="no known encoder"):
        FrozenEncoder(EncoderConfig("vit_base_patch16_224"))  # not one that the table's families know
    with pytest.raises(ConfigError, match="dinoconfig.layer: 2 is out of range of the 2 of dinov3_vits16plus"):
        FrozenEncoder(EncoderConfig(overrides=TINY, layer=2))
    with pytest.raises(ConfigError, match="dinoconfig.average_last: 2 must be at least 1 and at most 1"):
        FrozenEncoder(EncoderConfig(overrides=TINY, layer=0, average_last=2))
    with pytest.raises(ConfigError, match="no_such_argument"):
        FrozenEncoder(EncoderConfig(overrides={"no_such_argument": 1}))
    with pytest.raises(ConfigError, match="num_heads"):
        FrozenEncoder(EncoderConfig(overrides={"embed_dim": 50, "num_heads": 5, "depth": 1}))
    with pytest.raises(UserError, match="dinoconfig.weights.*there is no file"):
        build_encoder(EncoderConfig(weights=str(tmp_path / "absent.pth"), overrides=TINY))
    torch.save(tiny_encoder(depth=1).state_dict() | {"cls_token": torch.ones(1, 1, 7)}, tmp_path / "small.pth")
    with pytest.raises(UserError, match=r"missing: blocks.1.*of another shape: cls_token is \(1, 1, 7\)"):
        build_encoder(EncoderConfig(weights=str(tmp_path / "small.pth"), overrides=TINY))
