"""GenEval and DPG-Bench: their prompt files, the folders that their tools read, and the results that these write.

The tools themselves (object detectors, a VQA model) are not part of this project. What they read:

    GenEval      OUTPUT/images/00000/metadata.jsonl          the prompt's line of evaluation_metadata.jsonl
    (Ghosh et    OUTPUT/images/00000/samples/0000.png …
    al. 2023)    OUTPUT/images/00000/grid.png                for people
                 → python evaluation/evaluate_images.py OUTPUT/images --outfile results.jsonl …

    DPG-Bench    OUTPUT/images/NAME.png                      2 × 2 images of one prompt, NAME.txt, without gaps
    (Hu et al.   OUTPUT/samples/NAME/0000.png …              the same images one by one
    2024)        → PIC_NUM=4 bash dpg_bench/dist_eval.sh OUTPUT/images RESOLUTION

    folder       OUTPUT/images/00000_0000.png …              of any prompt file
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from autoencoder.common.config import UserError
from autoencoder.images.files import image_grid, load_image, save_png
from svg_t2i.text.files import checked, numbered_lines, read_text

# Task of GenEval's metadata → column of the published table
GENEVAL_TASKS = {
    "single_object": "Single",
    "two_object": "Two",
    "counting": "Counting",
    "colors": "Colours",
    "position": "Position",
    "color_attr": "Attributes",
}
COLUMNS = (*GENEVAL_TASKS.values(), "GenEval", "DPG-Bench")
PUBLISHED = dict(zip(COLUMNS, (0.94, 0.89, 0.49, 0.89, 0.69, 0.62, 0.75, 85.78)))

DPG_IMAGES = 4  # that the tool cuts out of a grid

SuiteName = Literal["geneval", "dpg", "folder"]


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt of a benchmark; `name` is what its files are called, `record` what GenEval's metadata says."""

    name: str
    text: str
    record: dict[str, Any] | None = None


# --- prompts ----------------------------------------------------------------------------------------------------


def read_geneval(path: Path) -> list[SuitePrompt]:
    """Prompts of an evaluation_metadata.jsonl: a line {"tag", "include", "prompt", …} each.

    Raises:
        UserError: not such a file; names the line.
    """
    if not path.is_file():
        raise UserError(f"--prompts {path} does not exist; give GenEval's prompts/evaluation_metadata.jsonl")
    return _not_empty(_numbered(checked(path, numbered_lines(read_text(path)), _geneval_prompt)), path)


def _geneval_prompt(line: str) -> SuitePrompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON ({error.msg}); fix or remove the line") from error
    missing = [key for key in ("tag", "include", "prompt") if not isinstance(record, dict) or key not in record]
    if missing:
        raise UserError(f"no {', '.join(missing)}; a line of GenEval's metadata has all three")
    return SuitePrompt("", record["prompt"], record)


def read_dpg(folder: Path) -> list[SuitePrompt]:
    """Prompts of a folder of .txt files, one each, in the order of their names.

    Raises:
        UserError: no such folder, an empty file, or a name that the official tool would cut at its first dot.
    """
    if not folder.is_dir():
        raise UserError(f"--prompts {folder} is no folder; give DPG-Bench's dpg_bench/prompts")
    prompts = []
    for path in sorted(folder.glob("*.txt")):
        text = " ".join(read_text(path).split())
        if not text:
            raise UserError(f"{path} is empty; a prompt file holds one prompt")
        if "." in path.stem:
            raise UserError(f"{path}: DPG-Bench's tool cuts names at their first dot; rename the file")
        prompts.append(SuitePrompt(path.stem, text))
    return _not_empty(prompts, folder)


def number_prompts(texts: Iterable[str]) -> list[SuitePrompt]:
    """Any prompts, named by their number."""
    return _numbered([SuitePrompt("", text) for text in texts])


def _numbered(prompts: Sequence[SuitePrompt]) -> list[SuitePrompt]:
    return [replace(prompt, name=f"{number:05d}") for number, prompt in enumerate(prompts)]


