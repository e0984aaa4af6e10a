"""Draws coloured shapes on plain ground: what the quickstart's pictures show.

A thing is described by four words: "a large red circle at the left". Where it sits and how big it is vary a little from
picture to picture, so that there is something to learn beyond a list of pictures.

One colour-shape-place combination in six is never drawn for training. The rule (indices add up to a multiple of six)
leaves every two of colour, shape and place together in the training set, so a model that has learned the words can
compose them.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels per side, of pictures unless another is named: a 4x4 grid of latents
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
class Spot:
    """A shape in a colour, at a place: centre is (x, y) and half_side half the side of its bounding square, in px."""

    shape: str
    colour: str
    centre: tuple[float, float]
    half_side: float

    def jittered(self, rng: np.random.Generator | None) -> "Spot":
        """Moved and grown a little; itself without a generator."""
        if rng is None:
            return self
        dx, dy, growth = rng.uniform(-1, 1, 3)
        centre = (self.centre[0] + PLACE_JITTER * dx, self.centre[1] + PLACE_JITTER * dy)
        return Spot(self.shape, self.colour, centre, self.half_side * (1 + SIZE_JITTER * growth))


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
        return kept_from_training((COLOURS, self.colour), (SHAPES, self.shape), (PLACES, self.place))


def kept_from_training(*words: tuple[Iterable[str], str]) -> bool:
    """The rule, of words that are each given behind all words of their kind: one combination in six."""
    return sum(list(kind).index(word) for kind, word in words) % len(COLOURS) == 0


def all_things() -> list[Thing]:
    """Every combination, in a fixed order: 6 colours x 4 shapes x 5 places x 2 sizes = 240."""
    return [Thing(*words) for words in itertools.product(COLOURS, SHAPES, PLACES, SIZES)]


def shape_mask(shape: str, centre: tuple[float, float], half_side: float, side: int = SIZE) -> np.ndarray:
    """Coverage of each pixel by the shape, (side, side) float32 in [0, 1].

    Args:
        shape: one of SHAPES, or NEW_SHAPE. The triangle stands on its base; the cross is a plus sign; the star has five
            points.
        centre: (x, y) of the middle of the bounding square, from the top left corner; half_side: half its side. Both in
            pixels of a picture of SIZE, whatever the side.
        side: of the picture, in pixels.
    """
    x, y, r = (v * SUPERSAMPLING * side / SIZE for v in (*centre, half_side))
    canvas = Image.new("L", (side * SUPERSAMPLING,) * 2, 0)
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


def draw(thing: Thing, rng: np.random.Generator | None = None, side: int = SIZE) -> Image.Image:
    """The picture of a thing, RGB, side x side; without a generator at its exact place and size."""
    return paint([Spot(thing.shape, thing.colour, PLACES[thing.place], SIZES[thing.size]).jittered(rng)], side)


def paint(spots: Iterable[Spot], side: int = SIZE) -> Image.Image:
    """A picture of shapes on plain ground, RGB, side x side; the later ones lie on the earlier."""
    pixels = np.broadcast_to(np.array(GROUND, dtype=float), (side, side, 3))
    for spot in spots:
        mask = shape_mask(spot.shape, spot.centre, spot.half_side, side)[..., None]  # (side, side, 1)
        pixels = mask * np.array(COLOURS[spot.colour]) + (1 - mask) * pixels
    return Image.fromarray(np.rint(pixels).astype(np.uint8))
