"""Manifests: files that list images and their captions.

A manifest is a JSONL file, or a JSON list, of entries in one of the two published conventions:

    {"path": "images/0001.png", "prompt": "a red bird"}
    {"image_path": "images/0001.png", "super_high_quality_caption": ["a red bird", "a bird on a wire"]}

Paths are relative to the manifest's folder unless absolute; a caption may be a list of alternatives. "width" and
"height", where given, let training balance its batches without opening the image. Entries are parsed on access; their
places are found by counting newlines, in memory or in a small memory-mapped index (see `images.spans`), so that a
manifest of 100 M lines opens in seconds and costs next to nothing in every worker process.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from autoencoder.common.config import UserError
from autoencoder.images.captions import parse_captions
from autoencoder.images.files import Size
from autoencoder.images.sources import CaptionKind, ImageSource, Reading, Sample
from autoencoder.images.spans import MAPPED_BYTES, FileBytes, Lines, Spans, open_lines

VALIDATED_ENTRIES = 200_000  # a manifest of so many is parsed when it is opened (seconds), of a larger one the first …
FIRST_ENTRIES = 20_000  # … so many; the others are checked on access

# image field → its caption field, and which system prompt the text encoder puts before the caption
CONVENTIONS: dict[str, tuple[str, CaptionKind]] = {
    "path": ("prompt", "base"),
    "image_path": ("super_high_quality_caption", "align"),
}


class Manifest(ImageSource):
    """The samples of a JSONL file or JSON list. Entries are read and parsed on access; make one with `open`."""

    def __init__(self, path: Path, spans: Spans | Lines, reading: Reading):
        super().__init__(str(path), reading)
        self.path = path
        self.content = FileBytes(path)
        self.spans = spans  # (first byte, end) of each entry
        self.left_out = np.zeros(0, dtype=np.int64)  # the broken ones among them, ascending

    @classmethod
    def open(cls, path: Path | str, reading: Reading | None = None) -> Manifest:
        """Find the entries of a manifest and check them: all up to 200,000, of more the first 20,000.

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
        manifest = cls(path, spans, reading)
        reading.failures.expect(manifest.name, len(spans))
        broken, reason = manifest._find_broken(len(spans) if len(spans) <= VALIDATED_ENTRIES else FIRST_ENTRIES)
        manifest.left_out = np.array(broken, dtype=np.int64)
        if not len(manifest):
            found = f"no usable entry; {reason}" if broken else "no entries"
            remedy = 'give it lines such as {"path": "a.png", "prompt": "a cat"}'
            raise UserError(f"manifest {path} has {found}; {remedy}")
        return manifest

    def __len__(self) -> int:
        return len(self.spans) - len(self.left_out)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`; a `UserError` names file and line of a broken entry."""
        return self._read(*self.spans[self._entry(index)])

    def _entry(self, index: int) -> int:
        """Which entry of the file is sample `index`."""
        sample = range(len(self))[operator.index(index)]  # IndexError, negative indices
        if not len(self.left_out):
            return sample
        # before the k-th of those left out there are left_out[k] - k samples
        before = self.left_out - np.arange(len(self.left_out))
        return sample + int(before.searchsorted(sample, side="right"))

    def _read(self, start: int, end: int) -> Sample:
        try:
            return parse_entry(self.content.read(start, end - start), self.path.parent, self.reading.require_captions)
        except ValueError as error:
            # counting the lines before would take long in a large file
            line = f"byte {start}" if start > MAPPED_BYTES else self.content.read(0, start).count(b"\n") + 1
            raise UserError(f"{self.path}:{line}: {error}") from None

    def _identity(self, index: int) -> bytes:
        start, end = self.spans[self._entry(index)]
        return self.content.read(start, end - start).strip()

    def _find_broken(self, limit: int) -> tuple[list[int], str]:
        """The broken ones among the first `limit` entries, counted as failures; and what is wrong with the first."""
        broken, first = [], ""
        for entry, span in enumerate(itertools.islice(self.spans, limit)):
            try:
                self._read(*span)
            except UserError as error:
                broken.append(entry)
                first = first or str(error)
                self.failures.add(self.name, f"entry {entry}", str(error))
        return broken, first


def parse_entry(entry: bytes, folder: Path, require_captions: bool) -> Sample:
    """One JSON object of a manifest in `folder` → its sample.

    Raises:
        ValueError: says what is wrong with the entry and what would be right.
    """
    try:
        fields = json.loads(entry)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object with an image path and a caption, got {type(fields).__name__}")
    image_field = next((name for name in CONVENTIONS if name in fields), None)
    if image_field is None:
        raise ValueError(f"needs a field {' or '.join(map(repr, CONVENTIONS))}; it has {sorted(fields)}")
    path = fields[image_field]
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"field {image_field!r} must be a file name, got {path!r}")
    caption_field, kind = CONVENTIONS[image_field]
    captions = parse_captions(fields, caption_field, image_field, require_captions)
    return Sample(folder / path, captions, kind, size_of(fields))


def size_of(fields: dict[str, Any]) -> Size | None:
    """The fields width and height, if there are such."""
    width, height = fields.get("width"), fields.get("height")
    known = isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0
    return (width, height) if known else None


def _is_json_list(path: Path) -> bool:
    if path.suffix == ".jsonl":
        return False
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


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
