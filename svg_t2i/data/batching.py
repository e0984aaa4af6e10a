"""Splitting the samples of a step over processes and micro-batches.

A step is a fixed set of samples, the positions step·G … step·G + G − 1 of the training stream, and its gradient that of
their mean loss: how they are split changes the speed, never the result. All ranks get equally many micro-batches, since
they exchange weights or gradients in each.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

from autoencoder.common.config import UserError


def split_evenly(count: int, world_size: int, micro_batch_size: int) -> list[list[list[int]]]:
    """The published way: sample i goes to rank i mod world_size, in as few micro-batches as the size allows.

    Sizes differ by at most one within a rank. Where processes have unequal shares, a micro-batch of one of them may be
    empty: with more processes than samples, or with `micro_batch_size` 1.

    Returns:
        The sample numbers by rank and micro-batch.
    """
    number = num_micro_batches(count, world_size, micro_batch_size)
    ranks = []
    for rank in range(world_size):
        share = list(range(rank, count, world_size))
        ends = [len(share) * i // number for i in range(number + 1)]
        ranks.append([share[start:end] for start, end in pairwise(ends)])
    return ranks


def num_micro_batches(count: int, world_size: int, micro_batch_size: int) -> int:
    """How many `split_evenly` makes of a step on every rank."""
    return -(-largest_share(count, world_size) // micro_batch_size)


def largest_share(count: int, world_size: int) -> int:
    """Samples of a step that the fullest of the processes has."""
    return -(-count // world_size)


def split_by_tokens(costs: Sequence[int], world_size: int, budget: int) -> list[list[list[int]]]:
    """As few micro-batches of at most `budget` tokens as possible, all about equally long, on every rank equally many.

    The longest sample goes first, each to the micro-batch that is shortest so far (LPT; Graham 1969: at most 4/3 of the
    best makespan). Long and short micro-batches are then assigned back and forth, so that the ranks' sums agree too.

    Args:
        costs: tokens of each sample, image and caption.

    Returns:
        The sample numbers by rank and micro-batch, ascending in each.

    Raises:
        UserError: there are fewer samples than processes, or the budget is too small.
    """
    if len(costs) < world_size:
        raise UserError(f"train.global_batch_size={len(costs)} leaves some of {world_size} processes without a sample")
    for micro_batches in range(max(1, -(-sum(costs) // (world_size * budget))), len(costs) // world_size + 1):
        bins = _fill(costs, world_size * micro_batches, budget)
        if bins is not None:
            break
    else:
        raise UserError(
            f"data.micro_batch_tokens={budget} is too small: a sample has up to {max(costs)} tokens; raise it"
        )
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    for number, chosen in enumerate(bins):
        turn, place = divmod(number, world_size)
        ranks[place if turn % 2 == 0 else world_size - 1 - place].append(sorted(chosen))
    return ranks


def _fill(costs: Sequence[int], count: int, budget: int) -> list[list[int]] | None:
    """`count` bins of sample numbers, longest first; None if one of them would exceed the budget."""
    heap: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(count)]
    for sample in sorted(range(len(costs)), key=lambda sample: -costs[sample]):
        load, number, chosen = heap[0]
        if load + costs[sample] > budget:
            return None
        chosen.append(sample)
        heapq.heapreplace(heap, (load + costs[sample], number, chosen))
    return [chosen for _, _, chosen in sorted(heap, reverse=True)]
