"""One picture for each sub-command of `svg_t2i.sample` that starts from images, drawn by the quickstart's model.

`bash scripts/quickstart.sh --pictures` calls it with the folder of a finished quickstart, and leaves there

    pictures/inputs/*.png         what they start from, drawn like the training data
    pictures/runs/VERB…/          the output folders of the commands
    pictures/variation.png        and image_to_image, inpaint, interpolate, retrieve: those of docs/sampling.md

The prompts of `image_to_image` and the query of `retrieve` are things that training never saw.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from draw import SIZE, Thing, draw
from PIL import Image
from steps import scalars

from autoencoder.common.config import UserError
from autoencoder.images.files import image_grid, save_png
from svg_t2i import sample

ZOOM = 2  # of the pictures in the grids
CIRCLE = Thing("red", "circle", "centre", "large")
SQUARE = Thing("blue", "square", "centre", "large")
CROSS = Thing("green", "cross", "top", "small")  # unseen, as the other two are not


def write_grid(
    path: Path, pictures: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None, zoom: int = ZOOM
) -> None:
    """A labelled grid of small pictures, enlarged without smoothing."""
    zoomed = [picture.resize([zoom * side for side in picture.size], Image.NEAREST) for picture in pictures]
    save_png(image_grid(zoomed, columns, labels), path)


def plot_losses(board: Path, path: Path) -> None:
    """The loss of training and that of held-out pictures over the steps of a run.

    They are not of one height: training draws times near noise more often, the held-out loss has eight times, evenly.
    """
    from matplotlib.figure import Figure

    read = scalars(board)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for tag, label in (("train/loss", "training"), ("validation/loss", "combinations never seen")):
        axes.plot(*read(tag), marker=".", label=label)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_pictures(folder: Path) -> None:
    """All pictures, in `folder`/pictures. UserError if no finished quickstart is in `folder`."""
    if not (folder / "transformer").is_dir() or not (folder / "data" / "train.jsonl").is_file():
        raise UserError(
            f"{folder} holds no finished quickstart; run bash scripts/quickstart.sh first, without --pictures"
        )
    for make in (variations, redrawn, inpainted, interpolated, retrieved):
        make(folder)
    print(f"look at {folder / 'pictures'}")


def variations(folder: Path) -> None:
    """variation.png: three things, each noised to several times t and sampled on without a prompt."""
    things, times = (CIRCLE, SQUARE, CROSS), (0.5, 0.2, 0.1, 0.05)
    inputs = [drawn(folder, thing) for thing in things]
    given = [word for path in inputs for word in ("--image", path)]
    columns = [[Image.open(path) for path in inputs]]
    columns += [run(folder, f"variation_{t}", "variation", *given, "--t", t) for t in times]
    labels = [name for _ in things for name in ("given", *(f"t = {t}" for t in times))]
    write(folder, "variation", [picture for row in zip(*columns) for picture in row], len(columns), labels)


def redrawn(folder: Path) -> None:
    """image_to_image.png: a thing redrawn after another prompt, at several strengths."""
    wanted, strengths = Thing("yellow", "circle", "bottom", "large"), (0.1, 0.15, 0.2, 0.25, 0.5)
    path = drawn(folder, SQUARE)
    pictures = [Image.open(path)]
    for strength in strengths:
        words = ("--image", path, "--prompt", wanted.caption, "--strength", strength, "--num_inference_steps", 40)
        pictures += run(folder, f"image_to_image_{strength}", "image_to_image", *words)
    labels = [f"given, and: {wanted.caption}", *(f"strength {strength}" for strength in strengths)]
    write(folder, "image_to_image", pictures, len(pictures), labels)


def inpainted(folder: Path) -> None:
    """inpaint.png: the right half of a thing repainted after other prompts."""
    path, mask = drawn(folder, SQUARE), folder / "pictures" / "inputs" / "mask.png"
    half = Image.new("L", (SIZE, SIZE))
    half.paste(255, (SIZE // 2, 0, SIZE, SIZE))
    save_png(half, mask)
    looks = (("red", "circle"), ("green", "triangle"), ("magenta", "square"), ("yellow", "square"))
    wanted = [Thing(*look, "centre", "large").caption for look in looks]
    prompts = [word for caption in wanted for word in ("--prompt", caption)]
    pictures = run(folder, "inpaint", "inpaint", "--image", path, "--mask", mask, *prompts)
    given = Image.open(path).convert("RGB")
    masked = Image.composite(Image.new("RGB", given.size, (150, 150, 150)), given, half)
    write(folder, "inpaint", [given, masked, *pictures], 6, ["given", "where the mask is white", *wanted])


def interpolated(folder: Path) -> None:
    """interpolate.png: from one prompt to another, and from one image to another."""
    ends = (Thing("red", "circle", "left", "large"), Thing("blue", "square", "right", "large"))
    prompts = [word for thing in ends for word in ("--prompt", thing.caption)]
    images = [word for thing in ends for word in ("--image", drawn(folder, thing))]
    rows = [
        run(folder, "interpolate_prompts", "interpolate", *prompts, "--weights", 7),
        run(folder, "interpolate_images", "interpolate", *images, "--weights", 7, "--t", 0.6),
    ]
    labels = [f"{kind} {i / 6:.2f}" for kind in ("prompts", "images") for i in range(7)]
    write(folder, "interpolate", [picture for row in rows for picture in row], 7, labels)


def retrieved(folder: Path) -> None:
    """retrieve.png: the pictures of the training set that are most like one of an unseen thing."""
    path = drawn(folder, CROSS)
    output = folder / "pictures" / "runs" / "retrieve"
    command = ["retrieve", "--checkpoint", folder / "transformer", "--image", path, "--top_k", 6, "--output", output]
    sample.main([str(word) for word in [*command, "--folder", folder / "data" / "images"]])
    matches = json.loads((output / "matches.json").read_text(encoding="utf-8"))["matches"]
    lines = (folder / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    captions = {Path(entry["path"]).name: entry["prompt"] for entry in map(json.loads, lines)}
    labels = [f"query: {CROSS.caption}"]
    labels += [f"{match['similarity']:.3f} {captions[Path(match['path']).name]}" for match in matches]
    write(folder, "retrieve", [Image.open(path), *(Image.open(match["path"]) for match in matches)], 7, labels)


def drawn(folder: Path, thing: Thing) -> Path:
    """The file of a thing's picture."""
    path = folder / "pictures" / "inputs" / f"{thing.caption.replace(' ', '_')}.png"
    if not path.is_file():
        save_png(draw(thing), path)
    return path


def run(folder: Path, name: str, what: str, *words: object) -> list[Image.Image]:
    """The pictures of `python -m svg_t2i.sample WHAT WORDS…`."""
    output = folder / "pictures" / "runs" / name
    command = [what, "--checkpoint", folder / "transformer", "--preset", "quickstart", "--output", output, *words]
    command = [str(word) for word in command]
    print(f"$ python -m svg_t2i.sample {shlex.join(command)}", flush=True)
    sample.main(command)
    records = json.loads((output / "data.json").read_text(encoding="utf-8"))
    return [Image.open(record["image_url"]).convert("RGB") for record in records]


def write(folder: Path, name: str, pictures: Sequence[Image.Image], columns: int, labels: Sequence[str]) -> None:
    path = folder / "pictures" / f"{name}.png"
    write_grid(path, pictures, columns, labels)
    save_png(Image.open(path).quantize(256, kmeans=4), path)  # half the bytes, for the docs
