"""What stands behind the page: limits, previews, files with their parameters, stopping."""

import gc
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.common.config import UserError
from svg_t2i.checkpoints.adapters import FILE, LoraSettings, add_adapter, write_adapter
from svg_t2i.loading.adapters import AdapterShelf
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.web.limits import Limits
from svg_t2i.web.requests import Studio, fitting_size, parameters_of


@pytest.fixture
def studio(toy_pipeline):
    return Studio(toy_pipeline, Limits(side=64, steps=30, images=2, prompt_characters=40))


NAMES = ("adapter", "adapter_weight")
REQUEST = {
    "prompt": "much noise", "negative_prompt": "", "width": 48, "height": 32, "num_inference_steps": 8,
    "guidance_scale": 2.5, "seed": 7, "images": 2, "solver": "dpm",
}  # fmt: skip


def test_previews_come_first_and_then_the_pipeline_s_own_images(studio, toy_pipeline):
    first, *steps, finished = studio.draw(**REQUEST)
    assert (first.status, first.items) == ("reading the prompt", None)
    assert [shown.status.partition(",")[0] for shown in steps] == [f"step {step} of 8" for step in range(1, 9)]
    assert re.fullmatch(r"step 1 of 8, \d+ s left", steps[0].status)
    previews = [shown.items for shown in steps if shown.items]
    assert [items[0][1] for items in previews] == [f"step {step}" for step in range(2, 8)]
    assert all(item.size == (48, 32) for items in previews for item, _ in items)
    assert finished.status == "2 finished; seed 7"
    expected = toy_pipeline(
        "much noise", num_inference_steps=8, guidance_scale=2.5, seed=7, num_images_per_prompt=2
    ).images
    for (path, caption), image, seed in zip(finished.items, expected, (7, 8), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))
        assert caption == f"seed {seed}"
        parameters = parameters_of(path)
        assert {**REQUEST, "seed": seed}.items() - {("images", 2)} <= parameters.items()


def test_previews_of_a_straight_path_are_its_end(studio, toy_pipeline, monkeypatch):
    """With a constant velocity the last two points of the way tell where it ends."""
    monkeypatch.setattr(toy_pipeline.transformer, "forward_packed", lambda tokens, *_: tokens * 0 + 1)
    *steps, finished = studio.draw(**REQUEST | {"solver": "euler"})
    end = np.asarray(Image.open(finished.items[0][0]), int)
    previews = [shown.items for shown in steps if shown.items]
    assert len(previews) > 3
    for items in previews:
        assert np.abs(np.asarray(items[0][0], int) - end).max() <= 1


@pytest.fixture
def tall(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "tall.png")
    return tmp_path / "tall.png"


def test_image_to_image_keeps_the_shape(studio, tall):
    *steps, finished = studio.redraw(str(tall), "noise", 0.5, 8, 2.0, 3, 1)
    assert any(shown.items for shown in steps)
    with Image.open(finished.items[0][0]) as image:
        assert image.size == fitting_size((150, 300), 32 * 48) == (32, 48)
    assert parameters_of(finished.items[0][0])["strength"] == 0.5


def pixels(finished):
    return [np.asarray(Image.open(path)) for path, _ in finished.items]


@pytest.fixture
def square(tmp_path):
    """An image of the pipeline's own number of pixels, so that it is not scaled."""
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(tmp_path / "own.png")
    return tmp_path / "own.png"


@pytest.mark.parametrize("transparent", [True, False])
def test_inpainting_changes_what_is_painted_over(studio, toy_pipeline, square, tmp_path, transparent):
    """As the page's editor sends it: a layer that is transparent but for the strokes; or white on black."""
    strokes = np.zeros((32, 48), np.uint8)
    strokes[:, 32:] = 255
    layer = Image.merge("RGBA", [Image.fromarray(strokes)] * 4) if transparent else Image.fromarray(strokes)
    layer.save(tmp_path / "layer.png")
    drawing = {"background": str(square), "layers": [str(tmp_path / "layer.png")]}
    *_, finished = studio.inpaint(drawing, "noise", 1.0, 4, 2.0, 3, 1)
    wanted = toy_pipeline.inpaint(
        "noise", Image.open(square), Image.fromarray(strokes), num_inference_steps=4, guidance_scale=2.0, seed=3
    ).images[0]
    (found,), before = pixels(finished), np.asarray(Image.open(square))
    assert np.array_equal(found, np.asarray(wanted))
    assert np.array_equal(found[:, :32], before[:, :32])
    assert not np.array_equal(found[:, 32:], before[:, 32:])


