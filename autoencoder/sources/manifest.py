"""Manifests: files that list images and their captions.

A manifest is a file of JSON lines, or a JSON list, of entries such as

    {"path": "images/0001.png", "prompt": "a red bird"}
    {"image_path": "images/0001.png", "super_high_quality_caption": ["a red bird", "a bird on a wire"]}

See `sources.entries` for the other columns that are understood. Paths are relative to the manifest's folder unless
absolute; a caption may be a list of alternatives. "width" and "height", where given, let training balance its batches
without opening the image. Entries are parsed on access; their places are found by counting newlines, in memory or in a
small memory-mapped index (see `sources.spans`), so that a manifest of 100 M lines opens in seconds and costs next to
nothing in every worker process. Tables and packed files are read from a copy in lines: `sources.tables`.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from autoencoder.common.config import UserError
from autoencoder.sources.entries import Entry, find_file, parse_line
from autoencoder.sources.source import ImageSource, Reading, Sample, stamp_of
from autoencoder.sources.spans import MAPPED_BYTES, FileBytes, FileChanged, Lines, Spans, file_version, open_lines

VALIDATED_ENTRIES = 200_000  # a manifest of so many is parsed when it is opened (seconds), of a larger one the first …
FIRST_ENTRIES = 20_000  # … so many; the others are checked on access


@dataclass(frozen=True)
class Origin:
    """The file that a user named, where its entries are read from a copy (see `sources.tables`).

    rows: an entry is row number … of a table; otherwise the copy has the lines of the original.
    images: the file in which the copy keeps images that the original holds.
    """

    path: Path
    rows: bool
    images: Path | None = None


class Manifest(ImageSource):
    """The samples of a file of JSON lines or a JSON list. Entries are parsed on access; make one with `open`."""

    def __init__(self, path: Path, spans: Spans | Lines, reading: Reading, origin: Origin | None = None):
        self.origin = origin or Origin(path, rows=False)
        super().__init__(str(self.origin.path), reading)
        self.content = FileBytes(path)
        self.folder, self.file_name = self.origin.path.parent, self.origin.path.name
        self.images = FileBytes(self.origin.images) if self.origin.images else None
        self.spans = spans  # (first byte, end) of each entry
        self.left_out = np.zeros(0, dtype=np.int64)  # the broken ones among them, ascending

    @classmethod
    def open(cls, path: Path | str, reading: Reading | None = None, origin: Origin | None = None) -> Manifest:
        """Find the entries of a manifest and check them: all up to 200,000, of more the first 20,000.

        origin: the file that `path` is a copy of.

        Broken entries are left out, each counted as an unusable sample whose reason names file and line. Missing image
        files are found when they are loaded.

        Raises:
            UserError: the file is missing, not a manifest, empty, or more of the entries are broken than may be.
        """
        path, reading = Path(path), reading or Reading()
        try:
            spans = Spans(_list_spans(path)) if _is_json_list(path) else open_lines(path, reading.index_folder)
        except OSError as error:
            raise UserError(f"manifest {path} cannot be read: {error.strerror}") from error
        manifest = cls(path, spans, reading, origin)
        reading.failures.expect(manifest.name, len(spans))
        broken, reason = manifest._find_broken(len(spans) if len(spans) <= VALIDATED_ENTRIES else FIRST_ENTRIES)
        manifest.left_out = np.array(broken, dtype=np.int64)
        if not len(manifest):
            found = f"no usable entry; {reason}" if broken else "no entries"
            remedy = 'give it lines such as {"path": "a.png", "prompt": "a cat"}'
            raise UserError(f"manifest {manifest.name} has {found}; {remedy}")
        return manifest

    def __len__(self) -> int:
        return len(self.spans) - len(self.left_out)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`; a `UserError` names file and line of a broken entry."""
        return self._find(index).sample

    def read(self, index: int) -> tuple[Path | bytes, Sample]:
        sample, content = self._find(index)
        if isinstance(content, tuple):
            content = self.images.read_exactly(content[0], content[1] - content[0])
        return sample.path if content is None else content, sample

    def stamp(self, index: int) -> bytes:
        sample, content = self._find(index)
        if content is None:
            return stamp_of(sample, file_version(sample.path))
        return stamp_of(sample, content[1] - content[0] if isinstance(content, tuple) else len(content))

    def _find(self, index: int) -> Entry:
        """The entry of sample `index`, with the path that its image really has."""
        entry = self._parse(self._entry(index))
        if entry.content is None:
            path = find_file(entry.sample.path)
            if path is not entry.sample.path:
                return entry._replace(sample=replace(entry.sample, path=path))
        return entry

    def _entry(self, index: int) -> int:
        """Which entry of the file is sample `index`."""
        sample = range(len(self))[operator.index(index)]  # IndexError, negative indices
        if not len(self.left_out):
            return sample
        # before the k-th of those left out there are left_out[k] - k samples
        before = self.left_out - np.arange(len(self.left_out))
        return sample + int(before.searchsorted(sample, side="right"))

    def _parse(self, entry: int, span: tuple[int, ...] | None = None) -> Entry:
        """The entry of this number, whose place may be known; its path is not looked for."""
        start, end = span or self.spans[entry]
        try:
            line, label = self.content.read_exactly(start, end - start), f"{self.file_name}/{entry:08d}"
            if self.origin.rows and line.startswith(b'"'):  # what is wrong with a row, instead of its fields
                raise ValueError(json.loads(line))
            return parse_line(line, self.folder, self.reading, label)
        except FileChanged:
            raise
        except ValueError as error:
            raise UserError(f"{self._place(entry, start)}: {error}") from None

    def _place(self, entry: int, start: int) -> str:
        """What messages call an entry."""
        if self.origin.rows:
            return f"{self.name}:row {entry + 1}"
        if start > MAPPED_BYTES:  # counting the lines before would take long in a large file
            return f"{self.name}:byte {start}"
        line = self.content.read(0, start).count(b"\n") + 1
        return f"{self.name}:{line}"

    def _identity(self, index: int) -> bytes:
        start, end = self.spans[self._entry(index)]
        return self.content.read(start, end - start).strip()

    def _listing(self) -> Iterator[bytes]:
        with self.content.path.open("rb") as file:
            while piece := file.read(1 << 20):
                yield piece

    def _find_broken(self, limit: int) -> tuple[list[int], str]:
        """The broken ones among the first `limit` entries, counted as failures; and what is wrong with the first."""
        broken, first = [], ""
        for entry, span in enumerate(itertools.islice(self.spans, limit)):
            try:
                self._parse(entry, span)
            except UserError as error:
                broken.append(entry)
                first = first or str(error)
                self.failures.add(self.name, f"entry {entry}", str(error))
        return broken, first


