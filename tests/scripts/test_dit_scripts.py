"""The published training commands, run as a user would, at tiny size."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from svg_t2i.checkpoints.weights import load_transformer

SCRIPT_VARIABLES = {
    "MASTER_ADDR", "MASTER_PORT", "NNODES", "NPROC_PER_NODE", "CONFIG", "RESULTS_DIR", "DATA_PATH", "INIT_FROM",
}  # fmt: skip


def bash(command, cwd, **variables):
    """Run a command line; returns (exit code, output of both kinds)."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    unset = (
        "MASTER_ADDR",
        "MASTER_PORT",
        "NNODES",
        "NPROC_PER_NODE",
        "CONFIG",
        "RESULTS_DIR",
        "DATA_PATH",
        "INIT_FROM",
    )
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    result = subprocess.run(
        ["timeout", "250", "bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=280
    )
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def tiny(toy_parts, tmp_path):
    """Overrides that make a published config tiny; results go to tmp_path."""
    return " ".join(
        [
            f"results_dir={tmp_path}/run data.path={toy_parts}/manifest.jsonl data.resolution=64 data.num_workers=0",
            f"autoencoder.config={toy_parts}/autoencoder autoencoder.checkpoint=null autoencoder.stats=null",
            f"text_encoder.path={toy_parts}/text_encoder model=tiny train.precision=fp32 parallel.compile=false",
            "train.max_steps=2 train.global_batch_size=4 train.micro_batch_size=2 train.log_every=1",
        ]
    )


def test_one_gpu_for_test_from_inside_svg_t2i(repo_root, tiny, tmp_path):
    command = f"bash scripts/run_train_1gpus_forTest.sh 0 {tiny}"
    code, output = bash(command, repo_root / "svg_t2i")
    assert code == 0, output
    assert "step 2/2" in output
    assert "Loading weights" not in output  # a bar of transformers
    assert load_transformer(tmp_path / "run").config.dim == 64
    code, output = bash(f"{command} train.max_steps=3", repo_root / "svg_t2i")  # and goes on
    assert code == 0, output
    assert "resumed from" in output
    assert "step 3/3" in output


def test_several_machines_script_with_two_processes(repo_root, tiny, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    code, output = bash(
        f"bash scripts/run_train_mnodes.sh 0 {tiny}", repo_root, NNODES="1", NPROC_PER_NODE="2", MASTER_PORT=port
    )
    assert code == 0, output
    assert "2 processes" in output
    assert "step 2/2" in output


def test_eight_gpu_script_says_what_is_wrong(repo_root, tiny):
    code, output = bash(f"bash scripts/run_train_8gpus.sh {tiny} optim.lrr=1", repo_root, NPROC_PER_NODE="1")
    assert code != 0
    assert "unknown key 'optim.lrr' (did you mean 'lr'?)" in output


def test_rank_outside_the_machines_is_refused(repo_root):
    code, output = bash("bash scripts/run_train_1gpus_forTest.sh 1", repo_root)
    assert code == 2
    assert "RANK ID 1" in output
    assert "set NNODES" in output


@pytest.mark.parametrize("script", ["run_train_1gpus_forTest.sh", "run_train_8gpus.sh", "run_train_mnodes.sh"])
def test_help_starts_nothing(repo_root, script):
    command = ["bash", f"scripts/{script}", "--help"]
    result = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=20)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"bash scripts/{script}" in result.stdout
