"""What a loader says of a worker that is killed while it hands a batch over."""

import os
import signal
import threading

import pytest
from torch.utils.data import DataLoader

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


def test_other_errors_stay_what_they_are(monkeypatch):
    losing(monkeypatch, ConnectionResetError("lost"), kill=False)
    monkeypatch.setattr(workers, "DYING_SECONDS", 0.1)
    with pytest.raises(ConnectionResetError, match="lost"):
        list(WorkerLoader(range(8), num_workers=1))