def _not_empty(prompts: list[SuitePrompt], path: Path) -> list[SuitePrompt]:
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt")
    return prompts


# --- folders ----------------------------------------------------------------------------------------------------


def image_path(suite: SuiteName, output: Path, prompt: SuitePrompt, number: int) -> Path:
    """Where image `number` of a prompt goes."""
    if suite == "geneval":
        return output / "images" / prompt.name / "samples" / f"{number:04d}.png"
    if suite == "dpg":
        return output / "samples" / prompt.name / f"{number:04d}.png"
    return output / "images" / f"{prompt.name}_{number:04d}.png"


def complete(suite: SuiteName, output: Path, prompt: SuitePrompt, count: int) -> None:
    """Add what the tool wants besides the `count` images of a prompt, once these are all there."""
    if suite == "folder":
        return
    beside = suite == "geneval"
    grid_path = output / "images" / prompt.name / "grid.png" if beside else output / "images" / f"{prompt.name}.png"
    if not grid_path.is_file():
        images = [load_image(image_path(suite, output, prompt, number)) for number in range(count)]
        save_png(make_grid(images, gap=2 if beside else 0), grid_path)
    if beside:
        (grid_path.parent / "metadata.jsonl").write_text(json.dumps(prompt.record, ensure_ascii=False) + "\n")


def make_grid(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """Two columns; with `gap` 0 the upper left corners are where DPG-Bench's tool cuts."""
    return image_grid(images, columns=min(2, len(images)), gap=gap)


# --- results ----------------------------------------------------------------------------------------------------


def read_geneval_results(path: Path) -> tuple[dict[str, float], int]:
    """Column → score of a results.jsonl of evaluate_images.py, and how many images it judged.

    As GenEval's summary_scores.py: a task's score is the fraction of its images that are correct, the overall score
    the mean over tasks. Tasks without images are left out, and the overall score with them.

    Raises:
        UserError: not such a file; names the line.
    """
    if not path.is_file():
        raise UserError(f"--geneval {path} does not exist; give the results.jsonl that evaluate_images.py wrote")
    correct: dict[str, list[bool]] = {tag: [] for tag in GENEVAL_TASKS}
    for number, line in numbered_lines(read_text(path)):
        try:
            record = json.loads(line)
            correct[record["tag"]].append(bool(record["correct"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a line of GenEval's results (tag and correct): {error}") from error
    scores = {GENEVAL_TASKS[tag]: sum(right) / len(right) for tag, right in correct.items() if right}
    if len(scores) == len(GENEVAL_TASKS):
        scores["GenEval"] = sum(scores.values()) / len(scores)
    return scores, sum(map(len, correct.values()))


def read_dpg_results(path: Path) -> tuple[float, int]:
    """DPG-Bench score in percent of a results file of compute_dpg_bench.py, and how many prompts it judged.

    The file has a line "image, score, …, mean score" per prompt and, when the tool came to its end, a summary; without
    one, the mean over the lines is taken, which is the same number.

    Raises:
        UserError: not such a file.
    """
    if not path.is_file():
        raise UserError(f"--dpg {path} does not exist; give the results file of compute_dpg_bench.py")
    means, final = [], None
    for _, line in numbered_lines(read_text(path)):
        if line.startswith("DPG-Bench score:"):
            final = _number(line.partition(":")[2])
        elif "," in line and (mean := _number(line.rpartition(",")[2])) is not None:
            means.append(mean)
    if final is None and not means:
        raise UserError(f"{path} holds no score; give the results file of compute_dpg_bench.py, not its _detail.txt")
    return (100 * sum(means) / len(means) if final is None else final), len(means)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown: name → scores by column, below the published ones."""
    lines = [f"| Model | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for name, scores in ({"SVG-T2I (published)": PUBLISHED} | rows).items():
        cells = [f"{scores[c]:.2f}" if c in scores else "–" for c in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
