"""The shape benchmark reads what it draws, is not easily pleased, and keeps its questions out of the training set."""

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from autoencoder.sources.manifest import Manifest
from svg_t2i.evaluation import shapes
from svg_t2i.evaluation.shapes import all_scenes, benchmark_scenes, connected_patches, draw_scene, judge, score_scenes

KINDS = ("single", "two_objects", "counting")


def some(kind, count=6):
    scenes = all_scenes(kind)
    return [scenes[i] for i in np.linspace(0, len(scenes) - 1, count).astype(int)]


@pytest.mark.parametrize("size", [64, 128])
def test_drawn_scenes_score_full_marks(size):
    """Jittered, blurred by a change of size and noisy, as a decoder might leave them."""
    scenes = [scene for kind in KINDS for scene in some(kind)]
    pictures = []
    for index, scene in enumerate(scenes):
        rng = np.random.default_rng(index)
        picture = np.asarray(draw_scene(scene, rng).resize((size, size), Image.Resampling.BICUBIC), dtype=float)
        pictures.append(Image.fromarray((picture + rng.normal(0, 8, picture.shape)).clip(0, 255).astype(np.uint8)))
    assert score_scenes(pictures, scenes) == dict.fromkeys((*shapes.TASKS, "overall"), 1.0)


def test_the_self_test_finds_a_reader_that_is_wrong(monkeypatch, capsys):
    benchmark = importlib.import_module("svg_t2i.benchmark")
    monkeypatch.setattr(benchmark, "self_test", lambda: shapes.self_test(copies=1))
    benchmark.main(["shapes", "--self_test"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["as drawn", "blurred, with noise"]
    assert all(line.count("100%") == len(shapes.TASKS) + 1 for line in lines)
    monkeypatch.setattr(shapes, "read_things", lambda picture: [])
    with pytest.raises(SystemExit, match="do not trust its scores"):
        benchmark.main(["shapes", "--self_test"])
    assert "two_objects 0%, counting 0%" in capsys.readouterr().out


def test_a_wrong_word_costs_its_task():
    draw, _ = shapes.quickstart()
    one = draw.Thing("red", "circle", "left", "small")
    two = draw.Thing("blue", "square", "right", "small")
    pair = shapes.Scene((one, two))
    swapped = shapes.Scene((replace(one, colour="blue"), replace(two, colour="red")))
    assert pair.caption == "a small red circle at the left and a small blue square at the right"
    assert judge(draw_scene(pair), shapes.Scene((two, one))) == {"two_objects": True}  # in either order
    assert judge(draw_scene(swapped), pair) == {"two_objects": False}  # the colours are bound to the shapes
    assert judge(draw_scene(shapes.Scene((one,))), pair) == {"two_objects": False}
    assert judge(draw_scene(shapes.Scene((one,))), shapes.Scene((draw.Thing("red", "cross", "left", "small"),))) == {
        "colour": True, "place": True, "shape": False,
    }  # fmt: skip
    three = shapes.Scene((draw.Thing("cyan", "cross", "centre", "small"),), "three")
    assert three.caption == "three small cyan crosses"
    for number, right in (("two", False), ("three", True), ("four", False)):
        assert judge(draw_scene(shapes.Scene(three.things, number)), three) == {"counting": right}
    assert judge(Image.new("RGB", (64, 64), draw.GROUND), three) == {"counting": False}


def test_questions_are_kept_from_training(tmp_path):
    asked = {scene.caption for scene in benchmark_scenes()}
    assert len(asked) == 92
    count = shapes.write_data_set(tmp_path, copies=1)
    manifest = Manifest.open(tmp_path / "train.jsonl")
    drawn = {sample.captions[0] for sample in manifest}
    assert len(manifest) == count == (240 - 40) + (1152 - 192) + (72 - 12)
    assert not asked & drawn
    assert {word for caption in asked for word in caption.split()} <= {w for c in drawn for w in c.split()}
    first = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[-1])
    assert Image.open(tmp_path / first["path"]).size == (64, 64)


def test_connected_patches():
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=bool)
    assert [int(patch.sum()) for patch in connected_patches(mask)] == [3, 1, 1]  # corners touch
    assert np.array_equal(np.logical_or.reduce(connected_patches(mask)), mask)
    assert connected_patches(np.zeros((3, 3), dtype=bool)) == []
