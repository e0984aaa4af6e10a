"""Parity of the residual ViT, its published-grid quirk included, and of the distribution matching with its gradient."""

import torch

from autoencoder.common.config import build
from autoencoder.common.weights import load_strictly
from autoencoder.encoders.residual import DROPPED, ResidualConfig, ResidualViT, match_distribution


def residual_config(config):
    """The release's constructor settings as our config."""
    ctor = config["ctor"]
    same = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
    overrides = {name: ctor[name] for name in same}
    overrides |= {"rope_temperature": ctor["rope_theta"]}
    values = {"output_dim": config["out_dim"], "published_grid": ctor["img_size"], "overrides": overrides}
    return build(ResidualConfig, values)


def check(vectors):
    residual = ResidualViT(residual_config(vectors.config)).eval()
    state = {name: x for name, x in vectors.state_dict().items() if not name.startswith(DROPPED)}
    load_strictly(residual, state, "parity vectors", "the names and shapes must be the published ones")
    for case in range(len(vectors.config["imgs"])):
        images = vectors.tensors[f"in.img.{case}"]
        vectors.compare(f"out.features.{case}", residual.forward_tokens(images))
        vectors.compare(f"out.{case}", residual.project(images).flatten(2))
    for case in range(len(vectors.config["md"])):
        features = vectors.tensors[f"in.match.{case}.h"]
        values = vectors.tensors[f"in.match.{case}.h_vit"].requires_grad_()
        matched = match_distribution(values, features, "batch")
        vectors.compare(f"out.match.{case}", matched)
        if f"out.grad.match.{case}.h_vit" in vectors.tensors:
            matched.pow(3).mean().backward()
            vectors.compare(f"out.grad.match.{case}.h_vit", values.grad)
        if case == 0:
            grid = vectors.config["md0_grid"]
            latents = torch.cat([features.unflatten(2, grid), matched.unflatten(2, grid)], dim=1)
            vectors.compare("out.residual_latent", latents)
