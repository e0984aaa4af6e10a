"""Teaches the quickstart's model a new word from ten pictures: a LoRA, and what it does to what was known.

The data set of the quickstart has no star. Here the model sees ten, in ten of the thirty pairs of colour and place, and
is asked for the other twenty; and for things that it knew before, which it should not forget. Started by
scripts/quickstart_lora.sh. The output folder afterwards:

    data/                 ten stars: train.jsonl, images/; keep.jsonl, what the model draws itself before it learns
    transformer/          the adapter: checkpoints, pytorch_lora_weights.safetensors, prior_images/
    before/, after/       samples of the model without and with the adapter
    stars.png             some stars: as drawn, as the autoencoder shows them, before, after
    report.json           fractions right of new stars and of old things, before and after; seconds per phase

A star is compared with how the autoencoder shows stars, of which it has never seen one either.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from data_set import write_jsonl
from draw import COLOURS, NEW_SHAPE, PLACES, SIZES, Spot, Thing, all_things, draw, paint
from pictures import write_grid
from PIL import Image
from score import HALF_SIDES, Templates, score, shape_templates
from steps import Steps, autoencode, divide_cores, percentages, read_samples, require_empty, trained_parts

from autoencoder.common.commands import Parser, command
from autoencoder.common.config import UserError

CONFIG = "configs/svg_t2i/quickstart_lora.yaml"
OLD = 40  # old things that are asked for


def pairs() -> tuple[list[Thing], list[Thing]]:
    """Ten stars to learn from, with every colour and every place, and twenty of other colours and places."""
    learnt, asked = [], []
    for (i, colour), (j, place) in itertools.product(enumerate(COLOURS), enumerate(PLACES)):
        star = Thing(colour, NEW_SHAPE, place, list(SIZES)[(i + j) % 2])
        (learnt if (i + 2 * j) % 3 == 0 else asked).append(star)
    return learnt, asked


class Lesson(Steps):
    """The steps, with the finished quickstart in `quickstart` and all results in `output`."""

    def __init__(self, quickstart: Path, output: Path, short: bool):
        super().__init__(*divide_cores())
        self.quickstart, self.output, self.short = quickstart, output, short
        self.learnt, self.asked = pairs()
        self.old = all_things()[:: len(all_things()) // OLD]

    def write_data(self) -> None:
        """The ten stars, and captions of what was trained on before, for the model to draw."""
        images = self.output / "data" / "images"
        images.mkdir(parents=True)
        lines = []
        for i, star in enumerate(self.learnt):
            draw(star, np.random.default_rng([1, i])).save(images / f"{i}.png")
            lines.append({"path": f"images/{i}.png", "prompt": star.caption})
        write_jsonl(images.parent / "train.jsonl", lines)
        seen = [thing for thing in all_things() if not thing.is_unseen]
        order = np.random.default_rng(0).permutation(len(seen))
        write_jsonl(images.parent / "keep.jsonl", [{"prompt": seen[i].caption} for i in order])
        write_jsonl(self.output / "prompts.jsonl", [{"prompt": thing.caption} for thing in self.asked + self.old])

    def train(self) -> None:
        """The adapter, on the stars and on what the model draws of what it knows."""
        short = ("train.max_steps=4", "train.ckpt_every=4", "prior_preservation.num_images=4")
        batch = 32 // self.processes
        self.train_transformer(
            CONFIG,
            f"results_dir={self.output / 'transformer'}",
            f"init_from={self.quickstart / 'transformer'}",
            f"data.path={self.output / 'data' / 'train.jsonl'}",
            f"prior_preservation.prompts={self.output / 'data' / 'keep.jsonl'}",
            f"train.micro_batch_size={batch}",
            *trained_parts(self.quickstart),
            *(short if self.short else ()),
        )

    def sample(self, name: str, *adapter: str | Path) -> list[Image.Image]:
        """Pictures of the twenty stars, then of the old things, by the quickstart's model."""
        self.run(
            *("svg_t2i.sample", "--checkpoint", self.quickstart / "transformer", *adapter),
            *("--prompts", self.output / "prompts.jsonl", "--output", self.output / name),
            *("--resolution", "64x64", "--batch_size", 30),
        )
        return read_samples(self.output / name)

    def score(self, pictures: Sequence[Image.Image], templates: Templates) -> dict[str, dict[str, float]]:
        number = len(self.asked)
        new, old = (pictures[:number], self.asked), (pictures[number:], self.old)
        return {"stars": score(*new, templates), "old": score(*old, templates)}

    def templates(self) -> Templates:
        """The drawn shapes, and stars as the autoencoder shows them, of all places and sizes and some colours."""
        wanted = list(itertools.product(HALF_SIDES, PLACES.values(), ("red", "green", "cyan")))
        drawn = [paint([Spot(NEW_SHAPE, colour, place, half)]) for half, place, colour in wanted]
        shown = autoencode(self.quickstart, drawn)
        return shape_templates().with_pictures(NEW_SHAPE, list(zip(shown, (float(half) for half, _, _ in wanted))))


def learn(lesson: Lesson) -> None:
    """All steps."""
    with lesson.phase("data"):
        lesson.write_data()
    with lesson.phase("before"):
        before = lesson.sample("before")
    with lesson.phase("learning"):
        lesson.train()
    with lesson.phase("after"):
        after = lesson.sample("after", "--lora", lesson.output / "transformer")
    with lesson.phase("score"):
        templates = lesson.templates()
        results = {"before": lesson.score(before, templates), "after": lesson.score(after, templates)}
        drawn = [draw(star) for star in lesson.asked]
        shown = autoencode(lesson.quickstart, drawn)
        results["reconstruction"] = score(shown, lesson.asked, templates)
        rows = [row[:10] for row in (drawn, shown, before, after)]
        write_grid(lesson.output / "stars.png", [picture for row in rows for picture in row], 10)
    lesson.write_report(
        {**results, "learnt": len(lesson.learnt), "asked": len(lesson.asked), "old": OLD}, lesson.output
    )
    for name, what in (
        ("stars", f"{len(lesson.asked)} stars in other colours and places"),
        ("old", f"{OLD} old things"),
    ):
        print(f"\nOf {what} are right")
        for when in ("before", "after"):
            found = results[when][name]
            print(f"  {when:>6}: {found['all']:4.0%}  ({percentages(found)})")
    if lesson.short:
        print("So few steps teach nothing; --short shows that everything runs. Leave it out to learn the star.")


@command
def main(argv: list[str]) -> None:
    """The lesson that the command line describes."""
    parser = Parser(description="The quickstart's model learns a new word.", prog="bash scripts/quickstart_lora.sh")
    parser.add_argument("--quickstart", type=Path, default=Path("outputs/quickstart"), help="what quickstart.sh made")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart_lora"), help="folder to write")
    parser.add_argument("--short", action="store_true", help="a few steps: everything runs, and nothing is learnt")
    args: argparse.Namespace = parser.parse_args(argv)
    quickstart, output = args.quickstart.resolve(), args.output.resolve()
    if not (quickstart / "transformer" / "checkpoints").is_dir():
        raise UserError(f"--quickstart {quickstart} has no trained model: bash scripts/quickstart.sh makes one")
    require_empty(output)
    output.mkdir(parents=True, exist_ok=True)
    lesson = Lesson(quickstart, output, args.short)
    learn(lesson)
    print(f"\n{sum(lesson.seconds.values()):.0f} seconds. Look at {output / 'stars.png'} and report.json beside it.")


if __name__ == "__main__":
    main()
