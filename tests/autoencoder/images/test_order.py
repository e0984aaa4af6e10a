"""Permutations that are computed, not stored, and the interleaving of several sources."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoencoder.common.config import UserError
from autoencoder.images import order as order_module
from autoencoder.images.order import MIXING_BLOCK, SampleOrder, keyed_permutation, sample_rng


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_keyed_permutation_is_one(length, key):
    image = keyed_permutation(length, key, np.arange(length))
    assert sorted(image.tolist()) == list(range(length))
    some = np.array([length - 1, 0, length // 2])
    assert keyed_permutation(length, key, some).tolist() == image[some].tolist()  # whatever it is asked along with


def test_keyed_permutation_looks_random():
    length = 40_000
    images = [keyed_permutation(length, key, np.arange(length)) for key in (1, 2)]
    for image in images:
        # 200 × 200 cells of (origin, image): χ² has mean 199² and deviation √(2·199²) = 281
        counts = np.histogram2d(np.arange(length), image, bins=200)[0]
        assert abs(((counts - 1) ** 2).sum() - 199**2) < 5 * 281
        assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 5 / length**0.5
        assert (image == np.arange(length)).sum() < 8  # fixed points: Poisson(1)
        steps = np.abs(np.diff(image))
        assert abs(steps.mean() / length - 1 / 3) < 0.01
    assert abs(np.corrcoef(*images)[0, 1]) < 5 / length**0.5


def test_keyed_permutation_mixes_short_lists_fairly():
    """Over many keys every element comes to stand everywhere equally often."""
    images = np.stack([keyed_permutation(5, key, np.arange(5)) for key in range(2000)])
    counts = np.stack([np.bincount(column, minlength=5) for column in images.T])
    assert np.abs(counts - 400).max() < 5 * (2000 * 0.2 * 0.8) ** 0.5
    assert len({tuple(row) for row in images.tolist()}) == 120


def test_small_sources_keep_the_published_order():
    for epoch in range(2):
        expected = torch.randperm(23, generator=torch.Generator().manual_seed(7 + epoch)).tolist()
        assert SampleOrder([23], seed=7).locate(np.arange(23) + 23 * epoch)[1].tolist() == expected


def test_large_sources_run_through_whole_epochs(monkeypatch):
    monkeypatch.setattr(order_module, "LISTED_SAMPLES", 10)
    stream = SampleOrder([50], seed=3).locate(np.arange(150))[1].tolist()
    for epoch in range(3):
        assert sorted(stream[50 * epoch : 50 * (epoch + 1)]) == list(range(50))
    assert stream[:50] != stream[50:100]
    shares = [SampleOrder([50], seed=3).locate(np.arange(40 + rank, 150, 2))[1].tolist() for rank in range(2)]
    assert [index for pair in zip(*shares) for index in pair] == stream[40:]


def test_an_order_of_a_billion_samples_costs_nothing():
    order = SampleOrder([10**9, 3 * 10**9], seed=1)
    sources, indices = order.locate(np.array([0, 10**15, 10**15 + 1]))
    assert (indices < np.array(order.lengths)[sources]).all()
    assert order.locate(np.array([10**15]))[1] == indices[1]


@settings(deadline=None, max_examples=15)
@given(
    weights=st.lists(st.floats(0.05, 10), min_size=2, max_size=4),
    lengths=st.lists(st.integers(3000, 40_000), min_size=4, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_sources_are_mixed_by_weight(weights, lengths, seed):
    order = SampleOrder(lengths[: len(weights)], weights, seed)
    positions = np.arange(2 * MIXING_BLOCK)
    sources, indices = order.locate(positions)
    for block in (sources[:MIXING_BLOCK], sources[MIXING_BLOCK:]):
        shares = np.bincount(block, minlength=len(weights)) / MIXING_BLOCK
        assert np.abs(shares - np.array(weights) / sum(weights)).max() <= 1 / MIXING_BLOCK
    early = np.bincount(sources[:5000], minlength=len(weights)) / 5000
    assert np.abs(early - shares).max() < 5 * 0.5 / 5000**0.5  # scattered, not one after the other
    for source in range(len(weights)):  # as many whole epochs as fit: each sample equally often, but for the last
        seen = np.bincount(indices[sources == source], minlength=lengths[source])
        assert seen.max() - seen.min() <= 2  # shuffled turns may straddle two epochs at the end
        assert len(seen) == lengths[source]
    some = np.array([MIXING_BLOCK + 17, 3, 2 * MIXING_BLOCK - 1])
    assert [part.tolist() for part in order.locate(some)] == [sources[some].tolist(), indices[some].tolist()]


def test_without_weights_every_sample_counts_alike():
    sources, _ = SampleOrder([1000, 3000], seed=0).locate(np.arange(MIXING_BLOCK))
    assert np.bincount(sources).tolist() == [MIXING_BLOCK // 4, MIXING_BLOCK * 3 // 4]


def test_two_sources_of_equal_length_are_visited_in_different_orders():
    sources, indices = SampleOrder([500, 500], seed=0).locate(np.arange(1000))
    first, second = (indices[sources == source][:200].tolist() for source in (0, 1))
    assert first != second


@pytest.mark.parametrize(
    ("lengths", "weights", "message"),
    [
        ([], None, "nothing to sample"),
        ([5, 0], None, "nothing to sample"),
        ([5, 5], [1.0, None], "give all sources a weight, or none"),
        ([5, 5], [1.0, -1.0], "must be positive"),
        ([5, 5], [1.0, float("nan")], "must be positive"),
        ([5, 5], [1.0, 1e-9], "below 1 in 65536"),
    ],
)
def test_mistakes_are_named(lengths, weights, message):
    with pytest.raises(UserError, match=message):
        SampleOrder(lengths, weights)


def test_orders_stay_those_of_earlier_runs():
    """Numbers that must not change: a run goes on after an interruption only if they never change."""
    assert keyed_permutation(11, 12345, np.arange(11)).tolist() == [1, 0, 3, 4, 9, 5, 8, 2, 6, 7, 10]
    far = [718124179, 480347540, 181167948, 799197920]
    assert keyed_permutation(10**9, 2**63 + 1, np.arange(4)).tolist() == far
    assert SampleOrder([7], seed=7).locate(np.arange(14))[1].tolist() == [5, 0, 3, 1, 2, 6, 4, 1, 5, 3, 4, 0, 2, 6]
    _, large = SampleOrder([10**9], seed=1).locate(np.array([0, 1, 10**9, 10**15]))
    assert large.tolist() == [732351487, 737440481, 823883112, 163788942]
    positions = np.array([0, 1, 2, 3, 4, 5, 6, 7, 70_000, 10**6])
    sources, indices = SampleOrder([100, 300], [1, 2], seed=7).locate(positions)
    assert sources.tolist() == [1, 1, 1, 0, 0, 1, 0, 0, 0, 1]
    assert indices.tolist() == [229, 88, 211, 13, 46, 55, 10, 47, 67, 165]


@pytest.mark.parametrize(
    ("seed", "position", "expected"),
    [
        (0, 0, [3445585646, 4049885951]),
        (0, 1, [2843493045, 2908538353]),
        (1, 0, [66015038, 3002330520]),
        (5, 10**9, [4054475906, 3876608254]),
    ],
)
def test_the_generator_of_a_sample_stays_what_it_was(seed, position, expected):
    assert sample_rng(seed, position).integers(0, 2**32, 2).tolist() == expected


def test_a_source_may_have_one_sample():
    assert SampleOrder([1], seed=7).locate(np.arange(3))[1].tolist() == [0, 0, 0]
    assert set(SampleOrder([1, 1], seed=7).locate(np.arange(9))[1].tolist()) == {0}
