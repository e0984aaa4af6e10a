"""A training step of shipped configs at full size, as rank 0 of several: prints what each took, a line of JSON.

    python tests/cuda/train.py 8 stage1_256 stage2_512 [key=value …]

static: GB of the frozen networks, of this rank's weights, of its averages and moments.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fake_cuda  # first: it loads what torch must find

import torch  # isort: skip

from autoencoder.common.config import load_config
from autoencoder.common.processes import World
from autoencoder.images.files import aspect_buckets
from networks import gemma, make_autoencoder
from svg_t2i.checkpoints.adapters import add_adapter
from svg_t2i.data.batching import largest_share, num_micro_batches
from svg_t2i.data.sources import TrainBatch
from svg_t2i.features.frozen import FrozenNetworks
from svg_t2i.training import sharding
from svg_t2i.training.monitor import Meter
from svg_t2i.training.settings import TrainConfig
from svg_t2i.training.step import FlowObjective, TrainState, train_step
from svg_t2i.transformer.model import SVGDiT

CAPTION = 150  # tokens on average
SHAPES = 5  # of images in a micro-batch, at most


def micro_batch(config: TrainConfig, rng: random.Random, size: int) -> TrainBatch:
    """Pinned images of several shapes and captions of about `CAPTION` tokens, a tenth of them empty."""
    buckets = rng.sample(aspect_buckets(config.data.resolution, config.data.max_aspect), SHAPES)
    sides = sorted(rng.choice(buckets) for _ in range(size))
    images = tuple(
        torch.zeros(sides.count(side), 3, side[1], side[0], dtype=torch.uint8) for side in sorted(set(sides))
    )
    lengths = [max(2, min(config.text_encoder.max_length, round(rng.gauss(CAPTION, CAPTION / 3)))) for _ in sides]
    captions = tuple(f"{length} {rng.random()}" if rng.random() > 0.1 else "" for length in lengths)
    positions = torch.arange(size)
    return TrainBatch(images, captions, positions, torch.full_like(positions, config.data.resolution)).pin_memory()


def main(processes: int, names: list[str], overrides: list[str]) -> None:
    configs = {
        name: load_config(
            TrainConfig, ROOT / "configs" / "svg_t2i" / f"{name}.yaml", ["parallel.compile=false", *overrides]
        )
        for name in names
    }
    autoencoder = make_autoencoder()
    fake_cuda.pretend(devices=8, processes=processes)
    world = World(0, 0, processes, torch.device("cuda", 0), min(8, processes))
    meshes = {
        name: sharding._mesh(config.parallel, world) if processes > 1 else None for name, config in configs.items()
    }
    mode = fake_cuda.FakeCuda()
    with mode:
        networks = fake_cuda.on_device(autoencoder), gemma()
        for name, config in configs.items():
            sharding._mesh = lambda *_, mesh=meshes[name]: mesh  # looks at numbers
            print(json.dumps({"config": name, **step_of(config, world, networks, mode)}), flush=True)
            gc.collect()


def step_of(config: TrainConfig, world: World, networks: tuple, mode: fake_cuda.FakeCuda) -> dict[str, object]:
    """Two micro-batches and the update, with what they took in GB."""
    rng, loop = random.Random(0), config.train
    frozen = FrozenNetworks(*networks, config.text_encoder.cache_tokens, loop.precision)
    sizes = [mode.now]
    with torch.device("cuda"):
        transformer = SVGDiT(config.model_config(384, 2304))
        if config.lora is not None:
            transformer = transformer.to(torch.bfloat16)
            add_adapter(transformer, config.lora)
    parameters = sum(weight.numel() for weight in transformer.parameters())
    objective = sharding.parallelize(FlowObjective(transformer, config), config.parallel, loop.precision, world)
    gc.collect()
    sizes.append(mode.now)
    state = TrainState.start(transformer, config)
    sizes.append(mode.now)
    meter = Meter(world, config, transformer.config)
    start = meter.phase

    def phase(name: str) -> None:
        mode.phase = name
        start(name)

    meter.phase = phase
    number = num_micro_batches(loop.global_batch_size, world.size, loop.micro_batch_size)
    share = -(-largest_share(loop.global_batch_size, world.size) // number)
    batches = [micro_batch(config, rng, share) for _ in range(min(2, number))]
    mode.clear()
    train_step(state, objective, batches, frozen, config, world, meter)
    return {
        "parameters": parameters,
        "micro_batches": number,
        "samples": share,
        "static": [round((end - start) / fake_cuda.GB, 2) for start, end in zip([0, *sizes], sizes)],
        "grids": [[(h // 16, w // 16) for h, w in batch.sizes] for batch in batches],
        "lengths": [[int(text.split()[0]) if text else 1 for text in batch.captions] for batch in batches],
        **mode.report(),
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    words = sys.argv[2:]
    main(int(sys.argv[1]), [w for w in words if "=" not in w], [w for w in words if "=" in w])
