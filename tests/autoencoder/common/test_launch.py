"""The launcher ends as the processes do that it starts; torchrun itself ends with 1 whatever they say."""

import os
import signal
import subprocess
import sys
import time

import pytest

from autoencoder.common.config import REPO_ROOT
from autoencoder.common.launch import exit_code

SCRIPT = """
import os, signal, sys, time
what, rank = sys.argv[1], int(os.environ["RANK"])
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "asked":
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(75))
    print("ready", flush=True)
    time.sleep(60)
if what == "one":
    sys.exit(2) if rank == 1 else time.sleep(60)
sys.exit(int(what))
"""


@pytest.fixture
def start(tmp_path):
    """Starts two processes that do as they are told."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def start(what):
        command = [sys.executable, "-m", "autoencoder.common.launch", "--standalone", "--nproc_per_node=2"]
        environment = os.environ | {"PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"}
        return subprocess.Popen(
            [*command, tmp_path / "script.py", what],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.mark.parametrize(("what", "code"), [("0", 0), ("75", 75), ("1", 1), ("killed", 137), ("one", 2)])
def test_the_exit_code_is_that_of_the_process_that_ended_first(start, what, code):
    process = start(what)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "Traceback" not in error
    assert ("ChildFailedError" in error or "FAILED" in error) == (code in (1, 137))  # else the process has said it


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_request_to_end_is_answered_as_by_the_processes(start, number, code):
    process = start("asked")
    assert process.stdout.readline() == process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "Traceback" not in error


def test_codes_are_those_of_shells():
    assert [exit_code(code) for code in (0, 3, -9, -15)] == [0, 3, 137, 143]