def test_variations_and_ways_are_the_pipeline_s(studio, toy_pipeline, square):
    *_, finished = studio.vary(str(square), 0.25, 4, 3, 2)
    wanted = toy_pipeline.variation(
        Image.open(square), t=0.25, num_inference_steps=4, seed=3, num_images_per_prompt=2
    ).images
    assert all(np.array_equal(one, np.asarray(other)) for one, other in zip(pixels(finished), wanted, strict=True))
    *_, finished = studio.interpolate("noise", "much noise", 4, 2.0, 3, 3)
    ends = {"num_inference_steps": 4, "guidance_scale": 2.0, "seed": 3}
    wanted = toy_pipeline.interpolate(["noise", "much noise"], weights=3, **ends).images
    assert all(np.array_equal(one, np.asarray(other)) for one, other in zip(pixels(finished), wanted, strict=True))
    assert [caption for _, caption in finished.items] == ["seed 3, 0%", "seed 3, 50%", "seed 3, 100%"]
    parameters = parameters_of(finished.items[1][0])
    assert (parameters["prompt"], parameters["second_prompt"], parameters["weight"]) == ("noise", "much noise", 0.5)


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("inpaint", [None, "x", 1.0, 4, 2.0, 3, 1], "choose an image first"),
        ("inpaint", [{"background": None, "layers": []}, "x", 1.0, 4, 2.0, 3, 1], "choose an image first"),
        ("inpaint", [{"background": "OWN", "layers": []}, "x", 1.0, 4, 2.0, 3, 1], "paint over the part"),
        ("inpaint", [{"background": "OWN", "layers": ["no.png"]}, "x", 1.0, 4, 2.0, 3, 1], "the painted part: "),
        ("inpaint", [{"background": "OWN", "layers": []}, "", 1.0, 4, 2.0, 3, 1], "write a prompt first"),
        ("vary", [None, 0.3, 4, 3, 1], "choose an image first"),
        ("vary", ["OWN", 1.0, 4, 3, 1], "likeness = 1.0: numbers from 0 to 0.95"),
        ("interpolate", ["a", "", 4, 2.0, 3, 3], "write a prompt first"),
        ("interpolate", ["a", "b", 4, 2.0, 3, 1], "images = 1: whole numbers from 2"),
        ("vary", ["OWN", 0.3, 4, 3, 1, "style"], "there is no adapter 'style'"),
    ],
)
def test_what_the_other_tabs_refuse(studio, square, method, values, message):
    drawing, *others = values
    if isinstance(drawing, dict) and drawing["background"]:
        drawing = {**drawing, "background": str(square)}
    with pytest.raises(UserError, match=re.escape(message)):
        next(getattr(studio, method)(str(square) if drawing == "OWN" else drawing, *others))


def test_a_browser_gets_its_own_finished_images_only(studio):
    *_, finished = studio.draw(**REQUEST)
    names = [os.path.basename(path) for path, _ in finished.items]
    (studio.folder / "secret.txt").write_text("x")
    asked = [*names, "secret.txt", f"../{studio.folder.name}/{names[0]}", "0" * 32 + ".png", 7, None]
    assert studio.kept(asked) == [path for path, _ in finished.items]
    assert studio.kept(None) == studio.kept("x") == studio.kept({"a": 1}) == []


def test_adapters_are_chosen_by_name(saved_pipeline, tmp_path):
    pipeline = SVGT2IPipeline.from_pretrained(saved_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    for name, scale in (("weak", 0.02), ("strong", 0.2)):
        plain, lora = (
            SVGDiT(DiTConfig(**{name: pipeline.transformer.config[name] for name in DiTConfig.__dataclass_fields__})),
            LoraSettings(rank=2),
        )
        add_adapter(plain, lora)
        weights = {key: scale * torch.randn_like(w) for key, w in plain.state_dict().items() if "lora_" in key}
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, weights, lora)
    studio = Studio(pipeline, Limits(side=64), adapters=AdapterShelf(tmp_path))
    assert list(studio.adapters.files) == ["strong", "weak"]

    def draw(*adapter):
        *_, finished = studio.draw(**REQUEST | {"images": 1, "num_inference_steps": 3}, **dict(zip(NAMES, adapter)))
        return pixels(finished)[0].astype(int), parameters_of(finished.items[0][0])

    plain, parameters = draw()
    assert "adapter" not in parameters
    strong, parameters = draw("strong", 1.0)
    assert (parameters["adapter"], parameters["adapter_weight"]) == ("strong", 1.0)
    assert np.abs(strong - plain).max() > np.abs(draw("weak", 1.0)[0] - plain).max() > 0
    assert np.array_equal(draw()[0], plain)
    assert np.array_equal(draw("strong", 1.0)[0], strong)
    assert np.array_equal(draw("strong", 0.0)[0], plain)
    with pytest.raises(UserError, match="the adapter's weight = 9: numbers from -4"):
        draw("strong", 9)
    shutil.copy(tmp_path / "weak" / FILE, tmp_path / "weak" / "latent_stats.safetensors")
    shutil.copy(tmp_path / "weak" / FILE, tmp_path / "weak.safetensors")
    assert list(AdapterShelf(tmp_path).files) == ["strong", "weak", "weak.safetensors"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no adapters .*in this folder"):
        AdapterShelf(tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "write a prompt"),
        ({"prompt": "x" * 41}, "the prompt has 41 characters; at most 40"),
        ({"width": 80}, "width = 80: whole numbers from 16 to 64"),
        ({"height": 40}, "height = 40: image sides must be positive multiples of 16"),
        ({"num_inference_steps": 31}, "steps = 31"),
        ({"images": 3}, "images = 3"),
        ({"seed": -2}, "seed = -2"),
        ({"seed": 0.5}, "seed = 0.5: whole numbers"),
        ({"width": float("nan")}, "width = nan"),
        ({"images": float("inf")}, "images = inf"),
        ({"images": True}, "images = True"),
        ({"solver": "magic"}, "choose one of dpm"),
        ({"solver": ["dpm"]}, "solver = "),
        ({"guidance_scale": None}, "guidance = None: numbers from 0 to 20"),
        ({"guidance_scale": 1e9}, "guidance = 1000000000.0"),
        ({"num_inference_steps": "8"}, "steps = 8: whole numbers"),
        ({"prompt": None}, "write a prompt"),
        ({"prompt": 7}, "the prompt = 7 must be a text"),
        ({"negative_prompt": ["x"]}, "the negative prompt = .*must be a text"),
        ({"negative_prompt": "x" * 41}, "the negative prompt has 41 characters"),
    ],
)
def test_limits_hold_whatever_the_page_sends(studio, changes, message):
    with pytest.raises(UserError, match=message):
        next(studio.draw(**REQUEST | changes))
    with pytest.raises(UserError, match="choose an image"):
        next(studio.redraw(None, "noise", 0.5, 8, 2.0, 3, 1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("strength", "steps", "guidance", "seed", "images")
        for value in (None, "a", [], -2)
        if (name, value) != ("seed", None)
    ],
)
def test_so_they_do_for_images(studio, tall, name, value):
    places = {"strength": 2, "steps": 3, "guidance": 4, "seed": 5, "images": 6}
    request = [tall, "", 0.5, 8, 2.0, 3, 1]
    request[places[name]] = value
    with pytest.raises(UserError, match=f"{name} = .*numbers from"):
        next(studio.redraw(*request))


