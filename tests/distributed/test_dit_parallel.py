"""Every way of spreading a run over processes, against the same run in one process; and checkpoints that change hands.

All runs of the same number of processes share one start: each rank plays through a list of runs.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor

from svg_t2i.checkpoints.adapters import FILE
from svg_t2i.checkpoints.index import SafeReader
from svg_t2i.checkpoints.run import newest_checkpoint, stored_tensors
from svg_t2i.train import main
from svg_t2i.training import loop
from svg_t2i.training.step import TrainState

FSDP, SDP, HSDP = (f"parallel.data_parallel={mode}" for mode in ("fsdp", "sdp", "hsdp"))
BY_ONE = "train.micro_batch_size=1"
RUNS = {  # of two processes
    "ddp": [BY_ONE],
    "sdp": [SDP, BY_ONE],
    "fsdp": [FSDP, BY_ONE, "parallel.activation_checkpointing=selective"],
    "frozen": [
        SDP, "parallel.shard_frozen=true", "parallel.activation_checkpointing=full", "train.micro_batch_size=2",
        "train.async_checkpoints=false",
    ],
    "compiled": [FSDP, BY_ONE, "parallel.compile=true"],
    "bf16": [FSDP, "train.precision=bf16", "train.micro_batch_size=2"],
}  # fmt: skip
# 4 samples of a step on three processes: two have nothing left for their second micro-batch
RUNS_OF_THREE = {"three": [FSDP, BY_ONE], "ddp of three": [BY_ONE]}
ADAPTERS = {  # of two processes, on the model of "one"
    "lora by ddp": [BY_ONE],
    "lora by fsdp": [FSDP, BY_ONE, "parallel.activation_checkpointing=full"],
    "lora by sdp in bf16": [SDP, "train.precision=bf16", "samples.every=4", "samples.prompts=[noise]"],
}  # fmt: skip
HEADS = {"head by ddp": [BY_ONE], "head by fsdp": [FSDP, BY_ONE]}  # of two processes, with an auxiliary head
STUDENTS = {"student by ddp": [BY_ONE], "student by fsdp": [FSDP, BY_ONE]}  # of two processes, of the model of "one"
RUNS_OF_FOUR = {"hsdp": [HSDP, "parallel.shard_size=2", BY_ONE], "stopped": [HSDP, "parallel.shard_size=2", BY_ONE]}
# second half after the first half of another; in four processes: hsdp
AFTER = ["ddp after ddp", "sdp after sdp", "fsdp after fsdp", "fsdp after ddp", "hsdp after hsdp", "hsdp after sdp"]
COMMON = [
    "train.ckpt_every=2", "train.max_steps=4", "train.ema_decay=[0.9,0.5]",
    "optim.eps=1e-8",  # a smaller one makes full steps of gradients that are mere rounding noise
]  # fmt: skip


def config_of(parts):
    """The settings of all runs: the loss on held-out samples is measured twice."""
    return ["--config", str(parts / "train.yaml"), f"validation={{path: {parts / 'manifest.jsonl'}, every: 2}}"]


def play(parts, folder, runs, ports):
    """Some runs, one after another, on this rank; -> the names of those with sharded weights, and exit codes."""
    sharded, codes, start, step = [], {}, TrainState.start.__func__, loop.train_step
    compile = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **options: compile(self, backend="eager", **options)  # no C++ compiler
    for (name, settings), port in zip(runs.items(), ports, strict=True):

        def spy(cls, *arguments, name=name):
            state = start(cls, *arguments)
            if isinstance(state.weights[0], DTensor):
                sharded.append(name)
            return state

        def step_with_signal(state, *arguments):
            if state.step == 1 and os.environ["RANK"] == "3":  # the others have to be told
                os.kill(os.getpid(), signal.SIGUSR1)
            step(state, *arguments)

        os.environ["MASTER_PORT"] = str(port)
        TrainState.start = classmethod(spy)
        loop.train_step = step_with_signal if name == "stopped" else step
        try:
            main([*config_of(parts), f"results_dir={folder / name}", *COMMON, *settings])
        except SystemExit as end:
            codes[name] = end.code
    return sharded, codes


def go_on(folder, name, source):
    """Give run `name` the first half of run `source`."""
    (folder / name / "checkpoints").mkdir(parents=True)
    (folder / name / "checkpoints" / "0000002").symlink_to(folder / source / "checkpoints" / "0000002")


@pytest.fixture(scope="module")
def runs(toy_parts, tmp_path_factory, run_processes, free_port):
    """Folder with the runs of two and of four processes, and "one", that of a single one."""
    folder = tmp_path_factory.mktemp("runs")
    for size, first in ((2, RUNS), (3, RUNS_OF_THREE), (4, RUNS_OF_FOUR)):
        second = {name: first[name.split()[0]] for name in AFTER if name.split()[0] in first}
        for name in second:
            go_on(folder, name, name.split()[2])
        together = first | second
        results = run_processes(play, size, toy_parts, folder, together, [free_port() for _ in together])
        for sharded, codes in results:
            assert sharded == [name for name in together if not name.startswith("ddp")]
            assert codes == {name: 75 for name in together if name == "stopped"}
    main([*config_of(toy_parts), f"results_dir={folder / 'one'}", *COMMON])
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


def logged(run, name, group="train"):
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return [event.value for event in board.Scalars(f"{group}/{name}")]


@pytest.mark.parametrize("name", [*(name for name in RUNS if name != "bf16"), *RUNS_OF_THREE, "hsdp"])
def test_several_processes_compute_what_one_does(runs, name):
    assert difference(runs, "one", name, step=2) <= 1e-6
    assert difference(runs, "one", name) <= 1e-6
    for value in ("loss", "grad_norm", "text_tokens"):
        assert logged(runs / name, value) == pytest.approx(logged(runs / "one", value), rel=1e-5)
    held_out = [logged(runs / run, "loss", "validation") for run in ("one", name)]
    assert len(held_out[0]) == 2
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-5)


@pytest.fixture(scope="module")
def adapters(runs, toy_parts, run_processes, free_port):
    """The folder of `runs` with adapters, auxiliary heads and students by two processes, and the same by one."""
    settings = [f"init_from={runs / 'one'}", "lora.rank=2", "optim.lr=0.01"]
    head = ["model_overrides.n_layers=2", "aux={loss: flow, block: 1}"]
    together = {name: [*settings, *own] for name, own in ADAPTERS.items()}
    together |= {name: [*head, *own] for name, own in HEADS.items()}
    student = [f"distill.teacher={runs / 'one'}", "distill.scales=[2,6]"]
    together |= {name: [*student, *own] for name, own in STUDENTS.items()}
    for sharded, codes in run_processes(play, 2, toy_parts, runs, together, [free_port() for _ in together]):
        assert sharded == [name for name in together if "ddp" not in name]
        assert codes == {}
    for name, own in (("lora", settings), ("head", head), ("student", student)):
        main(["--config", str(toy_parts / "train.yaml"), f"results_dir={runs / name}", *COMMON, *own])
    return runs


@pytest.mark.parametrize("name", ["lora by ddp", "lora by fsdp"])
def test_several_processes_train_the_adapter_that_one_does(adapters, name):
    assert difference(adapters, "lora", name) <= 1e-6
    one, several = (load_file(adapters / run / FILE) for run in ("lora", name))
    assert one.keys() == several.keys()
    assert max((one[key] - several[key]).abs().max().item() for key in one) <= 1e-6


@pytest.mark.parametrize("name", HEADS)
def test_several_processes_train_the_head_that_one_does(adapters, name):
    assert difference(adapters, "head", name) <= 1e-6
    assert logged(adapters / name, "aux_loss") == pytest.approx(logged(adapters / "head", "aux_loss"), rel=1e-5)


@pytest.mark.parametrize("name", STUDENTS)
def test_several_processes_train_the_student_that_one_does(adapters, name):
    assert difference(adapters, "student", name) <= 1e-6


def test_sharded_adapters_in_bf16_follow_those_in_fp32(adapters):
    run = adapters / "lora by sdp in bf16"
    assert logged(run, "loss") == pytest.approx(logged(adapters / "lora", "loss"), rel=0.01)
    assert {tensor.dtype for tensor in load_file(run / FILE).values()} == {torch.float32}
    assert (run / "samples" / "0000004.png").is_file()


def test_compiled_blocks_are_not_compiled_again(runs):
    graphs = logged(runs / "compiled", "compiled_graphs")
    assert graphs[0] > 0
    assert graphs == graphs[:1] * 4


def test_weights_in_bf16_follow_those_in_fp32(runs):
    losses, exact = logged(runs / "bf16", "loss"), logged(runs / "one", "loss")
    assert losses == pytest.approx(exact, rel=0.01)
    assert losses != pytest.approx(exact, rel=1e-6)
    stored = stored_tensors(runs / "bf16" / "checkpoints" / "0000004").values()
    assert {entry.properties.dtype for entry in stored} == {torch.float32}


@pytest.mark.parametrize("name", AFTER)
def test_a_run_goes_on_in_any_mode(runs, name):
    """Exactly in its own, and with the rounding of sums in another."""
    mode, _, source = name.split()
    if mode == source:
        assert difference(runs, source, name) == 0
    assert difference(runs, "one", name) <= 1e-6


@pytest.mark.parametrize("source", ["fsdp", "hsdp"])
def test_one_process_goes_on_with_shards(runs, toy_parts, source):
    name = f"one after {source}"
    go_on(runs, name, source)
    main(["--config", str(toy_parts / "train.yaml"), f"results_dir={runs / name}", *COMMON])
    assert difference(runs, "one", name) <= 1e-6


def test_all_stop_where_one_is_asked_to(runs, toy_parts):
    """Rank 3 of 4 gets the signal in step 2; all hear of it in step 3, save, and one process goes on."""
    assert newest_checkpoint(runs / "stopped" / "checkpoints", verify=True).name == "0000003"
    main(["--config", str(toy_parts / "train.yaml"), f"results_dir={runs / 'stopped'}", *COMMON])
    assert difference(runs, "one", "stopped") <= 1e-6


def unlucky(*arguments):
    """A run whose rank 1 is killed before step 4 of its first attempt, and its launcher before step 6 of the second.

    The first kill waits until the checkpoint of step 2, which is written in the background, is whole.
    """
    step, attempt = loop.train_step, int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    results = next(value.removeprefix("results_dir=") for value in arguments if value.startswith("results_dir="))

    def unlucky_step(state, *others):
        if (attempt, os.environ["RANK"], state.step) == (0, "1", 3):
            deadline = time.monotonic() + 60
            while newest_checkpoint(Path(results, "checkpoints"), verify=True) is None and time.monotonic() < deadline:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        if (attempt, os.environ["RANK"], state.step) == (1, "0", 5):
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(0.5)  # it passes the signal on
        step(state, *others)

    torch.set_num_threads(1)
    loop.train_step = unlucky_step
    sys.argv = ["train", *arguments]
    main()


def launch(arguments):
    """What `torchrun --nproc_per_node=2 --max-restarts=1` does, but workers are forks; ends this process."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, start_method="fork", run_id="test",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    try:
        elastic_launch(config, unlucky)(*arguments)
    except SignalException as end:
        os._exit(end.sigval)
    finally:
        os._exit(99)


def test_a_killed_process_and_a_lost_machine_cost_little(runs, toy_parts, capfd):
    """The kill costs the steps since the last checkpoint; being asked to end costs nothing."""
    settings = [f"results_dir={runs / 'unlucky'}", *COMMON, *RUNS["fsdp"], "resume=false", "train.max_steps=1000"]
    child = os.fork()
    if child == 0:
        launch(["--config", str(toy_parts / "train.yaml"), *settings])
    status = os.waitpid(child, 0)[1]
    output = capfd.readouterr().out
    assert os.waitstatus_to_exitcode(status) == signal.SIGTERM, output
    assert output.count("resumed from") == 1, output
    assert "step 3/1000" in output
    newest = newest_checkpoint(runs / "unlucky" / "checkpoints", verify=True)
    assert f"stopped after step {int(newest.name)} as asked" in output
    steps = int(newest.name) + 1
    go_on(runs, "lucky", "one")
    for name in ("unlucky", "lucky"):
        arguments = [f"results_dir={runs / name}", *COMMON, f"train.max_steps={steps}"]
        main(["--config", str(toy_parts / "train.yaml"), *arguments])
    assert difference(runs, "lucky", "unlucky", steps) <= 1e-6
