"""One run in a folder at a time: a lock file that a dead holder loses.

The holder touches the file every few seconds. It is dead when its process is gone (where that can be seen: same
machine, same container), or when the file was not touched for a while by the file system's own clock. That needs no
locks of the file system, so it works on NFS.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from autoencoder.common.config import UserError
from autoencoder.common.durable import make_folder

FILE_NAME = ".running"
BEAT = 15.0  # seconds between two touches
DEAD_AFTER = 90.0  # seconds; NFS shows a touch to other machines after up to 60


class RunLock:
    """Context manager: this process alone works in `folder`. It is made, and removed if nothing was written in it.

    Args:
        setting: what names the folder in the configuration, for messages.

    Attributes:
        lost: why the folder is no longer this run's (deleted, or taken by another run), else None.

    Raises:
        UserError: on entering, the folder cannot be made, or another run works there; it says which. Waits for up to
            `DEAD_AFTER` seconds to see whether a holder on another machine is alive.
    """

    def __init__(self, folder: Path, setting: str):
        self.path, self.setting = folder / FILE_NAME, setting
        self.lost: str | None = None
        self._token = secrets.token_hex(8)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def __enter__(self) -> RunLock:
        folder = self.path.parent
        self._made = [part for part in (folder, *folder.parents) if not part.exists()]
        make_folder(folder, self.setting)
        while not self._create():
            self._wait_for_its_end()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._read().get("token") == self._token:
            self.path.unlink(missing_ok=True)
        for folder in self._made:
            with suppress(OSError):  # not empty
                folder.rmdir()

    def check(self, look: bool = False) -> None:
        """UserError if the folder is lost, as far as that is known. look: see how it is now."""
        if look:
            self._look()
        if self.lost is not None:
            raise UserError(self.lost)

    def _create(self) -> bool:
        """Whether the lock was free and is this process's now. Whole from the start: it appears by one hard link."""
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
        own = self.path.with_name(f"{FILE_NAME}-{self._token}")
        own.write_text(json.dumps({"token": self._token, "job": job, **_this_process()}), encoding="utf-8")
        try:
            os.link(own, self.path)
        except FileExistsError:
            return False
        finally:
            own.unlink()
        return True

    def _wait_for_its_end(self) -> None:
        """Return when the holder is dead and its lock removed, or the lock vanished."""
        first = self._touched()
        while (touched := self._touched()) is not None and touched == first:
            holder = self._read()
            gone = _is_gone(holder)
            if gone is False:
                break
            if gone or self._now() - touched > DEAD_AFTER:
                self._take_away(holder)
                return
            time.sleep(1.0)
        else:
            if touched is None:
                return
        holder = self._read()
        job = f", job {holder['job']}" if holder.get("job") else ""
        raise UserError(
            f"{self.path.parent} is in use by another run: process {holder.get('pid')} on {holder.get('host')}{job}. "
            f"End that run first, or choose another folder; if there is none, remove {self.path}"
        )

    def _take_away(self, dead: dict[str, Any]) -> None:
        """Remove the dead holder's lock, and no other that took its place meanwhile."""
        aside = self.path.with_name(f"{FILE_NAME}-{self._token}")
        try:
            self.path.rename(aside)
            if _parse(aside).get("token") != dead.get("token"):
                os.link(aside, self.path)
        except (FileNotFoundError, FileExistsError):
            pass  # another run was faster: the next look shows it
        aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        while self.lost is None and not self._ended.wait(BEAT):
            self._look()
            if self.lost is None:
                with suppress(OSError):  # gone, which the next look shows, or a moment of trouble
                    os.utime(self.path)

    def _look(self) -> None:
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            holder = {}
        except (OSError, ValueError):
            return  # the file system has a moment of trouble
        if holder.get("token") != self._token:
            who = f"process {holder['pid']} on {holder['host']} works there" if holder else "it was deleted"
            self.lost = f"{self.path.parent} is no longer this run's: {who}; stopped without another save"

    def _read(self) -> dict[str, Any]:
        return _parse(self.path)

    def _touched(self) -> float | None:
        try:
            return self.path.stat().st_mtime
        except FileNotFoundError:
            return None

    def _now(self) -> float:
        """The file system's clock."""
        probe = self.path.with_name(f"{FILE_NAME}-{self._token}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now


def _parse(path: Path) -> dict[str, Any]:
    """What a lock file says; nothing where it is not there or not ours."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pids": _pid_namespace(),
        "started": _started(os.getpid()),
    }


def _is_gone(holder: dict[str, Any]) -> bool | None:
    """Whether the holder's process has ended; None where that cannot be seen from here."""
    here = _this_process()
    if here["pids"] is None or (holder.get("host"), holder.get("pids")) != (here["host"], here["pids"]):
        return None
    return _started(holder["pid"]) != holder["started"]


def _pid_namespace() -> str | None:
    """In which numbering of processes this one is (containers have their own); None where Linux does not tell."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process started, in ticks since the machine did; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended
