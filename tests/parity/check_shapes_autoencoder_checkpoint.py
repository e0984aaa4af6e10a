"""Names and shapes in complete autoencoder checkpoints: pure, residual, and residual with the `hyconfig` decoder."""

from autoencoder.common.config import build
from autoencoder.model import DROPPED, ModelConfig, SVGAutoencoder
from harness import check_keys


def check_shapes(vectors):
    for name, expected in vectors.meta["models"].items():
        keys = {key: shape for key, shape in expected["keys"].items() if not key.startswith(DROPPED)}
        kernel = keys["decoder.conv_in.weight"]
        residual = any(key.startswith("extra_vit.") for key in keys)
        values = {"hyconfig" if len(kernel) == 5 else "ddconfig": {"z_channels": kernel[1]}}
        values["extra_vit_config"] = {"output_dim": keys["extra_vit.heads.2.bias"][0]} if residual else None
        model = SVGAutoencoder(build(ModelConfig, values, name)).to("meta")  # older timm cannot build on meta
        check_keys({key: tensor.shape for key, tensor in model.state_dict().items()}, keys, name)
