"""Pictures during training: fixed prompts and seeds through the pipeline, from the averaged weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from autoencoder.common.processes import World
from autoencoder.images.files import image_grid, save_png
from svg_t2i.checkpoints.adapters import add_adapter
from svg_t2i.evaluation.evaluate import evaluate
from svg_t2i.features.frozen import FrozenNetworks
from svg_t2i.training.settings import TrainConfig
from svg_t2i.training.sharding import whole_tensor
from svg_t2i.training.step import TrainState
from svg_t2i.transformer.model import SVGDiT

if TYPE_CHECKING:  # diffusers takes seconds to import, which training without pictures need not wait for
    from svg_t2i.pipeline import SVGT2IPipeline

MOST_COLUMNS = 4


def averaged_transformer(state: TrainState, config: TrainConfig, world: World) -> SVGDiT:
    """The model with the averaged weights, on every rank, in the precision of training. What is frozen is shared."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    with torch.device("meta"):
        model = SVGDiT(state.transformer.config)
        if config.lora is not None:
            add_adapter(model, config.lora)
    tensors = state.transformer.state_dict() | state.ema  # what is frozen has no average
    weights = {name: whole_tensor(tensor).to(dtype) for name, tensor in tensors.items()}  # one whole one at a time
    model.load_state_dict(weights, assign=True)
    return model


def averaged_pipeline(state: TrainState, frozen: FrozenNetworks, config: TrainConfig, world: World) -> SVGT2IPipeline:
    """A pipeline over the averaged weights and the run's own frozen networks, on every rank."""
    from svg_t2i.pipeline import SVGT2IPipeline

    transformer, text = averaged_transformer(state, config, world), frozen.captions.encoder
    pipeline = SVGT2IPipeline(
        frozen.autoencoder,
        transformer,
        text.model,
        text.tokenizer,
        sampling=config.samples.options(config.data.resolution),
        max_length=text.max_length,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def evaluate_averaged(state: TrainState, frozen: FrozenNetworks, config: TrainConfig, world: World) -> dict[str, float]:
    """The metrics of the `evaluation` section, of the averaged weights; the same on every rank."""
    pipeline = averaged_pipeline(state, frozen, config, world)
    with frozen.whole():
        return evaluate(pipeline, config.evaluation, world)


def sample_grid(state: TrainState, frozen: FrozenNetworks, config: TrainConfig, world: World) -> Image.Image | None:
    """The pictures of `samples.prompts`, split over the ranks; written to results_dir/samples/{step:07d}.png by rank 0.

    Returns:
        The grid on rank 0, None elsewhere.
    """
    settings = config.samples
    own = list(range(world.rank, len(settings.prompts), world.size))
    pipeline = averaged_pipeline(state, frozen, config, world)
    pictures: list[Image.Image] = []
    with frozen.whole():
        if own:
            prompts, seeds = [settings.prompts[i] for i in own], [settings.seed + i for i in own]
            pictures = pipeline(prompts, seed=seeds).images
    gathered = world.gather(list(zip(own, pictures, strict=True)))
    if not world.is_main:
        return None
    by_prompt = dict(pair for share in gathered for pair in share)
    grid = image_grid(
        [by_prompt[i] for i in range(len(settings.prompts))],
        columns=min(MOST_COLUMNS, len(settings.prompts)),
        labels=list(settings.prompts),
    )
    folder = Path(config.results_dir) / "samples"
    folder.mkdir(exist_ok=True)
    save_png(grid, folder / f"{state.step:07d}.png")
    return grid
