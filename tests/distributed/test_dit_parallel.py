"""Every way of spreading a run over processes, against the same run in one process; and checkpoints that change hands.

All runs of the same number of processes share one start: each rank plays through the list of runs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.tensor import DTensor

from svg_t2i.saving import SafeReader, stored_tensors
from svg_t2i.train import main
from svg_t2i.training import TrainState

RUNS = {
    "ddp": ["train.micro_batch_size=1"],
    "sdp": ["parallel.data_parallel=sdp", "train.micro_batch_size=1"],
    "fsdp": ["parallel.data_parallel=fsdp", "train.micro_batch_size=1", "parallel.activation_checkpointing=selective"],
    "hsdp": ["parallel.data_parallel=hsdp", "parallel.shard_size=1", "train.micro_batch_size=1"],
    "frozen": [
        "parallel.data_parallel=sdp", "parallel.shard_frozen=true", "parallel.activation_checkpointing=full",
        "train.micro_batch_size=2", "train.async_checkpoints=false",
    ],
    "bf16": ["parallel.data_parallel=fsdp", "train.precision=bf16", "train.micro_batch_size=2"],
}  # fmt: skip
COMMON = [
    "train.ckpt_every=2", "train.max_steps=4", "train.ema_decay=[0.9,0.5]",
    "optim.eps=1e-8",  # a smaller one makes full steps of gradients that are mere rounding noise
]  # fmt: skip


AFTER = {"fsdp after ddp": "ddp", "hsdp after sdp": "sdp", "sdp after sdp": "sdp"}  # its first half


def play(parts, folder, ports):
    """All runs, one after another, on this rank; -> the names of those that trained sharded weights."""
    sharded, start = [], TrainState.start.__func__
    runs = RUNS | {name: RUNS[name.split()[0]] for name in AFTER}
    for (name, settings), port in zip(runs.items(), ports, strict=True):

        def spy(cls, *arguments, name=name):
            state = start(cls, *arguments)
            if isinstance(state.weights[0], DTensor):
                sharded.append(name)
            return state

        os.environ["MASTER_PORT"] = str(port)
        TrainState.start = classmethod(spy)
        main(["--config", str(parts / "train.yaml"), f"results_dir={folder / name}", *COMMON, *settings])
    return sharded


@pytest.fixture(scope="module")
def runs(toy_parts, tmp_path_factory, run_processes, free_port):
    """Folder with the runs of two processes, and "one", that of a single one."""
    folder = tmp_path_factory.mktemp("runs")
    for name, source in AFTER.items():
        (folder / name / "checkpoints").mkdir(parents=True)
        (folder / name / "checkpoints" / "0000002").symlink_to(folder / source / "checkpoints" / "0000002")
    sharded, _ = run_processes(play, 2, toy_parts, folder, [free_port() for _ in [*RUNS, *AFTER]])
    assert sharded == [name for name in [*RUNS, *AFTER] if name != "ddp"]
    main(["--config", str(toy_parts / "train.yaml"), f"results_dir={folder / 'one'}", *COMMON])
    return folder


def contents(checkpoint):
    """Every tensor in a checkpoint: weights, averages, moments."""
    tensors = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in stored_tensors(checkpoint).items()}
    dcp.load(tensors, storage_reader=SafeReader(checkpoint), no_dist=True)
    return tensors


def difference(folder, one, two, step=4):
    """Largest one between the checkpoints of two runs."""
    a, b = (contents(folder / run / "checkpoints" / f"{step:07d}") for run in (one, two))
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def logged(run, name):
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return [event.value for event in board.Scalars(f"train/{name}")]


@pytest.mark.parametrize("name", [name for name in RUNS if name != "bf16"])
def test_two_processes_compute_what_one_does(runs, name):
    assert difference(runs, "one", name, step=2) <= 1e-6
    assert difference(runs, "one", name) <= 1e-6
    for value in ("loss", "grad_norm", "text_tokens"):
        assert logged(runs / name, value) == pytest.approx(logged(runs / "one", value), rel=1e-5)


def test_weights_in_bf16_follow_those_in_fp32(runs):
    losses, exact = logged(runs / "bf16", "loss"), logged(runs / "one", "loss")
    assert losses == pytest.approx(exact, rel=0.01)
    assert losses != pytest.approx(exact, rel=1e-6)
    stored = stored_tensors(runs / "bf16" / "checkpoints" / "0000004").values()
    assert {entry.properties.dtype for entry in stored} == {torch.float32}


def test_a_run_goes_on_exactly_where_it_stopped(runs):
    assert difference(runs, "sdp", "sdp after sdp") == 0


@pytest.mark.parametrize("name", ["fsdp after ddp", "hsdp after sdp"])
def test_a_run_goes_on_in_another_mode(runs, name):
    assert difference(runs, "one", name) <= 1e-6


def test_one_process_goes_on_with_shards(runs, toy_parts, tmp_path):
    (tmp_path / "two" / "checkpoints").mkdir(parents=True)
    (tmp_path / "two" / "checkpoints" / "0000002").symlink_to(runs / "fsdp" / "checkpoints" / "0000002")
    main(["--config", str(toy_parts / "train.yaml"), f"results_dir={tmp_path / 'two'}", *COMMON])
    (tmp_path / "one").symlink_to(runs / "one")
    assert difference(tmp_path, "one", "two") <= 1e-6


def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(runs, toy_parts, tmp_path, repo_root):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    settings = [f"results_dir={tmp_path / 'two'}", *COMMON, *RUNS["fsdp"], "resume=false"]
    result = subprocess.run(
        [*command, Path(__file__).with_name("fail_once.py"), "--config", toy_parts / "train.yaml", *settings],
        env={**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("resumed from") == 1
    assert "step 3/4" in result.stdout
    (tmp_path / "one").symlink_to(runs / "one")
    assert difference(tmp_path, "one", "two") <= 1e-6
