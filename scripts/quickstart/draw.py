"""Draws the quickstart's data set: coloured shapes on plain ground, with captions.

Every picture shows one thing that four words describe: "a large red circle at the left". Where the thing sits and how
big it is vary a little from picture to picture, so that there is something to learn beyond a list of pictures.

One colour-shape-place combination in six is never drawn for training. The rule (indices add up to a multiple of six)
leaves every *pair* of colour, shape and place in the training set, so a model that has learned the words can compose
them. The folder afterwards:

    train.jsonl     {"path": "images/00000.png", "prompt": "a large red circle at the left"} per picture
    unseen.jsonl    {"prompt", "colour", "shape", "place", "size"} per combination that training never sees
    held_out.jsonl  {"path", "prompt"} of a picture of each of these, for the loss on them
    images/*.png

Usage: python draw.py FOLDER [--copies N] [--seed N]
"""

import argparse
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels per side: a 4x4 grid of latents
GROUND = (236, 236, 236)

# Corners of the RGB cube, slightly softened. The encoder's LayerNorm divides the length of a plain patch's feature away
# and keeps its direction, so colours have to differ in more than brightness.
COLOURS = {
    "red": (224, 32, 32),
    "green": (24, 168, 48),
    "blue": (32, 64, 224),
    "yellow": (240, 208, 16),
    "magenta": (216, 32, 200),
    "cyan": (16, 200, 216),
}
SHAPES = ("circle", "square", "triangle", "cross")
NEW_SHAPE = "star"  # not in the data set: an adapter learns it from ten pictures (learn_star.py)
PLACES = {"left": (18, 32), "right": (46, 32), "top": (32, 18), "bottom": (32, 46), "centre": (32, 32)}  # (x, y) in px
SIZES = {"large": 16.0, "small": 11.5}  # half the side of the shape's bounding square, in px

SUPERSAMPLING = 4
STAR_INNER = 0.45  # radius of the inner corners, as a fraction of that of the points
PLACE_JITTER = 1.0  # px in x and in y
SIZE_JITTER = 0.04  # fraction of the half side


@dataclass(frozen=True)
class Thing:
    """One word per property; together they determine the caption and, up to jitter, the picture."""

    colour: str
    shape: str
    place: str
    size: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} at the {self.place}"

    @property
    def is_unseen(self) -> bool:
        """True for the combinations of colour, shape and place that are kept from training."""
        indices = list(COLOURS).index(self.colour), SHAPES.index(self.shape), list(PLACES).index(self.place)
        return sum(indices) % len(COLOURS) == 0


def all_things() -> list[Thing]:
    """Every combination, in a fixed order: 6 colours x 4 shapes x 5 places x 2 sizes = 240."""
    return [Thing(*words) for words in itertools.product(COLOURS, SHAPES, PLACES, SIZES)]


def shape_mask(shape: str, centre: tuple[float, float], half_side: float) -> np.ndarray:
    """Coverage of each pixel by the shape, (SIZE, SIZE) float32 in [0, 1].

    Args:
        shape: one of SHAPES, or NEW_SHAPE. The triangle stands on its base; the cross is a plus sign; the star has five
            points.
        centre: (x, y) of the middle of the bounding square, in pixels from the top left corner.
        half_side: half the side of the bounding square, in pixels.
    """
    x, y, r = (v * SUPERSAMPLING for v in (*centre, half_side))
    canvas = Image.new("L", (SIZE * SUPERSAMPLING,) * 2, 0)
    pen = ImageDraw.Draw(canvas)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=255)
    elif shape == "cross":
        arm = r / 3
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=255)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=255)
    elif shape == NEW_SHAPE:
        radii = itertools.cycle((r, STAR_INNER * r))
        turns = (math.pi * i / 5 for i in range(10))
        pen.polygon([(x + radius * math.sin(a), y - radius * math.cos(a)) for radius, a in zip(radii, turns)], fill=255)
    else:
        raise ValueError(f"unknown shape {shape!r}: one of {', '.join((*SHAPES, NEW_SHAPE))}")
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def draw(thing: Thing, rng: np.random.Generator | None = None) -> Image.Image:
    """The picture of a thing, RGB, SIZE x SIZE; without a generator at its exact place and size."""
    dx, dy, growth = rng.uniform(-1, 1, 3) if rng is not None else (0.0, 0.0, 0.0)
    x, y = PLACES[thing.place]
    centre = (x + PLACE_JITTER * dx, y + PLACE_JITTER * dy)
    return paint(thing.shape, thing.colour, centre, SIZES[thing.size] * (1 + SIZE_JITTER * growth))


def paint(shape: str, colour: str, centre: tuple[float, float], half_side: float) -> Image.Image:
    """A picture of a shape on plain ground, RGB, SIZE x SIZE; arguments as of `shape_mask`."""
    mask = shape_mask(shape, centre, half_side)[..., None]
    pixels = mask * np.array(COLOURS[colour]) + (1 - mask) * np.array(GROUND)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def write_data_set(folder: Path, copies: int = 6, seed: int = 0) -> tuple[int, list[Thing]]:
    """Writes images, train.jsonl and unseen.jsonl; returns how many pictures there are, and the unseen things."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    seen = [thing for thing in all_things() if not thing.is_unseen]
    unseen = [thing for thing in all_things() if thing.is_unseen]
    lines = []
    for index, thing in enumerate(seen * copies):
        path = f"images/{index:05d}.png"
        draw(thing, np.random.default_rng([seed, index])).save(folder / path)
        lines.append({"path": path, "prompt": thing.caption})
    write_jsonl(folder / "train.jsonl", lines)
    write_jsonl(folder / "unseen.jsonl", [{"prompt": thing.caption, **vars(thing)} for thing in unseen])
    write_held_out(folder, seed)
    return len(lines), unseen


def write_held_out(folder: Path, seed: int = 0) -> Path:
    """Writes a picture of every unseen thing; returns the list of them, held_out.jsonl."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index, thing in enumerate(thing for thing in all_things() if thing.is_unseen):
        path = f"images/unseen_{index:02d}.png"
        draw(thing, np.random.default_rng([seed, 1, index])).save(folder / path)
        lines.append({"path": path, "prompt": thing.caption})
    write_jsonl(folder / "held_out.jsonl", lines)
    return folder / "held_out.jsonl"


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="draw the quickstart's data set")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--copies", type=int, default=6, help="pictures per combination (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    pictures, unseen = write_data_set(args.folder, args.copies, args.seed)
    print(f"{pictures} pictures and {len(unseen)} unseen combinations in {args.folder}")


if __name__ == "__main__":
    main()
