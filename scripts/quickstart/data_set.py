"""The quickstart's data set: pictures of one thing (draw.py) and of two in a relation (pairs.py), with captions.

What is never drawn for training is what the model is asked for. The folder:

    train.jsonl     {"path": "images/00000.png", "prompt": "a large red circle at the left"} per picture
    unseen.jsonl    {"prompt", "colour", "shape", ...} per combination of words that training never sees
    held_out.jsonl  {"path", "prompt"} of a picture of some of these, for the loss on them
    images/, held_out/

Usage: python data_set.py FOLDER [--copies N] [--seed N]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from draw import SIZE, Thing, all_things, draw
from pairs import Pair, all_pairs, draw_pair, score_pairs
from PIL import Image
from score import score

T = TypeVar("T")
UNSEEN_PAIRS = 40  # that are asked for, of 200, so that neither kind of picture outweighs the other


def picture_of(what: Thing | Pair, rng: np.random.Generator | None = None, side: int = SIZE) -> Image.Image:
    """The picture of a thing or of a pair."""
    return draw_pair(what, rng, side) if isinstance(what, Pair) else draw(what, rng, side)


def unseen_things() -> list[Thing]:
    """What training never sees, one thing in a picture: 40."""
    return [thing for thing in all_things() if thing.is_unseen]


def unseen_pairs() -> list[Pair]:
    """Some of the pairs that training never sees, evenly spread: UNSEEN_PAIRS."""
    pairs = [pair for pair in all_pairs() if pair.is_unseen]
    return [pairs[i] for i in np.linspace(0, len(pairs) - 1, UNSEEN_PAIRS).round().astype(int)]


def every(what: Sequence[T], number: int) -> Sequence[T]:
    """So many of them, evenly spread, or all."""
    return what[:: max(1, len(what) // number)][:number]


def score_both(pictures: Sequence[Image.Image], things: Sequence[Thing], pairs: Sequence[Pair]) -> dict[str, dict]:
    """The scores of pictures of the things, then of the pairs, equally many of each; larger ones are made smaller."""
    pictures = [picture.reduce(picture.width // SIZE) for picture in pictures]
    each = len(pictures) // (len(things) + len(pairs))
    split = each * len(things)
    repeated = [[what for what in group for _ in range(each)] for group in (things, pairs)]
    return {"single": score(pictures[:split], repeated[0]), "pairs": score_pairs(pictures[split:], repeated[1])}


def write_data_set(folder: Path, copies: int = 6, seed: int = 0, side: int = SIZE) -> int:
    """Writes images, train.jsonl, unseen.jsonl and held_out.jsonl; returns how many pictures there are to train on.

    Args:
        copies: pictures of each thing. Of pairs there are five times as many: each is drawn copies / 6 times, at least
            once, and twice as often one inside the other, where half as many shapes are possible.
        side: of the pictures, in px; a multiple of SIZE.
    """
    things = [thing for thing in all_things() if not thing.is_unseen]
    pairs = [pair for pair in all_pairs() if not pair.is_unseen]
    pairs += [pair for pair in pairs if pair.relation == "inside"]
    lines = write_pictures(folder, "images", things * copies + pairs * max(1, copies // 6), [seed], side)
    write_jsonl(folder / "train.jsonl", lines)
    unseen = [*unseen_things(), *unseen_pairs()]
    write_jsonl(folder / "unseen.jsonl", [{"prompt": what.caption, **vars(what)} for what in unseen])
    write_held_out(folder, seed, side)
    return len(lines)


def write_held_out(folder: Path, seed: int = 0, side: int = SIZE) -> Path:
    """Writes a picture of everything that is asked for; returns the list of them, held_out.jsonl."""
    lines = write_pictures(folder, "held_out", [*unseen_things(), *unseen_pairs()], [seed, 1], side)
    write_jsonl(folder / "held_out.jsonl", lines)
    return folder / "held_out.jsonl"


def write_pictures(
    folder: Path, name: str, what: Sequence[Thing | Pair], seeds: list[int], side: int
) -> list[dict[str, str]]:
    """Writes a picture of each into folder/name; returns their lines for a manifest in the folder."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for index, shown in enumerate(what):
        path = f"{name}/{index:05d}.png"
        picture_of(shown, np.random.default_rng([*seeds, index]), side).save(folder / path)
        lines.append({"path": path, "prompt": shown.caption})
    return lines


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="draw the quickstart's data set")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--copies", type=int, default=6, help="pictures of each thing (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(f"{write_data_set(args.folder, args.copies, args.seed)} pictures in {args.folder / 'train.jsonl'}")


if __name__ == "__main__":
    main()
