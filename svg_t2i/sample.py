"""Prompts → PNG files, from the command line.

    python -m svg_t2i.sample --checkpoint results/run --prompt "a red fox in snow" --resolution 1024x768
    python -m svg_t2i.sample --checkpoint pre-trained/stage4 --autoencoder pre-trained/autoencoder/P_stage3_1024.yaml \\
        --text_encoder google/gemma-2-2b --prompts prompts.jsonl --num_images_per_prompt 4

Output folder:

    OUTPUT/images/{solver}_{steps}_{index}_{WxH}.png    the parameters of each image are in its PNG text chunk
    OUTPUT/data.json                                    one record an image, rewritten atomically after every batch
    OUTPUT/grid.png                                     all images, a row a prompt
"""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from autoencoder.config import UserError, run_entry
from autoencoder.images import image_grid, save_png
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.solvers import SOLVERS
from svg_t2i.text import SYSTEM_PROMPTS

# Fields of a prompt record that hold the prompt, in order of preference.
PROMPT_FIELDS = ("refined_prompt", "prompt", "gpt_4_caption", "caption", "text", "description", "query")
MAX_GRID_IMAGES = 64


@dataclass(frozen=True)
class Job:
    """One image to make: its running index, prompt, size (width, height) in pixels, and seed."""

    index: int
    prompt: str
    size: tuple[int, int]
    seed: int


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a .txt file (a line each), a .json list or a .jsonl file, of strings or records.

    A record's prompt is its first field of `PROMPT_FIELDS`; a list of captions gives its first.

    Raises:
        UserError: file missing, of another kind, empty, or a record without a prompt; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"prompt file {path} does not exist")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    elif path.suffix in (".json", ".jsonl"):
        prompts = [_prompt_of(record, f"{path}:{number}") for number, record in _records(text, path)]
    else:
        raise UserError(f"prompt file {path}: unknown kind {path.suffix!r}; use .txt, .json or .jsonl")
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt; write one a line")
    return prompts


def _records(text: str, path: Path) -> list[tuple[int, Any]]:
    try:
        if path.suffix == ".json":
            records = json.loads(text) if text.strip() else []
            if not isinstance(records, list):
                raise UserError(f"{path}: expected a list of prompts or records, got {type(records).__name__}")
            return list(enumerate(records, 1))
        number = 0
        records = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                records.append((number, json.loads(line)))
        return records
    except json.JSONDecodeError as error:
        line = error.lineno if path.suffix == ".json" else number
        raise UserError(f"{path}:{line}: not valid JSON ({error.msg}); fix or remove the line") from error


def _prompt_of(record: Any, where: str) -> str:
    if isinstance(record, str):
        return record
    value = next((record[f] for f in PROMPT_FIELDS if f in record), None) if isinstance(record, dict) else None
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise UserError(f"{where}: no prompt; a record needs one of the fields {', '.join(PROMPT_FIELDS)}")
    return value


def parse_resolution(text: str) -> tuple[int, int]:
    """ "WxH" or "category:WxH" in pixels → (width, height). Both sides are positive multiples of 16."""
    match = re.fullmatch(r"(?:[^:]*:)?(\d+)x(\d+)", text.strip())
    if not match:
        raise UserError(f"--resolution {text!r}: expected WIDTHxHEIGHT such as 1024x768, or category:WIDTHxHEIGHT")
    width, height = int(match[1]), int(match[2])
    for name, side in (("width", width), ("height", height)):
        if side == 0 or side % 16:
            nearest = max(16, round(side / 16) * 16)
            raise UserError(f"--resolution {text!r}: {name} {side} is not divisible by 16; try {nearest}")
    return width, height


def plan_jobs(prompts: list[str], sizes: list[tuple[int, int]], images_per_prompt: int, seed: int) -> list[Job]:
    """All images of a run in order: prompt by prompt, size by size. Image i of a prompt has seed `seed + i`."""
    combinations = [(p, size, seed + i) for p in prompts for size in sizes for i in range(images_per_prompt)]
    return [Job(index, *combination) for index, combination in enumerate(combinations)]


def batches(jobs: list[Job], batch_size: int) -> list[list[Job]]:
    """Split jobs into batches of equal image size, in order of first appearance."""
    by_size: dict[tuple[int, int], list[Job]] = {}
    for job in jobs:
        by_size.setdefault(job.size, []).append(job)
    return [group[i : i + batch_size] for group in by_size.values() for i in range(0, len(group), batch_size)]


