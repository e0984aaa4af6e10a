"""Crashes, kills and requests: every process ends, with the reason, and what was trained is saved."""

import os
import shutil
import signal
import sys
import time

import pytest

from autoencoder.common import stopping
from autoencoder.common.config import UserError
from autoencoder.common.processes import World
from autoencoder.common.stopping import StopRequest
from autoencoder.common.watchdog import Watchdog
from autoencoder.common.workers import WorkersDied
from svg_t2i.data.loader import read_ahead
from tests.faults.runs import Command

ENDLESS = 100_000

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


def crash(stage):
    module, _, holder = stage.step[0].partition(":")
    target = f"taken.{holder}" if holder else "taken"
    return f"""
import {module} as taken, functools
@functools.wraps({target}.{stage.step[1]})
def boom(*_):
    raise RuntimeError("boom")
{target}.{stage.step[1]} = boom
"""


def test_a_crash_ends_the_workers_too(stage, tmp_path, started):
    command = started(stage.start(tmp_path / "run", f"{stage.workers}=2", stage.steps(3), before=crash(stage)))
    command.wait_for(lambda: "RuntimeError: boom" in command.output)
    assert command.wait(10) == 1
    assert not command.living()


def test_a_killed_worker_is_named_and_the_run_is_saved(stage, tmp_path, started):
    folder = tmp_path / "run"
    command = started(stage.start(folder, f"{stage.workers}=1", stage.steps(ENDLESS), f"{stage.keep}=2"))
    command.wait_for(lambda: len(stage.saved(folder)) > 1)
    workers = command.workers()
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    assert command.wait() == 2
    assert (
        "error: a worker that reads data was killed by signal SIGKILL; most likely the machine ran out of memory"
        in (command.output)
    )
    assert "Traceback" not in command.output
    assert not command.living()
    last = stage.saved(folder)[-1]
    stage.main(folder, stage.steps(last + 1))  # it goes on from there
    assert stage.saved(folder)[-1] == last + 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_asked_to_stop_a_run_saves_and_says_how_to_go_on(stage, tmp_path, monkeypatch, capfd, number, code):
    stage.at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    # no checkpoint is due at that step
    often = stage.often.replace("=1", "=100")
    assert stage.fork(tmp_path, stage.steps(4), often) == code
    output = capfd.readouterr()
    assert "stopped after step 2 as asked; the same command goes on" in output.out
    assert "Traceback" not in output.err
    assert stage.saved(tmp_path) == [2]


def test_ctrl_c_twice_ends_at_once(monkeypatch, stage, tmp_path):
    monkeypatch.setattr(stopping, "REPEATED_BY_HAND_WITHIN", 0.0)

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    stage.at_step(monkeypatch, 2, twice)
    assert stage.fork(tmp_path, stage.steps(3)) == -signal.SIGINT
    assert 2 not in stage.saved(tmp_path)


def test_the_end_of_torchrun_is_a_request(toy_parts, tmp_path, started):
    arguments = ["--config", str(toy_parts / "train.yaml"), f"results_dir={tmp_path / 'run'}", "train.max_steps=100000"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command = started(Command([*torchrun, "-m", "svg_t2i.train", *arguments], tmp_path / "log.txt"))
    command.wait_for(lambda: "step 2/" in command.output)
    command.process.kill()
    command.process.wait()
    command.wait_for(lambda: "as asked; the same command goes on" in command.output)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]


def test_a_script_that_is_asked_to_end_exits_with_the_code_of_its_run(toy_parts, tmp_path, started, repo_root):
    """As Slurm does it: the signal goes to the script, which is torchrun by then."""
    script = repo_root / "scripts" / "run_train_8gpus.sh"
    settings = [f"CONFIG={toy_parts / 'train.yaml'}", f"RESULTS_DIR={tmp_path / 'run'}", "NPROC_PER_NODE=2"]
    path = f"PATH={os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    more = ["train.max_steps=100000", "train.ckpt_every=100000"]
    command = started(Command(["env", path, *settings, "bash", str(script), *more], tmp_path / "log.txt"))
    command.wait_for(lambda: "step 2/" in command.output)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 75, command.output
    assert "as asked; the same command goes on" in command.output
    assert "Traceback" not in command.output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]


class TooLarge:
    """Cannot be handed over."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")


class LargeItems:
    def __getitem__(self, number):
        return number if number < 3 else TooLarge()

    def __len__(self):
        return 100


def test_a_batch_that_cannot_be_handed_over_is_no_endless_wait():
    batches = iter(read_ahead(LargeItems(), range(100), num_workers=1, prefetch=1))
    with pytest.raises(WorkersDied, match="its batch did not fit shared memory: .* MB free; lower num_workers"):
        list(batches)


def test_shared_memory_is_looked_at_first(stage, tmp_path, monkeypatch):
    usage = shutil.disk_usage("/")
    tight = type(usage)(usage.total, usage.total - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: tight if "shm" in str(path) else usage)
    with pytest.raises(UserError, match="hand over batches in shared memory.*lower num_wor"):
        stage.main(tmp_path, f"{stage.workers}=2", stage.steps(2))
    assert stage.saved(tmp_path) == []


def test_a_rank_that_hangs_is_named(tmp_path, capfd):
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            with Watchdog(tmp_path, 0.03, rank, 2) as watchdog:
                watchdog.at("in step 7")
                if rank == 0:
                    watchdog.at("waiting for the batch of step 8")
                time.sleep(60)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [2, 2]
    error = capfd.readouterr().err
    assert error.count("error: no progress for 0.03 minutes") == 1
    assert "rank 0 waiting for the batch of step 8" in error
    assert "rank 1 in step 7" in error
    assert "time.sleep" in error or "test_a_rank_that_hangs" in (tmp_path / "stalled" / "rank_00001.txt").read_text()


def test_a_step_that_does_not_end_ends_the_run(stage, tmp_path, monkeypatch, capfd):
    minutes = "train.stall_minutes=0.1" if stage.name == "dit" else "training.stall_minutes=0.1"
    stage.at_step(monkeypatch, 2, lambda: time.sleep(60))
    assert stage.fork(tmp_path, stage.steps(3), minutes) == 2
    assert "no progress for 0.1 minutes: rank 0 in step 2" in capfd.readouterr().err
    assert stage.saved(tmp_path) == [1]


def test_requests_are_noted_by_rank_0_alone_in_words(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.made
        assert request.exit_code == 130
    assert capfd.readouterr().err == ""


def test_others_end_quietly_where_rank_0_fails(run_from_main):
    assert run_from_main == [("UserError", "no such thing"), ("SystemExit", "2")]


@pytest.fixture
def run_from_main(tmp_path):
    """What two processes get when rank 0's work fails."""
    import json

    from torch.distributed import FileStore

    def attempt(rank):
        import torch.distributed as dist

        from autoencoder.common.config import UserError

        store = FileStore(str(tmp_path / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        world = World(rank, size=2, store=dist.PrefixStore("own", store))

        def make():
            raise UserError("no such thing")

        try:
            world.from_main(make)
        except (UserError, SystemExit) as error:
            (tmp_path / f"{rank}.json").write_text(json.dumps([type(error).__name__, str(error)]))
        dist.destroy_process_group()

    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                attempt(rank)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [tuple(json.loads((tmp_path / f"{rank}.json").read_text())) for rank in range(2)]
