"""Asked to stop, a run ends after its step, saved whole; data workers hold out; asked again, it ends at once."""

import os
import signal
import time

import pytest
import torch
from torch.utils.data import Dataset

from autoencoder.common import stopping
from autoencoder.common.stopping import StopRequest
from autoencoder.common.workers import WorkersDied
from svg_t2i import train
from svg_t2i.checkpoints.run import load_checkpoint, newest_checkpoint, stored_tensors
from svg_t2i.data.loader import read_ahead
from svg_t2i.training import loop


def forked(function):
    """Status of a child process that ran `function`."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(99)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_request_is_noted_and_afterwards_signals_act_as_before(number):
    before = signal.getsignal(number)
    with StopRequest() as request:
        assert not request.made
        for _ in range(2):  # the second is the same request, passed on by a launcher
            os.kill(os.getpid(), number)
            assert request.made
    assert signal.getsignal(number) is before


def test_a_later_signal_ends_the_process_at_once(monkeypatch):
    monkeypatch.setattr(stopping, "REPEATED_WITHIN", 0.0)

    def ask_twice():
        with StopRequest():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)

    assert os.WTERMSIG(forked(ask_twice)) == signal.SIGTERM


class ProcessIds(Dataset):
    def __getitem__(self, _):
        return os.getpid()


def test_data_workers_survive_the_first_signal_and_no_other():
    ids = iter(read_ahead(ProcessIds(), range(100), num_workers=1, prefetch=1))
    worker = next(ids)
    os.kill(worker, signal.SIGTERM)
    assert {next(ids) for _ in range(20)} == {worker}
    os.kill(worker, signal.SIGTERM)
    with pytest.raises(WorkersDied, match="killed by signal SIGTERM"):
        list(ids)


def everything(run, step):
    """All tensors of a checkpoint."""
    folder = run / "checkpoints" / f"{step:07d}"
    tensors = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in stored_tensors(folder).items()}
    load_checkpoint(folder, tensors)
    return tensors


def test_a_run_that_was_asked_to_stop_goes_on_bit_for_bit(toy_parts, tmp_path, monkeypatch, capfd):
    # features of captions depend in their last bits on what they are encoded with, so they are not kept
    settings = ["--config", str(toy_parts / "train.yaml"), "text_encoder.cache_tokens=0", "data.num_workers=1"]
    step = loop.train_step

    def step_with_signal(state, *arguments):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        step(state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step_with_signal)
        patch.setattr("sys.argv", ["train", *settings, f"results_dir={tmp_path / 'stopped'}"])
        status = forked(train.main)
    assert os.waitstatus_to_exitcode(status) == stopping.EXIT_CODE == 75
    assert "stopped after step 3 as asked" in capfd.readouterr().out
    assert newest_checkpoint(tmp_path / "stopped" / "checkpoints", verify=True).name == "0000003"
    train.main([*settings, f"results_dir={tmp_path / 'stopped'}"])
    assert "resumed from" in capfd.readouterr().out
    train.main([*settings, f"results_dir={tmp_path / 'straight'}"])
    one, two = everything(tmp_path / "stopped", 4), everything(tmp_path / "straight", 4)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_asked_in_its_last_step_a_run_is_simply_done(toy_parts, tmp_path, monkeypatch):
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *a: (step(*a), os.kill(os.getpid(), signal.SIGTERM)))
    train.main(["--config", str(toy_parts / "train.yaml"), f"results_dir={tmp_path}", "train.max_steps=1"])
    assert newest_checkpoint(tmp_path / "checkpoints").name == "0000001"
