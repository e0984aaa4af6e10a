"""Images of a benchmark: split over processes, resumable, in a folder that records its settings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from autoencoder.common.processes import World
from autoencoder.common.weights import write_json
from autoencoder.images.saving import save_image
from svg_t2i.evaluation.evaluate import own_batches, sample_batch
from svg_t2i.evaluation.suites import SuiteName, SuitePrompt, complete, image_path
from svg_t2i.rendering.folder import SETTINGS, check_folder, full_disk
from svg_t2i.sampling.options import SamplingOptions

if TYPE_CHECKING:
    from svg_t2i.pipeline import SVGT2IPipeline


def generate(
    pipeline: SVGT2IPipeline,
    suite: SuiteName,
    prompts: Sequence[SuitePrompt],
    sampling: SamplingOptions,
    *,
    output: Path,
    count: int,
    seed: int,
    batch_size: int,
    world: World,
) -> list[Path]:
    """Make `count` images of every prompt in the suite's layout, but for those that are there.

    Image i of the run has seed + i. A batch that lacks an image is made again as a whole: what an image looks like to
    the last bit depends on its batch. The batches are split over the processes.

    Returns:
        The paths of all images, prompt by prompt; on every process, and once they are all there.
    """
    texts = [prompt.text for prompt in prompts for _ in range(count)]
    paths = [image_path(suite, output, prompt, number) for prompt in prompts for number in range(count)]
    batches = list(own_batches(len(texts), batch_size, world))
    for batch in tqdm(batches, desc="sampling", unit="batch", disable=not world.is_main):
        missing = [i for i in batch if not paths[i].is_file()]
        if not missing:
            continue
        images = sample_batch(pipeline, texts, batch, seed, sampling)
        for i in missing:
            record = {"caption": texts[i], "seed": seed + i, **asdict(sampling)}
            with full_disk(output):
                save_image(images[i - batch.start], paths[i], record)
    world.barrier()
    with full_disk(output):
        for prompt in prompts[world.rank :: world.size]:
            complete(suite, output, prompt, count)
    world.barrier()
    return paths


def claim(
    output: Path,
    settings: Mapping[str, Any],
    load: Callable[[], SVGT2IPipeline],
    command: Mapping[str, str],
    world: World,
) -> SVGT2IPipeline:
    """Load the model, and keep the folder for it and these settings: output/settings.json.

    Args:
        settings: what the images depend on; a folder made with others is refused, before the model is loaded.
        command: recorded, but free to change from one start to the next.

    Raises:
        UserError: the folder holds a run with other settings or weights, or something else.
    """
    if world.is_main:
        check_folder(output, settings)
    pipeline = load()
    if world.is_main:
        complete_settings = {**settings, "model": pipeline.networks.describe()}
        check_folder(output, complete_settings)
        run = {**command, "processes": world.size, "device": str(pipeline.device), "torch": torch.__version__}
        with full_disk(output):
            write_json({**complete_settings, "run": run}, output / SETTINGS)
    world.barrier()
    return pipeline


def digest_prompts(prompts: Sequence[SuitePrompt]) -> str:
    """16 hex digits over all prompts."""
    return hashlib.sha256("\n".join(prompt.text for prompt in prompts).encode()).hexdigest()[:16]
