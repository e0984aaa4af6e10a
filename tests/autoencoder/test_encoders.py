"""The frozen encoder against transformers' DINOv3, its key mapping, and what it refuses."""

import pytest
import timm
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from autoencoder.config import ConfigError, UserError
from autoencoder.encoders import EncoderConfig, FrozenEncoder, build_encoder, from_official, to_official

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


def transformers_twin(state: dict[str, torch.Tensor], gated: bool) -> DINOv3ViTModel:
    config = DINOv3ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=len(state["blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"]),
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        num_register_tokens=4,
        query_bias=True,
        key_bias=False,
        value_bias=True,
    )
    twin = DINOv3ViTModel(config).eval()
    mapped = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": state["mask_token"][None],
        "embeddings.register_tokens": state["storage_tokens"],
        "embeddings.patch_embeddings.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.bias": state["patch_embed.proj.bias"],
        "norm.weight": state["norm.weight"],
        "norm.bias": state["norm.bias"],
    }
    renamed = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
    renamed |= {"attn.proj.": "attention.o_proj.", "mlp.w1.": "mlp.gate_proj.", "mlp.w2.": "mlp.up_proj."}
    renamed |= {"mlp.w3.": "mlp.down_proj.", "mlp.fc1.": "mlp.up_proj.", "mlp.fc2.": "mlp.down_proj."}
    layers = next(name for name in twin.state_dict() if "norm1.weight" in name).split("0.norm1")[0]
    for name, tensor in state.items():
        if not name.startswith("blocks."):
            continue
        _, index, rest = name.split(".", 2)
        if rest.startswith("attn.qkv.") and not rest.endswith("mask"):
            kind = rest.rsplit(".")[-1]
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3)):
                if (part, kind) != ("k_proj", "bias"):
                    mapped[f"{layers}{index}.attention.{part}.{kind}"] = piece
        elif not rest.startswith("attn.qkv."):
            for old, new in renamed.items():
                rest = rest.replace(old, new)
            mapped[f"{layers}{index}.{rest}"] = tensor
    missing, unexpected = twin.load_state_dict(mapped, strict=False)
    assert not unexpected
    assert all("inv_freq" in name for name in missing)
    rope = next(module for module in twin.modules() if hasattr(module, "inv_freq"))
    rope.inv_freq = 1 / state["rope_embed.periods"]
    return twin


@pytest.mark.parametrize("name", ["dinov3_vits16plus", "dinov3_vits16"])
def test_equals_transformers(name, images):
    encoder = tiny_encoder(name)
    twin = transformers_twin(encoder.state_dict(), gated=name.endswith("plus"))
    tokens = encoder.forward_tokens(images)
    with torch.no_grad():
        expected = twin(images).last_hidden_state  # class, registers, patches
    actual = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], dim=1)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


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
    own = {name: torch.randn(3) for name in ("backbone.reg_token", "backbone.norm.bias", "backbone.rope.periods")}
    assert from_official(to_official(own)) == own


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


def test_hub_weights_come_through_timm_with_rounded_periods(monkeypatch, images):
    real = timm.create_model

    def create(name, pretrained=False, **arguments):
        torch.manual_seed(11)
        model = real(name, **arguments)
        if pretrained:
            torch.nn.init.ones_(model.blocks[0].gamma_1)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    encoder = build_encoder(EncoderConfig(weights="hub", overrides=TINY))
    assert encoder(images).shape == (2, 48, 3, 5)
    state = encoder.state_dict()
    assert state["blocks.0.ls1.gamma"].eq(1).all()
    assert torch.equal(state["rope_embed.periods"], state["rope_embed.periods"].bfloat16().float())


def test_failed_download_says_what_to_do(monkeypatch):
    real = timm.create_model

    def offline(name, pretrained=False, **arguments):
        if pretrained:
            raise ConnectionError("no route")
        return real(name, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="could not be downloaded.*official .pth"):
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
    with pytest.raises(ConfigError, match="no_such_argument"):
        FrozenEncoder(EncoderConfig(overrides={"no_such_argument": 1}))
    with pytest.raises(ConfigError, match="num_heads"):
        FrozenEncoder(EncoderConfig(overrides={"embed_dim": 50, "num_heads": 5, "depth": 1}))
    with pytest.raises(UserError, match="dinoconfig.weights.*there is no file"):
        build_encoder(EncoderConfig(weights=str(tmp_path / "absent.pth"), overrides=TINY))
    torch.save(tiny_encoder(depth=1).state_dict() | {"cls_token": torch.ones(1, 1, 7)}, tmp_path / "small.pth")
    with pytest.raises(UserError, match=r"missing: blocks.1.*of another shape: cls_token is \(1, 1, 7\)"):
        build_encoder(EncoderConfig(weights=str(tmp_path / "small.pth"), overrides=TINY))
