"""The convolutional decoder against diffusers' decoder with mapped weights."""

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder

from autoencoder.common.config import UserError, build
from autoencoder.decoders.convolutional import ConvDecoder, DecoderConfig

CONFIG = DecoderConfig(ch=32, ch_mult=(1, 2, 1, 2), num_res_blocks=1, z_channels=12)


def diffusers_twin(decoder: ConvDecoder) -> Decoder:
    """diffusers' decoder with attention in the coarsest up block and our weights; its up block 0 is the coarsest."""
    config = decoder.config
    levels = len(config.ch_mult)
    twin = Decoder(
        in_channels=config.z_channels,
        out_channels=config.out_ch,
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
        block_out_channels=tuple(config.ch * m for m in config.ch_mult),
        layers_per_block=config.num_res_blocks,
        norm_num_groups=32,
    ).eval()
    mapped = {}
    for name, tensor in decoder.state_dict().items():
        if name.startswith("up."):
            _, level, rest = name.split(".", 2)
            name = f"up_blocks.{levels - 1 - int(level)}.{rest}"
        for old, new in (
            ("mid.block_1", "mid_block.resnets.0"),
            ("mid.block_2", "mid_block.resnets.1"),
            ("mid.attn_1", "mid_block.attentions.0"),
            (".block.", ".resnets."),
            (".attn.", ".attentions."),
            ("upsample.", "upsamplers.0."),
            ("nin_shortcut", "conv_shortcut"),
            ("norm_out", "conv_norm_out"),
        ):
            name = name.replace(old, new)
        if ".attentions." in name:
            for old, new in ((".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v.")):
                name = name.replace(old, new)
            name = name.replace(".norm.", ".group_norm.").replace("proj_out", "to_out.0")
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
        mapped[name] = tensor
    twin.load_state_dict(mapped, strict=True)
    return twin


@pytest.fixture
def decoder():
    decoder = ConvDecoder(CONFIG)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return decoder.eval()


def test_equals_diffusers_with_gradients(decoder):
    twin = diffusers_twin(decoder)
    latents = torch.randn(2, 12, 3, 5)
    ours, theirs = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    actual, expected = decoder(ours), twin(theirs)
    assert actual.shape == (2, 3, 24, 40)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    actual.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-3)
    torch.testing.assert_close(decoder.last_layer.grad, twin.conv_out.weight.grad, atol=1e-6, rtol=1e-3)


def test_memory_format_changes_nothing(decoder):
    latents = torch.randn(1, 12, 4, 4)
    expected = decoder(latents)
    plain = ConvDecoder(CONFIG).to(memory_format=torch.contiguous_format).eval()
    plain.load_state_dict(decoder.state_dict())
    torch.testing.assert_close(plain(latents.contiguous(memory_format=torch.channels_last)), expected)


def test_published_ddconfig_scales_by_16():
    published = {"double_z": True, "z_channels": 64, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32}
    published |= {"ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 0, "attn_resolutions": [], "dropout": 0.0}
    decoder = ConvDecoder(build(DecoderConfig, published))
    assert decoder.scale == 16
    assert decoder(torch.randn(1, 64, 1, 2)).shape == (1, 3, 16, 32)
    assert [name for name in decoder.state_dict() if name.startswith("up.4.attn.")]
    assert not [name for name in decoder.state_dict() if name.startswith(("up.0.attn", "up.3.attn"))]


def test_dropout_acts_in_training_only():
    decoder = ConvDecoder(DecoderConfig(ch=32, ch_mult=(1, 1), num_res_blocks=0, z_channels=4, dropout=0.5))
    latents = torch.randn(1, 4, 2, 2)
    assert not torch.equal(decoder(latents), decoder(latents))
    decoder.eval()
    assert torch.equal(decoder(latents), decoder(latents))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("ch", 48, "multiple of 32"), ("ch_mult", [], "ch_mult"), ("num_res_blocks", -1, "num_res_blocks"),
     ("dropout", 1.0, "dropout"), ("z_channels", 0, "z_channels")],
)  # fmt: skip
def test_impossible_settings_are_refused(field, value, message):
    with pytest.raises(UserError, match=message):
        build(DecoderConfig, {field: value})
