"""What stands behind the page: limits, previews, files with their parameters, stopping."""

import numpy as np
import pytest
from PIL import Image

from autoencoder.common.config import UserError
from svg_t2i.web.requests import Limits, Studio, fitting_size, parameters_of, random_seed


@pytest.fixture
def studio(toy_pipeline):
    return Studio(toy_pipeline, Limits(side=64, steps=30, images=2, prompt_characters=40))


REQUEST = {
    "prompt": "much noise", "negative_prompt": "", "width": 48, "height": 32, "num_inference_steps": 8,
    "guidance_scale": 2.5, "seed": 7, "images": 2, "solver": "dpm",
}  # fmt: skip


def test_previews_come_first_and_then_the_pipeline_s_own_images(studio, toy_pipeline):
    *previews, finished = studio.draw(**REQUEST)
    assert [items[0][1] for items in previews] == [f"step {step}" for step in range(2, 8)]
    assert all(item.size == (48, 32) for items in previews for item, _ in items)
    expected = toy_pipeline(
        "much noise", num_inference_steps=8, guidance_scale=2.5, seed=7, num_images_per_prompt=2
    ).images
    for (path, caption), image, seed in zip(finished, expected, (7, 8), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))
        assert caption == f"seed {seed}"
        parameters = parameters_of(path)
        assert {**REQUEST, "seed": seed}.items() - {("images", 2)} <= parameters.items()


def test_previews_of_a_straight_path_are_its_end(studio, toy_pipeline, monkeypatch):
    """With a constant velocity the last two points of the way tell where it ends."""
    monkeypatch.setattr(toy_pipeline.transformer, "forward_packed", lambda tokens, *_: tokens * 0 + 1)
    *previews, finished = studio.draw(**REQUEST | {"solver": "euler"})
    end = np.asarray(Image.open(finished[0][0]), int)
    for items in previews:
        assert np.abs(np.asarray(items[0][0], int) - end).max() <= 1


def test_image_to_image_keeps_the_shape(studio):
    tall = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 150, 3), dtype=np.uint8))
    *previews, finished = studio.redraw(tall, "noise", 0.5, 8, 2.0, 3, 1)
    assert previews
    with Image.open(finished[0][0]) as image:
        assert image.size == fitting_size((150, 300), 32 * 48) == (32, 48)
    assert parameters_of(finished[0][0])["strength"] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "write a prompt"),
        ({"prompt": "x" * 41}, "41 characters; at most 40"),
        ({"width": 80}, "width = 80: whole numbers from 16 to 64"),
        ({"height": 40}, "height = 40: image sides must be positive multiples of 16"),
        ({"num_inference_steps": 31}, "steps = 31"),
        ({"images": 3}, "images = 3"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": None}, "seed = None"),
        ({"solver": "magic"}, "choose one of dpm"),
    ],
)
def test_limits_hold_whatever_the_page_sends(studio, changes, message):
    with pytest.raises(UserError, match=message):
        next(studio.draw(**REQUEST | changes))
    with pytest.raises(UserError, match="choose an image"):
        next(studio.redraw(None, "noise", 0.5, 8, 2.0, 3, 1))


def test_who_leaves_stops_the_run(studio, toy_pipeline, monkeypatch):
    calls, original = [], toy_pipeline.transformer.forward_packed
    monkeypatch.setattr(toy_pipeline.transformer, "forward_packed", lambda *args: calls.append(1) or original(*args))
    request = studio.draw(**REQUEST | {"num_inference_steps": 30})
    next(request)
    request.close()
    assert len(calls) < 30
    assert len(list(studio.draw(**REQUEST))) > 1  # the next visitor is served


def test_errors_of_the_run_reach_the_visitor(studio, toy_pipeline, monkeypatch):
    def fail(*args):
        raise RuntimeError("broken kernel")

    monkeypatch.setattr(toy_pipeline.transformer, "forward_packed", fail)
    with pytest.raises(RuntimeError, match="broken kernel"):
        list(studio.draw(**REQUEST))


def test_random_seeds_differ():
    assert len({random_seed() for _ in range(8)}) == 8
