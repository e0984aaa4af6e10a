"""Randomness of one visit to a sample: caption dropout, caption choice, crop.

All of it is a function of (seed, position in the training stream): not of workers, ranks, micro-batches, interruptions,
nor of whether the sample is read as an image or as cached features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoencoder.common.config import UserError
from autoencoder.images.order import sample_rng

CROP_SEED = 0  # fixed crops belong to the data, not to the run


@dataclass(frozen=True)
class Draw:
    """The random choices for one visit to a sample."""

    dropped: bool  # the caption, and its system prompt
    caption: float  # uniform on [0, 1)
    rng: np.random.Generator  # for the crop
    mix: tuple[float, float, float] | None

    def choose_caption(self, lengths: Sequence[int]) -> int:
        """Which of the captions of these lengths: any alike, or short, middle and long ones by their shares."""
        if self.mix is None or len(lengths) == 1:
            return int(self.caption * len(lengths))
        ascending = sorted(range(len(lengths)), key=lambda i: lengths[i])
        short, middle, long = self.mix
        inner = len(lengths) - 2
        shares = np.array([short, *(middle / inner for _ in range(inner)), long])
        if not shares.any():  # only middle ones wanted, and there are none
            return int(self.caption * len(lengths))
        cumulative = np.cumsum(shares / shares.sum())
        return ascending[int(np.searchsorted(cumulative[:-1], self.caption, side="right"))]


@dataclass(frozen=True)
class Augmentation:
    """Augmentation settings: caption dropout, caption choice, crops.

    Attributes:
        caption_dropout_prob: how often the whole text is replaced by "", in [0, 1].
        caption_mix: shares of the shortest, the inner and the longest captions of a sample; None: all alike.
        crops_per_image: how many fixed crops there are of an image, the first of them its centre; None: a new one at
            every visit.
        seed: of all choices.
    """

    caption_dropout_prob: float = 0.1
    caption_mix: tuple[float, float, float] | None = None
    crops_per_image: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout_prob <= 1:
            raise UserError(f"caption_dropout_prob={self.caption_dropout_prob} must lie between 0 and 1")

    def draw(self, position: int) -> Draw:
        """The choices at a position. All numbers are always drawn: a changed rate changes no other choice."""
        rng = sample_rng(self.seed, position)
        dropped = rng.random() < self.caption_dropout_prob
        return Draw(dropped, rng.random(), rng, self.caption_mix)

    def choose_crop(self, draw: Draw) -> int:
        """Which of the fixed crops."""
        return int(draw.rng.random() * self.crops_per_image)


def crop_rng(index: int, crop: int) -> np.random.Generator | None:
    """What places the fixed crop number `crop` of image `index`; None for the first: the centre."""
    return sample_rng(CROP_SEED, (index << 16) + crop) if crop else None
