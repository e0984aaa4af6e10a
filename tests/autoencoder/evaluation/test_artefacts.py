"""What decoders add: known errors put into a perfect autoencoder come out as the numbers say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autoencoder.common.processes import World
from autoencoder.evaluation.artefacts import (
    BANDS,
    MOST_IMAGES,
    Artefacts,
    band_powers,
    flat_colours,
    grid_ratio,
    power,
    shift_errors,
)
from autoencoder.images.files import to_float

LEVEL = 2 / 255  # in [-1, 1]


def autoencoder(spoil=lambda images: images):
    return SimpleNamespace(encode=lambda images: images, decode=spoil)


def on_cells(images):
    """Every 16th row and column is three levels too bright."""
    spoilt = images.clone()
    spoilt[..., ::16, :] += 3 * LEVEL
    spoilt[..., :, ::16] += 3 * LEVEL
    return spoilt


def some_images(count, side=64):
    return torch.from_numpy(np.random.default_rng(0).integers(40, 200, (count, 3, side, side), dtype=np.uint8))


def test_a_perfect_autoencoder_has_none():
    assert flat_colours(autoencoder(), 64, torch.device("cpu")) == {
        "flat_error": 0.0, "flat_texture": 0.0, "flat_grid": 0.0,
    }  # fmt: skip
    assert shift_errors(autoencoder(), some_images(3), [0, 7, 20]).tolist() == [0, 0, 0]


def test_a_wrong_colour_is_no_texture():
    found = flat_colours(autoencoder(lambda images: images + 4 * LEVEL), 128, torch.device("cpu"))
    assert found["flat_error"] == pytest.approx(4.0)
    assert found["flat_texture"] == pytest.approx(0.0, abs=1e-9)


def test_a_grid_is_seen_on_flat_colours_and_in_errors():
    found = flat_colours(autoencoder(on_cells), 96, torch.device("cpu"))
    assert found["flat_texture"] > 0.5
    assert found["flat_grid"] == pytest.approx((64 * 64 - 1) / 255, rel=1e-6)  # all of it is there: 255 frequencies
    images = some_images(2)
    error = on_cells(to_float(images)) - to_float(images)
    assert grid_ratio(power(error)).tolist() == pytest.approx([(64 * 64 - 1) / 255] * 2, rel=1e-3)
    noise = torch.randn(4, 3, 128, 96)
    assert grid_ratio(power(noise)).mean().item() == pytest.approx(1, abs=0.15)


def test_what_sticks_to_the_grid_moves_wrongly():
    images = some_images(2)
    (moved, still) = shift_errors(autoencoder(on_cells), images, [4, 10])  # by 5 and 11 px
    assert min(moved, still) > 1
    flipped = shift_errors(autoencoder(lambda x: -x), images, [4, 10])  # wrong, but wrong alike everywhere
    assert flipped.max() <= 1e-9


def test_bands_hold_the_frequencies_that_they_name():
    x = torch.arange(64.0)
    for cycles, band in ((2, 0), (10, 2), (31, 7)):
        wave = torch.cos(2 * torch.pi * cycles * x / 64).expand(1, 3, 64, 64)
        powers = band_powers(power(wave))
        assert powers.shape == (1, BANDS)
        assert powers.argmax().item() == band
        assert powers[0, band] > 0.999 * powers.sum()
    white = band_powers(power(torch.randn(8, 3, 64, 64))).mean(dim=0)
    assert white.tolist() == pytest.approx([1.0] * BANDS, rel=0.2)


def test_the_first_images_count_whoever_reads_them():
    images, world = some_images(6, 48), World()
    places = [70, 3, MOST_IMAGES, 1, 0, 2]
    together, apart = Artefacts(), Artefacts()
    together.add(autoencoder(on_cells), places, images, on_cells(to_float(images)))
    for i in reversed(range(6)):
        one = images[i : i + 1]
        apart.add(autoencoder(on_cells), places[i : i + 1], one, on_cells(to_float(one)))
    assert sorted(together.places) == sorted(apart.places) == [0, 1, 2, 3]
    found = together.merged(world)
    assert found == apart.merged(world)
    assert len(found["spectrum"]) == BANDS
    small = Artefacts()
    small.add(autoencoder(), [0], images[:1, :, :32, :], to_float(images[:1, :, :32, :]))
    assert small.merged(world) == {}
