"""Evaluate a model: images for GenEval and DPG-Bench, built-in metrics, sweeps of sampling settings.

    python -m svg_t2i.benchmark geneval --checkpoint results/run --prompts geneval/prompts/evaluation_metadata.jsonl
    python -m svg_t2i.benchmark dpg     --checkpoint results/run --prompts ELLA/dpg_bench/prompts
    python -m svg_t2i.benchmark judge   --images outputs/benchmark/geneval/images
    python -m svg_t2i.benchmark summarise --geneval results.jsonl --dpg dpg-bench_results.txt
    python -m svg_t2i.benchmark folder  --checkpoint results/run --prompts val.jsonl --reference val.jsonl
    python -m svg_t2i.benchmark shapes  --checkpoint outputs/quickstart/transformer
    python -m svg_t2i.benchmark sweep   --checkpoint results/run --over guidance_scale=1,2,4,8 --manifest val.jsonl

Results are in outputs/benchmark/SUB-COMMAND, or `--output`. Started by `torchrun --nproc_per_node N -m
svg_t2i.benchmark …`, N processes share the work and make the same images as one. A run that was interrupted goes on
when started again.

    OUTPUT/settings.json    everything that the images depend on; a folder with other settings is refused
    OUTPUT/images/          as drawn in svg_t2i/evaluation/suites.py
    OUTPUT/metrics.json     folder and shapes: numbers, or the reasons why there are none
    OUTPUT/sweep.csv, .png  sweep
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoencoder.common.commands import Parser, command
from autoencoder.common.config import UserError
from autoencoder.common.processes import World, start_world
from autoencoder.common.weights import write_json
from autoencoder.images.files import image_grid, load_image, save_png
from autoencoder.sources.failures import Failures
from autoencoder.sources.folders import FileList
from autoencoder.sources.opening import open_images
from autoencoder.sources.source import Reading, Sample
from svg_t2i.evaluation import geneval, suites, sweep
from svg_t2i.evaluation.detector import CLIP, DETECTOR, ColourReader, Detector
from svg_t2i.evaluation.evaluate import ImageFiles, describe_report, evaluate, measure
from svg_t2i.evaluation.settings import METRICS, OF_IMAGES, WITH_ENCODER, WITH_REFERENCES, EvaluationConfig
from svg_t2i.evaluation.shapes import benchmark_scenes, score_scenes, self_test, write_data_set
from svg_t2i.evaluation.suite_images import claim, digest_prompts, generate
from svg_t2i.evaluation.suites import DPG_IMAGES, SuiteName, SuitePrompt
from svg_t2i.features.settings import AutoencoderSource
from svg_t2i.rendering.arguments import (
    add_parts,
    add_sampling_arguments,
    chosen_options,
    parse_resolution,
    sampling_changes,
)
from svg_t2i.sample import check_arguments, from_parts
from svg_t2i.sampling.options import SamplingOptions, changed
from svg_t2i.text.files import read_prompts
from svg_t2i.text.loading import set_loading_bars

if TYPE_CHECKING:
    from svg_t2i.pipeline import SVGT2IPipeline

MAX_GRID_IMAGES = 96


@command
def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if arguments.command == "summarise":
        print(summary(arguments.name, arguments.geneval, arguments.dpg))
    elif arguments.command == "shapes" and arguments.draw is not None:
        print(f"{write_data_set(arguments.draw)} pictures in {arguments.draw / 'train.jsonl'}")
    elif arguments.command == "shapes" and arguments.self_test:
        report_self_test(self_test())
    else:
        with start_world(arguments.device) as world:
            arguments.run(arguments, world)


# --- sub-commands ----------------------------------------------------------------------------------------------


def run_suite(arguments: argparse.Namespace, world: World) -> None:
    """geneval, dpg: images in the tool's layout."""
    reader = suites.read_geneval if arguments.command == "geneval" else suites.read_dpg
    prompts, sampling = reader(arguments.prompts), sampling_of(arguments, world)
    if arguments.command == "dpg" and sampling.width != sampling.height:
        raise UserError(f"--resolution {sampling.width}x{sampling.height}: DPG-Bench's tool takes squares")
    make_images(arguments, arguments.command, prompts, sampling, world)
    if world.is_main:
        images = arguments.output / "images"
        own = f"benchmark judge --images {images}, or " if arguments.command == "geneval" else ""
        print(f"{images} is ready; next: {own}the official tool and benchmark summarise")


