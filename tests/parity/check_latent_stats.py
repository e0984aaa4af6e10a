"""Parity of the latent statistics: what is taken from the published file, and both directions.

The release rounds the statistics to bf16 for training. We do not, so its training numbers are reproduced by rounding
first; our own pair of directions must be each other's inverse, which the release's is not.
"""

import torch

from autoencoder.latents.statistics import LatentStats


def check(vectors):
    path = vectors.directory / vectors.config["file"]
    width = torch.load(path, weights_only=True)["mean"].shape[-1]
    cases = sorted(key.split(".")[1] for key in vectors.tensors if key.startswith("in.") and key.endswith(".latent"))
    for case in cases:
        latents, normalized = vectors.tensors[f"in.{case}.latent"], vectors.tensors[f"in.{case}.normalised"]
        channels = latents.shape[1]
        stats = LatentStats.load(path, channels, vectors.config["num_layer"], made_up=channels - width)
        rounded = LatentStats(stats.mean.bfloat16(), stats.std.bfloat16())
        vectors.compare(f"out.{case}.mean", stats.mean)
        vectors.compare(f"out.{case}.std", stats.std)
        vectors.compare(f"out.{case}.train_normalised", rounded.normalize(latents))
        vectors.compare(f"out.{case}.sample_unnormalised", stats.denormalize(normalized))
        torch.testing.assert_close(stats.denormalize(stats.normalize(latents)), latents, atol=1e-5, rtol=1e-6)
