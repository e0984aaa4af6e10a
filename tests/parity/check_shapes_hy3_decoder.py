"""Names and shapes of the full-size 3-D decoder's state dict, and its number of parameters."""

import torch

from autoencoder.decoders.hy import HyDecoder, HyDecoderConfig
from harness import check_keys


def check_shapes(vectors):
    for name, expected in vectors.meta["models"].items():
        with torch.device("meta"):
            decoder = HyDecoder(HyDecoderConfig(z_channels=expected["keys"]["conv_in.weight"][1]))
        state = decoder.state_dict()
        check_keys({key: tensor.shape for key, tensor in state.items()}, expected["keys"], name)
        assert sum(tensor.numel() for tensor in state.values()) == expected["parameters"], name
