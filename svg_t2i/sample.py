"""Images from prompts and from images, as PNG files. Without a sub-command it is `generate`.

    python -m svg_t2i.sample --checkpoint results/run --prompt "a red fox in snow" --resolution 1024x768
    python -m svg_t2i.sample --checkpoint pre-trained --prompts prompts.jsonl --num_images_per_prompt 4 --preset stage4
    torchrun --nproc_per_node 8 -m svg_t2i.sample --checkpoint pre-trained --prompts prompts.jsonl

    python -m svg_t2i.sample image_to_image --checkpoint ... --image fox.png --prompt "a wolf in snow" --strength 0.6
    python -m svg_t2i.sample variation      --checkpoint ... --image fox.png --t 0.3 --num_images_per_prompt 4
    python -m svg_t2i.sample inpaint        --checkpoint ... --image fox.png --mask mask.png --prompt "a wolf in snow"
    python -m svg_t2i.sample interpolate    --checkpoint ... --prompt "a fox" --prompt "a wolf" --weights 7
    python -m svg_t2i.sample retrieve       --checkpoint ... --image fox.png --folder photos --top_k 12
    python -m svg_t2i.sample enhance        --checkpoint ... --prompt "a red fox"

The output folder is drawn in `rendering.folder`; the same command again goes on with a half-done one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from autoencoder.common.commands import Parser, command, require_positive
from autoencoder.common.config import UserError, to_dict
from autoencoder.common.processes import World, choose_device, start_world
from autoencoder.common.weights import write_json
from autoencoder.images.files import LATENT_PIXELS, image_grid, load_image, save_png
from autoencoder.images.saving import FORMATS
from autoencoder.sources.folders import list_images
from svg_t2i.loading.adapters import load_adapters, parse_adapter
from svg_t2i.rendering.arguments import (
    add_parts,
    add_sampling_arguments,
    chosen_options,
    parse_resolution,
    parts_of,
    quiet_imports,
    sampling_changes,
)
from svg_t2i.rendering.folder import Job, RunFolder, check_folder, full_disk, plan_jobs, render
from svg_t2i.sampling.inputs import crop_image, prepare_mask
from svg_t2i.sampling.options import SamplingOptions
from svg_t2i.text.files import MAX_SEED, Prompt, read_prompts

if TYPE_CHECKING:  # diffusers takes seconds to import, which --help need not wait for
    from svg_t2i.pipeline import SVGT2IPipeline

SUB_COMMANDS = {
    "generate": "images of prompts; what is done without a sub-command",
    "image_to_image": "redraw images to fit a prompt",
    "variation": "images that share the composition of a given one",
    "inpaint": "repaint the masked part of an image",
    "interpolate": "images between two prompts, or between two images",
    "retrieve": "the images of a folder that are nearest to a given one",
    "enhance": "rewrite prompts in more detail, and print them",
}
DAY = 24 * 60  # minutes that a process may wait for the slowest one


def requested_sizes(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """The sizes (width, height) that the command line names for all images; none where the model's or image's holds.

    `--height` or `--width` alone changes the model's own size, which images that are given do not have.
    """
    sides = {name: getattr(arguments, name) for name in ("width", "height") if getattr(arguments, name) is not None}
    if arguments.resolution and sides:
        raise UserError(f"--resolution and --{next(iter(sides))} say the same; give one of them")
    if sides and arguments.command != "generate":
        if len(sides) < 2:
            raise UserError(f"--{next(iter(sides))} alone would stretch the images; give --width and --height")
        return [(arguments.width, arguments.height)]
    return [parse_resolution(text) for text in arguments.resolution or ()]


def from_parts(arguments: argparse.Namespace, device: torch.device) -> SVGT2IPipeline:
    """The pipeline of `--checkpoint` and the arguments of `add_parts`, on the CPU, in the precision for `device`."""
    adapters = [parse_adapter(text) for text in arguments.lora]
    quiet_imports(arguments.verbose)
    from svg_t2i.pipeline import SVGT2IPipeline, set_verbosity

    set_verbosity(arguments.verbose)
    pipeline = SVGT2IPipeline.from_pretrained(
        arguments.checkpoint,
        **parts_of(arguments),
        use_ema=not arguments.raw_weights,
        quantization=arguments.quantization,
        dtype=arguments.dtype or ("bf16" if device.type == "cuda" else "fp32"),
    )
    load_adapters(pipeline, adapters)
    if arguments.layerwise_casting:
        pipeline.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=pipeline.dtype)
    return pipeline


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", required=True, help="saved pipeline, results folder, checkpoint, Hub id, …")
    add_parts(model)
    model.add_argument("--device", help="default: cuda when there is one")
    model.add_argument("--cpu_offload", action="store_true", help="the networks take turns on the GPU")
    model.add_argument("--compile", action="store_true", help="compile the transformer; pays from some ten images on")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = Parser("svg_t2i.sample", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUB-COMMAND")
    for name, summary in SUB_COMMANDS.items():
        _add_arguments(commands.add_parser(name, help=summary, description=summary), name)
    without = not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help"))
    arguments = parser.parse_args(["generate", *argv] if without else argv)
    check_arguments(arguments)
    return arguments


def _add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    _add_model_arguments(parser)
    what = parser.add_argument_group("what to make")
    if command not in ("variation", "retrieve"):
        what.add_argument("--prompt", action="append", default=[], help="may be given several times")
    if command in ("generate", "enhance", "image_to_image"):
        what.add_argument("--prompts", help="prompt file: .txt, .json, .jsonl, .csv or .tsv (default: none)")
        what.add_argument("--limit", type=int, help="only the first prompts of the list (default: all)")
    if command in ("generate", "image_to_image"):
        what.add_argument("--enhance", action="store_true", help="let the text encoder rewrite the prompts first")
    if command not in ("generate", "enhance"):
        required = command != "interpolate"
        what.add_argument("--image", action="append", default=[], help="an image file", required=required)
    if command == "inpaint":
        what.add_argument("--mask", required=True, help="white where to repaint, in cells of 16×16 pixels")
    if command in ("image_to_image", "inpaint"):
        strength = 0.6 if command == "image_to_image" else 1.0
        what.add_argument("--strength", type=float, default=strength, help="how much changes: 0 nothing, 1 all")
    if command in ("variation", "interpolate"):
        what.add_argument("--t", type=float, default=0.3, help="how much of the image stays: 0 nothing, 1 all")
    if command == "interpolate":
        what.add_argument("--weights", type=int, default=5, help="number of images")
    if command == "retrieve":
        what.add_argument("--folder", required=True, help="where to look, subfolders included")
        what.add_argument("--top_k", type=int, default=10, help="number of images to show")
    if command not in ("retrieve", "enhance"):
        size = "width and height in pixels, multiples of 16 (default: the model's own)"
        several = "+" if command == "generate" else 1
        what.add_argument("--resolution", metavar="[CATEGORY:]WxH", nargs=several, help=size)
        what.add_argument("--height", type=int, help="pixels; in place of --resolution (default: the model's own)")
        what.add_argument("--width", type=int, help="likewise (default: the model's own)")
        what.add_argument("--num_images_per_prompt", type=int, default=1, help="images of each prompt and resolution")
        what.add_argument("--seed", type=int, default=0, help="image i of every prompt uses seed + i")
        what.add_argument("--batch_size", type=int, default=4, help="images in one call")
        in_a_row = "images in a row of grid.png; 0: no such file (default: those of a prompt)"
        what.add_argument("--grid", type=int, metavar="COLUMNS", help=in_a_row)
        what.add_argument("--format", choices=list(FORMATS), default="png", help="kind of the files")
        add_sampling_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("samples"), help="folder to write")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse numbers out of range, before any file is opened."""
    require_positive(arguments, "num_images_per_prompt", "batch_size", "top_k", "limit")
    require_positive(arguments, "num_images", "images_per_scene")
    last = 1 if arguments.command == "interpolate" else math.nextafter(1, 0)
    ranges: dict[str, tuple[Callable[[Any], bool], str]] = {
        "seed": (lambda seed: 0 <= seed < MAX_SEED, "a whole number from 0 to 2^62 - 1"),
        "strength": (lambda strength: 0 < strength <= 1, "above 0 and at most 1"),
        "grid": (lambda columns: 0 <= columns <= 64, "from 0 to 64"),
        "weights": (lambda number: number >= 2, "at least 2, to make a way between two ends"),
        "t": (lambda t: 0 <= t <= last, f"in [0, 1{']' if last == 1 else ')'}; 0 is noise, 1 the image itself"),
    }
    for name, (fits, rule) in ranges.items():
        value = getattr(arguments, name, None)
        if value is not None and not fits(value):
            raise UserError(f"--{name} {value}: must be {rule}")
    if getattr(arguments, "layerwise_casting", False) and arguments.quantization:
        raise UserError("--layerwise_casting and --quantization both make weights smaller; give one of them")
    choose_device(getattr(arguments, "device", None))


