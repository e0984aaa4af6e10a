"""Pictures of two things in a relation: "a red circle left of a blue square". Drawn, and read back from the pixels.

Two things of different colours: beside each other, one above the other, or one inside the other. One combination of
colours, shapes and relation in six is never drawn for training; any two of its words meet in the others.

Reading knows draw.py's geometry and palette, and nothing of any model. The caption's two colours say where to look:
what has the first colour must have the first shape, and lie as it should to what has the second.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from draw import COLOURS, PLACES, SHAPES, SIZE, SIZES, Spot, kept_from_training, paint
from PIL import Image
from score import MIN_AREA, best_shape, middle, nearest_colours, shape_templates

INNER, OUTER = 12.0, 26.0  # half sides of one thing inside another, in px
# relation → (centre, half side) of the first and of the second thing, in px
LAYOUTS = {
    "left of": ((PLACES["left"], SIZES["small"]), (PLACES["right"], SIZES["small"])),
    "above": ((PLACES["top"], SIZES["small"]), (PLACES["bottom"], SIZES["small"])),
    "inside": ((PLACES["centre"], INNER), (PLACES["centre"], OUTER)),
}
ROOMY = ("circle", "square")  # shapes that another fits into
HALF_SIDES = tuple(np.arange(8.0, 29.0))  # px, of the shapes that a thing is compared with
APART = 14.0  # px between the middles of things beside each other, at least: half of what is drawn
WITHIN = 6.0  # px between the middles of things inside each other, at most
CLEAR = 80.0  # RGB distance from a colour within which a pixel has it; two colours are 143 apart, or more
MAX_EXTRA = 2 * MIN_AREA  # px of a third colour from which there is a third thing


@dataclass(frozen=True)
class Pair:
    """Two things, each a colour and a shape, and how the first lies to the second."""

    colour: str
    shape: str
    relation: str
    other_colour: str
    other_shape: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} {self.relation} a {self.other_colour} {self.other_shape}"

    @property
    def is_unseen(self) -> bool:
        """True for the combinations that are kept from training."""
        looks = (COLOURS, self.colour), (SHAPES, self.shape), (COLOURS, self.other_colour), (SHAPES, self.other_shape)
        return kept_from_training(*looks, (LAYOUTS, self.relation))


def all_pairs() -> list[Pair]:
    """Every pair in a fixed order: 30 x 16 of things beside and above each other, 30 x 8 inside, 1200 in all."""
    looks = list(itertools.product(COLOURS, SHAPES))
    return [
        Pair(*one, relation, *other)
        for relation, one, other in itertools.product(LAYOUTS, looks, looks)
        if one[0] != other[0] and (relation != "inside" or other[1] in ROOMY)
    ]


def draw_pair(pair: Pair, rng: np.random.Generator | None = None, side: int = SIZE) -> Image.Image:
    """The picture of a pair, RGB, side x side; without a generator at exact places and sizes."""
    first, second = LAYOUTS[pair.relation]
    spots = Spot(pair.other_shape, pair.other_colour, *second), Spot(pair.shape, pair.colour, *first)
    return paint([spot.jittered(rng) for spot in spots], side)


def judge(picture: Image.Image, pair: Pair) -> dict[str, bool]:
    """Whether the picture shows the pair's "attributes" (both colours and shapes, and nothing else) and its "relation".

    The relation is that of the two colours, whatever their shapes.
    """
    nearest = nearest_colours(picture, within=CLEAR)
    areas = dict(zip(COLOURS, np.bincount(nearest.ravel(), minlength=1 + len(COLOURS))[1:]))
    wanted = (pair.colour, pair.other_colour)
    if min(areas[colour] for colour in wanted) < MIN_AREA:
        return {"attributes": False, "relation": False}
    first, second = (nearest == 1 + list(COLOURS).index(colour) for colour in wanted)
    found = relation_of(first, second)
    if found == "inside":
        second = second | first  # the whole of what the first lies on
    shapes = tuple(best_shape(mask, shape_templates(HALF_SIDES))[0] for mask in (first, second))
    alone = all(areas[colour] < MAX_EXTRA for colour in set(COLOURS) - set(wanted))
    return {"attributes": alone and shapes == (pair.shape, pair.other_shape), "relation": found == pair.relation}


def relation_of(first: np.ndarray, second: np.ndarray) -> str | None:
    """The relation of two masks, (SIZE, SIZE) of bool, from the middles of what they cover; None: no relation."""
    (x, y), (other_x, other_y) = middle(first), middle(second)
    right, down = other_x - x, other_y - y
    if max(abs(right), abs(down)) <= WITHIN:
        return "inside" if extent(first) < extent(second) else None
    if right >= APART and right > 2 * abs(down):
        return "left of"
    if down >= APART and down > 2 * abs(right):
        return "above"
    return None


def extent(mask: np.ndarray) -> float:
    """The mean side of the box that holds a mask but for 1% of its pixels on each side, in px."""
    return float(np.mean([np.diff(np.quantile(indices, (0.01, 0.99))) for indices in np.nonzero(mask)]))


def score_pairs(pictures: Sequence[Image.Image], pairs: Sequence[Pair]) -> dict[str, float]:
    """Fractions of pictures with all attributes right, with the right relation, and with both."""
    if not pictures or len(pictures) != len(pairs):
        raise ValueError(f"{len(pictures)} pictures for {len(pairs)} pairs")
    rows = [judge(picture, pair) for picture, pair in zip(pictures, pairs, strict=True)]
    fractions = {name: float(np.mean([row[name] for row in rows])) for name in ("attributes", "relation")}
    return fractions | {"all": float(np.mean([all(row.values()) for row in rows]))}
