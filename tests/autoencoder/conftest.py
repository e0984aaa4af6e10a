"""A training run of a network of a few thousand parameters, through the entry."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

FOR_TEST = "configs/autoencoder/pure/svg_autoencoder_P_dd_M_IN_stage1_bs64_256_gpu1_forTest"
TINY = [
    "model.params.embed_dim=32",
    "model.params.ddconfig={z_channels: 32, ch: 32, ch_mult: [1, 1, 1, 1, 1], num_res_blocks: 0}",
    "model.params.dinoconfig={weights: random, overrides: {embed_dim: 32, depth: 1, num_heads: 1}}",
    "model.params.lossconfig.params.disc_ndf=8",
    "model.params.lossconfig.params.disc_num_layers=2",
    "training.log_images_every_n_steps=1000",
]
ON_CPU = ["training.trainer.accelerator=cpu"]
# at 128 px some become landscape, some portrait, some square
SIZES = [(90, 90), (200, 80), (80, 200), (128, 128), (70, 64), (256, 100), (150, 150)]


class ToyTraining:
    """Seven images, and runs on them.

    Attributes:
        tiny: overrides that make the published configs small. residual: overrides that add a residual branch.
    """

    name = FOR_TEST.rsplit("/", 1)[1]
    tiny = TINY
    residual = [
        "model.params.extra_vit_config={mask_ratio: 0.2, overrides: {embed_dim: 32, depth: 1, num_heads: 1}}",
        "model.params.ddconfig.z_channels=40",
    ]

    def __init__(self, folder: Path):
        self.folder = folder
        generator = np.random.default_rng(0)
        for i, size in enumerate(SIZES):
            coarse = Image.fromarray(generator.integers(0, 255, (4, 4, 3), dtype=np.uint8))
            coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        self.manifest = folder / "manifest.jsonl"
        self.manifest.write_text("\n".join(json.dumps({"path": f"{i}.png"}) for i in range(len(SIZES))))

    def run(self, *overrides: str, logdir: str = "logs") -> Path:
        """Trains, 64 px unless the overrides say otherwise, and returns the run's folder."""
        from autoencoder.train import main

        folder = self.folder / logdir
        own = [f"training.logdir={folder}", f"data.params.json_path={self.manifest}", "data.params.train_resol=64"]
        main(["--config", FOR_TEST, "--devices", "1", *TINY, *ON_CPU, *own, *overrides])
        return folder / self.name

    @staticmethod
    def read(folder: Path, step: int) -> dict:
        return torch.load(folder / "checkpoints" / f"step_{step:07d}.ckpt", weights_only=True)

    @staticmethod
    def scalars(folder: Path) -> tuple[dict[str, dict[int, float]], object]:
        """tag → step → value, and the event file that they are from."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder)).Reload()
        tags = events.Tags()["scalars"]
        return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}, events


@pytest.fixture
def toy(tmp_path) -> ToyTraining:
    return ToyTraining(tmp_path)


@pytest.fixture(scope="module")
def shared_toy(tmp_path_factory) -> ToyTraining:
    return ToyTraining(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def assert_equal():
    """assert_equal(a, b, where): nested containers of tensors and plain values are equal to the last bit."""

    def check(a, b, where):
        if isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                check(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b), where
            for i, (x, y) in enumerate(zip(a, b)):
                check(x, y, f"{where}[{i}]")
        else:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where

    return check
