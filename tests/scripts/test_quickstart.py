"""The quickstart's data set is what its captions say, and its scorer reads it back and is not easily pleased.

The recipe itself runs in .ci/run (`scripts/quickstart.sh --short`).
"""

import itertools
import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from torch.utils.tensorboard import SummaryWriter

from autoencoder.common.config import UserError
from autoencoder.sources.manifest import Manifest
from svg_t2i.sampling.options import PRESETS

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "quickstart"
EXAMPLE = FOLDER.parents[1] / "configs" / "example.jsonl"
PROPERTIES = ("colour", "shape", "place", "size")
PERFECT = {"attributes": 1.0, "relation": 1.0, "all": 1.0}
PAIR = ("colour", "shape", "relation", "other_colour", "other_shape")


@pytest.fixture
def draw(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return pytest.importorskip("draw")


@pytest.fixture
def score(monkeypatch, draw):
    return pytest.importorskip("score")


@pytest.fixture
def pairs(score):
    return pytest.importorskip("pairs")


@pytest.fixture
def data_set(pairs):
    return pytest.importorskip("data_set")


def handled(picture, rng):
    """Blurred, and with noise of 10 grey levels, as a decoder might leave it."""
    levels = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.7)), dtype=float)
    return Image.fromarray((levels + rng.normal(0, 10, levels.shape)).clip(0, 255).astype(np.uint8))


def test_clean_pictures_score_full_marks(draw, score):
    things = draw.all_things()
    assert score.score([draw.draw(thing) for thing in things], things) == dict.fromkeys((*PROPERTIES, "all"), 1.0)


def test_jittered_noisy_pictures_score_full_marks(draw, score):
    """A decoder's small errors are forgiven."""
    things = random.Random(0).sample(draw.all_things(), 80)
    pictures = []
    for index, thing in enumerate(things):
        rng = np.random.default_rng(index)
        pictures.append(handled(draw.draw(thing, rng), rng))
    assert score.score(pictures, things) == dict.fromkeys((*PROPERTIES, "all"), 1.0)


@pytest.mark.parametrize("wrong", PROPERTIES)
def test_one_wrong_property_costs_that_property_alone(draw, score, wrong):
    things = random.Random(1).sample(draw.all_things(), 24)
    words = {
        "colour": list(draw.COLOURS),
        "shape": list(draw.SHAPES),
        "place": list(draw.PLACES),
        "size": list(draw.SIZES),
    }[wrong]
    others = [
        replace(thing, **{wrong: words[(words.index(getattr(thing, wrong)) + 1) % len(words)]}) for thing in things
    ]
    fractions = score.score([draw.draw(other) for other in others], things)
    assert fractions == {name: float(name != wrong) for name in PROPERTIES} | {"all": float(wrong == "size")}


def test_stars_are_told_from_what_was_known(draw, score):
    """By templates from pictures: here of blurred stars, in the recipe of what the autoencoder makes of them."""
    lesson = pytest.importorskip("learn_star")

    def shown(picture):
        return picture.filter(ImageFilter.GaussianBlur(1.5))

    spots = [draw.Spot(draw.NEW_SHAPE, "red", (32, 32), half) for half in score.HALF_SIDES]
    pictures = [(shown(draw.paint([spot])), float(spot.half_side)) for spot in spots]
    templates = score.shape_templates().with_pictures(draw.NEW_SHAPE, pictures)
    learnt, asked = lesson.pairs()
    assert (len(learnt), len(asked)) == (10, 20)
    assert not {(star.colour, star.place) for star in learnt} & {(star.colour, star.place) for star in asked}
    assert {star.colour for star in learnt} == set(draw.COLOURS)
    assert {star.place for star in learnt} == set(draw.PLACES)
    everything = [*asked, *draw.all_things()]
    drawn = [shown(draw.draw(thing, np.random.default_rng(i))) for i, thing in enumerate(everything)]
    assert score.score(drawn, everything, templates)["all"] > 0.99
    assert score.score(drawn[:20], asked)["shape"] == 0  # without those templates nothing is a star
    assert draw.NEW_SHAPE not in " ".join(thing.caption for thing in draw.all_things())


