"""The whole recipe at toy size: data, autoencoder, latent statistics, text encoder, DiT, pictures, score.

Every step is the command a real run uses; this file only calls them one after another, on a small problem. Started by
scripts/quickstart.sh. The output folder afterwards:

    data/                     train.jsonl, images/; unseen.jsonl and held_out.jsonl, or with --data squares of your
                              images
    autoencoder/quickstart/   checkpoints, TensorBoard scalars and reconstructions
    latent_stats.safetensors  mean and deviation of every latent channel
    text_encoder/             small random Gemma-2 and a word tokenizer, Hugging Face format
    transformer/              checkpoints and TensorBoard scalars of the DiT
    prompts.jsonl, samples/   what was asked for; one PNG per picture, data.json
    reconstructions.png       pictures above what the autoencoder makes of them
    loss.png                  of training, and of pictures of combinations that training never sees
    samples.png               labelled grid, the first picture for each prompt
    report.json               fractions of pictures of one thing with right colour, place and shape, and of pairs with
                              right attributes and relation; or with --data of pictures that are most like their own
                              image; seconds per phase
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from data_set import every, picture_of, score_both, unseen_pairs, unseen_things, write_data_set, write_jsonl
from draw import NEW_SHAPE, SIZE, all_things
from pairs import all_pairs
from pictures import draw_pictures, plot_losses, write_grid
from PIL import Image
from steps import AUTOENCODER, Steps, autoencode, divide_cores, percentages, read_samples, require_empty, trained_parts

from autoencoder.common.commands import Parser, command
from autoencoder.common.config import UserError
from autoencoder.images.files import (
    aspect_buckets,
    crop_square,
    load_image,
    save_png,
)
from autoencoder.sources.failures import FILE_NAME, MAX_ERRORS, Failures
from autoencoder.sources.opening import open_source
from autoencoder.sources.source import ImageSource, Reading
from svg_t2i.text.toy import make_toy_text_encoder

AUTOENCODER_CONFIG = "configs/autoencoder/demo/quickstart.yaml"
TRANSFORMER_CONFIG = "configs/svg_t2i/quickstart.yaml"
PROPERTIES = {"single": ("colour", "place", "shape"), "pairs": ("attributes", "relation")}


@dataclass(frozen=True)
class Plan:
    """How long to train and how much to sample."""

    copies: int  # pictures of each thing that is seen; of each pair a sixth
    autoencoder_steps: int
    transformer_steps: int
    prompts: int  # how many of the unseen things and of the unseen pairs, or of the user's captions
    pictures_per_prompt: int
    side: int = SIZE  # of the pictures that these batches are for, in px; larger ones get smaller batches
    autoencoder_batch: int = 8
    transformer_batch: int = 32
    short: bool = False  # too few steps to learn anything
    autoencoder_changes: tuple[str, ...] = ()  # of the config
    transformer_changes: tuple[str, ...] = ()


FULL = Plan(copies=6, autoencoder_steps=1500, transformer_steps=700, prompts=40, pictures_per_prompt=2)
# Photographs have more in them than shapes: the decoder is wider, and noise on its input makes it forgive what the
# transformer gets slightly wrong.
ON_DATA = Plan(
    copies=0,
    autoencoder_steps=1500,
    transformer_steps=1000,
    prompts=40,
    pictures_per_prompt=1,
    autoencoder_changes=(
        "model.params.hyconfig.block_out_channels=[256, 128, 64, 32, 32]",
        "training.latent_noise=0.1",
    ),
    transformer_changes=(
        "data.crops_per_image=1",
        "optim.schedule=cosine",
        "model_overrides.prediction=velocity",  # clean latents and their features were compared on shapes alone
        "aux=null",
    ),
)
# 256 latents instead of 16: sixteen times as many tell more of a picture together, so that more noise is needed to hide
# it, by the root of that number.
ON_GPU = Plan(
    copies=6,
    autoencoder_steps=1000,
    transformer_steps=1200,
    prompts=40,
    pictures_per_prompt=2,
    side=256,
    autoencoder_batch=32,
    transformer_batch=64,
    autoencoder_changes=("training.trainer.precision=bf16-mixed", "data.params.num_workers=8"),
    transformer_changes=(
        "model_overrides.dim=512",
        "model_overrides.n_layers=8",
        "model_overrides.n_heads=16",
        "model_overrides.n_kv_heads=8",
        "train.precision=bf16",
        "data.num_workers=8",
        "optim.lr=1e-3",
        f"flow.mu={-2.0 - math.log(4):.2f}",
        "samples.time_shift=32",
    ),
)
SHORT = {
    "short": True,
    "copies": 1,
    "autoencoder_steps": 20,
    "transformer_steps": 20,
    "prompts": 8,
    "pictures_per_prompt": 1,
}


class Recipe(Steps):
    """The commands, on squares of `resolution`² pixels, with all results in `output`."""

    def __init__(self, output: Path, resolution: int, plan: Plan, processes: int, threads: int):
        super().__init__(processes, threads)
        self.output, self.resolution, self.plan = output, resolution, plan
        self.manifest = output / "data" / "train.jsonl"
        self.checkpoint = output / AUTOENCODER / "checkpoints" / "last.ckpt"
        self.autoencoder = output / AUTOENCODER / "config.yaml"
        self.stats = output / "latent_stats.safetensors"
        # Divides the batch sizes, so that a step costs the same at any resolution.
        self.batch_shrink = max(1, round((resolution / plan.side) ** 2))

    def train_autoencoder(self) -> None:
        self.run(
            *("autoencoder.train", "--config", AUTOENCODER_CONFIG, "--devices", self.processes),
            f"data.params.json_path={self.manifest}",
            f"data.params.train_resol={self.resolution}",
            f"data.params.batch_size={max(1, self.plan.autoencoder_batch // self.batch_shrink // self.processes)}",
            f"training.logdir={self.output / 'autoencoder'}",
            f"training.trainer.max_steps={self.plan.autoencoder_steps}",
            *self.plan.autoencoder_changes,
            processes=self.processes,
        )

    def measure_latents(self) -> None:
        self.run(
            *("autoencoder.measure_latents", self.autoencoder, "--checkpoint", self.checkpoint),
            *("--manifest", self.manifest, "--resolution", self.resolution, "--max_aspect", 1),
            *("--output", self.stats),
        )

    def make_text_encoder(self, captions: Sequence[str]) -> None:
        make_toy_text_encoder(captions, self.output / "text_encoder")

    def train_dit(self) -> None:
        """The DiT, on the autoencoder's latents and the captions, into `output`/transformer."""
        batch = max(4, self.plan.transformer_batch // self.batch_shrink)
        self.train_transformer(
            TRANSFORMER_CONFIG,
            f"results_dir={self.output / 'transformer'}",
            f"data.path={self.manifest}",
            f"data.resolution={self.resolution}",
            f"train.max_steps={self.plan.transformer_steps}",
            f"train.ckpt_every={self.plan.transformer_steps}",
            f"train.global_batch_size={batch}",
            f"train.micro_batch_size={batch // self.processes}",
            *trained_parts(self.output),
            *self.held_out(),
            *self.plan.transformer_changes,
        )

    def held_out(self) -> tuple[str, ...]:
        """The settings that measure the loss on held-out pictures, where there are some: ten times."""
        path = self.manifest.parent / "held_out.jsonl"
        every = max(1, self.plan.transformer_steps // 10)
        return (f"validation={{path: {path}, every: {every}}}",) if path.is_file() else ()

    def sample(self, prompts: Sequence[str]) -> list[Image.Image]:
        """Pictures for the prompts, `pictures_per_prompt` in a row for each."""
        prompt_file = self.output / "prompts.jsonl"
        write_jsonl(prompt_file, [{"prompt": prompt} for prompt in prompts])
        self.run(
            *("svg_t2i.sample", "--checkpoint", self.output / "transformer", "--prompts", prompt_file),
            *("--output", self.output / "samples", "--resolution", f"{self.resolution}x{self.resolution}"),
            *("--num_images_per_prompt", self.plan.pictures_per_prompt, "--batch_size", 40),
        )
        return read_samples(self.output / "samples")

    def reconstruct(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """What the trained autoencoder makes of pictures; also written as reconstructions.png."""
        reconstructions = autoencode(self.output, pictures)
        rows = [row[:10] for row in (pictures, reconstructions)]
        write_grid(self.output / "reconstructions.png", [picture for row in rows for picture in row], len(rows[0]))
        return reconstructions

    def train(self, captions: Sequence[str]) -> None:
        """Everything up to a trained DiT."""
        with self.phase("autoencoder"):
            self.train_autoencoder()
        with self.phase("latent_statistics"):
            self.measure_latents()
        with self.phase("text_encoder"):
            self.make_text_encoder(captions)
        with self.phase("transformer"):
            self.train_dit()


def run_on_shapes(recipe: Recipe) -> None:
    """Draws things and pairs of things, trains on them, and scores pictures of combinations that training never saw."""
    with recipe.phase("data"):
        pictures = write_data_set(recipe.manifest.parent, recipe.plan.copies, side=recipe.resolution)
        things, pairs = (every(what, recipe.plan.prompts) for what in (unseen_things(), unseen_pairs()))
        print(f"{pictures} pictures; of {len(things)} things and {len(pairs)} pairs, the words never meet in training")
    words = [what.caption for what in (*all_things(), *all_pairs())]
    recipe.train([*words, NEW_SHAPE])  # the text encoder has read of stars
    captions = [what.caption for what in (*things, *pairs)]
    with recipe.phase("samples"):
        samples = recipe.sample(captions)
    with recipe.phase("score"):
        per_prompt = recipe.plan.pictures_per_prompt
        first, zoom = samples[::per_prompt], max(1, 2 * SIZE // recipe.resolution)
        write_grid(recipe.output / "samples.png", first, columns=8, labels=captions, zoom=zoom)
        result = score_both(samples, things, pairs)
        plot_losses(recipe.output / "transformer" / "tensorboard", recipe.output / "loss.png")
        shown = recipe.reconstruct([picture_of(what, side=recipe.resolution) for what in (*things, *pairs)])
        reconstruction = score_both(shown, things, pairs)
    recipe.write_report({**result, "pictures": len(samples), "reconstruction": reconstruction}, recipe.output)
    print(f"\nOf {len(samples)} pictures of combinations that training never saw,")
    for kind, names in PROPERTIES.items():
        print(f"  {kind + ':':>7} {percentages(result[kind], names)}")
    for kind, names in PROPERTIES.items():
        print(f"  ({kind}, drawn, and through the autoencoder alone: {percentages(reconstruction[kind], names)})")
    if recipe.plan.short:
        print("So few steps teach nothing; --short shows that everything runs. Leave it out to learn the shapes.")


def run_on_data(recipe: Recipe, source: ImageSource) -> None:
    """Trains on squares of the user's images; shows some, their reconstructions, and pictures for their captions."""
    with recipe.phase("data"):
        samples = write_squares(source, recipe.manifest.parent, recipe.resolution)
        source.failures.report()
        print(f"{len(samples)} squares of {recipe.resolution} px")
    recipe.train([caption for _, captions in samples for caption in captions])
    shown = samples[:: max(1, len(samples) // recipe.plan.prompts)][: recipe.plan.prompts]
    captions = [texts[0] for _, texts in shown]
    per_prompt = recipe.plan.pictures_per_prompt
    with recipe.phase("samples"):
        pictures = recipe.sample(captions)
    with recipe.phase("score"):
        squares = [load_image(path) for path, _ in shown]
        reconstructions = recipe.reconstruct(squares)
        write_grid(recipe.output / "samples.png", pictures[::per_prompt], columns=5, labels=captions)
        reconstruction = [
            float(compare(square, [own])[0]) for square, own in zip(squares, reconstructions, strict=True)
        ]
        own = own_image(pictures, [i for i in range(len(shown)) for _ in range(per_prompt)], reconstructions)
    print(f"\nReconstructions: {np.mean(reconstruction):.1f} dB PSNR on average, {min(reconstruction):.1f} at least.")
    print(f"Of {len(pictures)} pictures, {own['own_image']:.0%} are most like the image of their own caption,")
    print(f"from whose reconstruction they are {own['sample_psnr']:.1f} dB on average.")
    report = {"images": len(samples), "pictures": len(pictures), "reconstruction_psnr": np.mean(reconstruction).item()}
    recipe.write_report({**report, "reconstruction_psnr_min": min(reconstruction), **own}, recipe.output)


def write_squares(source: ImageSource, folder: Path, side: int) -> list[tuple[Path, tuple[str, ...]]]:
    """Cuts the middle squares of all images, once: (file, captions) of each. Also writes their train.jsonl.

    The same crop at every visit is what lets a small model overfit a handful of images.
    """
    (folder / "images").mkdir(parents=True)
    samples = []
    for index in range(len(source)):
        image, sample, found = source.load(index)
        if found != index:  # unusable, and told so
            continue
        path = folder / "images" / f"{index:05d}.png"
        save_png(crop_square(image, side, None), path)
        samples.append((path, sample.captions))
    lines = [{"path": f"images/{path.name}", "prompt": list(captions)} for path, captions in samples]
    write_jsonl(folder / "train.jsonl", lines)
    return samples


def compare(picture: Image.Image, others: Sequence[Image.Image]) -> np.ndarray:
    """PSNR in dB of a picture against each of the others, of the same size."""
    errors = [np.asarray(picture, dtype=np.float32) - np.asarray(other, dtype=np.float32) for other in others]
    return np.array([20 * np.log10(255 / max(1e-3, np.sqrt(np.mean(error**2)))) for error in errors])


def own_image(
    pictures: Sequence[Image.Image], wanted: Sequence[int], reconstructions: Sequence[Image.Image]
) -> dict[str, float]:
    """How much each picture is like the reconstruction that was `wanted`, by its number in `reconstructions`.

    own_image: fraction that are nearer to it than to any other. sample_psnr: dB, mean; sample_psnr_others: to the
    others, for comparison. Reconstructions, not images: what the decoder lost is not the transformer's to find.
    """
    table = np.stack([compare(picture, reconstructions) for picture in pictures])  # (pictures, reconstructions)
    own = table[np.arange(len(pictures)), wanted]
    others = (table.sum(axis=1) - own) / max(1, len(reconstructions) - 1)
    return {
        "own_image": float(np.mean(table.argmax(axis=1) == np.asarray(wanted))),
        "sample_psnr": float(own.mean()),
        "sample_psnr_others": float(others.mean()),
    }


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The options of scripts/quickstart.sh."""
    description = "Autoencoder, DiT and pictures at toy size, with no download."
    parser = Parser(description=description, prog="bash scripts/quickstart.sh")
    parser.add_argument("--short", action="store_true", help="a few steps of everything: it runs, and learns nothing")
    parser.add_argument("--gpu", action="store_true", help="at 256 px with a larger model, on one GPU")
    parser.add_argument("--data", help="your images and captions: folder, manifest, table, tar shards, hf://datasets/…")
    parser.add_argument("--resolution", type=int, default=128, help="with --data: side of the squares")
    parser.add_argument("--image_column", help="of a manifest or table (default: by the usual names)")
    parser.add_argument("--caption_column", help="likewise (default: by the usual names)")
    parser.add_argument("--max_errors", type=float, default=MAX_ERRORS, help="unusable samples: a share, or a number")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), help="folder to write")
    parser.add_argument("--pictures", action="store_true", help="train nothing: draw the pictures of docs/sampling.md")
    return parser.parse_args(argv)


@command
def main(argv: list[str]) -> None:
    """The recipe that the command line describes."""
    args = parse_arguments(argv)
    output, own_data = args.output.resolve(), args.data is not None
    if args.pictures:
        draw_pictures(output)
        return
    require_empty(output)
    if args.gpu and own_data:
        raise UserError("--gpu and --data exclude each other; a GPU is used with --data as well, where there is one")
    if args.gpu and not args.short and not torch.cuda.is_available():
        raise UserError("--gpu found no GPU that torch can use; bash scripts/quickstart.sh is made for the CPU")
    if own_data:  # complain before anything is written
        reading = Reading(
            image_column=args.image_column, caption_column=args.caption_column, failures=Failures(args.max_errors)
        )
        source = open_source(args.data, reading)
        aspect_buckets(args.resolution, max_aspect=1)
    output.mkdir(parents=True, exist_ok=True)
    processes, threads = divide_cores()
    plan = ON_GPU if args.gpu else ON_DATA if own_data else FULL
    recipe = Recipe(
        output=output,
        resolution=args.resolution if own_data else plan.side,
        plan=replace(plan, **SHORT) if args.short else plan,
        processes=processes,
        threads=threads,
    )
    if own_data:
        source.failures.keep_in(output / FILE_NAME)
        run_on_data(recipe, source)
    else:
        run_on_shapes(recipe)
    print(f"\n{sum(recipe.seconds.values()):.0f} seconds. Look at {output / 'samples.png'} and report.json beside it.")


if __name__ == "__main__":
    main()