def run_folder(arguments: argparse.Namespace, world: World) -> None:
    """folder: images of any prompts, or images that are there, and their metrics."""
    texts = [prompt.text for prompt in read_prompts(arguments.prompts)] if arguments.prompts else []
    check_folder_arguments(arguments, texts)
    references = None if arguments.reference is None else open_images(arguments.reference)
    exactly = Reading(require_captions=False, failures=Failures(0))
    if arguments.images is None:
        sampling = sampling_of(arguments, world)
        pipeline, paths = make_images(arguments, "folder", suites.number_prompts(texts), sampling, world)
        numbers = [i for i in range(len(texts))[: arguments.limit] for _ in range(arguments.num_images_per_prompt)]
        captions = [texts[i] for i in numbers]
        own = numbers if references and len(references) == len(texts) and same_file(arguments) else None
        images, autoencoder, size = FileList(paths, exactly), pipeline.autoencoder, sampling.size
    else:
        images, captions = open_images(arguments.images, exactly), texts
        if captions and len(captions) != len(images):
            raise UserError(f"{arguments.images} has {len(images)} images, --prompts {len(captions)} captions")
        own = None if references is None else match_names(images, references)
        size = arguments.resolution or tuple(side // 16 * 16 for side in images.load(0).image.size)
        autoencoder = None
        if arguments.autoencoder is not None:
            source = AutoencoderSource(arguments.autoencoder, arguments.autoencoder_checkpoint)
            autoencoder = source.load().to(world.device)
    # Only images that are there can be meant to look like the real ones, of whose captions new ones are just made.
    pairs = None if own is None or arguments.images is None else ImageFiles(references, size, own)
    report = measure(
        ImageFiles(images, size), arguments.metrics, captions=captions, autoencoder=autoencoder, clip=arguments.clip,
        references=None if references is None else ImageFiles(references, size), own=own, counterparts=pairs,
        batch_size=arguments.batch_size, world=world,
    )  # fmt: skip
    counts = {"images": len(images), "references": len(references or ())}
    write_metrics(describe_report(report) | counts, arguments.output, world)


def run_shapes(arguments: argparse.Namespace, world: World) -> None:
    """shapes: pictures of the scenes that training never saw, and the fractions that are right."""
    scenes, sampling = benchmark_scenes()[: arguments.limit], sampling_of(arguments, world)
    _, paths = make_images(arguments, "folder", suites.number_prompts(s.caption for s in scenes), sampling, world)
    if not world.is_main:
        return
    pictures = [load_image(path) for path in paths]
    shown = [scene for scene in scenes for _ in range(arguments.num_images_per_prompt)]
    labels = [scene.caption for scene in shown[:MAX_GRID_IMAGES]]
    save_png(image_grid(pictures[:MAX_GRID_IMAGES], 8, labels), arguments.output / "grid.png")
    scores = score_scenes(pictures, shown)
    write_metrics({f"shapes/{task}": value for task, value in scores.items()}, arguments.output, world)


def report_self_test(found: dict[str, dict[str, float]]) -> None:
    """Print a line for every kind of drawn pictures.

    Raises:
        SystemExit: the reader misjudges some of them.
    """
    for kind, tasks in found.items():
        print(f"{kind}: {', '.join(f'{task} {right:.0%}' for task, right in tasks.items())}")
    if any(right < 1 for tasks in found.values() for right in tasks.values()):
        raise SystemExit("The reader misjudges drawn pictures: do not trust its scores.")


def run_sweep(arguments: argparse.Namespace, world: World) -> None:
    """sweep: the built-in metrics at every combination of settings."""
    axes = [sweep.parse_axis(text, SamplingOptions(**sampling_changes(arguments))) for text in arguments.over]
    if len({axis.name for axis in axes}) < len(axes) or len(axes) > 2:
        raise UserError(f"--over {' '.join(arguments.over)}: one or two different settings can be swept")
    names = [field.name for field in fields(EvaluationConfig) if hasattr(arguments, field.name)]
    evaluation = EvaluationConfig(**{name: getattr(arguments, name) for name in names})
    base = sampling_of(arguments, world)
    evaluation = replace(evaluation, sampling=base)
    swept = {axis.name for axis in axes}
    fixed = {name: value for name, value in asdict(base).items() if name not in swept}
    measured = {name: getattr(evaluation, name) for name in names if name != "batch_size"}
    settings = {"benchmark": "sweep", **measured, "metrics": list(evaluation.metrics), "sampling": fixed}
    pipeline = open_run(arguments, settings, world)
    path = arguments.output / "sweep.csv"
    rows: list[dict[str, Any]] = world.broadcast(sweep.read_rows(path) if world.is_main else None)
    for values, sampling in sweep.points(base, axes):
        if sweep.find_row(rows, values) is None:
            results = evaluate(pipeline, replace(evaluation, sampling=sampling), world)
            rows.append({name: str(value) for name, value in (values | results).items()})
            if world.is_main:
                sweep.write_rows(rows, path)
                print(", ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    if world.is_main:
        sweep.plot(rows, axes, path.with_suffix(".png"))
        print(f"{path} and {path.with_suffix('.png')}")


def run_judge(arguments: argparse.Namespace, world: World) -> None:
    """judge: GenEval's verdicts on pictures in its layout, whoever made them."""
    pictures = geneval.find_pictures(arguments.images)
    set_loading_bars(False)
    output = arguments.output or arguments.images.parent / "results.jsonl"
    with world.main_first():  # one process downloads
        networks = Detector(arguments.detector, world.device), ColourReader(arguments.clip, world.device)
    verdicts = geneval.judge(pictures, *networks, world)
    if world.is_main:
        used = {name: version(name) for name in ("torch", "transformers")}
        used |= {"detector": arguments.detector, "clip": arguments.clip, "pictures": len(pictures)}
        geneval.write_verdicts(verdicts, output)
        write_json(used, output.with_suffix(".json"))
        print(f"{summary(arguments.name, output)}\n{output}")


def summary(name: str, geneval_results: Path | None, dpg_results: Path | None = None) -> str:
    """Markdown of what was found, by the official tools or `judge`, next to the published scores."""
    if geneval_results is None and dpg_results is None:
        raise UserError("nothing to summarise: give --geneval results.jsonl, --dpg results.txt or both")
    scores: dict[str, float] = {}
    notes = []
    if geneval_results is not None:
        found, images = suites.read_geneval_results(geneval_results)
        scores |= found
        notes.append(f"GenEval: {images} images")
    if dpg_results is not None:
        scores["DPG-Bench"], prompts = suites.read_dpg_results(dpg_results)
        notes.append(f"DPG-Bench: {prompts} prompts")
    return f"{suites.table({name: scores})}\n\n{name}: {'; '.join(notes)}."


# --- images -----------------------------------------------------------------------------------------------------


def make_images(
    arguments: argparse.Namespace, suite: SuiteName, prompts: list[SuitePrompt], sampling: SamplingOptions, world: World
) -> tuple[SVGT2IPipeline, list[Path]]:
    """The pipeline, and the images of all prompts, which are made where they are not there yet."""
    settings = {
        "benchmark": arguments.command,
        "prompts": {"count": len(prompts), "sha256": digest_prompts(prompts)},
        "num_images_per_prompt": arguments.num_images_per_prompt,
        "seed": arguments.seed,
        "sampling": asdict(sampling),
    }
    pipeline = open_run(arguments, settings, world)
    paths = generate(
        pipeline, suite, prompts[: arguments.limit], sampling, output=arguments.output,
        count=arguments.num_images_per_prompt, seed=arguments.seed, batch_size=arguments.batch_size, world=world,
    )  # fmt: skip
    return pipeline, paths


def open_run(arguments: argparse.Namespace, settings: dict[str, Any], world: World) -> SVGT2IPipeline:
    """Load the model and claim the output folder for it and these settings."""

    def load() -> SVGT2IPipeline:
        pipeline = from_parts(arguments, world.device).to(world.device)
        pipeline.set_attention_backend(arguments.attention)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    command = {name: str(value) for name, value in vars(arguments).items() if value is not None and name != "run"}
    return claim(arguments.output, settings, load, command, world)


# --- metrics ----------------------------------------------------------------------------------------------------


def check_folder_arguments(arguments: argparse.Namespace, texts: Sequence[str]) -> None:
    """Refuse metrics that lack something, before any network is loaded."""
    without_encoder = arguments.images is not None and arguments.autoencoder is None
    for name in arguments.metrics:
        if name in WITH_REFERENCES and arguments.reference is None:
            raise UserError(f"--metrics {name} needs real images to compare with: give --reference FOLDER or manifest")
        if name in WITH_ENCODER and without_encoder:
            raise UserError(f"--metrics {name} with --images needs an --autoencoder")
        if name == "clip_score" and not texts:
            raise UserError(f"--metrics {name} with --images needs captions (--prompts)")
    if arguments.images is None and not texts:
        raise UserError("folder needs --prompts FILE to make images from, or --images FOLDER with images")


def match_names(images: Iterable[Sample], references: Iterable[Sample]) -> list[int] | None:
    """Which reference has the name of each image, if every image has one."""
    by_name = {sample.path.stem: i for i, sample in enumerate(references)}
    names = [sample.path.stem for sample in images]
    return [by_name[name] for name in names] if all(name in by_name for name in names) else None


def same_file(arguments: argparse.Namespace) -> bool:
    """Whether captions and real images come from one manifest."""
    return Path(arguments.prompts).resolve() == Path(arguments.reference).resolve()


def write_metrics(metrics: dict[str, Any], output: Path, world: World) -> None:
    """metrics.json, and the same on the console."""
    if world.is_main:
        write_json(metrics, output / "metrics.json")
        for name, value in metrics.items():
            reason = value["unavailable"] if isinstance(value, dict) else None
            print(f"{name}: " + (f"unavailable: {reason}" if reason else f"{value:.4g}"))


# --- command line -----------------------------------------------------------------------------------------------


def sampling_of(arguments: argparse.Namespace, world: World) -> SamplingOptions:
    """How the images are made: as `chosen_options` says, in the size of `--resolution` where it is given."""
    sizes = {} if arguments.resolution is None else dict(zip(("width", "height"), arguments.resolution))
    return changed(chosen_options(arguments, world), sizes)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = Parser("svg_t2i.benchmark", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUB-COMMAND")
    for name, run, what in (("geneval", run_suite, "GenEval"), ("dpg", run_suite, "DPG-Bench")):
        suite = add_sampler(commands, name, run, f"make images for {what}'s tool", images=4)
        suite.add_argument("--prompts", type=Path, required=True, help="the official prompts; see docs/evaluation.md")

    folder = add_sampler(commands, "folder", run_folder, "measure images of any prompts, or images that exist", 1)
    folder.add_argument("--prompts", help="prompt file (.txt, .json, .jsonl, .csv, .tsv) or manifest (default: none)")
    folder.add_argument("--images", help="measure these, in the size of the first (default: make images)")
    folder.add_argument("--reference", help="real images: a folder, manifest, … as of training (default: none)")
    folder.add_argument(
        "--metrics", nargs="*", choices=OF_IMAGES, default=["mmd"], help="what to measure; no name: nothing"
    )
    folder.add_argument("--clip", default=EvaluationConfig.clip, help="Hugging Face folder or id of the CLIP")

    shapes = add_sampler(commands, "shapes", run_shapes, "colour, place, shape, two objects, counting", images=2)
    shapes.add_argument(
        "--draw", type=Path, metavar="FOLDER", help="only draw a data set to train on (default: do not)"
    )
    shapes.add_argument("--self_test", action="store_true", help="only read drawn pictures: all of them must be right")
    shapes.set_defaults(prompts="unseen scenes", preset="quickstart", batch_size=40)

    swept = add_sampler(commands, "sweep", run_sweep, "metrics against sampling settings", images=None)
    swept.add_argument("--over", action="append", required=True, metavar="NAME=VALUE,VALUE", help="once or twice")
    swept.add_argument("--manifest", help="captions to sample from, images to compare with (default: none)")
    swept.add_argument("--metrics", nargs="+", choices=METRICS, default=["mmd"], help="what to measure")
    swept.add_argument("--num_images", type=int, default=EvaluationConfig.num_images, help="of every setting")
    swept.add_argument("--images_per_scene", type=int, default=1, help="for the metric shapes")
    swept.add_argument("--clip", default=EvaluationConfig.clip, help="Hugging Face folder or id of the CLIP")

    judged = commands.add_parser("judge", help="GenEval's verdicts on images in its layout, without its tool")
    judged.set_defaults(run=run_judge)
    judged.add_argument(
        "--images", type=Path, default=Path("outputs/benchmark/geneval/images"), help="what geneval made"
    )
    judged.add_argument("--output", type=Path, help="file to write (default: results.jsonl beside --images)")
    judged.add_argument("--detector", default=DETECTOR, help="Hugging Face folder or id of a Mask2Former of COCO")
    judged.add_argument("--clip", default=CLIP, help="Hugging Face folder or id of the CLIP that reads colours")
    judged.add_argument("--device", help="default: cuda when there is one")

    table = commands.add_parser("summarise", help="Markdown row of the official tools' results, next to the published")
    table.add_argument("--geneval", type=Path, help="results.jsonl of GenEval's evaluate_images.py (default: none)")
    table.add_argument("--dpg", type=Path, help="results of DPG-Bench's compute_dpg_bench.py (default: none)")
    for one in (judged, table):
        one.add_argument("--name", default="this model", help="first cell of the row")
    arguments = parser.parse_args(argv)
    if arguments.command not in ("judge", "summarise"):
        check(arguments)
    return arguments


def add_sampler(
    commands: argparse._SubParsersAction, name: str, run: Callable, summary: str, images: int | None
) -> argparse.ArgumentParser:
    """A sub-command that samples: arguments as those of svg_t2i.sample."""
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark") / name, help="folder to write")
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", help="results folder, checkpoint or saved pipeline; has no default")
    add_parts(model)
    model.add_argument("--device", help="default: cuda when there is one")
    what = parser.add_argument_group("what to make")
    size = "width and height in pixels (default: those of --preset or the model)"
    what.add_argument("--resolution", type=parse_resolution, metavar="WxH", help=size)
    what.add_argument("--seed", type=int, default=0, help="image i of the run has seed + i")
    what.add_argument("--batch_size", type=int, default=4, help="images in one packed batch")
    if images is not None:
        what.add_argument("--num_images_per_prompt", type=int, default=images, help="images of each prompt")
        what.add_argument("--limit", type=int, help="only the first prompts; may be raised later (default: all)")
    add_sampling_arguments(parser)
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Refuse what needs no file to be seen as wrong."""
    check_arguments(arguments)
    sampling_changes(arguments)
    makes_none = (getattr(arguments, name, None) for name in ("images", "draw", "self_test"))
    if arguments.checkpoint is None and not any(makes_none):
        raise UserError("--checkpoint is missing: a results folder, a checkpoint folder or a saved pipeline")
    if arguments.command == "dpg" and arguments.num_images_per_prompt > DPG_IMAGES:
        number = arguments.num_images_per_prompt
        raise UserError(f"--num_images_per_prompt {number}: DPG-Bench's tool reads {DPG_IMAGES} at most")


if __name__ == "__main__":
    main()
