"""Parity of the 2-D network with the release's 3-D decoder, for latents that divide the first width and others."""

from autoencoder.common.config import build
from autoencoder.common.weights import load_strictly
from autoencoder.decoders.hy import HyDecoder, HyDecoderConfig


def check(vectors):
    ctor, state = vectors.config["ctor"], vectors.state_dict()
    models = {
        "main": (ctor, state),
        "divisible": (ctor | {"z_channels": vectors.config["alt_z"]}, state | vectors.state_dict("alt.")),
    }
    for name, (settings, weights) in models.items():
        decoder = HyDecoder(build(HyDecoderConfig, settings)).eval()
        load_strictly(decoder, weights, "parity vectors", "the names and shapes must be the published ones")
        for case in range(len(vectors.config["zs"])):
            vectors.compare(f"out.{name}.{case}", decoder(vectors.tensors[f"in.{name}.{case}.z"]))
