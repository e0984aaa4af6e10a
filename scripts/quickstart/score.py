"""Reads colour, place, shape and size of the thing in a picture back from its pixels.

Knows draw.py's geometry and palette, and nothing of any model: numpy and PIL only. A picture that shows no clear thing
gets None for what cannot be read, which counts as wrong.

    colour  most frequent palette colour among the pixels that are nearer to a palette colour than to the ground
    place   the canonical place within PLACE_TOLERANCE of the middle of the thing
    shape   the drawn shape, over a grid of centres and sizes, with the largest intersection over union
    size    the word of the size nearest to that of the best shape

Usage: python score.py SAMPLES    the folder of data.json, whose captions say what should be there
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from draw import COLOURS, GROUND, PLACES, SHAPES, SIZE, SIZES, Thing, all_things, shape_mask
from PIL import Image

MIN_AREA = 60  # px; the smallest thing drawn (a small cross) covers about 290
PLACE_TOLERANCE = 7.0  # px between the middle and the canonical place, half the distance between two places
MIN_OVERLAP = 0.6  # intersection over union below which no shape is recognised
HALF_SIDES = tuple(np.arange(9.0, 19.0))  # px, of the shapes that a thing is compared with
OFFSETS = range(-4, 5)  # px between the shape's centre and the thing's bounding middle


@dataclass(frozen=True)
class Reading:
    """What the pixels show; None where it cannot be told."""

    colour: str | None
    shape: str | None
    place: str | None
    size: str | None

    def matches(self, thing: Thing) -> dict[str, bool]:
        """Which properties are those of the thing."""
        return {name: getattr(self, name) == wanted for name, wanted in vars(thing).items()}


NOTHING = Reading(None, None, None, None)


@dataclass(frozen=True)
class Templates:
    """What a shape is compared with: masks (templates, SIZE * SIZE) of 0/1 in mid-picture, with shape and half side."""

    masks: np.ndarray
    labels: tuple[tuple[str, float], ...]

    def with_pictures(self, shape: str, pictures: Sequence[tuple[Image.Image, float]]) -> "Templates":
        """These and some of `shape`, from pictures of a thing of known half side."""
        found = [nearest_colours(picture) > 0 for picture, _ in pictures]
        centred = [move(mask, *(round(SIZE / 2 - v) for v in reversed(middle(mask)))).ravel() for mask in found]
        labels = tuple((shape, half_side) for _, half_side in pictures)
        return Templates(np.concatenate([self.masks, np.stack(centred)]), self.labels + labels)


def nearest_colours(image: Image.Image, within: float = math.inf) -> np.ndarray:
    """The nearest palette entry of each pixel, (SIZE, SIZE): 0 for the ground, then the colours in their order.

    Args:
        within: RGB distance from which a pixel has none of the colours (0), as where two of them meet.

    Raises:
        ValueError: the picture is not SIZE x SIZE.
    """
    if image.size != (SIZE, SIZE):
        raise ValueError(f"the picture is {image.size[0]}x{image.size[1]}, the scorer reads {SIZE}x{SIZE}")
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    palette = np.array([GROUND, *COLOURS.values()], dtype=np.float32)  # (1 + colours, 3)
    distances = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)  # (SIZE, SIZE, 1 + colours)
    return np.where(distances.min(axis=-1) <= within, distances.argmin(axis=-1), 0)


def read_picture(image: Image.Image, templates: Templates | None = None) -> Reading:
    """Reads an RGB picture of SIZE x SIZE pixels (ValueError otherwise). templates: of the drawn shapes by default."""
    nearest = nearest_colours(image)
    mask = nearest > 0
    if mask.sum() < MIN_AREA:
        return NOTHING
    votes = np.bincount(nearest[mask], minlength=1 + len(COLOURS))
    x, y = middle(mask)
    shape, half_side = best_shape(mask, templates or shape_templates())
    size = min(SIZES, key=lambda word: abs(SIZES[word] - half_side)) if shape else None
    return Reading(list(COLOURS)[votes.argmax() - 1], shape, place_of(x, y), size)


def middle(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the middle of the box that holds a mask but for 1% of its pixels on each side."""
    rows, columns = np.nonzero(mask)
    return tuple(float(np.quantile(indices, (0.01, 0.99)).mean()) + 0.5 for indices in (columns, rows))


def place_of(x: float, y: float) -> str | None:
    """The canonical place within PLACE_TOLERANCE of a point in pixels, if any."""
    distances = {name: float(np.hypot(x - px, y - py)) for name, (px, py) in PLACES.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= PLACE_TOLERANCE else None


def best_shape(mask: np.ndarray, templates: Templates) -> tuple[str | None, float]:
    """The shape that overlaps a (SIZE, SIZE) mask best, and its half side; (None, 0.0) below MIN_OVERLAP."""
    x, y = middle(mask)
    best, found = MIN_OVERLAP, (None, 0.0)
    for dy in OFFSETS:
        for dx in OFFSETS:
            moved = move(mask, round(SIZE / 2 - y) + dy, round(SIZE / 2 - x) + dx)
            overlap = templates.masks @ moved.ravel()  # (templates,) px
            union = templates.masks.sum(axis=1) + moved.sum() - overlap
            index = int((overlap / union).argmax())
            if overlap[index] / union[index] > best:
                best, found = overlap[index] / union[index], templates.labels[index]
    return found


@lru_cache(maxsize=2)
def shape_templates(half_sides: tuple[float, ...] = HALF_SIDES) -> Templates:
    """Every drawn shape of every half side, in px."""
    labels = tuple((shape, float(half_side)) for shape in SHAPES for half_side in half_sides)
    masks = [shape_mask(shape, (SIZE / 2, SIZE / 2), half_side) > 0.5 for shape, half_side in labels]
    return Templates(np.stack(masks).reshape(len(labels), -1).astype(np.float32), labels)


def move(mask: np.ndarray, down: int, right: int) -> np.ndarray:
    """The mask shifted by whole pixels, empty where nothing moves in; float32."""
    moved = np.zeros((SIZE, SIZE), dtype=np.float32)
    rows, columns = np.nonzero(mask)
    rows, columns = rows + down, columns + right
    inside = (rows >= 0) & (rows < SIZE) & (columns >= 0) & (columns < SIZE)
    moved[rows[inside], columns[inside]] = 1
    return moved


def score(
    pictures: Sequence[Image.Image], things: Sequence[Thing], templates: Templates | None = None
) -> dict[str, float]:
    """Fractions of pictures with the right colour, shape, place, size, and with colour, shape and place all right."""
    if not pictures or len(pictures) != len(things):
        raise ValueError(f"{len(pictures)} pictures for {len(things)} descriptions")
    rows = [read_picture(picture, templates).matches(thing) for picture, thing in zip(pictures, things, strict=True)]
    fractions = {name: float(np.mean([row[name] for row in rows])) for name in ("colour", "place", "shape", "size")}
    return fractions | {"all": float(np.mean([row["colour"] and row["place"] and row["shape"] for row in rows]))}


def score_folder(folder: Path) -> dict[str, float]:
    """Scores the pictures of a samples folder against their captions (KeyError for one that names no known thing)."""
    things = {thing.caption: thing for thing in all_things()}
    records = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    pictures = [Image.open(folder / "images" / Path(record["image_url"]).name) for record in records]
    return score(pictures, [things[record["caption"]] for record in records])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="score the quickstart's samples against their captions")
    parser.add_argument("samples", type=Path, help="folder with data.json and images/")
    print(json.dumps(score_folder(parser.parse_args().samples), indent=2))
