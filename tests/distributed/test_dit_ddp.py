"""Two processes over gloo against one: the same losses and weights, and checkpoints that change hands."""

import os
import subprocess
import sys

import pytest

from svg_t2i.checkpoint import read_transformer
from svg_t2i.train import main


def torchrun(repo_root, processes, *arguments):
    """Run svg_t2i.train in several processes; returns its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    result = subprocess.run(
        [*command, "-m", "svg_t2i.train", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def losses(output):
    return [float(line.split("loss ")[1].split()[0]) for line in output.splitlines() if line.startswith("step ")]


@pytest.fixture(scope="module")
def two(toy_parts, tmp_path_factory, repo_root):
    """A run of two processes with two micro-batches each, and what it printed."""
    folder = tmp_path_factory.mktemp("two")
    settings = ["train.micro_batch_size=1", "train.ckpt_every=2"]
    output = torchrun(repo_root, 2, "--config", toy_parts / "train.yaml", f"results_dir={folder}", *settings)
    return folder, output


def assert_close(one, two, step):
    for ema in (False, True):
        a, b = (read_transformer(run / "checkpoints" / f"{step:07d}", ema).state for run in (one, two))
        assert max((a[key] - b[key]).abs().max().item() for key in a) <= 1e-6


def test_two_processes_compute_what_one_does(two, toy_parts, tmp_path, capsys):
    folder, output = two
    main(["--config", str(toy_parts / "train.yaml"), f"results_dir={tmp_path}"])
    assert losses(output) == pytest.approx(losses(capsys.readouterr().out), abs=1e-4)  # as printed
    assert len(losses(output)) == 4  # only rank 0 speaks
    assert_close(tmp_path, folder, 4)


def test_checkpoint_of_two_processes_resumes_on_one(two, toy_parts, tmp_path, capsys):
    folder, _ = two
    (tmp_path / "checkpoints").mkdir()
    os.symlink(folder / "checkpoints" / "0000002", tmp_path / "checkpoints" / "0000002")
    main(["--config", str(toy_parts / "train.yaml"), f"results_dir={tmp_path}"])
    assert "resumed from" in capsys.readouterr().out
    assert_close(tmp_path, folder, 4)