def test_the_lesson_refuses_what_it_cannot_use(score, tmp_path):
    lesson = pytest.importorskip("learn_star")
    with pytest.raises(UserError, match="has no trained model: bash scripts/quickstart.sh makes one"):
        lesson.main(["--quickstart", str(tmp_path), "--output", str(tmp_path / "new")])
    (tmp_path / "transformer" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="is not empty; nothing was overwritten"):
        lesson.main(["--quickstart", str(tmp_path), "--output", str(tmp_path)])
    assert not (tmp_path / "new").exists()


def test_unclear_pictures_score_nothing(draw, score):
    noise = np.random.default_rng(0).integers(0, 256, (draw.SIZE, draw.SIZE, 3), dtype=np.uint8)
    plain = Image.new("RGB", (draw.SIZE, draw.SIZE), draw.GROUND)
    speck = plain.copy()
    speck.paste(draw.COLOURS["red"], (30, 30, 36, 36))
    filled = Image.new("RGB", plain.size, draw.COLOURS["red"])
    for picture in (plain, speck):
        assert score.read_picture(picture) == score.Reading(None, None, None, None)
    for picture in (Image.fromarray(noise), filled):
        assert score.read_picture(picture).shape is None


def test_chance_scores_low(draw, score):
    """Pictures of other things are right about as often as dice."""
    things = draw.all_things()
    shuffled = random.Random(2).sample(things, len(things))[:120]
    fractions = score.score([draw.draw(thing) for thing in shuffled], things[:120])
    assert fractions["colour"] < 0.3
    assert fractions["place"] < 0.35
    assert fractions["shape"] < 0.4
    assert fractions["all"] < 0.05


def test_a_thing_between_two_places_is_at_neither(draw, score):
    picture = draw.draw(draw.Thing("red", "circle", "left", "small"))
    moved = Image.new("RGB", picture.size, draw.GROUND)
    moved.paste(picture, (7, 7))  # half way from the left to the bottom
    assert score.read_picture(moved).place is None


def test_wrong_sizes_and_counts_are_errors(draw, score):
    with pytest.raises(ValueError, match="32x32"):
        score.read_picture(Image.new("RGB", (32, 32)))
    with pytest.raises(ValueError, match="0 pictures"):
        score.score([], [])
    with pytest.raises(ValueError, match="hexagon"):
        draw.shape_mask("hexagon", (32, 32), 10)


def test_unseen_combinations_never_meet_in_training_but_any_two_words_do(data_set, tmp_path):
    count = data_set.write_data_set(tmp_path, copies=1)
    captions = {json.loads(line)["prompt"] for line in (tmp_path / "train.jsonl").read_text().splitlines()}
    unseen = [*data_set.unseen_things(), *data_set.unseen_pairs()]
    assert len(captions) == (240 - 40) + (1200 - 200)
    assert count == len(captions) + (240 - 40)  # pairs inside each other are drawn twice
    assert [json.loads(line)["prompt"] for line in (tmp_path / "unseen.jsonl").read_text().splitlines()] == [
        what.caption for what in unseen
    ]
    pairs = data_set.all_pairs()
    assert {what.caption for what in (*data_set.all_things(), *pairs) if not what.is_unseen} == captions
    assert {pair.relation for pair in data_set.unseen_pairs()} == {"left of", "above", "inside"}

    def words(what, names):
        return {tuple(getattr(each, name) for name in names) for each in what}

    groups = (
        (data_set.all_things(), PROPERTIES, ("colour", "shape", "place")),
        (pairs, PAIR, PAIR),
    )
    for group, names, rule in groups:
        seen = [what for what in group if not what.is_unseen]
        kept = [what for what in group if what.is_unseen]
        assert len(kept) * 6 == len(group)
        assert not words(seen, rule) & words(kept, rule)
        for two in itertools.combinations(names, 2):
            assert words(kept, two) <= words(seen, two)


