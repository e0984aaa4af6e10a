"""Where the entries of a large file begin and end, found once and kept in a memory-mapped index.

An index is a `.npy` of int64 rows (first byte, end, …). Its name carries the size and the modification time of the file
it describes, so that an index of an older version is never read; writing one removes its predecessors:

    <folder>/<name>-<hash of the path>-<hash of size and time>.npy

The folder is the one asked for, else `$SVG_T2I_INDEX`, else the file's own if it can be written to, else
`~/.cache/svg_t2i/index`. Processes share the pages of a mapped index; 100 M entries take 1.6 GB of disk and no memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from autoencoder.weights import replacing

MAPPED_BYTES = 1 << 26  # files below 64 MiB are scanned in a blink: their spans stay in memory
CHUNK_BYTES = 1 << 24
THREADS = min(8, os.cpu_count() or 1)


class Spans:
    """Rows of an index, in memory or in a file that is mapped when it is read; pickles as its name where it has one."""

    def __init__(self, rows: np.ndarray | Path):
        self._source = rows
        self._length = len(self._rows)

    @property
    def _rows(self) -> np.ndarray:
        return _mapped(self._source) if isinstance(self._source, Path) else self._source

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[int, ...]:
        return tuple(self._rows[index].tolist())


@lru_cache(maxsize=1024)  # a process may hold 65,530 mappings
def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def index_path(name: str, version: object, folder: Path | None, beside: Path | None = None) -> Path:
    """Where the index of file `name` at `version` is, or is to be: in `folder`, see the top for the default."""
    return (folder or _default_folder(beside)) / f"{Path(name).name}-{_digest(name)}-{_digest(version)}.npy"


def write_index(path: Path, pieces: Iterable[np.ndarray]) -> None:
    """Write the rows of an index, which come in pieces, and remove the indexes of older versions of its file."""
    outdated = [old for old in path.parent.glob(f"{path.stem.rpartition('-')[0]}-*.npy") if old != path]
    with replacing(path) as partial, partial.open("wb") as file:
        shape = (0, 2)
        _write_header(file, shape)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype=np.int64).data)
            shape = (shape[0] + len(piece), piece.shape[1])
        file.seek(0)
        _write_header(file, shape)
    for old in outdated:
        old.unlink(missing_ok=True)


def _default_folder(beside: Path | None) -> Path:
    if os.environ.get("SVG_T2I_INDEX"):
        return Path(os.environ["SVG_T2I_INDEX"]).expanduser()
    if beside is not None and os.access(beside, os.W_OK):
        return beside / ".index"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "svg_t2i" / "index"


def _digest(value: object) -> str:
    return hashlib.sha256(str(value).encode(errors="surrogateescape")).hexdigest()[:12]


def _write_header(file: BinaryIO, shape: tuple[int, int]) -> None:
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}"
    file.write(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117).encode() + b"\n")


# --- lines ------------------------------------------------------------------------------------------------------


def line_spans(path: Path, folder: Path | None = None) -> Spans:
    """(first byte, end) of the lines of a file that are not blank; mapped from an index if the file is large.

    Raises:
        OSError: the file cannot be read, or the index not be written.
    """
    status = path.stat()
    if status.st_size < MAPPED_BYTES:
        return Spans(np.concatenate([np.empty((0, 2), dtype=np.int64), *_scan_lines(path)]))
    version = (status.st_size, status.st_mtime_ns)
    index = index_path(os.path.abspath(path), version, folder, path.parent)
    if not index.is_file():
        write_index(index, _scan_lines(path))
    return Spans(index)


def _scan_lines(path: Path) -> Iterator[np.ndarray]:
    size = path.stat().st_size
    with path.open("rb") as file, ThreadPoolExecutor(THREADS) as pool:
        begin, step = 0, 2 * THREADS * CHUNK_BYTES  # a few chunks at a time: the results must not pile up
        for window in range(0, size, step):
            starts = range(window, min(window + step, size), CHUNK_BYTES)
            for ends in pool.map(lambda start: _line_ends(file.fileno(), start), starts):
                if len(ends):
                    spans = np.stack([np.concatenate([[begin], ends[:-1]]), ends], axis=1)  # (n, 2)
                    begin = int(ends[-1])
                    yield _without_blank(file.fileno(), spans)
        if begin < size:  # no newline at the end
            yield _without_blank(file.fileno(), np.array([[begin, size]]))


def _line_ends(descriptor: int, start: int) -> np.ndarray:
    """Ends (behind the newline) of the lines that end in one chunk; reading and searching release the interpreter."""
    chunk = np.frombuffer(os.pread(descriptor, CHUNK_BYTES, start), dtype=np.uint8)
    return np.flatnonzero(chunk == ord("\n")) + (start + 1)


def _without_blank(descriptor: int, spans: np.ndarray) -> np.ndarray:
    """Without lines of white space only; only short lines, and the shortest object has 2 letters, are looked at."""
    lengths = spans[:, 1] - spans[:, 0]
    suspects = np.flatnonzero(lengths < SHORT_LINE)
    blank = [i for i in suspects if os.pread(descriptor, int(lengths[i]), int(spans[i, 0])).isspace()]
    return np.delete(spans, blank, axis=0)


SHORT_LINE = 16  # bytes; a longer line of blanks counts as an entry and is reported as a broken one
