"""Names and shapes of the full-size encoders' state dicts."""

import torch

from autoencoder.encoders.encoder import EncoderConfig, FrozenEncoder
from harness import check_keys


def check_shapes(vectors):
    for name, expected in vectors.meta["models"].items():
        with torch.device("meta"):
            encoder = FrozenEncoder(EncoderConfig(f"dinov3_{name}"))
        check_keys({key: tensor.shape for key, tensor in encoder.state_dict().items()}, expected["keys"], name)
