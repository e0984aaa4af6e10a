"""GenEval's verdicts: on drawn scenes by a reader that sees their colours exactly, and rule by rule on boxes."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from autoencoder.common.config import UserError
from autoencoder.common.processes import ALONE
from svg_t2i.evaluation import suites
from svg_t2i.evaluation.geneval import (
    COLOURS,
    MOST_OBJECTS,
    NAMES,
    Found,
    certain,
    find_pictures,
    judge,
    relations,
    verdict,
    write_verdicts,
)

# What a colour of the drawing stands for: (name, the colour that it has there).
PAINT = {
    (200, 0, 0): ("apple", "red"),
    (0, 160, 0): ("apple", "green"),
    (0, 0, 200): ("cup", "blue"),
    (200, 0, 10): ("cup", "red"),
}


def draw(*things):
    """(paint, left, top) of squares of 20 pixels, in a picture of 120 × 100."""
    image = Image.new("RGB", (120, 100), "white")
    for paint, left, top in things:
        ImageDraw.Draw(image).rectangle((left, top, left + 19, top + 19), fill=paint)
    return image


def detect(image):
    pixels, found = np.asarray(image), {}
    for paint, (name, _) in PAINT.items():
        patches, count = ndimage.label((pixels == paint).all(axis=-1))
        for patch in range(1, count + 1):
            rows, columns = np.nonzero(patches == patch)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            found.setdefault(name, []).append(Found(tuple(map(float, box)), 0.95, patches == patch))
    return found


def read_colours(image, objects, name):
    pixels = np.asarray(image)
    seen = [PAINT[tuple(map(int, pixels[one.mask][0]))] for one in objects]
    assert all(of == name for of, _ in seen)
    return [colour for _, colour in seen]


RED, GREEN, BLUE, CUP = PAINT
SCENES = {  # tag: what is asked for, drawings that show it, drawings that do not
    "single_object": ([{"class": "apple", "count": 1}], [[(RED, 5, 5)]], [[(BLUE, 5, 5)], []]),
    "two_object": (
        [{"class": "apple", "count": 1}, {"class": "cup", "count": 1}],
        [[(RED, 5, 5), (BLUE, 50, 50)]], [[(RED, 5, 5), (GREEN, 50, 50)]],
    ),
    "counting": (
        [{"class": "apple", "count": 2}],
        [[(RED, 5, 5), (GREEN, 50, 50)]], [[(RED, 5, 5)], [(RED, 5, 5), (RED, 50, 5), (RED, 5, 50)]],
    ),
    "colors": ([{"class": "apple", "count": 1, "color": "green"}], [[(GREEN, 5, 5)]], [[(RED, 5, 5)]]),
    "position": (
        [{"class": "apple", "count": 1}, {"class": "cup", "count": 1, "position": ["left of", 0]}],
        [[(RED, 80, 40), (BLUE, 10, 44)]],
        [[(RED, 10, 40), (BLUE, 80, 44)], [(RED, 40, 5), (BLUE, 40, 70)], [(BLUE, 1, 1)]],
    ),
    "color_attr": (
        [{"class": "apple", "count": 1, "color": "green"}, {"class": "cup", "count": 1, "color": "red"}],
        [[(GREEN, 5, 5), (CUP, 60, 60)]], [[(RED, 5, 5), (BLUE, 60, 60)], [(GREEN, 5, 5), (BLUE, 60, 60)]],
    ),
}  # fmt: skip


def test_drawn_scenes_are_judged_right(tmp_path):
    """From the folder that `benchmark geneval` writes to the row that `benchmark summarise` prints."""
    expected = []
    for number, (tag, (include, right, wrong)) in enumerate(SCENES.items()):
        folder = tmp_path / "images" / f"{number:05d}"
        (folder / "samples").mkdir(parents=True)
        exclude = [{"class": "apple", "count": 3}] if tag == "counting" else []
        record = {"tag": tag, "include": include, "exclude": exclude, "prompt": f"a photo of {tag}"}
        (folder / "metadata.jsonl").write_text(json.dumps(record) + "\n")
        for i, scene in enumerate([*right, *wrong]):
            draw(*scene).save(folder / "samples" / f"{i:04d}.png")
            expected.append(i < len(right))
        draw().save(folder / "grid.png")
    found = judge(find_pictures(tmp_path / "images"), detect, read_colours, ALONE)
    assert [one["correct"] for one in found] == expected
    assert [one["reason"] == "" for one in found] == expected
    write_verdicts(found, tmp_path / "results.jsonl")
    scores, images = suites.read_geneval_results(tmp_path / "results.jsonl")
    assert images == len(expected)
    assert scores["Single"] == pytest.approx(1 / 3)
    assert scores["Position"] == pytest.approx(1 / 4)
    assert scores["GenEval"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 1 / 2 + 1 / 4 + 1 / 3) / 6)
    reasons = [one["reason"] for one in found]
    assert "cup: 0 of 1 found" in reasons
    assert "apple: red instead of green\ncup: blue instead of red" in reasons
    assert "cup: right of instead of left of" in reasons
    assert "cup: below instead of left of" in reasons
    assert "apple: 3 found, fewer than 3 wanted" in reasons
    assert json.loads(found[0]["details"]) == {"apple": [[5, 5, 25, 25, 0.95]]}


def box(x, y, width=20, height=20):
    """Around a centre."""
    return Found((x - width / 2, y - height / 2, x + width / 2, y + height / 2), 1.0)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (box(150, 50), {"left of"}),
        (box(-90, 50), {"right of"}),
        (box(50, 150), {"above"}),
        (box(50, -50), {"below"}),
        (box(150, 150), {"left of", "above"}),  # each 0.68 of the distance
        (box(150, 100), {"left of"}),  # 0.86 and 0.41
        (box(54, 54), set()),  # a tenth of both widths is 4
        (box(55, 50), set()),  # 1 of 5 pixels is left
        (box(59, 50), {"left of"}),  # 5 of 9 are
        (box(58, 50), set()),  # 4 of 8 are half of it, not more
        (box(150, 50, 480), set()),  # 50 of 100 are
    ],
)
def test_a_relation_needs_a_clear_distance(other, expected):
    assert relations(box(50, 50), other) == expected


def test_what_is_certain_depends_on_the_task():
    found = [Found((0, 0, 1, 1), confidence) for confidence in (0.3, 0.31, 0.95, 0.9, 0.2)]
    assert [one.confidence for one in certain({"cup": found}, "colors")["cup"]] == [0.95, 0.9, 0.31]
    assert [one.confidence for one in certain({"cup": found}, "counting")["cup"]] == [0.95]
    assert certain({"cup": found[-1:]}, "colors") == {}
    many = [Found((0, 0, 1, 1), 0.5 + 0.01 * i) for i in range(20)]
    assert [one.confidence for one in certain({"cup": many}, "two_object")["cup"]] == pytest.approx(
        [0.69 - 0.01 * i for i in range(MOST_OBJECTS)]
    )


def test_only_the_most_certain_objects_are_looked_at():
    """As many as are asked for; a second thing elsewhere, or in another colour, changes nothing."""
    objects = {"apple": [box(10, 50), box(90, 50)], "cup": [box(50, 50)]}
    include = [{"class": "cup", "count": 1}, {"class": "apple", "count": 1, "position": ["left of", 0], "color": "red"}]
    asked = []

    def colours(found, name):
        asked.append((len(found), name))
        return ["red"] * len(found)

    assert verdict({"include": include}, objects, colours) == (True, [])
    assert asked == [(1, "apple")]
    objects["apple"].reverse()
    assert verdict({"include": include}, objects, colours) == (False, ["apple: right of instead of left of"])
    both = [include[0], {"class": "apple", "count": 2, "position": ["left of", 0]}]
    assert verdict({"include": both}, objects, colours) == (False, ["apple: right of instead of left of"])


def test_a_relation_to_what_is_wrong_itself_is_wrong():
    objects = {"apple": [box(10, 50)], "cup": [box(50, 50)]}
    include = [
        {"class": "cup", "count": 1, "color": "blue"},
        {"class": "apple", "count": 1, "position": ["left of", 0]},
    ]
    right, wrong = verdict({"include": include}, objects, lambda found, _: ["pink"] * len(found))
    assert not right
    assert wrong == ["cup: pink instead of blue", "apple: nothing is there that it could be left of"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a line of evaluation_metadata.jsonl"),
        ({"tag": "colors", "include": []}, "KeyError: 'prompt'"),
        ({"tag": 3, "prompt": "a", "include": []}, "tag and prompt must be texts"),
        ({"include": [{"class": "unicorn", "count": 1}]}, "class 'unicorn' is none of COCO's 80"),
        ({"include": [{"class": "cup", "count": 0}]}, "count 0 of cup must be a whole number from 1"),
        ({"include": [{"class": "cup", "count": "2"}]}, "count '2' of cup"),
        ({"include": [{"class": "cup", "count": 1, "color": "mauve"}]}, "color 'mauve' of cup; choose from red"),
        ({"include": [{"class": "cup", "count": 1, "position": ["left of", 0]}]}, "an object before it"),
        ({"include": [{"class": "cup", "count": 1}], "exclude": [{"class": "cup", "count": 1, "position": ["on", 0]}]},
         "position .'on', 0. of cup"),
    ],
)  # fmt: skip
def test_metadata_that_no_verdict_can_be_given_on_is_refused(tmp_path, record, message):
    (tmp_path / "00000" / "samples").mkdir(parents=True)
    draw().save(tmp_path / "00000" / "samples" / "0000.png")
    text = record if isinstance(record, str) else json.dumps({"tag": "colors", "prompt": "a", **record})
    if record == {"tag": "colors", "include": []}:
        text = json.dumps(record)
    (tmp_path / "00000" / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=rf"00000/metadata.jsonl: .*{message}"):
        find_pictures(tmp_path)


def test_a_folder_of_another_layout_is_refused(tmp_path):
    draw().save(tmp_path / "0000.png")
    with pytest.raises(UserError, match="has no pictures like 00000/samples/0000.png"):
        find_pictures(tmp_path)
    (tmp_path / "00007" / "samples").mkdir(parents=True)
    draw().save(tmp_path / "00007" / "samples" / "0000.png")
    with pytest.raises(
        UserError, match="00007 has pictures and no metadata.jsonl: let `benchmark geneval` come to its end"
    ):
        find_pictures(tmp_path)


def test_names_are_those_of_the_prompts():
    assert (len(NAMES), len(set(NAMES)), len(COLOURS)) == (80, 80, 10)
    assert [NAMES[i] for i in (0, 56, 64, 65, 66, 79)] == [
        "person", "chair", "computer mouse", "tv remote", "computer keyboard", "toothbrush",
    ]  # fmt: skip
