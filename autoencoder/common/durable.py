"""Files that outlive a failure: folders made, space asked for, writes that reached the disk, contents by their hash."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from autoencoder.common.config import UserError

HASH_THREADS = 8
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def make_folder(folder: Path, setting: str) -> Path:
    """`folder`, which exists now and can be written to.

    Raises:
        UserError: it cannot be made, or nothing can be written in it; names the setting.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{setting}={folder}: there is a file of this name; choose another folder") from None
    except OSError as error:
        what = "make some space there" if error.errno in NO_SPACE else "change its permissions"
        raise UserError(f"{setting}={folder} cannot be written ({error.strerror}); {what}, or choose another") from None
    return folder


def require_space(folder: Path, size: int, what: str) -> None:
    """UserError unless `size` bytes fit the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise no_space(folder, what, size)


def no_space(folder: Path, what: str, size: int | None = None) -> UserError:
    """The error of a full disk. size: bytes needed, where that is known."""
    needed = "" if size is None else f"needs {size / 1e9:.3g} GB, "
    return UserError(
        f"{folder}: no space left for {what}: {needed}{shutil.disk_usage(folder).free / 1e9:.3g} GB free. What was "
        "saved before is whole; make some space and start the same command again"
    )


def write_durably(path: Path, text: str) -> None:
    """Write and flush to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file's content, in hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(partial(file.read, 1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def digests(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The size in bytes and SHA-256 of files, by their names."""
    paths = list(paths)
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        return {
            path.name: {"size": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, threads.map(sha256, paths), strict=True)
        }
