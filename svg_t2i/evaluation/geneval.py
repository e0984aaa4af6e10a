"""GenEval's verdicts on pictures (Ghosh et al. 2023, arXiv 2310.11513), from the objects that a detector finds in them.

A picture is right where each object of its prompt is found often enough, has its colour and lies where it should, and
nothing that must not be there is found. The rules and their thresholds are those of the official evaluate_images.py at
commit 16f1681; the detector is the caller's, such as `evaluation.detector.Detector`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from autoencoder.common.config import UserError
from autoencoder.common.processes import World
from autoencoder.common.weights import replacing
from autoencoder.images.files import load_image

# The 80 classes of COCO, in its order and in GenEval's words.
NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9  # that an object needs to be found; the second where objects are counted
MOST_OBJECTS = 16  # of a class that are looked at
SIDE_SHARE = 0.1  # of the sides of both boxes: what two centres must lie apart beyond to be in a relation
MAIN_DIRECTION = 0.5  # share of the distance that must lie in a direction


@dataclass(frozen=True)
class Found:
    """An object in a picture.

    Attributes:
        box: left, top, right and bottom in pixels.
        confidence: in [0, 1].
        mask: (H, W) of bool, where the object is; None for all of the box.
    """

    box: tuple[float, float, float, float]
    confidence: float
    mask: np.ndarray | None = None


Objects = Mapping[str, Sequence[Found]]  # by the name of their class
Detect = Callable[[Image.Image], Objects]
ReadColours = Callable[[Image.Image, Sequence[Found], str], Sequence[str]]  # of objects of that name


@dataclass(frozen=True)
class Picture:
    """A picture that is to be judged, and what its prompt asks for (a line of evaluation_metadata.jsonl)."""

    path: Path
    record: Mapping[str, Any]


# --- rules --------------------------------------------------------------------------------------------------------


def verdict(
    record: Mapping[str, Any], objects: Objects, colours_of: Callable[[Sequence[Found], str], Sequence[str]]
) -> tuple[bool, list[str]]:
    """Whether a picture with these objects is right, and what is wrong with it.

    objects: the certain ones, most certain first (`certain`). colours_of: (objects, name) -> their colours.
    """
    wrong: list[str] = []
    placed: list[Sequence[Found]] = []  # what was found for each part of the prompt; none where that is wrong
    for wanted in record["include"]:
        name, count = wanted["class"], wanted["count"]
        found = objects.get(name, [])[:count]
        problem = ""
        if len(found) < count:
            problem = f"{name}: {len(found)} of {count} found"
        elif "color" in wanted:
            colours = list(colours_of(found, name))
            if colours.count(wanted["color"]) < count:
                problem = f"{name}: {', '.join(colours)} instead of {wanted['color']}"
        if not problem and "position" in wanted:
            problem = _misplaced(found, placed, *wanted["position"], name)
        if problem:
            wrong.append(problem)
        placed.append([] if problem else found)
    for unwanted in record.get("exclude", []):
        number = len(objects.get(unwanted["class"], []))
        if number >= unwanted["count"]:
            wrong.append(f"{unwanted['class']}: {number} found, fewer than {unwanted['count']} wanted")
    return not wrong, wrong


def _misplaced(found: Sequence[Found], placed: Sequence[Sequence[Found]], relation: str, target: int, name: str) -> str:
    if not placed[target]:
        return f"{name}: nothing is there that it could be {relation}"
    for one in found:
        for other in placed[target]:
            if relation not in (seen := relations(one, other)):
                return f"{name}: {' and '.join(sorted(seen)) or 'in no clear relation'} instead of {relation}"
    return ""


def relations(one: Found, other: Found) -> set[str]:
    """Where an object lies, seen from another: up to two of `RELATIONS`.

    The offset of the centres is shortened in x and y by a tenth of both widths or heights, and must then make up more
    than half of the distance in a direction.
    """
    boxes = np.array([one.box, other.box], dtype=float).reshape(2, 2, 2)  # object, corner, axis
    centres, sides = boxes.mean(axis=1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    clear = np.sign(offset) * np.maximum(np.abs(offset) - SIDE_SHARE * sides.sum(axis=0), 0)
    if np.all(np.abs(clear) < 1e-3):
        return set()
    x, y = clear / np.linalg.norm(offset)
    holds = (x < -MAIN_DIRECTION, x > MAIN_DIRECTION, y < -MAIN_DIRECTION, y > MAIN_DIRECTION)
    return {relation for relation, true in zip(RELATIONS, holds) if true}


def certain(objects: Objects, tag: str) -> dict[str, list[Found]]:
    """The objects that count for a task, most certain first."""
    least = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    kept = {
        name: sorted((one for one in found if one.confidence > least), key=lambda one: -one.confidence)[:MOST_OBJECTS]
        for name, found in objects.items()
    }
    return {name: found for name, found in kept.items() if found}


# --- folders ------------------------------------------------------------------------------------------------------


def find_pictures(folder: Path) -> list[Picture]:
    """The pictures below a folder in GenEval's layout: 00000/metadata.jsonl and 00000/samples/0000.png.

    Raises:
        UserError: there are none, a prompt has pictures and no metadata, as where they are still being made, or it asks
            for what no verdict can be given on.
    """
    pictures = []
    for prompt in sorted(path for path in folder.glob("*") if path.name.isdigit()):
        paths = sorted(path for path in prompt.glob("samples/*.png") if path.stem.isdigit())
        if paths and not (prompt / "metadata.jsonl").is_file():
            raise UserError(
                f"{prompt} has pictures and no metadata.jsonl: let `benchmark geneval` come to its end first"
            )
        record = read_record(prompt / "metadata.jsonl") if paths else {}
        pictures += [Picture(path, record) for path in paths]
    if not pictures:
        raise UserError(f"--images {folder} has no pictures like 00000/samples/0000.png with 00000/metadata.jsonl")
    return pictures


def read_record(path: Path) -> dict[str, Any]:
    """A prompt's metadata, checked.

    Raises:
        UserError: names the file and what is wrong.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        problem = _problem_of(record)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        problem = f"not valid JSON ({error})"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"not a line of evaluation_metadata.jsonl ({type(error).__name__}: {error})"
    if problem:
        raise UserError(f"{path}: {problem}")
    return record