def test_data_set_is_deterministic_and_a_manifest(data_set, pairs, draw, score, tmp_path):
    for name in ("a", "b"):
        data_set.write_data_set(tmp_path / name, copies=1, seed=3)
    data_set.write_data_set(tmp_path / "c", copies=1, seed=4)
    first, again, other = (sorted((tmp_path / name / "images").iterdir()) for name in "abc")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert sum(p.read_bytes() != q.read_bytes() for p, q in zip(first, other, strict=True)) > 1000

    things = {thing.caption: thing for thing in draw.all_things()}
    couples = {pair.caption: pair for pair in pairs.all_pairs()}
    manifest = Manifest.open(tmp_path / "a" / "train.jsonl")
    for index in range(0, len(manifest), 20):
        image, sample, _ = manifest.load(index)
        (caption,) = sample.captions
        pair = couples.get(caption)
        right = pairs.judge(image, pair) if pair else score.read_picture(image).matches(things[caption])
        assert all(right.values()), caption


def test_samples_folder_is_scored_by_its_captions(draw, score, tmp_path):
    (tmp_path / "images").mkdir()
    things = draw.all_things()[:6]
    for index, thing in enumerate(things):
        draw.draw(things[0] if index == 5 else thing).save(tmp_path / "images" / f"{index}.png")
    records = [{"caption": thing.caption, "image_url": f"elsewhere/{i}.png"} for i, thing in enumerate(things)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    fractions = score.score_folder(tmp_path)
    assert fractions["colour"] == 1.0
    assert fractions["place"] == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "full"], "full is not empty"),
        (["--gpu", "--data", str(EXAMPLE)], "--gpu and --data exclude each other"),
        (["--gpu"], "found no GPU that torch can use; bash scripts/quickstart.sh is made for the CPU"),
        (["--data", "none.jsonl"], "none.jsonl cannot be read: No such file"),
        (["--data", str(EXAMPLE), "--resolution", "100"], "100 is not a positive multiple of 16"),
    ],
)
def test_recipe_refuses_bad_input_and_touches_nothing(score, monkeypatch, tmp_path, arguments, message):
    recipe = pytest.importorskip("recipe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("mine")
    with pytest.raises(UserError, match=message):
        recipe.main(arguments)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "kept.txt"]


def test_pictures_are_told_from_those_of_other_captions(score):
    recipe = pytest.importorskip("recipe")
    rng = np.random.default_rng(0)
    levels = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(4)]
    images = [Image.fromarray(level) for level in levels]
    assert recipe.compare(images[0], images)[0] > 100
    noisy = [
        Image.fromarray((0.8 * level + 0.2 * rng.integers(0, 256, level.shape)).astype(np.uint8)) for level in levels
    ]
    right = recipe.own_image(noisy, [0, 1, 2, 3], images)
    assert right["own_image"] == 1.0
    assert right["sample_psnr"] > right["sample_psnr_others"] + 5
    assert recipe.own_image([noisy[1], *noisy[1:]], [0, 1, 2, 3], images)["own_image"] == 0.75
    assert recipe.own_image([noisy[1], *noisy[1:]], [1, 1, 2, 3], images)["own_image"] == 1.0


def test_squares_of_the_users_images(score, tmp_path):
    recipe = pytest.importorskip("recipe")
    Image.new("RGB", (100, 50), "red").save(tmp_path / "wide.png")
    captions = ["a red field", "red"]
    (tmp_path / "my.jsonl").write_text(json.dumps({"path": "wide.png", "prompt": captions}))
    recipe.write_squares(Manifest.open(tmp_path / "my.jsonl"), tmp_path / "data", 32)
    image, sample, _ = Manifest.open(tmp_path / "data" / "train.jsonl").load(0)
    assert (image.size, sample.captions) == ((32, 32), tuple(captions))
    assert image.getpixel((3, 3)) == (255, 0, 0)


