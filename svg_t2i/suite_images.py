"""Making the images of a benchmark: shared by processes, resumable, in a folder that knows its settings."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from autoencoder.config import UserError
from autoencoder.images import save_png
from svg_t2i.evaluation import Job, own_batches, sample_batch
from svg_t2i.evaluation_config import SamplingConfig
from svg_t2i.parallel import World, reduce_sum
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.suites import Prompt, SuiteName, complete, image_path


def generate(
    pipeline: SVGT2IPipeline,
    suite: SuiteName,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    output: Path,
    count: int,
    seed: int,
    batch_size: int,
    world: World,
) -> list[Path]:
    """Make `count` images of every prompt in the suite's layout, but for those that are there.

    Image i of the run has seed + i. A batch that lacks an image is made again as a whole: what an image looks like to
    the last bit depends on its batch. The batches are dealt to the processes.

    Returns:
        The paths of all images, prompt by prompt; on every process, and once they are all there.
    """
    texts = [prompt.text for prompt in prompts for _ in range(count)]
    jobs = [Job(text, seed + i) for i, text in enumerate(texts)]
    paths = [image_path(suite, output, prompt, number) for prompt in prompts for number in range(count)]
    batches = list(own_batches(len(jobs), batch_size, world))
    for batch in tqdm(batches, desc="sampling", unit="batch", disable=not world.is_main):
        missing = [i for i in batch if not paths[i].is_file()]
        if not missing:
            continue
        images = sample_batch(pipeline, [jobs[i] for i in batch], sampling)
        for i in missing:
            record = {"caption": jobs[i].prompt, "seed": jobs[i].seed, **asdict(sampling)}
            save_png(images[i - batch.start], paths[i], {"parameters": json.dumps(record, ensure_ascii=False)})
    wait(world)
    for prompt in prompts[world.rank :: world.size]:
        complete(suite, output, prompt, count)
    wait(world)
    return paths


def wait(world: World) -> None:
    """Go on when all processes have come here."""
    reduce_sum(torch.zeros(1, device=world.device), world).item()


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
    path = output / "settings.json"
    if world.is_main:
        check_settings(path, settings)
    pipeline = load()
    if world.is_main:
        complete_settings = {**settings, "model": describe_model(pipeline)}
        check_settings(path, complete_settings)
        run = {**command, "processes": world.size, "device": str(pipeline.device), "torch": torch.__version__}
        write_json({**complete_settings, "run": run}, path)
    wait(world)
    return pipeline


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder that holds anything but a run with these settings, finished or not."""
    folder = path.parent
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--output {folder} is not empty and holds no benchmark; choose another folder or empty it")
        return
    recorded = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(settings))
    changed = [
        f"{key} was {json.dumps(recorded.get(key))} and is {json.dumps(wanted[key])}"
        for key in wanted
        if recorded.get(key) != wanted[key]
    ]
    if changed:
        raise UserError(f"--output {folder} holds other images; choose another folder: {'; '.join(changed)}")


def describe_model(pipeline: SVGT2IPipeline) -> dict[str, Any]:
    """What identifies the weights. A path does not: a training run has newer ones under it every hour."""
    return {
        "transformer": weights_digest(pipeline.transformer),
        "autoencoder": pipeline.autoencoder.fingerprint(),
        "decoder": weights_digest(pipeline.autoencoder.decoder),
        "text_encoder": pipeline.text_encoder.fingerprint(),
        "dtype": str(next(pipeline.transformer.parameters()).dtype),
    }


def weights_digest(module: nn.Module) -> str:
    """16 hex digits over names, shapes and a sample of the values of all weights."""
    weights = dict(sorted(module.named_parameters()))
    digest = hashlib.sha256(str([(name, tuple(weight.shape)) for name, weight in weights.items()]).encode())
    samples = [weight.detach().flatten()[:: math.ceil(weight.numel() / 64)].bfloat16() for weight in weights.values()]
    digest.update(torch.cat(samples).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def digest_prompts(prompts: Sequence[Prompt]) -> str:
    """16 hex digits over all prompts."""
    return hashlib.sha256("\n".join(prompt.text for prompt in prompts).encode()).hexdigest()[:16]


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """Write atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
