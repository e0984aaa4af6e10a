"""Shared by the tests of training: a trained run to start others from."""

import pytest

from svg_t2i.train import main

FAST = ("optim.lr=0.05", "optim.warmup_steps=0", "optim.eps=1e-8", "train.ema_decay=0.5")


@pytest.fixture(scope="module")
def base(toy_parts, tmp_path_factory):
    """A run whose weights are not those of the start, which predict zero."""
    folder = tmp_path_factory.mktemp("base") / "run"
    main(["--config", str(toy_parts / "train.yaml"), f"results_dir={folder}", *FAST])
    return folder


@pytest.fixture
def tune(toy_parts, tmp_path, base):
    """Go on from `base` into tmp_path/NAME with overrides; returns that folder."""

    def run(name, *overrides):
        settings = [f"init_from={base}", f"results_dir={tmp_path / name}", *FAST, *overrides]
        main(["--config", str(toy_parts / "train.yaml"), *settings])
        return tmp_path / name

    return run


@pytest.fixture
def train(toy_parts, tmp_path):
    """Run the training entry into tmp_path/NAME with overrides; returns that folder."""

    def run(name, *overrides):
        main(["--config", str(toy_parts / "train.yaml"), f"results_dir={tmp_path / name}", *overrides])
        return tmp_path / name

    return run
