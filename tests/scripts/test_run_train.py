"""The published command, run as a user would from inside `autoencoder/`, at a size of seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CONFIG = "configs/pure/svg_autoencoder_P_dd_M_IN_stage1_bs64_256_gpu1_forTest"
TINY = [
    "model.params.dinoconfig.weights=random",
    "model.params.dinoconfig.overrides={embed_dim: 32, depth: 1, num_heads: 1}",
    "model.params.ddconfig={z_channels: 32, ch: 32, ch_mult: [1, 1, 1, 1, 1], num_res_blocks: 0}",
    "model.params.lossconfig.params.disc_ndf=8",
    "data.params.train_resol=64",
    "training.trainer.accelerator=cpu",
    "training.trainer.max_steps=2",
]


@pytest.fixture
def run_train(repo_root):
    def run(*arguments):
        environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        command = ["bash", "run_train.sh", *map(str, arguments)]
        return subprocess.run(
            command, cwd=repo_root / "autoencoder", env=environment, capture_output=True, text=True, timeout=240
        )

    return run


def test_published_command_on_two_devices(run_train, tmp_path):
    result = run_train(2, CONFIG, *TINY, f"training.logdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step 2/2") == 1  # one process speaks
    assert re.search(r"2 steps in \d+\.\d minutes, at most \d+\.\d\d GiB", result.stdout)
    assert "RANDOM ENCODER" in result.stderr
    folder = tmp_path / Path(CONFIG).name
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"encoder", "decoder", "loss"}
    assert checkpoint["ImageDataModule"]["position"] == 2 * 2 * 2
    assert list(folder.glob("events.out.tfevents.*"))
    assert list((folder / "checkpoints").glob("step_0000002.ckpt"))


def test_mistakes_are_one_line(run_train, tmp_path):
    result = run_train(1, CONFIG + ".yaml", *TINY, f"training.logdir={tmp_path}", "training.trainer.max_step=3")
    assert result.returncode == 2
    assert "did you mean 'max_steps'" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