def _problem_of(record: Mapping[str, Any]) -> str:
    if not isinstance(record["tag"], str) or not isinstance(record["prompt"], str):
        return "tag and prompt must be texts"
    for place, wanted in enumerate([*record["include"], *record.get("exclude", [])]):
        name, count, colour = wanted["class"], wanted["count"], wanted.get("color", COLOURS[0])
        if name not in NAMES:
            return f"class {name!r} is none of COCO's 80"
        if type(count) is not int or count < 1:
            return f"count {count!r} of {name} must be a whole number from 1"
        if colour not in COLOURS:
            return f"color {colour!r} of {name}; choose from {', '.join(COLOURS)}"
        relation, target = wanted.get("position", (RELATIONS[0], 0))
        if relation not in RELATIONS or "position" in wanted and target not in range(place):
            return f"position {wanted['position']!r} of {name}: a relation to an object before it in the list"
    return ""


def judge(pictures: Sequence[Picture], detect: Detect, read_colours: ReadColours, world: World) -> list[dict[str, Any]]:
    """The verdicts on all pictures, in their order, on rank 0; a share each on the others, which get none.

    They have the fields of the official results.jsonl.

    Raises:
        UserError: a picture cannot be read.
    """
    verdicts = {}
    for i in tqdm(range(len(pictures))[world.rank :: world.size], "judging", unit="picture", disable=not world.is_main):
        record, image = pictures[i].record, load_image(pictures[i].path)
        objects = certain(detect(image), record["tag"])
        right, wrong = verdict(record, objects, lambda found, name, image=image: read_colours(image, found, name))
        details = {name: [[*one.box, one.confidence] for one in found] for name, found in objects.items()}
        verdicts[i] = {
            "filename": str(pictures[i].path), "tag": record["tag"], "prompt": record["prompt"], "correct": right,
            "reason": "\n".join(wrong), "metadata": json.dumps(record), "details": json.dumps(details),
        }  # fmt: skip
    everything = {i: one for share in world.gather(verdicts) for i, one in share.items()}
    return [everything[i] for i in sorted(everything)]


def write_verdicts(verdicts: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A line of JSON each, as `suites.read_geneval_results` and the official summary_scores.py read them."""
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in verdicts), encoding="utf-8")
