"""The shape benchmark: coloured shapes on plain ground, described in words and read back from the pixels.

A small cousin of GenEval that needs no detector, so that a training run can be followed by number on any machine. Five
tasks, each scored as the fraction of pictures that show what their caption says:

    colour, place, shape    one thing: "a large red circle at the left"
    two_objects             each as described: "a small red circle at the left and a small blue square at the right"
    counting                so many, and nothing else: "three small blue circles"

Single things, their drawing and their reading are the quickstart's (scripts/quickstart/draw.py and score.py); scenes of
several things are put together from them here. Things of a picture with several are the connected patches of its
pixels. One scene in six is `unseen`: never drawn for training, and what the benchmark asks for. `write_data_set` draws
the others, captions included, to train on.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, ImageFilter

from autoencoder.common.config import REPO_ROOT, UserError

TASKS = ("colour", "place", "shape", "two_objects", "counting")
NUMBERS = {"two": 2, "three": 3, "four": 4}
OPPOSITE = (("left", "right"), ("top", "bottom"))  # pairs of places where two small things do not touch
CORNERS = ((18, 18), (46, 18), (18, 46), (46, 46))  # (x, y) in px, where counted things are
UNSEEN_PAIRS = 40  # of the 192, so that no kind of scene outweighs the others
PALETTE_SIZE = 6


@lru_cache(maxsize=1)
def quickstart() -> tuple[ModuleType, ModuleType]:
    """The quickstart's modules `draw` and `score`.

    Raises:
        UserError: the scripts are not there.
    """
    folder = REPO_ROOT / "scripts" / "quickstart"
    if not (folder / "score.py").is_file():
        raise UserError(f"{folder} is missing; the shape benchmark runs in a full checkout of the repository")
    sys.path.insert(0, str(folder))  # score.py imports draw
    try:
        return importlib.import_module("draw"), importlib.import_module("score")
    finally:
        sys.path.remove(str(folder))


@dataclass(frozen=True)
class Scene:
    """What a picture shows: `things`, all of them at a place, or `number` of the one thing, wherever."""

    things: tuple
    number: str | None = None

    @property
    def task(self) -> str:
        """ "single", "two_objects" or "counting"."""
        return "counting" if self.number else "two_objects" if len(self.things) == 2 else "single"

    @property
    def caption(self) -> str:
        if self.number:
            thing = self.things[0]
            plural = thing.shape + ("es" if thing.shape.endswith("s") else "s")
            return f"{self.number} {thing.size} {thing.colour} {plural}"
        return " and ".join(thing.caption for thing in self.things)

    @property
    def is_unseen(self) -> bool:
        """True for the sixth that is kept from training; every pair of words meets in the others."""
        draw, _ = quickstart()
        if self.task == "single":
            return self.things[0].is_unseen
        words = sum(list(draw.COLOURS).index(t.colour) + draw.SHAPES.index(t.shape) for t in self.things)
        place = NUMBERS[self.number] if self.number else [a for a, _ in OPPOSITE].index(self.things[0].place)
        return (words + place) % PALETTE_SIZE == 0


def all_scenes(kind: str) -> list[Scene]:
    """Every scene of a kind ("single", "two_objects", "counting") in a fixed order: 240, 1152 and 72."""
    draw, _ = quickstart()
    if kind == "single":
        return [Scene((thing,)) for thing in draw.all_things()]
    looks = list(itertools.product(draw.COLOURS, draw.SHAPES))
    if kind == "counting":
        return [Scene((draw.Thing(*look, "centre", "small"),), n) for n in NUMBERS for look in looks]
    pairs = itertools.product(OPPOSITE, looks, looks)
    return [Scene((draw.Thing(*one, a, "small"), draw.Thing(*other, b, "small"))) for (a, b), one, other in pairs]


def benchmark_scenes() -> list[Scene]:
    """The scenes that training never sees and the benchmark asks for: 40 single things, 40 pairs, 12 counts."""
    unseen = {kind: [s for s in all_scenes(kind) if s.is_unseen] for kind in ("single", "two_objects", "counting")}
    pairs = unseen["two_objects"]
    spread = np.linspace(0, len(pairs) - 1, UNSEEN_PAIRS).round().astype(int)
    return unseen["single"] + [pairs[i] for i in spread] + unseen["counting"]


# --- drawing ----------------------------------------------------------------------------------------------------


def draw_scene(scene: Scene, rng: np.random.Generator | None = None) -> Image.Image:
    """The picture of a scene, RGB, 64 × 64; without a generator at exact places and sizes, in the first corners."""
    draw, _ = quickstart()
    if scene.number:
        count = NUMBERS[scene.number]
        order = range(count) if rng is None else rng.permutation(len(CORNERS))[:count]
        spots = [(scene.things[0], CORNERS[i]) for i in order]
    else:
        spots = [(thing, draw.PLACES[thing.place]) for thing in scene.things]
    things = [draw.Spot(thing.shape, thing.colour, centre, draw.SIZES[thing.size]) for thing, centre in spots]
    return draw.paint([thing.jittered(rng) for thing in things])


def write_data_set(folder: Path, copies: int = 2, seed: int = 0) -> int:
    """Draw every scene that is not unseen `copies` times: folder/images/*.png, folder/train.jsonl. Returns how many."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    scenes = [s for kind in ("single", "two_objects", "counting") for s in all_scenes(kind) if not s.is_unseen]
    with (folder / "train.jsonl").open("w", encoding="utf-8") as manifest:
        for index, scene in enumerate(scenes * copies):
            path = f"images/{index:05d}.png"
            draw_scene(scene, np.random.default_rng([seed, index])).save(folder / path)
            manifest.write(json.dumps({"path": path, "prompt": scene.caption}) + "\n")
    return len(scenes) * copies


# --- reading ----------------------------------------------------------------------------------------------------


def read_things(image: Image.Image) -> list:
    """A `Reading` of every connected patch of palette colours in an RGB picture of any size."""
    draw, score = quickstart()
    pixels = np.asarray(to_size(image), dtype=np.float32)
    palette = np.array([draw.GROUND, *draw.COLOURS.values()], dtype=np.float32)
    patches = connected_patches(np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(axis=-1) > 0)
    ground = np.array(draw.GROUND, dtype=np.uint8)
    alone = [np.where(patch[..., None], pixels.astype(np.uint8), ground) for patch in patches]
    readings = [score.read_picture(Image.fromarray(picture)) for picture in alone]
    return [reading for reading in readings if reading != score.NOTHING]


def to_size(image: Image.Image) -> Image.Image:
    """The picture as RGB of the size that is drawn and read, 64 × 64."""
    size = (quickstart()[0].SIZE,) * 2
    image = image.convert("RGB")
    return image if image.size == size else image.resize(size, Image.Resampling.BOX)


def connected_patches(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected parts of a boolean (H, W) mask, each as such a mask, in reading order of their first pixels."""
    rest, patches = mask.copy(), []
    while rest.any():
        patch = np.zeros_like(rest)
        stack = [tuple(np.argwhere(rest)[0])]
        patch[stack[0]] = True
        while stack:
            row, column = stack.pop()
            window = np.s_[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
            fresh = rest[window] & ~patch[window]
            patch[window] |= fresh
            stack += [(row + r - min(row, 1), column + c - min(column, 1)) for r, c in np.argwhere(fresh)]
        patches.append(patch)
        rest &= ~patch
    return patches


def judge(picture: Image.Image, scene: Scene) -> dict[str, bool]:
    """Task → whether the picture gets it right, for the tasks that the scene is about."""
    if scene.task == "single":  # as the quickstart reads it: specks beside the thing are forgiven
        right = quickstart()[1].read_picture(to_size(picture)).matches(scene.things[0])
        return {name: right[name] for name in ("colour", "place", "shape")}
    found = read_things(picture)
    if scene.number:
        looks = [(wanted.colour, wanted.shape) for wanted in scene.things] * NUMBERS[scene.number]
        return {"counting": [(reading.colour, reading.shape) for reading in found] == looks}
    wanted = Counter((thing.colour, thing.shape, thing.place) for thing in scene.things)
    return {"two_objects": Counter((r.colour, r.shape, r.place) for r in found) == wanted}


def score_scenes(pictures: Sequence[Image.Image], scenes: Iterable[Scene]) -> dict[str, float]:
    """Task → fraction of the pictures about it that get it right, and "overall", the mean over the tasks."""
    verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    by_task = {task: [v[task] for v in verdicts if task in v] for task in TASKS}
    scores = {task: float(np.mean(right)) for task, right in by_task.items() if right}
    return scores | {"overall": float(np.mean(list(scores.values())))}


def self_test(copies: int = 1, seed: int = 0) -> dict[str, dict[str, float]]:
    """What the benchmark gives for pictures that are right: 1.0 everywhere, or the reader is at fault.

    Every scene of `benchmark_scenes` is drawn `copies` times at random places and sizes, and read twice: as it is, and
    as a decoder may give it, blurred (radius 1 px) and with noise (deviation 12 of 255).
    """
    scenes = benchmark_scenes() * copies
    rng = np.random.default_rng(seed)
    pictures = [draw_scene(scene, rng) for scene in scenes]
    return {
        "as drawn": score_scenes(pictures, scenes),
        "blurred, with noise": score_scenes([_worn(picture, rng) for picture in pictures], scenes),
    }


def _worn(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(1)), dtype=np.float32)
    return Image.fromarray((pixels + rng.normal(0, 12, pixels.shape)).round().clip(0, 255).astype(np.uint8))