# ------------------------------------------------------------------------------------------------------------ reading


def given_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    """The prompts of the command line, then those of the file."""
    listed = read_prompts(arguments.prompts) if getattr(arguments, "prompts", None) else []
    prompts = [Prompt(text) for text in arguments.prompt] + listed
    if not prompts:
        raise UserError("nothing to draw: give --prompt TEXT or --prompts FILE")
    return prompts[: getattr(arguments, "limit", None)]


def load_pipeline(arguments: argparse.Namespace, device: torch.device) -> SVGT2IPipeline:
    """The pipeline on this process's device, as the model arguments say."""
    pipeline = from_parts(arguments, device)
    if arguments.cpu_offload:
        pipeline.enable_model_cpu_offload(device)
    else:
        pipeline.to(device)
    pipeline.set_attention_backend(arguments.attention)
    if arguments.compile:
        pipeline.compile()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ------------------------------------------------------------------------------------------------------ sub-commands


@command
def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    if arguments.command == "enhance":
        prompts = given_prompts(arguments)
        pipeline = load_pipeline(arguments, choose_device(arguments.device))
        for prompt in prompts:
            print(pipeline.enhance(prompt.text))
    elif arguments.command == "retrieve":
        retrieve(arguments)
    else:
        with start_world(arguments.device, timeout_minutes=DAY) as world:
            draw(arguments, world)


