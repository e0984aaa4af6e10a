"""The 2-D decoder against a plain 3-D reading of the specification, run on one frame with 3-D weights."""

import einops
import pytest
import torch
import torch.nn.functional as F

from autoencoder.common.config import UserError, build
from autoencoder.decoders.hy import HyDecoder, HyDecoderConfig, from_published, pixel_shuffle, to_published

TINY = {"block_out_channels": (64, 32, 32, 32, 32), "num_res_blocks": 1}


def tiny(z_channels, **fields):
    """A small decoder in eval mode and a 3-D state dict whose outer time slices are not zero."""
    decoder = HyDecoder(HyDecoderConfig(z_channels=z_channels, **{**TINY, **fields})).eval()
    state = {name: torch.randn_like(x) / max(x[0].numel(), 1) ** 0.5 for name, x in decoder.state_dict().items()}
    decoder.load_state_dict(state)
    return decoder, state


class Reference3d:
    """The published decoder on (B, z, 1, h, w), straight from a state dict, in float64."""

    def __init__(self, state):
        self.state = {name: x.double() for name, x in state.items()}

    def conv(self, x, name):
        kernel = self.state[f"{name}.weight"]
        return F.conv3d(x, kernel, self.state[f"{name}.bias"], padding=kernel.shape[-1] // 2)

    def norm(self, x, name):
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def block(self, x, name):
        hidden = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1")
        hidden = self.conv(F.silu(self.norm(hidden, f"{name}.norm2")), f"{name}.conv2")
        wider = f"{name}.nin_shortcut.weight" in self.state
        return hidden + (self.conv(x, f"{name}.nin_shortcut") if wider else x)

    def attention(self, x, name):
        normed = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(normed, f"{name}.{part}").flatten(2) for part in "qkv")  # (B, C, N)
        weights = torch.softmax(q.mT @ k / q.shape[1] ** 0.5, dim=-1)  # (B, N, N)
        return x + self.conv((v @ weights.mT).view_as(x), f"{name}.proj_out")

    def upsample(self, x, name):
        wide = self.conv(x, f"{name}.conv")
        wide = wide + x.repeat_interleave(wide.shape[1] // x.shape[1], dim=1)
        return einops.rearrange(wide, "b (r s c) t h w -> b c t (h r) (w s)", r=2, s=2)

    def __call__(self, latents):
        z = latents.double().unsqueeze(2)
        width = self.state["conv_in.weight"].shape[0]
        shortcut = z if width % z.shape[1] == 0 else z[:, -8:]
        x = self.conv(z, "conv_in") + shortcut.repeat_interleave(width // shortcut.shape[1], dim=1)
        x = self.block(self.attention(self.block(x, "mid.block_1"), "mid.attn_1"), "mid.block_2")
        for level in range(5):
            for index in range(2):
                x = self.block(x, f"up.{level}.block.{index}")
            if level < 4:
                x = self.upsample(x, f"up.{level}.upsample")
        return self.conv(F.silu(self.norm(x, "norm_out")), "conv_out").squeeze(2)


@pytest.mark.parametrize("match", [True, False])
@pytest.mark.parametrize("z_channels", [24, 32])  # the last 8 repeated, all repeated
def test_two_dimensions_are_exact(z_channels, match):
    decoder, state = tiny(z_channels, upsample_match_channel=match)
    latents = torch.randn(2, z_channels, 2, 3)
    images = decoder(latents)
    assert images.shape == (2, 3, 32, 48)
    expected = Reference3d(state)(latents)
    assert (images - expected).abs().max() < 1e-4 * expected.abs().max()


def test_pixel_shuffle_has_the_channels_fastest():
    x = torch.randn(2, 12, 3, 4)
    expected = einops.rearrange(x, "b (r s c) h w -> b c (h r) (w s)", r=2, s=2)
    assert torch.equal(pixel_shuffle(x), expected)


def test_state_dict_has_published_shapes_and_round_trips():
    decoder, state = tiny(24)
    saved = decoder.state_dict()
    assert saved["conv_in.weight"].shape == (64, 24, 3, 3, 3)
    assert saved["mid.attn_1.q.weight"].shape == (64, 64, 1, 1, 1)
    assert saved["norm_out.weight"].shape == (32,)
    assert torch.equal(saved["conv_in.weight"][:, :, 1], state["conv_in.weight"][:, :, 1])
    assert not saved["conv_in.weight"][:, :, ::2].any()
    other, _ = tiny(24)
    other.load_state_dict(saved)
    latents = torch.randn(1, 24, 2, 2)
    torch.testing.assert_close(other(latents), decoder(latents))


def test_weight_mappings_are_inverse():
    flat = {"a.weight": torch.randn(4, 2, 3, 3), "a.bias": torch.randn(4), "b.weight": torch.randn(4, 2, 1, 1)}
    again = from_published(to_published(flat))
    assert all(torch.equal(again[name], flat[name]) for name in flat)


def test_two_dimensional_weights_load_too():
    decoder, state = tiny(24)
    other = HyDecoder(decoder.config).eval()
    other.load_state_dict(from_published(state))
    latents = torch.randn(1, 24, 2, 2)
    torch.testing.assert_close(other(latents), decoder(latents))


def test_gradients_reach_the_last_layer_and_the_latents():
    decoder, _ = tiny(24)
    latents = torch.randn(1, 24, 1, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(decoder(latents).square().sum(), decoder.last_layer, retain_graph=False)
    assert gradient.shape == decoder.conv_out.weight.shape
    assert gradient.any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_out_channels": [48, 32, 32, 32, 32]}, "multiple of 32"),
        ({"ffactor_temporal": 4}, "ffactor_temporal = 4"),
        ({"ffactor_spatial": 8}, "ffactor_spatial = 8"),
        ({"z_channels": 5}, "z_channels = 5"),
        ({"num_res_blocks": -1}, "num_res_blocks = -1"),
        ({"block_out_channels": [96, 32, 32, 32, 32]}, "must divide 4 times"),
        ({"block_out_chanels": [32]}, "block_out_channels"),
    ],
)
def test_bad_configs(values, message):
    with pytest.raises(UserError, match=message):
        build(HyDecoderConfig, values)
