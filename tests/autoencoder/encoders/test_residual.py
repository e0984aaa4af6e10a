"""The residual branch against timm's and torchvision's own models, and against plain formulas in float64."""

import numpy as np
import pytest
import timm
import torch

from autoencoder.common.config import ConfigError, UserError, build
from autoencoder.encoders.residual import ResidualConfig, ResidualViT, from_published, match_distribution, to_published

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}
TINY_PLAIN = {"image_size": 64, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}


def tiny(**fields) -> ResidualViT:
    """A small vit-rope-s with random weights everywhere, layer scales included, in eval mode."""
    plain = fields.get("vit_type") == "vit-s"
    model = ResidualViT(ResidualConfig(**{"overrides": TINY_PLAIN if plain else TINY, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("sides", [(32, 32), (48, 80), (64, 16)])
def test_trunk_is_timms_model(sides):
    model = tiny()
    reference = timm.create_model("vit_small_patch16_rope_mixed_224", num_classes=0, dynamic_img_size=True, **TINY)
    reference.load_state_dict(model.trunk.state_dict())
    images = torch.randn(2, 3, *sides)
    torch.testing.assert_close(model.forward_tokens(images), reference.eval().forward_features(images))


def test_rotation_is_a_complex_phase_of_column_and_row():
    rope = tiny().trunk.rope
    h, w, layer, head = 3, 5, 1, 2
    table = rope.get_embed((h, w))[layer, head].detach().double()  # (N, 2·head_dim)
    sin, cos = table.chunk(2, dim=-1)
    f_x, f_y = rope.freqs[:, layer, head].detach().double()
    for row, column in [(0, 0), (1, 4), (2, 3)]:
        phase = torch.polar(torch.ones(len(f_x), dtype=torch.float64), column * f_x + row * f_y)
        torch.testing.assert_close(cos[row * w + column, ::2], phase.real, atol=1e-6, rtol=0)
        torch.testing.assert_close(sin[row * w + column, 1::2], phase.imag, atol=1e-6, rtol=0)


def test_initial_frequencies_are_turned_pairs():
    model = ResidualViT(ResidualConfig())
    f = torch.complex(*model.trunk.rope.freqs.detach())  # (depth 12, heads 6, 32)
    assert f.shape == (12, 6, 32)
    magnitudes = 10 ** (-4 * torch.arange(16) / 64)
    torch.testing.assert_close(f.abs(), magnitudes.repeat(2).expand_as(f))
    quarter_turns = f[..., 16:] / f[..., :16]
    torch.testing.assert_close(quarter_turns, torch.full_like(quarter_turns, 1j), atol=1e-5, rtol=0)
    assert all(torch.all(block.gamma_1 == 1e-4) and torch.all(block.gamma_2 == 1e-4) for block in model.trunk.blocks)


def test_published_grid_is_an_option():
    right, published = tiny(), tiny(published_grid=64)
    published.load_state_dict(right.state_dict())
    square, strip, other = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 128, 32), torch.randn(1, 3, 64, 48)
    for images in (square, other):
        torch.testing.assert_close(published.project(images), right.project(images))
    assert (published.project(strip) - right.project(strip)).abs().max() > 1e-3
    torch.testing.assert_close(published.trunk.rope.get_embed((8, 2)), right.trunk.rope.get_embed((4, 4)))


def test_rotary_angles_stay_exact_in_bf16_and_under_autocast():
    model = tiny()
    before = model.trunk.rope.get_embed((4, 60)).detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.trunk.rope.get_embed((4, 60)), before, atol=0, rtol=0)
    torch.testing.assert_close(model.bfloat16().trunk.rope.get_embed((4, 60)), before, atol=0, rtol=0)
    assert model.project(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


# -- distribution matching --------------------------------------------------------------------------------------------


def reference_match(residual, features):
    """The formula of the specification in NumPy, over everything given, (B, C, N)."""
    locations = [v.mean((0, 2)).mean() for v in (residual, features)]
    spreads = [v.std((0, 2), ddof=1).mean() for v in (residual, features)]
    return (residual - locations[0]) / (spreads[0] + 1e-6) * spreads[1] + locations[1]


def test_matching_follows_the_formula():
    features, residual = 3 + 2 * torch.randn(3, 24, 4, 5), -1 + 0.2 * torch.randn(3, 8, 4, 5)
    flat = [x.flatten(2).double().numpy() for x in (residual, features)]
    batch = match_distribution(residual, features, "batch").flatten(2).double().numpy()
    np.testing.assert_allclose(batch, reference_match(*flat), atol=1e-4)
    single = match_distribution(residual, features, "per_image").flatten(2).double().numpy()
    for i in range(3):
        np.testing.assert_allclose(single[i : i + 1], reference_match(*(x[i : i + 1] for x in flat)), atol=1e-4)


def test_per_image_latents_do_not_depend_on_neighbours():
    model, features, images = tiny(outnorm="per_image"), torch.randn(3, 24, 2, 3), torch.randn(3, 3, 32, 48)
    together, alone = model(images, features), model(images[1:2], features[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)
    published = tiny(outnorm="batch")
    published.load_state_dict(model.state_dict())
    assert (published(images, features)[1:2] - alone).abs().max() > 1e-3
    torch.testing.assert_close(published(images[1:2], features[1:2]), alone)


def test_statistics_are_constants_for_the_gradient():
    features = torch.randn(2, 6, 10, requires_grad=True)
    residual = torch.randn(2, 4, 10, requires_grad=True)
    matched = match_distribution(residual, features)
    matched.sum().backward()
    assert features.grad is None
    scale = features.std((0, 2)).mean() / (residual.std((0, 2)).mean() + 1e-6)
    torch.testing.assert_close(residual.grad, scale.expand_as(residual))


@pytest.mark.parametrize(("over", "batch"), [("batch", 1), ("per_image", 4)])
def test_one_cell_has_no_deviation(over, batch):
    with pytest.raises(UserError, match="at least 2 latent cells"):
        match_distribution(torch.randn(batch, 8, 1, 1), torch.randn(batch, 24, 1, 1), over)


def test_without_outnorm_the_channels_are_as_they_come():
    model, images = tiny(use_outnorm=False), torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(images, torch.randn(1, 24, 2, 2)), model.project(images))


# -- training ---------------------------------------------------------------------------------------------------------


def test_masking_zeroes_whole_cells_in_training_only():
    model, images, features = tiny(mask_ratio=0.25), torch.randn(4, 3, 256, 256), torch.randn(4, 24, 16, 16)
    whole = model(images, features)
    assert torch.all(whole != 0)
    masked = model.train()(images, features)
    zero = masked == 0
    assert torch.equal(zero.any(1), zero.all(1))
    assert 0.2 < zero.float().mean() < 0.3
    torch.testing.assert_close(masked[~zero], whole[~zero], atol=1e-5, rtol=1e-4)


def test_frozen_stays_frozen():
    model = tiny(frozen=True, vit_type="vit-s").train()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tiny().train().training


# -- published names --------------------------------------------------------------------------------------------------


def test_published_names_go_both_ways():
    model = tiny()
    state = model.state_dict()
    assert state["freqs"].shape == (2, 2, 24)
    assert {"cls_token", "blocks.1.gamma_2", "heads.2.bias", "patch_embed.proj.weight"} < state.keys()
    inner = from_published(state, heads=3)
    again = to_published(inner)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_a_published_state_dict_loads_without_what_is_unused():
    donor, model = tiny(), tiny()
    unused = {"head.weight": torch.zeros(10, 48), "head.bias": torch.zeros(10)}
    unused |= {"freqs_t_x": torch.zeros(16), "freqs_t_y": torch.zeros(16)}
    model.load_state_dict({**donor.state_dict(), **unused}, strict=True)
    images = torch.randn(1, 3, 48, 32)
    torch.testing.assert_close(model.project(images), donor.project(images))
    with pytest.raises(RuntimeError, match="trunk.typo"):
        model.load_state_dict({**donor.state_dict(), "typo": torch.zeros(1)})


# -- the older variant ------------------------------------------------------------------------------------------------


def test_vit_s_is_torchvisions_model():
    model, images = tiny(vit_type="vit-s"), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.forward_tokens(images)[:, 0], model.trunk(images))
    assert model(images, torch.randn(2, 24, 4, 4)).shape == (2, 8, 4, 4)
    assert {"class_token", "conv_proj.weight", "encoder.layers.encoder_layer_1.mlp.0.bias"} < model.state_dict().keys()


def test_vit_s_default_sizes():
    model = ResidualViT(ResidualConfig(vit_type="vit-s"))
    state = model.state_dict()
    assert state["encoder.pos_embedding"].shape == (1, 257, 384)
    assert state["encoder.layers.encoder_layer_5.mlp.3.weight"].shape == (384, 1536)
    assert "encoder.layers.encoder_layer_6.ln_1.weight" not in state
    assert model.trunk.encoder.layers[0].self_attention.num_heads == 8
    assert model.trunk.encoder.layers[0].dropout.p == 0.1


def test_vit_s_refuses_other_sizes():
    with pytest.raises(UserError, match=r"64×64 images only, got 96×64"):
        tiny(vit_type="vit-s").project(torch.randn(1, 3, 64, 96))


# -- bad configs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output_dim": 0}, "output_dim = 0"),
        ({"mask_ratio": 1.0}, "mask_ratio = 1.0"),
        ({"vit_type": "vit-b"}, "vit-rope-s"),
        ({"use_outnrom": True}, "use_outnorm"),
        ({"vit_type": "vit-s", "published_grid": 1024}, "published_grid"),
    ],
)
def test_bad_configs(values, message):
    with pytest.raises(UserError, match=message):
        build(ResidualConfig, values)


@pytest.mark.parametrize(("vit_type", "overrides"), [("vit-rope-s", {"embed_dims": 3}), ("vit-s", {"image_size": 60})])
def test_bad_overrides(vit_type, overrides):
    with pytest.raises(ConfigError, match=f"extra_vit_config.overrides.*{vit_type}"):
        ResidualViT(ResidualConfig(vit_type=vit_type, overrides=overrides))
