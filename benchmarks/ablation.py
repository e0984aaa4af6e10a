"""What each option of training is worth: the quickstart's model, trained with it and without it, over several seeds.

All runs share the data, the autoencoder and the text encoder of a finished quickstart, its configuration and its number
of steps; an option is a handful of changed settings. An option that changes the latents has an autoencoder of its own,
trained as long as the quickstart's. Each run is scored as the quickstart scores its own: pictures of
combinations that training never saw, read back from their pixels. Every result goes into results.jsonl as soon as it is
there, the same command continues after an interruption, and the table is made of whatever there is.

    bash scripts/quickstart.sh
    python -m benchmarks.ablation --quickstart outputs/quickstart --output outputs/ablation
    python -m benchmarks.ablation --output outputs/ablation --table       # once more, without training

Columns: after each quarter of the steps pictures of one thing that are right in colour, shape and place, and pictures
of two that are right in all attributes and in their relation; the same after half of the steps with few steps of
sampling; the first checkpoint with 90 % of all right; the loss of the velocity on pictures of unseen combinations, at
fixed noise and eight times, and its part nearest to noise, where a picture is decided; seconds a step, which mean
something on an idle machine only. Mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from autoencoder.common.commands import Parser, command
from autoencoder.common.config import REPO_ROOT, UserError

sys.path.append(str(REPO_ROOT / "scripts" / "quickstart"))  # the recipe's folder is no package
from data_set import every, score_both, unseen_pairs, unseen_things, write_held_out
from draw import SIZE
from recipe import FULL, Recipe
from steps import Steps, divide_cores, scalars, trained_parts

CONFIG = "configs/svg_t2i/quickstart.yaml"
VELOCITY, DATA = (f"model_overrides.prediction={what}" for what in ("velocity", "data"))
ALONE, FLOW, FEATURES = "aux=null", "aux={loss: flow, block: 2}", "aux={loss: features, block: 2}"


@dataclass(frozen=True)
class Option:
    """What differs from the other options: settings of training, of sampling, and of the autoencoder's training."""

    training: tuple[str, ...]
    sampling: Mapping[str, float] = field(default_factory=dict)
    autoencoder: tuple[str, ...] = ()  # none: that of the quickstart


OPTIONS = {
    "velocity": Option((VELOCITY, ALONE)),
    "data": Option((DATA, ALONE)),
    "dimension shift": Option((VELOCITY, ALONE, "flow={snr_type: uniform, shift: true, shift_rule: dimension}")),
    "aux flow": Option((VELOCITY, FLOW)),
    "aux flow, guided": Option((VELOCITY, FLOW), {"internal_guidance": 1.5}),
    "aux features": Option((VELOCITY, FEATURES)),
    "data, aux features": Option((DATA, FEATURES)),  # the quickstart's own
    "data, four layers": Option((DATA, ALONE), autoencoder=("model.params.dinoconfig.layers=last_4",)),
}
FEW_STEPS = 4
ENOUGH = 0.9  # right, for "steps to"
CHECKPOINTS = 4  # in a run, evenly spaced


@dataclass(frozen=True)
class Budget:
    """What every run may spend."""

    steps: int
    prompts: int = 40  # of the unseen things and of the unseen pairs, evenly spread
    pictures_per_prompt: int = 1