def test_unusable_images_are_counted_and_listed(score, odd_images, monkeypatch, tmp_path):
    recipe = pytest.importorskip("recipe")
    monkeypatch.setattr(recipe.Recipe, "train", lambda *_: pytest.fail("reached training"))
    arguments = ["--data", str(odd_images), "--resolution", "32", "--output"]
    with pytest.raises(BaseException, match="reached training"):
        recipe.main([*arguments, str(tmp_path / "usual")])
    (line,) = map(json.loads, (tmp_path / "usual" / "unusable.jsonl").read_text().splitlines())
    assert "damaged.jpg" in line["reason"]
    assert len(list((tmp_path / "usual" / "data" / "images").iterdir())) == 9
    with pytest.raises(UserError, match=r"(?s)more than 0 unusable samples .*damaged\.jpg"):
        recipe.main([*arguments, str(tmp_path / "strict"), "--max_errors", "0"])


def test_pictures_of_every_verb_that_starts_from_images(data_set, saved_pipeline, monkeypatch, tmp_path):
    recipe = pytest.importorskip("recipe")
    with pytest.raises(UserError, match="holds no finished quickstart"):
        recipe.main(["--pictures", "--output", str(tmp_path)])
    data_set.write_data_set(tmp_path / "data", copies=1)
    for path in sorted((tmp_path / "data" / "images").iterdir())[7:]:
        path.unlink()
    (tmp_path / "transformer").symlink_to(saved_pipeline)
    monkeypatch.setitem(PRESETS, "quickstart", replace(PRESETS["quickstart"], num_inference_steps=2))
    recipe.main(["--pictures", "--output", str(tmp_path)])
    sizes = {path.stem: Image.open(path).size for path in (tmp_path / "pictures").glob("*.png")}
    assert set(sizes) == {"variation", "image_to_image", "inpaint", "interpolate", "retrieve"}
    assert min(width for width, _ in sizes.values()) > 6 * 64


