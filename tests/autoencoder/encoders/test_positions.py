"""Rotary tables against their formula; resized position embeddings against a bicubic written from its definition,
and against Pillow's antialiased one."""

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.encoders.positions import Rotary, resize_positions

SIDE = 7


@pytest.fixture
def table():
    return torch.randn(1, SIDE * SIDE, 3)


def keys_cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys 1981, equation 4."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def weights(cells: int, offset: float) -> np.ndarray:
    """(cells, SIDE): how much every old position counts in a new one; the border repeats."""
    centres = (np.arange(cells) + 0.5) * SIDE / (cells + offset) - 0.5
    matrix = np.zeros((cells, SIDE))
    for row, centre in enumerate(centres):
        for old in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[row, min(max(old, 0), SIDE - 1)] += keys_cubic(np.array(centre - old))
    return matrix


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("grid", [(3, 5), (12, 7), (16, 16)])
def test_bicubic(table, grid, offset):
    square = table.view(SIDE, SIDE, 3).numpy()
    expected = np.einsum("ri,cj,ijd->rcd", weights(grid[0], offset), weights(grid[1], offset), square)
    resized = resize_positions(table, grid, offset=offset)
    assert resized.shape == (1, grid[0] * grid[1], 3)
    np.testing.assert_allclose(resized.view(*grid, 3).numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("grid", [(3, 5), (12, 9)])
def test_antialiased_bicubic_is_pillows(table, grid):
    resized = resize_positions(table, grid, antialias=True).view(*grid, 3)
    for channel in range(3):
        plane = Image.fromarray(table[0, :, channel].reshape(SIDE, SIDE).numpy(), mode="F")
        expected = np.asarray(plane.resize((grid[1], grid[0]), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(resized[..., channel].numpy(), expected, atol=2e-5)


def test_the_tables_own_grid_is_left_alone_in_any_precision(table):
    assert resize_positions(table, (SIDE, SIDE), offset=0.1) is table
    half = resize_positions(table.bfloat16(), (4, 4))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, resize_positions(table.bfloat16().float(), (4, 4)).bfloat16())  # fp32 inside


@pytest.mark.parametrize("grid", [(2, 3), (4, 1)])
def test_rotary_angles_are_the_centres_of_patches_over_the_periods(grid):
    rotary = Rotary(head_dim=8)  # periods 1 and 10, exact in bfloat16
    table = rotary.get_embed(grid)
    assert table.shape == (grid[0] * grid[1], 2 * 8)
    for row in range(grid[0]):
        for column in range(grid[1]):
            centres = [-1 + (2 * place + 1) / cells for place, cells in zip((row, column), grid)]
            angles = [2 * np.pi * centre / period for centre in centres for period in (1, 10)] * 2
            expected = torch.tensor([*np.sin(angles), *np.cos(angles)], dtype=torch.float32)
            torch.testing.assert_close(table[row * grid[1] + column], expected, atol=2e-6, rtol=0)


def test_rotary_periods_are_rounded_as_in_the_released_weights_and_stay_single():
    rotary = Rotary(head_dim=64)
    exact = torch.tensor([100 ** (i / 16) for i in range(16)])
    assert torch.equal(rotary.periods, exact.bfloat16().float())
    assert not torch.equal(rotary.periods, exact)
    before = rotary.get_embed((3, 4))
    after = rotary.to(torch.bfloat16).get_embed((3, 4))
    assert after.dtype == torch.float32
    assert torch.equal(before, after)


def test_rotary_tables_follow_the_periods_and_are_kept_for_a_number_of_grids():
    rotary = Rotary(head_dim=8)
    before = rotary.get_embed((2, 3))
    assert rotary.get_embed((2, 3)) is before
    rotary.load_state_dict({"periods": torch.tensor([2.0, 20.0])})
    after = rotary.get_embed((2, 3))
    assert not torch.equal(after, before)
    for width in range(1, 2 * Rotary.MAX_TABLES):
        rotary.get_embed((1, width))
    assert torch.equal(rotary.get_embed((2, 3)), after)
    assert len(rotary._tables) <= Rotary.MAX_TABLES