class Ablation(Steps):
    """Runs of the options of `OPTIONS`, on what a finished quickstart left in `quickstart`, into `output`."""

    def __init__(self, quickstart: Path, output: Path, budget: Budget):
        super().__init__(*divide_cores())
        self.quickstart, self.output, self.budget = quickstart, output, budget
        self.held_out = write_held_out(output / "held_out")
        self.wanted = tuple(every(what, budget.prompts) for what in (unseen_things(), unseen_pairs()))

    def parts(self, option: str) -> Path:
        """The folder of an option's autoencoder and statistics: the quickstart's.

        Where the option changes the autoencoder, one is trained first, on the same pictures.
        """
        changes = OPTIONS[option].autoencoder
        if not changes:
            return self.quickstart
        recipe = Recipe(
            self.output / f"parts_{file_name(option)}",
            SIZE,
            replace(FULL, autoencoder_changes=changes),
            self.processes,
            self.threads,
        )
        if not recipe.stats.is_file():
            recipe.manifest = self.quickstart / "data" / "train.jsonl"
            recipe.train_autoencoder()
            recipe.measure_latents()
        return recipe.output

    def train(self, option: str, seed: int) -> Path:
        """The folder of the run, trained to its end. Options that differ in sampling alone share it."""
        own = OPTIONS[option]
        first = next(name for name, other in OPTIONS.items() if replace(other, sampling=own.sampling) == own)
        every = max(1, self.budget.steps // CHECKPOINTS)
        folder = self.output / f"{file_name(first)}_{seed}"
        self.train_transformer(
            CONFIG,
            f"results_dir={folder}",
            f"data.path={self.quickstart / 'data' / 'train.jsonl'}",
            *trained_parts(self.parts(option), self.quickstart),
            f"train.seed={seed}",
            f"train.max_steps={self.budget.steps}",
            f"train.ckpt_every={every}",
            f"train.keep_last={CHECKPOINTS + 1}",
            f"train.micro_batch_size={32 // self.processes}",
            f"validation.path={self.held_out}",
            f"validation.every={every}",
            "validation.num_samples=80",
            *own.training,
        )
        return folder

    def right(self, checkpoint: Path, **settings: float) -> tuple[float, float]:
        """Fractions of pictures of one thing, and of two, that are right in everything."""
        from svg_t2i.pipeline import SVGT2IPipeline

        pipeline, each = SVGT2IPipeline.from_pretrained(checkpoint), self.budget.pictures_per_prompt
        pipeline.set_progress_bar_config(disable=True)
        captions = [what.caption for kind in self.wanted for what in kind]
        images = pipeline(captions, num_images_per_prompt=each, seed=0, packed=True, **settings).images
        scores = score_both(images, *self.wanted)
        return scores["single"]["all"], scores["pairs"]["all"]

    def measure(self, option: str, seed: int) -> dict[str, object]:
        """One row of results.jsonl."""
        folder = self.train(option, seed)
        checkpoints = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
        own = OPTIONS[option].sampling
        over_time = {int(path.name): self.right(path, **own) for path in checkpoints}
        half = checkpoints[(len(checkpoints) - 1) // 2]
        board = scalars(folder / "tensorboard")
        return {
            "option": option,
            "seed": seed,
            "steps": self.budget.steps,
            "right": over_time,  # step → of one thing, of two
            "right_few": self.right(half, num_inference_steps=FEW_STEPS, **own),
            "validation": board("validation/loss")[1][-1],
            "validation_at_noise": board("validation/loss_at_t/0.00-0.12")[1][-1],
            "seconds": 32 / statistics.median(board("train/images_per_second")[1]),
        }


def file_name(option: str) -> str:
    return re.sub(r"\W+", "_", option)


def read_results(path: Path) -> list[dict]:
    """The rows of results.jsonl, none where it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def steps_to(right: dict[str, Sequence[float]], enough: float = ENOUGH) -> int | None:
    """The first step at which so many of all pictures are right; None where none is."""
    return next((int(step) for step, shares in right.items() if statistics.fmean(shares) >= enough), None)


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation; the mean alone of a single value."""
    mean = form.format(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(statistics.stdev(values))}"


def table(rows: Sequence[dict]) -> str:
    """The results as a Markdown table, a line per option in the order of `OPTIONS`."""
    if not rows:
        return "no results yet"
    steps = sorted(map(int, rows[0]["right"]))
    half = steps[(len(steps) - 1) // 2]
    names = ["option", "seeds", *(f"right after {step}" for step in steps), f"after {half}, {FEW_STEPS} steps"]
    names[2:] = [f"{name}, {kind}" for name in names[2:] for kind in ("one", "two")]
    names += [f"steps to {ENOUGH:.0%}", "validation loss", "nearest to noise", "seconds a step"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for option in OPTIONS:
        own = [row for row in rows if row["option"] == option]
        if not own:
            continue
        pairs = [[row["right"][str(step)] for row in own] for step in steps] + [[row["right_few"] for row in own]]
        columns = [[100 * pair[kind] for pair in column] for column in pairs for kind in (0, 1)]
        cells = [spread(column, "{:.0f}") + " %" for column in columns]
        reached = [steps_to(row["right"]) for row in own]
        cells.append(", ".join("never" if step is None else str(step) for step in reached))
        for name, form in (("validation", "{:.3f}"), ("validation_at_noise", "{:.4f}"), ("seconds", "{:.3f}")):
            cells.append(spread([row[name] for row in own], form))
        lines.append(f"| {option} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict], path: Path) -> None:
    """Pictures that are right against steps, a line per option through the means, with a bar for the spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for option in OPTIONS:
        own = [row["right"] for row in rows if row["option"] == option]
        if not own:
            continue
        for kind, axes in enumerate(panels):
            columns = {int(step): [100 * right[step][kind] for right in own] for step in own[0]}
            means = [statistics.fmean(column) for column in columns.values()]
            spreads = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns.values()]
            axes.errorbar(list(columns), means, yerr=spreads, marker="o", capsize=3, label=option)
    for axes, title in zip(panels, ("one thing", "two things in a relation")):
        axes.set(xlabel="step", title=title, ylim=(-2, 102))
    panels[0].set_ylabel("pictures all right (%)")
    panels[0].legend()
    figure.savefig(path, dpi=120)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description="What each option of training is worth, on the quickstart.", prog="benchmarks.ablation")
    parser.add_argument("--quickstart", type=Path, default=Path("outputs/quickstart"), help="what quickstart.sh made")
    parser.add_argument("--output", type=Path, default=Path("outputs/ablation"), help="folder of runs and results")
    parser.add_argument("--options", nargs="+", default=list(OPTIONS), choices=list(OPTIONS), help="which to run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each option")
    parser.add_argument("--steps", type=int, default=600, help="of each run")
    parser.add_argument("--plot", type=Path, help="a picture to draw as well (default: none)")
    parser.add_argument("--table", action="store_true", help="train nothing: print the table of what there is")
    return parser.parse_args(argv)


@command
def main(argv: list[str]) -> None:
    """Run what is missing, then print the table."""
    args = parse_arguments(argv)
    results, quickstart = args.output.resolve() / "results.jsonl", args.quickstart.resolve()
    rows = read_results(results)
    if not args.table:
        if not (quickstart / "transformer" / "checkpoints").is_dir():
            raise UserError(f"--quickstart {quickstart} has no trained model: bash scripts/quickstart.sh makes one")
        if other := {row["steps"] for row in rows} - {args.steps}:
            raise UserError(f"--output {args.output} holds runs of {other.pop()} steps; choose another folder")
        ablation = Ablation(quickstart, results.parent, Budget(args.steps))
        done = {(row["option"], row["seed"]) for row in rows}
        for seed in range(args.seeds):  # seed by seed: an interruption leaves options that can be compared
            for option in args.options:
                if (option, seed) in done:
                    continue
                row = ablation.measure(option, seed)
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    rows = read_results(results)
    print(table(rows))
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
