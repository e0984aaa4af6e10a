"""Sources of images and captions: manifests and ImageNet-style folders.

A manifest is a JSONL file, or a JSON list, of entries in one of the two published conventions:

    {"path": "images/0001.png", "prompt": "a red bird"}
    {"image_path": "images/0001.png", "super_high_quality_caption": ["a red bird", "a bird on a wire"]}

Paths are relative to the manifest's folder unless absolute; a caption may be a list of alternatives. "width" and
"height", where given, let training balance its batches without opening the image. Entries are parsed on access; their
places are found by counting newlines, in memory or in a small memory-mapped index (see `images.spans`), so that a
manifest of 100 M lines opens in seconds and costs next to nothing in every worker process.

In which order samples are visited is decided in `autoencoder.images.order`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import operator
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from autoencoder.common.config import UserError
from autoencoder.images.files import Size, load_image
from autoencoder.images.spans import MAPPED_BYTES, FileBytes, Lines, Spans, open_lines

logger = logging.getLogger(__name__)

MAX_ERRORS = 16
VALIDATED_ENTRIES = 200_000  # a manifest of so many is parsed when it is opened (seconds), of a larger one the first …
FIRST_ENTRIES = 20_000  # … so many; the others are checked on access
IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif"}

CaptionKind = Literal["base", "align"]
# image field → its caption field, and which system prompt the text encoder puts before the caption
CONVENTIONS: dict[str, tuple[str, CaptionKind]] = {
    "path": ("prompt", "base"),
    "image_path": ("super_high_quality_caption", "align"),
}


@dataclass(frozen=True)
class Sample:
    """An image file and its alternative captions: at least one, unless the source was opened without requiring any."""

    path: Path
    captions: tuple[str, ...]
    caption_kind: CaptionKind
    size: Size | None = None  # (width, height) in pixels, if the source tells without opening the image


class ImageSource(Sequence[Sample]):
    """A sequence of samples whose images are loaded with a bounded number of failures.

    Attributes:
        name: what messages call this source, its file or folder.
        max_errors: how many unusable entries each process tolerates.
        failures: index → reason, for the entries found unusable so far by this process.
    """

    def __init__(self, name: str, max_errors: int):
        self.name = name
        self.max_errors = max_errors
        self.failures: dict[int, str] = {}

    def load(self, index: int, shrink: Callable[[Size], Size] | None = None) -> tuple[Image.Image, Sample]:
        """The RGB image and sample at `index`, or at the next index (cyclically) that is usable.

        shrink: as in `load_image`.

        Raises:
            UserError: when more than `max_errors` entries, or all of them, have turned out unusable.
        """
        first = range(len(self))[index]  # IndexError, negative indices
        for candidate in itertools.chain(range(first, len(self)), range(first)):
            if candidate in self.failures:
                continue
            try:
                source, sample = self.read(candidate)
                return load_image(source, shrink=shrink, name=str(sample.path)), sample
            except UserError as error:
                self.failures[candidate] = str(error)
                if len(self.failures) > self.max_errors:
                    reasons = list(self.failures.values())
                    raise too_many(self.name, "unusable images", reasons, self.max_errors) from error
                logger.warning("skipped %s (%d of at most %d)", error, len(self.failures), self.max_errors)
        raise UserError(f"{self.name}: none of the {len(self)} images is usable; the first: {self.failures[first]}")

    def read(self, index: int) -> tuple[Path | bytes, Sample]:
        """The image at `index`, as a file or as the content of one, and its sample."""
        sample = self[index]
        return sample.path, sample

    def hint(self, index: int) -> tuple[Size | None, tuple[int, ...]]:
        """What is known without reading the image: its size, and how many bytes of UTF-8 the captions have."""
        sample = self[index]
        return sample.size, tuple(len(caption.encode(errors="replace")) for caption in sample.captions)

    def fingerprint(self) -> str:
        """16 hex digits that change when samples are added, removed, reordered or described otherwise.

        A look at 64 entries from first to last, not at the images, nor at the folder's name.
        """
        digest = hashlib.sha256(str(len(self)).encode())
        for index in np.linspace(0, len(self) - 1, min(len(self), 64)).astype(int).tolist():
            digest.update(self._identity(index))
        return digest.hexdigest()[:16]

    def _identity(self, index: int) -> bytes:
        """What names one sample among others."""
        return os.fsencode(self[index].path.name)


def find_part(ends: Sequence[int], index: int) -> tuple[int, int]:
    """Index in several sequences as one, which end at `ends` → number of the sequence, index in it."""
    index = range(ends[-1])[operator.index(index)]  # IndexError, negative indices
    number = bisect_right(ends, index)
    return number, index - (ends[number - 1] if number else 0)


class JoinedSources(ImageSource):
    """Several sources as one, in their order. Each counts its own failures."""

    def __init__(self, sources: Sequence[ImageSource]):
        super().__init__(", ".join(source.name for source in sources), sources[0].max_errors)
        self.sources = tuple(sources)
        self.ends = list(itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        source, index = self._find(index)
        return source[index]

    def load(self, index: int, shrink: Callable[[Size], Size] | None = None) -> tuple[Image.Image, Sample]:
        source, index = self._find(index)
        return source.load(index, shrink)

    def read(self, index: int) -> tuple[Path | bytes, Sample]:
        source, index = self._find(index)
        return source.read(index)

    def _find(self, index: int) -> tuple[ImageSource, int]:
        number, index = find_part(self.ends, index)
        return self.sources[number], index


def too_many(name: str, what: str, reasons: Sequence[str], max_errors: int) -> UserError:
    """The error for a source with more broken parts than it may have; it quotes the first reasons."""
    first = "\n  ".join(reasons[:3])
    return UserError(f"{name}: more than {max_errors} {what}; repair or remove them. The first:\n  {first}")


# --- manifests --------------------------------------------------------------------------------------------------


class Manifest(ImageSource):
    """The samples of a JSONL file or JSON list. Entries are read and parsed on access; make one with `open`."""

    def __init__(self, path: Path, spans: Spans | Lines, require_captions: bool, max_errors: int):
        super().__init__(str(path), max_errors)
        self.path = path
        self.content = FileBytes(path)
        self.require_captions = require_captions
        self.spans = spans  # (first byte, end) of each entry
        self.left_out: tuple[int, ...] = ()  # the broken ones among them, ascending

    @classmethod
    def open(
        cls,
        path: Path | str,
        require_captions: bool = True,
        max_errors: int = MAX_ERRORS,
        index_folder: Path | None = None,
    ) -> Manifest:
        """Find the entries of a manifest and check them: all up to 200,000, of more the first 20,000.

        Up to `max_errors` broken entries are left out, each with a warning that names file and line. Missing image
        files are found when they are loaded. The index of a large file is kept in `index_folder`, see
        `autoencoder.images.spans`.

        Raises:
            UserError: the file is missing, not a manifest, empty, or has more broken entries than that.
        """
        path = Path(path)
        try:
            spans = Spans(_list_spans(path)) if _is_json_list(path) else open_lines(path, index_folder)
        except OSError as error:
            raise UserError(f"manifest {path} cannot be read: {error.strerror}") from error
        manifest = cls(path, spans, require_captions, max_errors)
        errors = manifest._broken_entries(len(spans) if len(spans) <= VALIDATED_ENTRIES else FIRST_ENTRIES)
        if len(errors) > max_errors:
            raise too_many(manifest.name, "unusable entries", list(errors.values()), max_errors)
        manifest.left_out = tuple(errors)
        if not len(manifest):
            found = f"no usable entry; {next(iter(errors.values()))}" if errors else "no entries"
            remedy = 'give it lines such as {"path": "a.png", "prompt": "a cat"}'
            raise UserError(f"manifest {path} has {found}; {remedy}")
        for error in errors.values():
            logger.warning("skipped %s (%d of at most %d)", error, len(errors), max_errors)
        return manifest

    def __len__(self) -> int:
        return len(self.spans) - len(self.left_out)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`; a `UserError` names file and line of a broken entry."""
        return self._read(*self.spans[self._entry(index)])

    def _entry(self, index: int) -> int:
        """Which entry of the file is sample `index`."""
        entry = range(len(self))[operator.index(index)]  # IndexError, negative indices
        for broken in self.left_out:
            entry += broken <= entry
        return entry

    def _read(self, start: int, end: int) -> Sample:
        try:
            return parse_entry(self.content.read(start, end - start), self.path.parent, self.require_captions)
        except ValueError as error:
            # counting the lines before would take long in a large file
            line = f"byte {start}" if start > MAPPED_BYTES else self.content.read(0, start).count(b"\n") + 1
            raise UserError(f"{self.path}:{line}: {error}") from None

    def _identity(self, index: int) -> bytes:
        start, end = self.spans[self._entry(index)]
        return self.content.read(start, end - start).strip()

    def _broken_entries(self, limit: int) -> dict[int, str]:
        """index → message of the broken ones among the first `limit` entries; stops beyond `max_errors` of them."""
        errors: dict[int, str] = {}
        for entry, span in enumerate(itertools.islice(self.spans, limit)):
            try:
                self._read(*span)
            except UserError as error:
                errors[entry] = str(error)
                if len(errors) > self.max_errors:
                    break
        return errors


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
    return Sample(folder / path, captions, kind, image_size(fields))


