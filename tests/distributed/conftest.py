"""Several processes over gloo without starting any interpreter: forks of this one."""

import os
import socket
import traceback

import pytest
import torch
import torch.multiprocessing as multiprocessing


def _child(rank, function, size, port, queue, arguments):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)  # renews torch's pool of threads after the fork: two threads that do so at once abort
    try:
        queue.put((rank, None, function(*arguments)))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
        raise


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def free_port():
    """free_port() -> a port nobody listens on."""
    return _free_port


@pytest.fixture(scope="session")
def run_processes():
    """run_processes(function, size, *arguments) -> its (picklable) results by rank; fails with every traceback."""

    def run(function, size, *arguments):
        port = _free_port()
        queue = multiprocessing.get_context("fork").SimpleQueue()
        context = multiprocessing.start_processes(
            _child, (function, size, port, queue, arguments), nprocs=size, join=False, start_method="fork"
        )
        reports = [queue.get() for _ in range(size)]
        errors = [f"rank {rank}: {error}" for rank, error, _ in reports if error]
        assert not errors, "\n".join(errors)
        results = {rank: result for rank, _, result in reports}
        while not context.join():
            pass
        return [results[rank] for rank in range(size)]

    return run
