"""Decoding in stripes: equal to the plain decoder, and what 4096×4096 takes, counted at full size without memory."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoencoder.decoders import striped
from autoencoder.decoders.convolutional import ConvDecoder, DecoderConfig
from autoencoder.decoders.hy import HyDecoder, HyDecoderConfig
from autoencoder.decoders.striped import decode, decode_in_stripes

SMALL = [
    ConvDecoder(DecoderConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=24)),
    HyDecoder(HyDecoderConfig((128, 64, 32), z_channels=20, num_res_blocks=1, ffactor_spatial=4)),
    HyDecoder(HyDecoderConfig((64, 32, 32), z_channels=16, ffactor_spatial=4, upsample_match_channel=False)),
]


def randomized(decoder):
    """Norms that scale and shift by channel, so that a wrong padding or statistic shows."""
    for name, parameter in decoder.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    return decoder.eval()


@pytest.mark.parametrize("decoder", SMALL, ids=["conv", "hy", "hy_mismatched"])
@pytest.mark.parametrize("stripe_bytes", [1, 3000, 2**40], ids=["row", "some", "whole"])
def test_equals_plain_decoding(decoder, stripe_bytes):
    decoder = randomized(decoder).double()
    latents = torch.randn(2, decoder.conv_in.in_channels, 5, 7, dtype=torch.float64) * 3 + 1
    with torch.no_grad():
        expected = decoder(latents)
    actual = decode_in_stripes(decoder, latents, stripe_bytes)
    # statistics are taken in fp32, which is what the tolerance is for
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_bf16_differs_no_more_than_bf16_rounds():
    decoder = randomized(SMALL[0]).double()
    latents = torch.randn(1, 24, 6, 6)
    with torch.no_grad():
        exact = decoder(latents.double())
        decoder.to(torch.bfloat16)
        plain = (decoder(latents.bfloat16()).double() - exact).abs().mean()
        ours = (decode_in_stripes(decoder, latents.bfloat16(), 2000).double() - exact).abs().mean()
    assert ours < 1.5 * plain


def test_decode_takes_stripes_beyond_the_limit_only(monkeypatch):
    decoder, calls = randomized(SMALL[0]).float(), []
    monkeypatch.setattr(striped, "decode_in_stripes", lambda d, x: calls.append(len(x)) or decode_in_stripes(d, x))
    latents = torch.randn(3, 24, 4, 4)
    small = decode(decoder, latents)
    assert not calls
    monkeypatch.setattr(striped, "PLAIN_PIXELS", 3 * 16 * 16)
    assert torch.equal(decode(decoder, latents), small)
    assert not calls
    monkeypatch.setattr(striped, "PLAIN_PIXELS", 3 * 16 * 16 - 1)
    torch.testing.assert_close(decode(decoder, latents), small, rtol=0, atol=1e-5)
    assert calls == [1, 1, 1]


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages alive at once, counted as they are made: on the meta device nothing is computed."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self.known.discard(key)
        self.now -= size


def peak_gigabytes(run, decoder, size, dtype):
    with torch.device("meta"):
        latents = torch.empty(1, decoder.conv_in.in_channels, size // 16, size // 16, dtype=dtype)
    weights = sum(parameter.nbytes for parameter in decoder.parameters())
    with PeakMemory() as memory, torch.no_grad():
        run(decoder, latents)
    return (memory.peak + weights) / 1e9


@pytest.mark.parametrize(("kind", "config"), [(ConvDecoder, DecoderConfig()), (HyDecoder, HyDecoderConfig())])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 19), (torch.bfloat16, 10)], ids=["fp32", "bf16"])
def test_4096_pixels_fit_on_a_24_gigabyte_card(kind, config, dtype, most):
    with torch.device("meta"):
        decoder = kind(config).to(dtype).eval()
    assert peak_gigabytes(decode, decoder, 4096, dtype) < most


def test_the_count_sees_what_plain_decoding_takes():
    with torch.device("meta"):
        decoder = ConvDecoder(DecoderConfig()).eval()
    feature_map = 128 * 4096**2 * 4 / 1e9
    assert peak_gigabytes(decoder.__class__.__call__, decoder, 4096, torch.float32) > 4 * feature_map
