"""Names and shapes of the full-size convolutional decoders' state dicts, and their numbers of parameters."""

import torch

from autoencoder.decoders.convolutional import ConvDecoder, DecoderConfig
from harness import check_keys


def check_shapes(vectors):
    for name, expected in vectors.meta["models"].items():
        with torch.device("meta"):
            decoder = ConvDecoder(DecoderConfig(z_channels=expected["keys"]["conv_in.weight"][1]))
        check_keys({key: tensor.shape for key, tensor in decoder.state_dict().items()}, expected["keys"], name)
        assert sum(parameter.numel() for parameter in decoder.parameters()) == expected["parameters"], name