def test_uploads_are_limited_by_pixels_before_they_are_decoded(toy_pipeline, tall, tmp_path, monkeypatch):
    few = Studio(toy_pipeline, Limits(upload_pixels=300 * 150 - 1))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match="the image: 150x300"):
        next(few.redraw(tall, "noise", 0.5, 8, 2.0, 3, 1))
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="the image: not a readable image"):
        next(few.redraw(tmp_path / "x.png", "noise", 0.5, 8, 2.0, 3, 1))


def test_files_are_deleted_by_age_and_with_the_studio(toy_pipeline):
    studio = Studio(toy_pipeline, Limits(side=64))
    (*_, first), (*_, second) = studio.draw(**REQUEST), studio.draw(**REQUEST)
    old = first.items[0][0]
    os.utime(old, (0, 0))
    *_, third = studio.draw(**REQUEST)
    assert not os.path.exists(old)
    assert all(os.path.exists(path) for path, _ in [*second.items, *third.items])
    with pytest.raises(UserError, match="was deleted"):
        parameters_of(old)
    folder = studio.folder
    del studio
    gc.collect()
    assert not folder.exists()


def test_files_end_with_the_process(tmp_path):
    code = "from svg_t2i.web.requests import Studio; print(Studio(None).folder)"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert made
    assert not os.path.exists(made)


def test_who_leaves_stops_the_run(studio, toy_pipeline, monkeypatch):
    calls, original = [], toy_pipeline.transformer.forward_packed
    monkeypatch.setattr(toy_pipeline.transformer, "forward_packed", lambda *args: calls.append(1) or original(*args))
    request = studio.draw(**REQUEST | {"num_inference_steps": 30, "images": 1})
    while "step 3 " not in next(request).status:
        pass
    request.close()
    assert 3 <= len(calls) < 8  # it ends with the step that it is at
    assert len(list(studio.draw(**REQUEST))) > 1  # the next visitor is served


def test_errors_of_the_run_reach_the_visitor(studio, toy_pipeline, monkeypatch):
    def fail(*args):
        raise RuntimeError("broken kernel")

    monkeypatch.setattr(toy_pipeline.transformer, "forward_packed", fail)
    with pytest.raises(RuntimeError, match="broken kernel"):
        list(studio.draw(**REQUEST))


def test_without_a_seed_a_random_one_is_taken_and_named(studio):
    seeds = []
    for seed in (None, -1, -1):
        *_, finished = studio.draw(**REQUEST | {"seed": seed, "num_inference_steps": 1})
        seeds.append(parameters_of(finished.items[0][0])["seed"])
        assert finished.status == f"2 finished; seed {seeds[-1]}"
    assert len(set(seeds)) == 3


def test_who_waits_is_told(studio):
    waiting = studio.draw(**REQUEST)
    with studio._busy:
        assert next(waiting).status == "waiting for another visitor's pictures"
    assert [shown.status for shown in waiting][-1] == "2 finished; seed 7"
