"""Parity of the convolutional decoder: images, and the gradients of their mean square."""

from autoencoder.common.config import build
from autoencoder.common.weights import load_strictly
from autoencoder.decoders.convolutional import ConvDecoder, DecoderConfig


def check(vectors):
    decoder = ConvDecoder(build(DecoderConfig, vectors.config["ctor"])).eval()
    load_strictly(decoder, vectors.state_dict(), "parity vectors", "the names and shapes must be the published ones")
    parameters = dict(decoder.named_parameters())
    for case in range(len(vectors.config["zs"])):
        latents = vectors.tensors[f"in.{case}.z"].requires_grad_()
        images = decoder(latents)
        vectors.compare(f"out.{case}", images.detach())
        gradients = [key for key in vectors.tensors if key.startswith(f"out.grad.{case}.")]
        if gradients:
            decoder.zero_grad()
            images.square().mean().backward()
        for key in gradients:
            name = key.removeprefix(f"out.grad.{case}.")
            leaf = latents if name == "z" else parameters[name.removeprefix("param.")]
            vectors.compare(key, leaf.grad)
