"""Parity of the frozen encoder, its rotary tables included. Inputs are already ImageNet-normalised."""

from autoencoder.common.weights import load_strictly
from autoencoder.encoders.encoder import EncoderConfig, FrozenEncoder


def timm_arguments(ctor):
    """The release's constructor settings as overrides of the timm architecture."""
    arguments = {
        "patch_size": ctor["patch_size"],
        "embed_dim": ctor["embed_dim"],
        "depth": ctor["depth"],
        "num_heads": ctor["num_heads"],
        "num_reg_tokens": ctor["n_storage_tokens"],
        "mlp_ratio": ctor["ffn_ratio"],
    }
    if ctor["ffn_layer"] == "swiglu":  # hidden width 2/3·ratio·dim, rounded up to a multiple of 8
        arguments["mlp_ratio"] = ctor["ffn_ratio"] * 2 / 3
    return arguments


def check(vectors):
    ctor = vectors.config["ctor"]
    name = "dinov3_vits16plus" if ctor["ffn_layer"] == "swiglu" else "dinov3_vits16"
    encoder = FrozenEncoder(EncoderConfig(name, overrides=timm_arguments(ctor)))
    load_strictly(encoder, vectors.state_dict(), "parity vectors", "the names and shapes must be the published ones")
    for case, (_, height, width) in enumerate(vectors.config["imgs"]):
        grid = height // encoder.patch_size, width // encoder.patch_size
        tokens = encoder.forward_tokens(vectors.tensors[f"in.img.{case}"])
        vectors.compare(f"out.{case}.x_norm_patchtokens", tokens.patches)
        vectors.compare(f"out.{case}.x_norm_clstoken", tokens.cls)
        vectors.compare(f"out.{case}.x_storage_tokens", tokens.registers)
        sin, cos = encoder.backbone.rope.get_embed(grid).chunk(2, dim=-1)
        vectors.compare(f"out.{case}.rope_sin", sin)
        vectors.compare(f"out.{case}.rope_cos", cos)
        images = (vectors.tensors[f"in.img.{case}"] - encoder.image_shift) / encoder.image_scale  # back to [-1, 1]
        vectors.compare(f"out.{case}.latent", encoder(images))