def draw(arguments: argparse.Namespace, world: World) -> None:
    """The sub-commands that make images: plan them all, make this process's share, then record and report together."""
    sampling_changes(arguments)
    sizes = requested_sizes(arguments)
    prompts, sources = plan_sources(arguments, sizes)
    options = chosen_options(arguments, world)
    shared = {name: value for name, value in to_dict(options).items() if name not in ("height", "width")}
    settings = {**shared, "verb": arguments.command, "format": arguments.format}
    _by_main(lambda: check_folder(arguments.output, settings), world)
    jobs, rewritten = plan_images(arguments, options, sizes, prompts, sources), getattr(arguments, "enhance", False)
    model = (*parts_of(arguments), "checkpoint", "raw_weights", "dtype", "quantization", "lora", "attention")
    model += ("layerwise_casting",)
    command = {name: getattr(arguments, name) for name in model}
    known = RunFolder(arguments.output, settings, command)
    if world.broadcast(world.is_main and not rewritten and known.has_all(jobs)):
        if world.is_main:
            if arguments.grid is not None:
                known.write_grid(jobs, arguments.grid)
            print(f"all {len(jobs)} images are in {arguments.output / 'images'}; nothing was loaded")
        return
    with world.main_first():
        pipeline = load_pipeline(arguments, world.device)
    run = RunFolder(arguments.output, {**settings, "model": pipeline.networks.describe()}, command)
    _by_main(run.prepare, world)
    if rewritten:
        jobs = plan_images(arguments, options, sizes, enhance_all(pipeline, prompts, world), sources)
    failed = render(partial(make_images, pipeline, arguments, options), jobs, run, arguments.batch_size, world)
    if world.is_main:
        with full_disk(run.folder):
            run.write_failed(failed)
            run.write_records(jobs)
            each = arguments.num_images_per_prompt * max(1, len(sizes)) * max(1, len(sources))
            run.write_grid(jobs, (each if each > 1 else 4) if arguments.grid is None else arguments.grid)
        print(f"{len(jobs) - len(failed)} images in {arguments.output / 'images'}; look at index.html beside it")
    if failed:
        count = f"{len(failed)} of {len(jobs)}"
        raise UserError(f"{count} images failed (failed.json); the same command again tries those anew")


def plan_images(
    arguments: argparse.Namespace,
    options: SamplingOptions,
    sizes: Sequence[tuple[int, int]],
    prompts: Sequence[Prompt],
    sources: Sequence[dict[str, Any]],
) -> list[Job]:
    """All images of the command: of every prompt and source in every size."""
    listed = [(prompt.text, {**prompt.settings, **source}) for prompt in prompts for source in sources or ({},)]
    jobs = plan_jobs(listed, sizes or [options.size], arguments.num_images_per_prompt, arguments.seed)
    if not sources or sizes:
        return jobs
    return [replace(job, size=_own_size(job.own.get("image") or arguments.image[:1], options.size)) for job in jobs]


def enhance_all(pipeline: SVGT2IPipeline, prompts: Sequence[Prompt], world: World) -> list[Prompt]:
    """The prompts rewritten, a share by each process; all of them on every process."""
    own = {i: pipeline.enhance(prompts[i].text) for i in range(world.rank, len(prompts), world.size)}
    written = {i: text for share in world.broadcast(world.gather(own)) for i, text in share.items()}
    return [replace(prompt, text=written[i]) for i, prompt in enumerate(prompts)]


def _by_main(check: Callable[[], None], world: World) -> None:
    """Rank 0 looks at the folder; what is wrong with it stops all processes."""
    problem = None
    if world.is_main:
        try:
            check()
        except UserError as error:
            problem = str(error)
    problem = world.broadcast(problem)
    if problem:
        raise UserError(problem)


