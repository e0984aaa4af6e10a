"""What a run will take, before a cluster is booked: memory of every way to spread it, time and cost. An estimate.

    python -m svg_t2i.plan --config stage1_256 --gpus 64 --gpu h100 --price 2.5
    python -m svg_t2i.plan --config stage3_1024 --gpus 8 --gpu h100 train.micro_batch_size=4
    python -m svg_t2i.plan --sample 1024 --gpu 4090
    python -m svg_t2i.plan --config configs/autoencoder/pure/svg_autoencoder_P_dd_M_IN_stage1_bs64_256_woattn

Nothing is downloaded, and no GPU is needed: networks are built without values and one pass through them is counted.
Memory is that of blocks that are not compiled; compiled ones take less.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from autoencoder.common.commands import Parser, command, require_positive
from autoencoder.common.config import REPO_ROOT, UserError, build, find_config, read_config
from autoencoder.training.settings import AutoencoderTrainConfig
from svg_t2i.planning import autoencoder, sampling, training
from svg_t2i.planning.autoencoder import AutoencoderPlan, plan_autoencoder
from svg_t2i.planning.gpus import GPU, GPUS, find_gpu
from svg_t2i.planning.sampling import SamplingPlan, plan_sampling
from svg_t2i.planning.training import GB, Choice, TrainingPlan, plan_training
from svg_t2i.training.settings import TrainConfig

FOLDER = REPO_ROOT / "configs" / "svg_t2i"
TERA, PETA = 1e12, 1e15
NO_TIME = "no time: the peak of this card is not in the table"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = Parser("svg_t2i.plan", __doc__)
    parser.add_argument(
        "--config", default="stage4_sft", help="YAML file of either stage, or a name in configs/svg_t2i"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes of its entries")
    parser.add_argument("--gpus", type=int, default=8, help="how many")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--price", type=float, help="of a GPU for an hour (default: no cost is shown)")
    parser.add_argument(
        "--utilisation", type=float,
        help="share of the peak that the arithmetic gets "
        f"(default: {training.UTILISATION} in training and {sampling.UTILISATION} in sampling, as measured; "
        f"{autoencoder.UTILISATION} for the autoencoder, assumed)",
    )  # fmt: skip
    parser.add_argument("--caption_tokens", type=int, default=150, help="of a caption, on average")
    parser.add_argument("--image_kb", type=float, default=300, help="of an image file, on average")
    parser.add_argument(
        "--sample", type=int, metavar="PIXELS", help="plan drawing images of this side (default: training)"
    )
    parser.add_argument("--images", type=int, default=1, help="with --sample: in a batch")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="with --sample: model calls")
    return parser.parse_intermixed_args(argv)


@command
def main(argv: list[str]) -> None:
    """Print the plan of what the command line names: stage 1, stage 2, or drawing images."""
    arguments = parse_arguments(argv)
    require_positive(arguments, "gpus", "caption_tokens", "images", "num_inference_steps")
    if arguments.price is not None and arguments.price < 0 or arguments.image_kb <= 0:
        raise UserError("--price must not be negative, and --image_kb must be positive")
    path, gpu = find_plan_config(arguments.config), find_gpu(arguments.gpu)
    values = read_config(path, arguments.overrides, resolvers=True)
    given = {} if arguments.utilisation is None else {"utilisation": arguments.utilisation}
    if isinstance(values.get("model"), dict):  # of stage 1
        if arguments.sample is not None:
            raise UserError("--sample plans for the networks of a DiT training; give such a file as --config")
        plan = plan_autoencoder(build(AutoencoderTrainConfig, values, str(path)), gpu, arguments.gpus, **given)
        print("\n".join(describe_autoencoder(plan, arguments, path)))
        return
    config = build(TrainConfig, values, str(path))
    if arguments.sample is not None:
        plan = plan_sampling(
            config, gpu, arguments.sample, arguments.images, arguments.num_inference_steps,
            caption_tokens=arguments.caption_tokens, **given,
        )  # fmt: skip
        print("\n".join(describe_sampling(plan, arguments, gpu)))
        return
    plan = plan_training(config, gpu, arguments.gpus, caption_tokens=arguments.caption_tokens, **given)
    print("\n".join(describe_training(plan, arguments, path)))


def find_plan_config(name: str) -> Path:
    """A YAML file as `find_config` finds it, or of configs/svg_t2i. UserError where there is none."""
    if "/" not in name and not Path(name).exists():
        return find_config(FOLDER / name)
    return find_config(name)


def describe_training(plan: TrainingPlan, arguments: argparse.Namespace, path: Path) -> list[str]:
    """The plan in lines."""
    utilisation = arguments.utilisation or training.UTILISATION
    per_image, per_step = plan.flops_per_image / TERA, plan.flops_per_image * plan.samples_per_step / PETA
    lines = [
        f"{path.stem} on {plan.gpus} × {plan.gpu.title}. An estimate.",
        f"{plan.parameters / 1e9:.2f} B trained and {plan.frozen_parameters / 1e9:.2f} B frozen parameters",
        f"{plan.image_tokens} image and {plan.text_tokens} text tokens an image, "
        f"{per_image:.1f} TFLOP an image, {per_step:.1f} PFLOP a step",
        f"batch {plan.samples_per_step}: {_number(plan.micro_batches, 'micro-batch', 'micro-batches')} of up to "
        f"{plan.micro_batch_size} a GPU",
        f"a checkpoint has {plan.checkpoint_bytes / GB:.1f} GB",
        "",
        "GB on a GPU:",
    ]
    if plan.text_assumed:
        lines.insert(2, "the text encoder is not here: taken to be as large as Gemma-2-2B")
    if plan.idle_share > 0.01:
        lines.insert(-2, f"{plan.idle_share:.0%} of the GPUs' time is waited: {plan.gpus} do not divide the batch")
    lines += _table(plan)
    best = plan.best
    if best is None:
        least = min(plan.choices, key=lambda choice: choice.total)
        return [*lines, "", f"nothing fits: {least.total / GB:.0f} GB are needed at least. Use more GPUs, "
                "parallel.shard_frozen=true, or a smaller train.micro_batch_size"]  # fmt: skip
    lines += ["", f"fastest that fits: parallel.data_parallel={best.data_parallel} "
              f"parallel.activation_checkpointing={best.checkpointing}"]  # fmt: skip
    if best.seconds is None:
        return [*lines, NO_TIME]
    images = plan.samples_per_step / best.seconds
    lines += [
        f"{best.seconds:.2f} s a step at a utilisation of {utilisation:.0%}: {images:.0f} images/s, "
        f"{images * arguments.image_kb / 1e6:.2f} GB/s of image files to read",
        _cost(f"{plan.steps} steps", plan.steps * best.seconds / 3600, plan.gpus, arguments.price),
    ]
    return lines


def _table(plan: TrainingPlan) -> list[str]:
    parts = list(plan.choices[0].memory)
    head = ["data_parallel", "checkpointing", *parts, "total", "head-room", "s a step", ""]
    rows = [head, *(_row(choice, plan, parts) for choice in plan.choices)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _row(choice: Choice, plan: TrainingPlan, parts: list[str]) -> list[str]:
    room = plan.gpu.memory - choice.total / GB
    mark = "← fastest" if choice is plan.best else "" if room >= 0 else "too large"
    seconds = "?" if choice.seconds is None else f"{choice.seconds:.2f}"
    memory = [f"{choice.memory[part] / GB:.1f}" for part in parts]
    return [
        choice.data_parallel,
        choice.checkpointing,
        *memory,
        f"{choice.total / GB:.1f}",
        f"{room:.1f}",
        seconds,
        mark,
    ]


def describe_autoencoder(plan: AutoencoderPlan, arguments: argparse.Namespace, path: Path) -> list[str]:
    """The plan in lines."""
    utilisation = arguments.utilisation or autoencoder.UTILISATION
    parts = ", ".join(f"{part} {size / GB:.1f}" for part, size in plan.memory.items())
    lines = [
        f"{path.stem} on {plan.gpus} × {plan.gpu.title}. An estimate.",
        f"{plan.parameters / 1e6:.1f} M trained parameters, and {plan.discriminator_parameters / 1e6:.1f} M of the "
        "discriminator",
        f"{plan.images_per_gpu} images of {plan.side}×{plan.side} px at once on a GPU, {plan.images_per_step} a step, "
        f"{plan.flops / TERA:.2f} TFLOP an image",
        f"GB on a GPU, while the discriminator plays: {parts}",
        f"{plan.total / GB:.1f} GB in all, which {'fits' if plan.fits else 'does not fit'}"
        + ("" if plan.fits else ": use a smaller data.params.batch_size, with training.accumulate_grad_batches, or "
           "training.trainer.precision=bf16-mixed"),
        f"a checkpoint has {plan.checkpoint_bytes / GB:.1f} GB",
    ]  # fmt: skip
    if plan.seconds is None:
        return [*lines, NO_TIME]
    images = plan.images_per_step / plan.seconds
    lines.append(
        f"{plan.seconds:.2f} s a step at a utilisation of {utilisation:.0%}: {images:.0f} images/s, "
        f"{images * arguments.image_kb / 1e6:.2f} GB/s of image files to read"
    )
    if plan.steps is not None:
        return [*lines, _cost(f"{plan.steps} steps", plan.steps * plan.seconds / 3600, plan.gpus, arguments.price)]
    return [*lines, _cost("a million images", 1e6 / images / 3600, plan.gpus, arguments.price)]


def _number(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _cost(what: str, hours: float, gpus: int, price: float | None) -> str:
    cost = f", {hours * gpus * price:,.0f} at {price:g} an hour" if price else ""
    return f"{what}: {hours:.1f} hours, {hours * gpus:.1f} GPU-hours{cost}"


def describe_sampling(plan: SamplingPlan, arguments: argparse.Namespace, gpu: GPU) -> list[str]:
    """The plan in lines."""

    def fits(need: float) -> str:
        return "fits" if need <= gpu.memory * GB else "does not fit"

    weights = ", ".join(f"{part} {size / GB:.1f}" for part, size in plan.weights.items())
    stages = ", ".join(f"{stage} {size / GB:.1f}" for stage, size in plan.stages.items())
    return [
        f"{_number(arguments.images, 'image', 'images')} of {arguments.sample}×{arguments.sample} px in "
        f"{arguments.num_inference_steps} steps with guidance on one {gpu.title}, bf16. An estimate.",
        f"{plan.parameters / 1e9:.2f} B parameters; weights in GB: {weights}",
        f"GB besides them: {stages}",
        f"all networks on the card: {plan.resident / GB:.1f} GB, which {fits(plan.resident)}",
        f"taking turns (--cpu_offload): {plan.taking_turns / GB:.1f} GB, which {fits(plan.taking_turns)}",
        "with --quantization int8 or fp8: " + ", ".join(
            f"{how} {need / GB:.1f} GB, which {fits(need)}"
            for how, need in zip(("all on the card", "taking turns"), plan.in_8_bits)
        ),
        f"{plan.flops / TERA:.0f} TFLOP"
        + (f"; {NO_TIME}" if plan.seconds is None
           else f", {plan.seconds:.1f} s at a utilisation of {arguments.utilisation or sampling.UTILISATION:.0%}"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
