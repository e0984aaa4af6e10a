"""Names and shapes in complete autoencoder checkpoints; those with a residual branch arrive with it."""

import torch

from autoencoder.config import build
from autoencoder.model import DROPPED, ModelConfig, SVGAutoencoder
from harness import check_keys


def check_shapes(vectors):
    for name, expected in vectors.meta["models"].items():
        keys = {key: shape for key, shape in expected["keys"].items() if not key.startswith(DROPPED)}
        if any(key.startswith("extra_vit.") for key in keys):
            print(f"{name}: named gap until the residual autoencoder")
            continue
        channels = keys["decoder.conv_in.weight"][1]
        config = build(ModelConfig, {"embed_dim": channels, "ddconfig": {"z_channels": channels}}, name)
        with torch.device("meta"):
            model = SVGAutoencoder(config)
        check_keys({key: tensor.shape for key, tensor in model.state_dict().items()}, keys, name)
