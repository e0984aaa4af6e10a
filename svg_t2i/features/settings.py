"""Sources of the frozen networks: the `autoencoder` and `text_encoder` sections of a run's YAML file."""

from __future__ import annotations

from dataclasses import dataclass

from autoencoder.common.config import UserError, locate
from autoencoder.model import SVGAutoencoder


@dataclass(frozen=True)
class AutoencoderSource:
    """The frozen autoencoder: see `SVGAutoencoder`. Training uses its encoder and statistics only."""

    config: str  # its YAML, or a folder written by save_pretrained
    checkpoint: str | None = None
    stats: str | None = None  # latent statistics, ours or published; "measure" takes them from the training images
    encoder_weights: str | None = None  # instead of dinoconfig.weights: a .pth, "hub" or "random"

    def load(self) -> SVGAutoencoder:
        """The autoencoder, on the CPU.

        Raises:
            UserError: something is missing or does not fit; or encoder weights for a folder that has its own.
        """
        weights = [] if self.encoder_weights is None else [f"model.params.dinoconfig.weights={self.encoder_weights}"]
        if weights and locate(self.config).is_dir():
            raise UserError(
                f"autoencoder.encoder_weights is for a YAML config; the folder {self.config} brings its own weights"
            )
        return SVGAutoencoder.from_pretrained(self.config, self.checkpoint, self.stats, weights)


@dataclass(frozen=True)
class TextSource:
    """The frozen text encoder: see `TextEncoder`."""

    path: str = "google/gemma-2-2b"  # folder or Hub id; "random" makes a small random one
    max_length: int = 256
    cache_tokens: int = 32768  # features of recent captions are kept up to this many tokens; 0 switches it off
