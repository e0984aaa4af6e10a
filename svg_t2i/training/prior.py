"""Prior preservation (DreamBooth, arXiv:2208.12242, section 3.3): fine-tuning keeps what the model can do already.

Before the first step the model draws pictures of what it should keep; training sees them beside the own images, as one
more source. They are kept in the results folder:

    results_dir/prior_images/
      0000.png …       drawn by the model as it was
      images.jsonl     their prompts; written last
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from autoencoder.common.config import UserError, locate
from autoencoder.common.processes import World
from autoencoder.common.weights import replacing
from autoencoder.images.files import save_png
from svg_t2i.data.settings import DataConfig, DataSource
from svg_t2i.evaluation.evaluate import own_batches, sample_batch
from svg_t2i.features.frozen import FrozenNetworks
from svg_t2i.text.files import read_prompts
from svg_t2i.training.pictures import averaged_pipeline
from svg_t2i.training.settings import PriorConfig, TrainConfig
from svg_t2i.training.step import TrainState

if TYPE_CHECKING:
    from svg_t2i.pipeline import SVGT2IPipeline

log = logging.getLogger(__name__)

FOLDER, MANIFEST = "prior_images", "images.jsonl"


def with_prior(
    config: TrainConfig, prior: PriorConfig, state: TrainState, frozen: FrozenNetworks, world: World
) -> DataConfig:
    """The data of a run with its prior images as the last source. They are drawn where they are not there yet.

    Raises:
        UserError: the prompts cannot be read, or the images are gone in the middle of a run.
    """
    data, manifest = config.data, Path(config.results_dir) / FOLDER / MANIFEST
    if not world.from_main(manifest.is_file):
        if state.step:
            raise UserError(
                f"{manifest} is gone, and the model has learnt since: bring it back, or begin anew "
                "in another results_dir"
            )
        with frozen.whole():
            draw_prior(config, prior, averaged_pipeline(state, frozen, config, world), manifest, world)
    own = [replace(source, weight=1.0) if len(data.all_sources) == 1 else source for source in data.all_sources]
    share = prior.weight * sum(source.weight for source in own)
    return replace(data, path=None, sources=(*own, DataSource(str(manifest), share)))


def draw_prior(config: TrainConfig, prior: PriorConfig, pipeline: SVGT2IPipeline, manifest: Path, world: World) -> None:
    """Draw the pictures, squares of data.resolution with the settings of `samples`; picture i has seed i."""
    prompts = prior_prompts(prior)
    texts = [prompts[i % len(prompts)] for i in range(prior.num_images)]
    sampling = config.samples.options(config.data.resolution)
    log.info("drawing %d pictures of what the model can do, into %s", len(texts), manifest.parent)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    for batch in own_batches(len(texts), config.train.micro_batch_size, world):
        for i, image in zip(batch, sample_batch(pipeline, texts, batch, 0, sampling), strict=True):
            save_png(image, manifest.parent / f"{i:04d}.png")
    world.barrier()
    if world.is_main:
        lines = [json.dumps({"path": f"{i:04d}.png", "prompt": text}) + "\n" for i, text in enumerate(texts)]
        with replacing(manifest) as partial:
            partial.write_text("".join(lines), encoding="utf-8")
    world.barrier()


def prior_prompts(prior: PriorConfig) -> tuple[str, ...]:
    """The prompts themselves, or those of the file that is named. Raises UserError as `read_prompts`."""
    if isinstance(prior.prompts, str):
        return tuple(prompt.text for prompt in read_prompts(locate(prior.prompts)))
    return prior.prompts
