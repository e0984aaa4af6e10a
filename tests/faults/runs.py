"""Tiny runs of both stages, as forks of this process and as commands, with something that happens in one step."""

import functools
import importlib
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """One of the two trainings.

    Attributes:
        module: of its command.
        step: module, and name in it, of the function that takes a step.
        base: its arguments besides the folder. setting: what names the folder. below: the run's part of the folder.
        often: saves at every step. workers: setting of their number.
    """

    name: str
    module: str
    step: tuple[str, str]
    base: tuple[str, ...]
    setting: str
    below: str
    max_steps: str
    often: str
    workers: str
    keep: str

    def arguments(self, folder: Path, *overrides: str) -> list[str]:
        return [*self.base, f"{self.setting}={folder}", self.often, *overrides]

    def steps(self, number: int) -> str:
        return f"{self.max_steps}={number}"

    def results(self, folder: Path) -> Path:
        return folder / self.below

    def main(self, folder: Path, *overrides: str) -> None:
        """Run in this process."""
        importlib.import_module(self.module).main(self.arguments(folder, *overrides))

    def fork(self, folder: Path, *overrides: str) -> int:
        """Run in a fork, as from the command line. -> exit code, negative for a signal."""
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            code = 99
            logging.root.handlers.clear()  # of pytest, which has closed its files
            try:
                sys.argv = [self.module, *self.arguments(folder, *overrides)]
                importlib.import_module(self.module).main()
                code = 0
            except SystemExit as end:
                code = end.code
            finally:
                sys.stdout.flush()
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def start(self, folder: Path, *overrides: str, before: str = "") -> "Command":
        """Run as a command of its own, after the Python statements `before`."""
        script = f"import sys\nfrom {self.module} import main\n{before}\nmain()\n"
        return Command([sys.executable, "-c", script, *self.arguments(folder, *overrides)], folder.parent / "log.txt")

    def saved(self, folder: Path) -> list[int]:
        """Steps of the checkpoints, whole or not."""
        names = (path.stem.removeprefix("step_") for path in (self.results(folder) / "checkpoints").glob("*"))
        return sorted(int(name) for name in names if name.isdigit())

    def wait_for_the_first(self, folder: Path) -> None:
        """Return when the checkpoint of step 1, which is written in the background, is whole."""
        while self.saved(folder) != [1] or list((self.results(folder) / "checkpoints").glob(".tmp*")):
            time.sleep(0.05)
        time.sleep(0.1)

    def path(self, folder: Path, step: int) -> Path:
        """A file with tensors of a checkpoint."""
        checkpoints = self.results(folder) / "checkpoints"
        if self.name == "autoencoder":
            return checkpoints / f"step_{step:07d}.ckpt"
        return next((checkpoints / f"{step:07d}").glob("*.distcp"))

    def at_step(self, monkeypatch, number: int, act) -> None:
        """Call `act` before the given step of those that a process takes."""
        module, _, holder = self.step[0].partition(":")
        holder = functools.reduce(getattr, [holder] if holder else [], importlib.import_module(module))
        take, taken = getattr(holder, self.step[1]), []

        @functools.wraps(take)
        def step(*arguments):
            taken.append(None)
            if len(taken) == number:
                act()
            return take(*arguments)

        monkeypatch.setattr(holder, self.step[1], step)


class Command:
    """A started command, and all processes that it has started."""

    def __init__(self, command: list[str], log: Path):
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, condition, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def wait(self, seconds: float = 60.0) -> int:
        """The exit code."""
        self.wait_for(lambda: self.process.poll() is not None, seconds)
        return self.process.returncode

    def living(self) -> list[int]:
        """Processes of its session that have not ended."""
        return [pid for pid, fields in _processes() if fields[3] == str(self.process.pid) and fields[0] not in "ZX"]

    def workers(self) -> list[int]:
        """Forks of its process."""
        own = Path(f"/proc/{self.process.pid}/cmdline").read_bytes()
        children = [pid for pid, fields in _processes() if fields[1] == str(self.process.pid)]
        return [pid for pid in children if Path(f"/proc/{pid}/cmdline").read_bytes() == own]

    def end(self) -> None:
        for pid in self.living():
            os.kill(pid, 9)
        self.process.wait()


def _processes() -> list[tuple[int, list[str]]]:
    """Number, and the fields of /proc/PID/stat behind the name: state, parent, group, session, …"""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            found.append((int(entry.name), (entry / "stat").read_text().rpartition(")")[2].split()))
        except OSError:
            continue
    return found