def _own_size(image: str | list[str], default: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of an input image, cropped to multiples of 16."""
    path = image if isinstance(image, str) else next(iter(image), None)
    if path is None:
        return default
    return crop_image(path).size


def plan_sources(
    arguments: argparse.Namespace, sizes: Sequence[tuple[int, int]] = ()
) -> tuple[list[Prompt], list[dict[str, Any]]]:
    """The prompts, and what each image starts from: one entry an input image or an interpolation weight.

    Raises:
        UserError: an image or mask that cannot be used; found here, before any weight is loaded.
    """
    chosen = arguments.command
    if chosen == "generate":
        return given_prompts(arguments), []
    for path in arguments.image:
        width, height = sizes[0] if sizes else (None, None)
        width, height = crop_image(path, height, width).size
        if chosen == "inpaint":
            prepare_mask(arguments.mask, (height // LATENT_PIXELS, width // LATENT_PIXELS))
    if chosen == "variation":
        return [Prompt("")], [{"image": path, "t": arguments.t} for path in arguments.image]
    if chosen == "interpolate":
        if len(arguments.prompt) > 2 or len(arguments.image) not in (0, 2):
            raise UserError("interpolate takes up to two --prompt and none or two --image")
        if len(arguments.prompt) < 2 and not arguments.image:
            raise UserError("interpolate has nothing to go between: give two --prompt, or two --image")
        shares = [i / (arguments.weights - 1) for i in range(arguments.weights)]
        ends = {"prompts": arguments.prompt, "images": arguments.image, "t": arguments.t}
        return [Prompt(" → ".join(arguments.prompt))], [{**ends, "weight": share} for share in shares]
    extra = {"mask": arguments.mask} if chosen == "inpaint" else {}
    sources = [{"image": path, "strength": arguments.strength, **extra} for path in arguments.image]
    return given_prompts(arguments), sources


def make_images(
    pipeline: SVGT2IPipeline, arguments: argparse.Namespace, options: SamplingOptions, jobs: Sequence[Job]
) -> list[Image.Image]:
    """The images of one batch, by the sub-command's method."""
    own = {
        name: tuple(job.own.get(name, getattr(options, name)) for job in jobs)
        for name in ("guidance_scale", "negative_prompt")
    }
    settings = to_dict(options) | own
    settings |= {"width": [job.size[0] for job in jobs], "height": [job.size[1] for job in jobs]}
    seeds, prompts = [job.seed for job in jobs], [job.prompt for job in jobs]
    if arguments.command == "generate":
        return pipeline(prompts, seed=seeds, **settings).images
    width, height = settings.pop("width"), settings.pop("height")
    if arguments.command == "interpolate":
        prompt = arguments.prompt if len(arguments.prompt) == 2 else "".join(arguments.prompt)
        between = {"weights": [job.own["weight"] for job in jobs], "t": arguments.t, "seed": seeds}
        size = {"width": width[0], "height": height[0]}
        return pipeline.interpolate(prompt, arguments.image or None, **between, **size, **settings).images
    images = [crop_image(job.own["image"], h, w) for job, h, w in zip(jobs, height, width)]
    if arguments.command == "variation":
        return pipeline.variation(images, t=arguments.t, seed=seeds, **settings).images
    if arguments.command == "inpaint":
        mask = {"mask_image": arguments.mask, "strength": arguments.strength}
        return pipeline.inpaint(prompts, images, seed=seeds, **mask, **settings).images
    return pipeline.image_to_image(prompts, images, strength=arguments.strength, seed=seeds, **settings).images


def retrieve(arguments: argparse.Namespace) -> None:
    """Print the nearest images, best first; OUTPUT/matches.json and grid.png show query and matches."""
    if len(arguments.image) > 1:
        raise UserError(f"retrieve takes one --image, not {len(arguments.image)}")
    query, files = load_image(arguments.image[0]), list_images(arguments.folder)
    pipeline = load_pipeline(arguments, choose_device(arguments.device))
    matches = pipeline.retrieve(query, files, top_k=arguments.top_k)
    for match in matches:
        print(f"{match.similarity:.4f}  {match.path}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    records = [{"path": str(match.path), "similarity": match.similarity} for match in matches]
    write_json({"query": arguments.image[0], "matches": records}, arguments.output / "matches.json")
    shown = [query, *(load_image(match.path) for match in matches)]
    for image in shown:
        image.thumbnail((256, 256))
    labels = ["query", *(f"{match.similarity:.3f} {match.path.name}" for match in matches)]
    save_png(image_grid(shown, min(6, len(shown)), labels), arguments.output / "grid.png")


if __name__ == "__main__":
    main()