def prepare_output(folder: Path) -> Path:
    """Create OUTPUT/images; refuse a folder that already holds a run."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder} is not empty; nothing was overwritten. Choose another folder or empty it.")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    return folder


def write_json(records: list[dict], path: Path) -> None:
    """Write atomically: readers see the old file or the new one, never half of one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(records, indent=2, ensure_ascii=False))
    os.replace(temporary, path)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="svg_t2i.sample", description=__doc__.split("\n")[0])
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", required=True, help="results folder, checkpoint folder, or saved pipeline")
    model.add_argument("--autoencoder", help="autoencoder YAML or saved folder (default: the one trained with)")
    model.add_argument("--autoencoder_checkpoint", help="weights for --autoencoder when its YAML names none")
    model.add_argument("--latent_stats", help="latent statistics, .safetensors or the published .pt")
    model.add_argument("--text_encoder", help="Hugging Face folder or id (default: the one trained with)")
    model.add_argument("--raw_weights", action="store_true", help="use the raw weights instead of their average (EMA)")
    model.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default=None, help="default: bf16 on a GPU")
    model.add_argument("--device", default=None, help="default: cuda when there is one")
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompt", action="append", default=[], help="may be given several times")
    what.add_argument("--prompts", help="prompt file: .txt, .json or .jsonl")
    what.add_argument("--limit", type=int, help="only the first prompts of the list")
    what.add_argument("--negative_prompt", default="")
    what.add_argument("--system_prompt", choices=sorted(SYSTEM_PROMPTS), default="base")
    what.add_argument("--resolution", nargs="+", default=["1024x1024"], metavar="[CATEGORY:]WxH")
    what.add_argument("--num_images_per_prompt", type=int, default=1)
    what.add_argument("--seed", type=int, default=0, help="image i of every prompt uses seed + i")
    how = parser.add_argument_group("how")
    how.add_argument("--solver", choices=sorted(SOLVERS), default="dpm")
    how.add_argument("--num_inference_steps", type=int, default=50)
    how.add_argument("--guidance_scale", type=float, default=4.0)
    how.add_argument("--time_shift", type=float, help="default: 10 for dpm, 6 for the ODE solvers")
    how.add_argument("--renorm_cfg", type=float, default=1.0, help="0 switches renormalisation off")
    how.add_argument("--cfg_trunc", type=float, default=1.0, help="no guidance for t >= this, 1: never")
    how.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("samples"))
    arguments = parser.parse_args(argv)
    for name in ("num_images_per_prompt", "num_inference_steps", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    return arguments


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    prompts = arguments.prompt + (read_prompts(arguments.prompts) if arguments.prompts else [])
    if not prompts:
        raise UserError("nothing to draw: give --prompt TEXT or --prompts FILE")
    prompts = prompts[: arguments.limit]
    sizes = [parse_resolution(text) for text in arguments.resolution]
    jobs = plan_jobs(prompts, sizes, arguments.num_images_per_prompt, arguments.seed)
    output = prepare_output(arguments.output)
    pipeline = SVGT2IPipeline.from_pretrained(
        arguments.checkpoint,
        autoencoder=arguments.autoencoder,
        autoencoder_checkpoint=arguments.autoencoder_checkpoint,
        latent_stats=arguments.latent_stats,
        text_encoder=arguments.text_encoder,
        use_ema=not arguments.raw_weights,
        dtype={None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype],
        device=arguments.device,
    )
    settings = {
        "solver": arguments.solver,
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
        "time_shift": arguments.time_shift,
        "renorm_cfg": arguments.renorm_cfg,
        "cfg_trunc": arguments.cfg_trunc,
        "negative_prompt": arguments.negative_prompt,
        "system_prompt": arguments.system_prompt,
    }
    images = render(pipeline, jobs, settings, arguments.batch_size, output)
    columns = arguments.num_images_per_prompt * len(sizes)
    shown = min(len(jobs), max(1, MAX_GRID_IMAGES // columns) * columns)
    labels = [job.prompt for job in jobs[:shown]]
    save_png(image_grid([images[i] for i in range(shown)], columns if columns > 1 else 4, labels), output / "grid.png")
    print(f"{len(jobs)} images in {output / 'images'}")


def render(
    pipeline: SVGT2IPipeline, jobs: list[Job], settings: dict[str, Any], batch_size: int, output: Path
) -> dict[int, Image.Image]:
    """Make all images, writing PNG files and `data.json` as they come. Returns the images that the grid may show."""
    records: dict[int, dict] = {}
    images: dict[int, Image.Image] = {}
    for batch in tqdm(batches(jobs, batch_size), desc="sampling", unit="batch"):
        width, height = batch[0].size
        result = pipeline(
            [job.prompt for job in batch], height=height, width=width, seed=[job.seed for job in batch], **settings
        )
        for job, image in zip(batch, result):
            name = f"{settings['solver']}_{settings['num_inference_steps']}_{job.index}_{width}x{height}.png"
            records[job.index] = {
                "caption": job.prompt,
                "image_url": str(output / "images" / name),
                "resolution": f"{width}x{height}",
                "num_sampling_steps": settings["num_inference_steps"],
                "seed": job.seed,
                **settings,
            }
            parameters = json.dumps(records[job.index], ensure_ascii=False)
            save_png(image, output / "images" / name, {"parameters": parameters})
            if job.index < MAX_GRID_IMAGES:
                images[job.index] = image
        write_json([records[index] for index in sorted(records)], output / "data.json")
    return images


if __name__ == "__main__":
    run_entry(main)
