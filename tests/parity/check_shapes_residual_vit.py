"""Names and shapes of the full-size residual branch's state dict."""

import torch

from autoencoder.common.config import build
from autoencoder.encoders.residual import DROPPED, ResidualConfig, ResidualViT
from harness import check_keys


def check_shapes(vectors):
    for name, expected in vectors.meta["models"].items():
        residual = ResidualViT(build(ResidualConfig, {"vit_type": name}))
        keys = {key: shape for key, shape in expected["keys"].items() if not key.startswith(DROPPED)}
        check_keys({key: tensor.shape for key, tensor in residual.state_dict().items()}, keys, name)
        classifier = sum(torch.Size(expected["keys"][key]).numel() for key in ("head.weight", "head.bias"))
        assert sum(p.numel() for p in residual.parameters()) == expected["parameters"] - classifier, name
