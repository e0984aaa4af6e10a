"""What a loader says of a worker that is killed while it hands a batch over."""

import os
import signal
import threading

import pytest
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from autoencoder.common import workers
from autoencoder.common.workers import WorkerLoader, WorkersDied


def losing(monkeypatch, error, kill):
    """Let every loader lose the connection to its worker after the first batch; `kill`: which ends 0.3 s later."""
    original = DataLoader.__iter__

    def batches_of(loader):
        batches = original(loader)
        first = next(batches)

        def lost():
            yield first
            if kill:
                threading.Timer(0.3, os.kill, (batches._workers[0].pid, signal.SIGKILL)).start()
            raise error

        return lost()

    monkeypatch.setattr(DataLoader, "__iter__", batches_of)


@pytest.mark.parametrize("error", [ConnectionResetError("lost"), EOFError(), RuntimeError("lost")])
def test_a_connection_that_ends_before_its_worker_is_that_worker_s_death(monkeypatch, error):
    """The kernel closes what a killed process has open before it is seen to have ended."""
    losing(monkeypatch, error, kill=True)
    with pytest.raises(WorkersDied, match="a worker that reads data was killed by signal SIGKILL"):
        list(WorkerLoader(range(8), num_workers=1))


@pytest.mark.parametrize("before", [signal.SIG_DFL, lambda *_: None])
def test_the_handler_of_an_earlier_loader_of_torch_is_taken_back(monkeypatch, before):
    """It raises in any line of the main process, for the workers of every loader."""
    kept = signal.signal(signal.SIGCHLD, before)
    try:
        monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
        assert list(DataLoader(range(4), batch_size=None, num_workers=1)) == [0, 1, 2, 3]
        assert signal.getsignal(signal.SIGCHLD) != before
        with monkeypatch.context() as inner:
            losing(inner, ConnectionResetError("lost"), kill=True)
            with pytest.raises(WorkersDied, match="killed by signal SIGKILL"):
                list(WorkerLoader(range(8), num_workers=1))
        assert signal.getsignal(signal.SIGCHLD) == before
    finally:
        signal.signal(signal.SIGCHLD, kept)


def test_other_errors_stay_what_they_are(monkeypatch):
    losing(monkeypatch, ConnectionResetError("lost"), kill=False)
    monkeypatch.setattr(workers, "DYING_SECONDS", 0.1)
    with pytest.raises(ConnectionResetError, match="lost"):
        list(WorkerLoader(range(8), num_workers=1))