def image_size(fields: dict[str, Any]) -> Size | None:
    """The fields width and height, if there are such."""
    width, height = fields.get("width"), fields.get("height")
    known = isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0
    return (width, height) if known else None


def parse_captions(fields: dict[str, Any], name: str, image_field: str, required: bool) -> tuple[str, ...]:
    """The text, or list of texts, in field `name`. ValueError if it is neither, or missing and required."""
    value = fields.get(name)
    captions = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"field {name!r} must be a text or a list of texts, got {value!r}")
    if required and not captions:
        raise ValueError(f"field {name!r}, the caption of {image_field!r}, is missing; it has {sorted(fields)}")
    if required and not all(caption.strip() for caption in captions):
        raise ValueError(f"field {name!r} holds an empty caption")
    return tuple(captions)


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


# --- folders ----------------------------------------------------------------------------------------------------


class ImageFolder(ImageSource):
    """All images below root/split in the order of their names, without captions. (ImageNet's splits: train, val.)

    Raises:
        UserError: the folder is missing or holds no image.
    """

    def __init__(self, root: Path | str, split: str = "", max_errors: int = MAX_ERRORS):
        self.folder = Path(root) / split
        super().__init__(str(self.folder), max_errors)
        if not self.folder.is_dir():
            layout = f"; expected <data_root>/{split}/**/*.JPEG" if split else ""
            raise UserError(f"image folder {self.folder} does not exist{layout}")
        names = [
            os.path.relpath(os.path.join(folder, name), self.folder)
            for folder, _, files in os.walk(self.folder, followlinks=True)
            for name in files
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
        if not names:
            raise UserError(f"image folder {self.folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        # One block of bytes: a million Python strings would be copied into every worker as they are touched.
        self.names = np.sort(np.array([os.fsencode(name) for name in names]))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.folder / os.fsdecode(self.names[operator.index(index)]), (), "base")


def open_images(path: str | Path) -> ImageSource:
    """A folder of images (with all its subfolders) or a manifest."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder of images or a manifest (.jsonl, .json)")
    return ImageFolder(path) if path.is_dir() else Manifest.open(path, require_captions=False)


def list_images(folder: str | Path) -> list[Path]:
    """All image files below a folder, in the order of their names. UserError if there are none."""
    return [sample.path for sample in ImageFolder(folder)]