def test_help_needs_no_installation(tmp_path):
    """Quickstart explains itself before anything is installed: no Python in sight."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "sed", "dirname", "realpath"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    command = ["bash", str(FOLDER.parent / "quickstart.sh"), "--help"]
    done = subprocess.run(command, env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True, check=True)
    for option in ("--short", "--data", "--resolution", "--output", "--pictures"):
        assert option in done.stdout
    assert not done.stderr


def test_held_out_pictures_are_of_unseen_combinations(data_set, pairs, score, tmp_path):
    lines = [json.loads(line) for line in data_set.write_held_out(tmp_path).read_text().splitlines()]
    things, couples = data_set.unseen_things(), data_set.unseen_pairs()
    assert [line["prompt"] for line in lines] == [what.caption for what in (*things, *couples)]
    assert not (tmp_path / "images").exists()  # whoever takes the folder of training images gets those alone
    pictures = [Image.open(tmp_path / line["path"]) for line in lines]
    assert score.score(pictures[: len(things)], things)["all"] == 1.0
    assert pairs.score_pairs(pictures[len(things) :], couples) == PERFECT


def test_drawn_pairs_score_full_marks(pairs):
    """Exact ones, and jittered ones that a decoder might have left."""
    couples = random.Random(0).sample(pairs.all_pairs(), 120)
    assert pairs.score_pairs([pairs.draw_pair(pair) for pair in couples], couples) == PERFECT
    pictures = []
    for index, pair in enumerate(couples):
        rng = np.random.default_rng(index)
        pictures.append(handled(pairs.draw_pair(pair, rng), rng))
    assert pairs.score_pairs(pictures, couples) == PERFECT


@pytest.mark.parametrize("relation", ["left of", "above", "inside"])
def test_a_wrong_word_of_a_pair_costs_what_it_is_about(pairs, draw, relation):
    pair = pairs.Pair("red", "cross", relation, "blue", "square")
    assert pair.caption == f"a red cross {relation} a blue square"

    def judged(**changes):
        right = pairs.judge(pairs.draw_pair(replace(pair, **changes)), pair)
        return right["attributes"], right["relation"]

    assert judged() == (True, True)
    assert judged(shape="circle") == judged(other_shape="circle") == (False, True)
    assert judged(colour="green") == judged(other_colour="green") == (False, False)
    assert judged(colour="blue", shape="square", other_colour="red", other_shape="cross")[1] is False
    assert judged(colour="blue", other_colour="red") == (False, False)  # colours are bound to shapes and places
    for other in {"left of", "above", "inside"} - {relation}:
        assert judged(relation=other)[1] is False
    alone = draw.Spot("square", "blue", (32, 32), 12.0)
    assert pairs.judge(draw.paint([alone]), pair) == {"attributes": False, "relation": False}
    first, second = pairs.LAYOUTS[relation]
    third = draw.Spot("circle", "yellow", (10, 10), 8.0)
    spots = [draw.Spot("square", "blue", *second), draw.Spot("cross", "red", *first), third]
    assert pairs.judge(draw.paint(spots), pair) == {"attributes": False, "relation": True}


def test_pairs_by_chance_score_low(pairs):
    couples = random.Random(1).sample(pairs.all_pairs(), 150)
    others = random.Random(2).sample(couples, len(couples))
    fractions = pairs.score_pairs([pairs.draw_pair(other) for other in others], couples)
    assert max(fractions.values()) < 0.05
    with pytest.raises(ValueError, match="0 pictures for 150 pairs"):
        pairs.score_pairs([], couples)


def test_larger_pictures_show_the_same(data_set, pairs):
    things, couples = data_set.every(data_set.unseen_things(), 8), data_set.every(data_set.unseen_pairs(), 8)
    large = [data_set.picture_of(what, side=256) for what in (*things, *couples)]
    assert {picture.size for picture in large} == {(256, 256)}
    scores = data_set.score_both(large, things, couples)
    assert (scores["single"]["all"], scores["pairs"]) == (1.0, PERFECT)
    for picture, what in zip(large, (*things, *couples)):
        difference = np.abs(np.asarray(picture.reduce(4), float) - np.asarray(data_set.picture_of(what), float))
        assert difference.mean() < 1.0  # of 255: at the edges alone


def test_the_two_kinds_are_scored_apart(data_set, pairs, score):
    things, couples = data_set.every(data_set.unseen_things(), 4), data_set.every(data_set.unseen_pairs(), 5)
    assert (len(things), len(couples)) == (4, 5)
    assert data_set.every(things, 9) == things
    pictures = [data_set.picture_of(what) for what in (*things, *couples) for _ in range(2)]
    scores = data_set.score_both(pictures, things, couples)
    assert scores["single"]["all"] == 1.0
    assert scores["pairs"] == PERFECT
    pictures[-1] = pictures[0]
    assert data_set.score_both(pictures, things, couples)["pairs"]["all"] == pytest.approx(0.9)


def test_the_losses_are_plotted(draw, tmp_path):
    pictures = pytest.importorskip("pictures")
    with SummaryWriter(str(tmp_path / "board")) as board:
        for step in (50, 100):
            board.add_scalar("train/loss", 1 / step, step)
            board.add_scalar("validation/loss", 2 / step, step)
    read = pytest.importorskip("steps").scalars(tmp_path / "board")
    assert read("validation/loss") == ([50, 100], pytest.approx([0.04, 0.02]))
    pictures.plot_losses(tmp_path / "board", tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (720, 420)
