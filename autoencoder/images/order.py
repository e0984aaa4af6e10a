"""Order of training samples: a function of (seed, position) alone, without state.

A position counts the samples of a run from its beginning, over all ranks. Small sources follow the published order (one
`torch.randperm` per epoch); large ones a keyed permutation that is evaluated where it is needed, so that the 10¹²-th
sample of a source of 10⁹ costs as much as the first. Several sources are interleaved by weight in the same manner.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import isqrt

import numpy as np
import torch

from autoencoder.common.config import UserError

LISTED_SAMPLES = 1 << 22  # up to here (32 MB) an epoch's permutation is the published one, kept as a list
MIXING_BLOCK = 1 << 16  # positions after which the shares of several sources come out exactly
ROUNDS = 6  # of the Feistel network: 4 make it pseudorandom (Luby and Rackoff 1988), two spare


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The generator of one sample, independent of all others: a function of the seed and its position in training."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(position,)))


# --- permutations -----------------------------------------------------------------------------------------------


def keyed_permutation(length: int, key: int, offsets: np.ndarray) -> np.ndarray:
    """Where a pseudorandom permutation of 0 … length − 1, chosen by `key` (64 bit), sends `offsets`.

    An alternating Feistel network on the digits of x = left · b + right, left < a, right < b, with the smallest a · b
    that holds `length`; what leaves the range walks on until it returns (Black and Rogaway 2002).
    """
    a = isqrt(length - 1) + 1 if length > 1 else 1
    b = -(-length // a)
    result = np.asarray(offsets, dtype=np.uint64).copy()
    pending = np.ones(result.shape, dtype=bool)
    keys = _mix(np.array([(key + i * _GOLDEN) % 2**64 for i in range(ROUNDS)], dtype=np.uint64))
    a, b = np.uint64(a), np.uint64(b)
    while pending.any():
        left, right = np.divmod(result[pending], b)
        for i, round_key in enumerate(keys):
            if i % 2:
                right = (right + _mix(left ^ round_key) % b) % b
            else:
                left = (left + _mix(right ^ round_key) % a) % a
        result[pending] = left * b + right
        pending = result >= length
    return result.astype(np.int64)


_GOLDEN = 0x9E3779B97F4A7C15


def _mix(words: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): every input bit flips every output bit half of the time."""
    words = words + np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@lru_cache(maxsize=4)
def _listed_permutation(length: int, seed: int) -> np.ndarray:
    """The published order of an epoch."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).numpy()


def _key(*numbers: int) -> int:
    return int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)[0])


# --- streams ----------------------------------------------------------------------------------------------------


class SampleOrder:
    """Endless epochs over one or several sources: position → (source, index), in any order, at any place.

    Of every 65,536 positions each source gets its share, scattered; within its share a source runs through its own
    epochs, every sample once in each. One source alone gets every position, in the published order.

    Args:
        lengths: samples of each source.
        weights: share of each source, None for its share of all samples.

    Raises:
        UserError: an empty source, a weight that is not positive or too small to be ever drawn.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float | None] | None = None, seed: int = 0):
        weights = weights or [None] * len(lengths)
        if not lengths or min(lengths) < 1:
            raise UserError(f"nothing to sample: sources of {list(lengths)} samples")
        if any(weight is not None for weight in weights) and None in weights:
            raise UserError(f"source weights {list(weights)}: give all sources a weight, or none")
        shares = np.array([length if weight is None else weight for length, weight in zip(lengths, weights)], float)
        if not (np.isfinite(shares).all() and (shares > 0).all()):
            raise UserError(f"source weights {list(weights)} must be positive numbers")
        self.lengths, self.seed = tuple(lengths), seed
        self.quotas = _apportion(shares / shares.sum(), MIXING_BLOCK)
        if self.quotas.min() < 1:
            raise UserError(f"a source's share of {shares.min() / shares.sum():.1g} is below 1 in {MIXING_BLOCK}")
        self._starts = np.concatenate([[0], np.cumsum(self.quotas)])

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(P,) positions → (P,) source numbers and (P,) indices within them, all int64."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(self.lengths) == 1:
            return np.zeros_like(positions), self._indices(0, positions)
        blocks, offsets = np.divmod(positions, MIXING_BLOCK)
        slots = np.empty_like(positions)  # permuted within their block: source s owns a contiguous range of slots
        for block in np.unique(blocks):
            here = blocks == block
            slots[here] = keyed_permutation(MIXING_BLOCK, _key(self.seed, int(block), 1), offsets[here])
        sources = np.searchsorted(self._starts, slots, side="right") - 1
        turns = blocks * self.quotas[sources] + slots - self._starts[sources]  # how often the source had its turn
        indices = np.empty_like(positions)
        for source in np.unique(sources):
            here = sources == source
            indices[here] = self._indices(int(source), turns[here])
        return sources, indices

    def _indices(self, source: int, turns: np.ndarray) -> np.ndarray:
        length = self.lengths[source]
        seed = self.seed if source == 0 else _key(self.seed, source, 2) % 2**62
        epochs, offsets = np.divmod(turns, length)
        indices = np.empty_like(turns)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            if length <= LISTED_SAMPLES:
                indices[here] = _listed_permutation(length, seed + epoch)[offsets[here]]
            else:
                indices[here] = keyed_permutation(length, _key(seed, epoch), offsets[here])
        return indices


def _apportion(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that add up to `total` and follow the shares: largest remainders."""
    exact = shares * total
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: total - quotas.sum()]] += 1
    return quotas
