"""Choices made at each visit: their shares, and what does not depend on what."""

from collections import Counter

import pytest

from autoencoder.common.config import UserError
from svg_t2i.data.draws import Augmentation, crop_rng

COUNT = 2000


def shares(augmentation, lengths):
    chosen = Counter(augmentation.draw(position).choose_caption(lengths) for position in range(COUNT))
    return [chosen[i] / COUNT for i in range(len(lengths))]


@pytest.mark.parametrize(
    ("mix", "lengths", "expected"),
    [
        (None, [5, 1, 9], [1 / 3, 1 / 3, 1 / 3]),
        ((0.1, 0.3, 0.6), [5, 1, 9], [0.3, 0.1, 0.6]),
        ((0.1, 0.3, 0.6), [9, 5, 7, 1], [0.6, 0.15, 0.15, 0.1]),
        ((2, 3, 6), [9, 1], [0.75, 0.25]),  # no middle one: the others share
        ((1, 0, 0), [9, 1, 5], [0, 1, 0]),
        ((0, 1, 0), [9, 1], [0.5, 0.5]),
        ((0.1, 0.3, 0.6), [4], [1]),
        ((0.5, 0, 0.5), [3, 3], [0.5, 0.5]),
    ],
)
def test_caption_mix(mix, lengths, expected):
    assert shares(Augmentation(caption_mix=mix), lengths) == pytest.approx(expected, abs=5 * 0.5 / COUNT**0.5)


def test_choices_are_independent():
    """The caption chosen tells nothing about dropout and crop."""
    augmentation = Augmentation(0.5, crops_per_image=2, seed=1)
    seen = Counter()
    for position in range(COUNT):
        draw = augmentation.draw(position)
        seen[draw.dropped, draw.choose_caption([1, 1]), augmentation.choose_crop(draw)] += 1
    assert len(seen) == 8
    assert max(abs(count - COUNT / 8) for count in seen.values()) < 5 * (COUNT / 8) ** 0.5


def test_fixed_crops_belong_to_the_image():
    assert crop_rng(3, 0) is None  # the centre
    draws = {(i, k): crop_rng(i, k).random() for i in range(3) for k in (1, 2)}
    assert len(set(draws.values())) == 6
    assert crop_rng(2, 1).random() == draws[2, 1]


def test_bounds():
    assert [Augmentation(prob).caption_dropout_prob for prob in (0.0, 1.0)] == [0.0, 1.0]
    for prob in (-0.5, 1.5):
        with pytest.raises(UserError, match=f"caption_dropout_prob={prob}"):
            Augmentation(prob)


def test_choices_stay_those_of_earlier_runs():
    """Numbers that must not change: a change here changes every run, and what goes on after an interruption."""
    augmentation = Augmentation(0.5, crops_per_image=4, seed=3)
    drawn = [augmentation.draw(position) for position in (0, 1, 2, 3, 10**6)]
    assert [draw.dropped for draw in drawn] == [False, True, True, True, True]
    captions = [0.37867835260281935, 0.6325138865874828, 0.09457830442392834, 0.5006757574317242, 0.250055816557747]
    assert [draw.caption for draw in drawn] == captions
    assert [augmentation.choose_crop(draw) for draw in drawn] == [3, 2, 3, 3, 2]
    places = [crop_rng(index, crop).random() for index, crop in ((0, 1), (0, 2), (1, 1), (70_000, 3))]
    assert places == [0.6771968569751019, 0.8382711479571602, 0.2068714896111843, 0.4753001657903352]
