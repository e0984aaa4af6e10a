"""The scripts of `autoencoder/`, run as a user would from inside it, at a size of seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoencoder.common.config import save_config

CONFIG = "configs/pure/svg_autoencoder_P_dd_M_IN_stage1_bs64_256_gpu1_forTest"


@pytest.fixture
def run_train(repo_root):
    def run(*arguments):
        environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        command = ["bash", "run_train.sh", *map(str, arguments)]
        return subprocess.run(
            command, cwd=repo_root / "autoencoder", env=environment, capture_output=True, text=True, timeout=240
        )

    return run


def test_published_command_on_two_devices(run_train, tiny_for_test, tmp_path):
    steps = "training.trainer.max_steps=2"
    result = run_train(2, CONFIG, *tiny_for_test, steps, f"training.logdir={tmp_path}")
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


@pytest.mark.parametrize("script", ["run_train.sh", "run_eval.sh"])
def test_help_and_no_arguments_start_nothing(repo_root, script):
    for arguments, status in (([], 2), (["--help"], 0), (["-h"], 0)):
        result = subprocess.run(
            ["bash", script, *arguments], cwd=repo_root / "autoencoder", capture_output=True, text=True, timeout=20,
            env=os.environ | {"PYTHON": "false"},
        )  # fmt: skip
        assert (result.returncode, result.stderr) == (status, "")
        assert f"bash {script} <GPU NUM>" in result.stdout


def test_mistakes_are_one_line(run_train, tiny_for_test, tmp_path):
    mistake = "training.trainer.max_step=3"
    result = run_train(1, CONFIG + ".yaml", *tiny_for_test, f"training.logdir={tmp_path}", mistake)
    assert result.returncode == 2
    assert "did you mean 'max_steps'" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_evaluation_fills_a_table_and_goes_on(repo_root, tmp_path):
    """Two configs, one of which lacks its weights: the other's row is there, and is not measured again."""
    small = {"z_channels": 32, "ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 0}
    encoder = {"model_name": "dinov3_vits16plus", "overrides": {"embed_dim": 32, "depth": 1, "num_heads": 1}}
    for name, weights in (("small", "random"), ("lost", "lost.pth")):
        params = {"ddconfig": small, "dinoconfig": encoder | {"weights": weights}}
        save_config({"model": {"params": params}}, tmp_path / f"{name}.yaml")
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "OUTPUT": str(tmp_path / "out")}
    environment |= {"CONFIGS": f"{tmp_path}/small.yaml {tmp_path}/lost.yaml", "RESOLUTIONS": "32", "NUM_WORKERS": "0"}

    def evaluate():
        command = ["bash", "run_eval.sh", "1", "../configs/example_images"]
        return subprocess.run(
            command, cwd=repo_root / "autoencoder", env=environment, capture_output=True, text=True, timeout=240
        )

    result = evaluate()
    assert result.returncode == 2
    assert "lost.pth" in result.stderr
    assert "lost.yaml was not evaluated" in result.stderr
    assert "| small | configs/example_images | 32 | 8 |" in result.stdout
    environment["CONFIGS"] = f"{tmp_path}/small.yaml"
    again = evaluate()
    assert again.returncode == 0, again.stderr
    assert "small has results" in again.stdout
    assert not list((repo_root / "autoencoder").glob("results"))
