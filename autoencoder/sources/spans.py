"""Index of a large file: where its entries begin and end, found once and memory-mapped.

An index is a `.npy` of int64. Its name carries the size and the modification time of the file it describes, so that an
index of an older version is never read; writing one removes its predecessors:

    <folder>/<name>-<hash of the path>-<hash of size and time>.npy

Of tar shards it holds a row for each sample (`Spans`). Of a file of lines it holds how many entries begin before each
block of 4 KiB (`Lines`): a five-hundredth of the file, counted about as fast as memory is read. An entry is then found
by reading its block. Copies of tables as lines (`sources.tables`) are kept in the same way, as `.jsonl` and `.images`.

The folder is the one asked for, else `$SVG_T2I_INDEX`, else `.index` beside the file if it can be written to, else
`~/.cache/svg_t2i/index`. Processes share the pages of a mapped index.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from autoencoder.common.config import UserError
from autoencoder.common.weights import replacing

try:
    import fcntl
except ImportError:  # not a POSIX system: processes that start together may make the same index, each its own
    fcntl = None

logger = logging.getLogger(__name__)

MAPPED_BYTES = 1 << 26  # files below 64 MiB are counted in a blink: their index stays in memory
BLOCK_BYTES = 1 << 12
CHUNK_BYTES = 1 << 20  # whole blocks; counted at once by a thread, in buffers that fit its cache
THREADS = min(8, os.cpu_count() or 1)


class Spans:
    """Rows (first byte, end, …) in memory or in an index that is mapped when it is read; pickles as its name then."""

    def __init__(self, rows: np.ndarray | Path):
        self._source = rows
        self._length = len(_array(rows))

    @property
    def rows(self) -> np.ndarray:
        """(N, numbers of a row) int64."""
        return _array(self._source)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[int, ...]:
        return tuple(_array(self._source)[index].tolist())


@lru_cache(maxsize=1024)  # a process may hold 65,530 mappings
def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r").view(np.ndarray)


def _array(source: np.ndarray | Path) -> np.ndarray:
    return _mapped(source) if isinstance(source, Path) else source


def index_path(
    name: str, version: object, folder: Path | None, beside: Path | None = None, suffix: str = ".npy", variant: str = ""
) -> Path:
    """Where the index of file `name` at `version` is, or is to be: in `folder`, see the top for the default.

    variant: tells indexes of one file apart that were made in different ways; they do not replace each other.
    """
    file = f"{Path(name).name}-{_digest(name + variant)}-{_digest(version)}{suffix}"
    folders = [folder] if folder else _default_folders(beside)
    return next((path / file for path in folders if (path / file).is_file()), folders[0] / file)


def write_index(path: Path, rows: np.ndarray) -> None:
    """Write an index and remove those of older versions of its file.

    Raises:
        OSError: its folder cannot be written to.
    """
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, rows)
    remove_outdated(path)


def remove_outdated(path: Path) -> None:
    """Remove the indexes of older versions of the file that the index `path` describes."""
    start = glob.escape(path.stem.rpartition("-")[0])
    for old in path.parent.glob(f"{start}-*{path.suffix}"):
        if old != path:
            old.unlink(missing_ok=True)


def _default_folders(beside: Path | None) -> list[Path]:
    """Where to look for an index; new ones go into the first."""
    if os.environ.get("SVG_T2I_INDEX"):
        return [Path(os.environ["SVG_T2I_INDEX"]).expanduser()]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "svg_t2i" / "index"
    if beside is None:
        return [cache]
    near = beside / ".index"
    return [near, cache] if os.access(near if near.exists() else beside, os.W_OK) else [cache, near]


def _digest(value: object) -> str:
    return hashlib.sha256(str(value).encode(errors="surrogateescape")).hexdigest()[:12]


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Processes of a machine enter one after another, where its folder can be written to and knows locks."""
    lock, file = path.with_suffix(".lock"), None
    with suppress(OSError, AttributeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if file is not None:
            lock.unlink(missing_ok=True)
            file.close()


# --- lines ------------------------------------------------------------------------------------------------------


class FileChanged(UserError):
    """A file is not what it was when the run opened it. This ends the run: no sample of it can be trusted."""

    @classmethod
    def of(cls, path: Path) -> FileChanged:
        return cls(
            f"{path} was changed while it was in use; put the old one back or give the new one a name of its own, and "
            "start the same command again: a training run goes on from its last checkpoint"
        )


class FileBytes:
    """The bytes of a file by their place. It has no position, so forked processes share it; pickles as its name.

    Once opened it stays what it was, even if another file takes its name.
    """

    def __init__(self, path: Path):
        self.path = path
        self.version = version_of(path.stat())

    def read(self, first: int, count: int) -> bytes:
        """Up to `count` bytes from byte `first` on, fewer at the end of the file."""
        return os.pread(self._descriptor, count, first)

    def read_exactly(self, first: int, count: int) -> bytes:
        """`count` bytes from byte `first` on. FileChanged if there are no longer so many."""
        content = self.read(first, count)
        if len(content) < count:
            raise FileChanged.of(self.path)
        return content

    def line(self, first: int) -> bytes:
        """The line that begins at byte `first`, newline included."""
        pieces = []
        while piece := self.read(first, BLOCK_BYTES):
            end = piece.find(b"\n") + 1
            pieces.append(piece[:end] if end else piece)
            if end:
                break
            first += len(piece)
        return b"".join(pieces)

    def fill(self, buffer: np.ndarray, first: int) -> None:
        """Read into (n,) uint8 what lies from byte `first` on."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptor, [buffer[done:]], first + done)
            if not count:
                raise FileChanged.of(self.path)
            done += count

    @property
    def _descriptor(self) -> int:
        file: FileIO | None = self.__dict__.get("_file")
        if file is None:  # of threads that come at once one wins: no descriptor in use is closed with a lost file
            file = self.__dict__.setdefault("_file", self._open())
        return file.fileno()

    def _open(self) -> FileIO:
        try:
            file = self.path.open("rb", buffering=0)
        except FileNotFoundError:
            raise FileChanged.of(self.path) from None
        if version_of(os.fstat(file.fileno())) != self.version:
            raise FileChanged.of(self.path)
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "version": self.version}


def file_version(path: Path) -> tuple[int, int] | None:
    """What changes when a file does: its size and time; None if there is none."""
    try:
        return version_of(path.stat())
    except OSError:
        return None


def version_of(status: os.stat_result) -> tuple[int, int]:
    """Size and time of a file."""
    return status.st_size, status.st_mtime_ns


class Lines:
    """(first byte, end) of the lines of a file that are not blank: a list that takes next to no memory.

    Args:
        counts: (blocks + 1,) how many of them begin before each block; or the index that holds these numbers.
    """

    def __init__(self, content: FileBytes, counts: np.ndarray | Path):
        self.content = content
        self._source = counts
        self._length = int(_array(counts)[-1])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self._length:
            raise IndexError(f"line {index} of {self._length}")
        counts = _array(self._source)
        block = int(counts.searchsorted(index, side="right")) - 1
        first = next(islice(self._beginnings(block), index - int(counts[block]), None), None)
        line = b"" if first is None else self.content.line(first)
        if not line or not (line.endswith(b"\n") or first + len(line) == self.content.version[0]):
            raise FileChanged.of(self.content.path)
        return first, first + len(line)

    def _beginnings(self, block: int) -> Iterator[int]:
        """First bytes of the lines that begin in a block."""
        before = block * BLOCK_BYTES - 1  # the byte before the block tells whether a line begins with it
        data = self.content.read(before, BLOCK_BYTES + 1) if block else b"\n" + self.content.read(0, BLOCK_BYTES)
        place = data.find(b"\n", 0, len(data) - 1) + 1
        while place:
            if data[place] > SPACE or self.content.line(before + place).strip():
                yield before + place
            place = data.find(b"\n", place, len(data) - 1) + 1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = 0
        with self.content.path.open("rb") as file:
            for line in file:
                if line.strip():
                    yield first, first + len(line)
                first += len(line)


def open_lines(path: Path, folder: Path | None = None) -> Lines:
    """The lines of a file. Those of a large one are counted only once; its index goes where `index_path` says.

    Where no index can be written it is made anew in every process, with a warning.

    Raises:
        OSError: the file cannot be read.
    """
    status, content = path.stat(), FileBytes(path)
    if status.st_size < MAPPED_BYTES:
        return Lines(content, _count_lines(content, status.st_size))
    version = (status.st_size, status.st_mtime_ns, BLOCK_BYTES)
    index = index_path(os.path.abspath(path), version, folder, path.parent)
    with nullcontext() if index.is_file() else one_at_a_time(index):
        if index.is_file():
            return Lines(content, index)
        counts = _count_lines(content, status.st_size)
        try:
            write_index(index, counts)
        except OSError as error:
            logger.warning("%s: no index was kept (%s); every start counts its lines again", path, error)
            return Lines(content, counts)
    return Lines(content, index)


def _count_lines(content: FileBytes, size: int) -> np.ndarray:
    """(blocks + 1,) how many lines that are not blank begin before each block. Threads take turns with chunks."""
    chunks = -(-size // CHUNK_BYTES)
    per_block = np.zeros(chunks * (CHUNK_BYTES // BLOCK_BYTES), dtype=np.int64)
    with ThreadPoolExecutor(THREADS) as pool:
        turns = [range(turn, chunks, THREADS) for turn in range(THREADS)]
        list(pool.map(lambda turn: _count_chunks(content, size, turn, per_block), turns))
    counts = np.zeros(-(-size // BLOCK_BYTES) + 1, dtype=np.int64)
    np.cumsum(per_block[: len(counts) - 1], out=counts[1:])
    return counts


def _count_chunks(content: FileBytes, size: int, chunks: range, per_block: np.ndarray) -> None:
    """Write how many lines begin in each block of these chunks. Reading and numpy let the other threads run."""
    buffer = np.empty(CHUNK_BYTES + 1, dtype=np.uint8)  # from the byte before the chunk on
    buffers = np.empty((2, CHUNK_BYTES), dtype=bool)  # fresh memory for each chunk would take most of the time
    blocks = CHUNK_BYTES // BLOCK_BYTES
    for chunk in chunks:
        first, count = chunk * CHUNK_BYTES, min(CHUNK_BYTES, size - chunk * CHUNK_BYTES)
        buffer[0] = NEWLINE
        content.fill(buffer[: count + 1] if chunk else buffer[1 : count + 1], first - bool(chunk))
        begins, solid = buffers[:, :count]
        np.equal(buffer[:count], NEWLINE, out=begins)
        np.greater(buffer[1 : count + 1], SPACE, out=solid)
        solid &= begins
        if np.count_nonzero(begins) != np.count_nonzero(solid):  # blank lines, or lines that begin with space
            for place in np.flatnonzero(begins > solid).tolist():
                solid[place] = buffer[place + 1] != NEWLINE and bool(content.line(first + place).strip())
        buffers[1, count:] = False
        # sums of the 0 and 1 in each of 8 bytes at a time, of 128 at most, so that none overflows
        sums = buffers[1].view(np.uint64).reshape(-1, min(128, BLOCK_BYTES // 8)).sum(axis=1)
        per_block[chunk * blocks : (chunk + 1) * blocks] = sums.view(np.uint8).reshape(blocks, -1).sum(axis=1)


NEWLINE, SPACE = ord("\n"), ord(" ")  # all white space is at most a space