def _is_json_list(path: Path) -> bool:
    """Whether a JSON file is one list, rather than a line for each entry."""
    with path.open("rb") as file:
        beginning = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not beginning.startswith(b"["):
        return False
    first, second, *_ = [line.strip() for line in beginning.splitlines() if line.strip()] + [b""]
    return first.endswith((b"[", b",")) or not second.startswith(b"{")  # else the first of many lines is broken


def _list_spans(path: Path) -> np.ndarray:
    """(N, 2) first byte and end of the elements of a JSON list.

    Raises:
        UserError: the file is not valid JSON; names the line. A list cannot be read beyond its first such fault.
    """
    spans, decoder, space = array("q"), json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    try:
        text = path.read_bytes().decode("utf-8")
        position = space.match(text, text.index("[") + 1).end()
        counted, num_bytes = 0, 0  # characters whose length in bytes is known, and that length
        while not text.startswith("]", position):
            if spans:
                if not text.startswith(",", position):
                    raise json.JSONDecodeError("expected ',' or ']'", text, position)
                position = space.match(text, position + 1).end()
            _, end = decoder.raw_decode(text, position)
            first = num_bytes + len(text[counted:position].encode())
            counted, num_bytes = end, first + len(text[position:end].encode())
            spans.extend((first, num_bytes))
            position = space.match(text, end).end()
        end = space.match(text, position + 1).end()
        if end < len(text):
            raise json.JSONDecodeError("unexpected text after the list", text, end)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}; repair the list") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    return np.array(spans, dtype=np.int64).reshape(-1, 2)
