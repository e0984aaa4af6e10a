"""How a step's samples are dealt: nobody is lost, ranks carry alike, budgets hold."""

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoencoder.common.config import REPO_ROOT, UserError, load_config
from svg_t2i.data.batching import largest_share, num_micro_batches, split_by_tokens, split_evenly
from svg_t2i.training.settings import TrainConfig


def test_dealt_evenly_as_published():
    assert split_evenly(8, 2, 2) == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    assert split_evenly(7, 2, 3) == [[[0, 2], [4, 6]], [[1], [3, 5]]]
    assert split_evenly(3, 2, 1) == [[[0], [2]], [[], [1]]]
    assert split_evenly(2, 3, 4) == [[[0]], [[1]], [[]]]


@settings(deadline=None, max_examples=200)
@given(count=st.integers(1, 300), world_size=st.integers(1, 70), micro=st.integers(1, 30))
def test_any_number_of_processes_shares_any_batch(count, world_size, micro):
    ranks = split_evenly(count, world_size, micro)
    assert sorted(sample for rank in ranks for part in rank for sample in part) == list(range(count))
    assert {len(rank) for rank in ranks} == {num_micro_batches(count, world_size, micro)}
    fullest = largest_share(count, world_size)
    for number, rank in enumerate(ranks):
        sizes = [len(part) for part in rank]
        assert [sample for part in rank for sample in part] == list(range(number, count, world_size))
        assert fullest - 1 <= sum(sizes) <= fullest
        assert max(sizes) <= micro
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1 or micro == 1 or count < world_size
    if count % (world_size * micro) == 0:  # as published
        assert all(len(part) == micro for rank in ranks for part in rank)


@settings(deadline=None, max_examples=80)
@given(
    costs=st.lists(st.integers(256, 1024), min_size=16, max_size=120),
    world_size=st.integers(1, 8),
    budget=st.integers(2048, 9000),
)
def test_by_tokens(costs, world_size, budget):
    ranks = split_by_tokens(costs, world_size, budget)
    assert sorted(sample for rank in ranks for batch in rank for sample in batch) == list(range(len(costs)))
    assert len(ranks) == world_size
    assert len({len(rank) for rank in ranks}) == 1  # collectives of the backward passes must match
    assert all(batch and batch == sorted(batch) for rank in ranks for batch in rank)
    loads = [[sum(costs[sample] for sample in batch) for batch in rank] for rank in ranks]
    assert max(map(max, loads)) <= budget
    assert max(map(max, loads)) - min(map(min, loads)) <= max(costs)  # LPT: nobody waits for more than one sample
    assert max(map(sum, loads)) - min(map(sum, loads)) <= max(costs)
    assert split_by_tokens(costs, world_size, budget) == ranks


def test_a_micro_batch_may_reach_its_budget():
    assert split_by_tokens([500, 300, 200], 1, 1000) == [[[0, 1, 2]]]
    assert len(split_by_tokens([500, 300, 200], 1, 999)[0]) == 2


def test_long_and_short_micro_batches_are_dealt_back_and_forth():
    assert split_by_tokens([9, 8, 7, 6, 5, 4], 2, 9) == [[[0], [3], [4]], [[1], [2], [5]]]


def test_few_micro_batches():
    """No more of them than the sum of all tokens asks for, and ranks within a hundredth of each other."""
    costs = [256 + 37 * i % 400 for i in range(384)]
    ranks = split_by_tokens(costs, 4, 16384)
    assert len(ranks[0]) == ceil(sum(costs) / (4 * 16384)) == 3
    sums = [sum(costs[sample] for batch in rank for sample in batch) for rank in ranks]
    assert max(sums) / min(sums) < 1.01


def test_mistakes_are_named():
    with pytest.raises(UserError, match="micro_batch_tokens=500 is too small: a sample has up to 600"):
        split_by_tokens([600, 300], 1, 500)
    with pytest.raises(UserError, match="micro_batch_tokens=500 is too small"):
        split_by_tokens([500, 500, 500], 2, 500)  # the second rank's second micro-batch would be empty
    with pytest.raises(UserError, match="global_batch_size=2 leaves some of 3 processes without a sample"):
        split_by_tokens([1, 1], 3, 10)


STAGES = sorted((REPO_ROOT / "configs" / "svg_t2i").glob("stage*.yaml"))


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_shipped_configs_start_on_any_number_of_processes(path):
    """1 to 1024, as they say."""
    assert "Tested for 1 to 1024 processes" in path.read_text()
    loop = load_config(TrainConfig, path).train
    for world_size in range(1, 1025):
        ranks = split_evenly(loop.global_batch_size, world_size, loop.micro_batch_size)
        assert len({len(rank) for rank in ranks}) == 1
        assert sum(len(part) for rank in ranks for part in rank) == loop.global_batch_size
        assert max(len(part) for rank in ranks for part in rank) <= loop.micro_batch_size
