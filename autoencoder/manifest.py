"""Where images and captions come from: manifests, ImageNet-style folders, and the order they are visited in.

A manifest is a JSONL file, or a JSON list, of entries in one of the two published conventions:

    {"path": "images/0001.png", "prompt": "a red bird"}
    {"image_path": "images/0001.png", "super_high_quality_caption": ["a red bird", "a bird on a wire"]}

Paths are relative to the manifest's folder unless absolute; a caption may be a list of alternatives. Only the byte
positions of the entries are kept in memory (16 bytes each), so that a manifest of millions of lines opens in seconds
and costs little in every worker process.

Nothing here depends on the number of workers or ranks: the order is a function of (seed, epoch), and the randomness
of a sample (crop, caption, dropout, noise) a function of (seed, position in that order), see `sample_rng`.
"""

from __future__ import annotations

import itertools
import json
import logging
import operator
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Sampler

from autoencoder.config import UserError
from autoencoder.images import load_image

logger = logging.getLogger(__name__)

MAX_ERRORS = 16
VALIDATED_ENTRIES = 200_000  # parsed when a manifest is opened (seconds); later ones are checked on access
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

    def load(self, index: int) -> tuple[Image.Image, Sample]:
        """The RGB image and sample at `index`, or at the next index (cyclically) that is usable.

        Raises:
            UserError: when more than `max_errors` entries, or all of them, have turned out unusable.
        """
        first = range(len(self))[index]  # IndexError, negative indices
        for candidate in itertools.chain(range(first, len(self)), range(first)):
            if candidate in self.failures:
                continue
            try:
                sample = self[candidate]
                return load_image(sample.path), sample
            except UserError as error:
                self._count_failure(candidate, error)
        raise UserError(f"{self.name}: none of the {len(self)} images is usable; the first: {self.failures[first]}")

    def _count_failure(self, index: int, error: UserError) -> None:
        self.failures[index] = str(error)
        if len(self.failures) > self.max_errors:
            raise _too_many(self.name, "images", list(self.failures.values()), self.max_errors) from error
        logger.warning("skipped %s (%d of at most %d)", error, len(self.failures), self.max_errors)


def _too_many(name: str, what: str, reasons: list[str], max_errors: int) -> UserError:
    first = "\n  ".join(reasons[:3])
    return UserError(f"{name}: more than {max_errors} unusable {what}; repair or remove them. The first:\n  {first}")


# --- manifests --------------------------------------------------------------------------------------------------


class Manifest(ImageSource):
    """The samples of a JSONL file or JSON list. Entries are read and parsed on access; make one with `open`."""

    def __init__(self, path: Path, spans: np.ndarray, require_captions: bool, max_errors: int):
        super().__init__(str(path), max_errors)
        self.path = path
        self.require_captions = require_captions
        self.spans = spans  # (N, 2) int64, first byte and end of each entry

    @classmethod
    def open(cls, path: Path | str, require_captions: bool = True, max_errors: int = MAX_ERRORS) -> Manifest:
        """Find the entries of a manifest and check the first 200,000 of them.

        Up to `max_errors` broken entries are left out, each with a warning that names file and line. Missing image
        files are found when they are loaded.

        Raises:
            UserError: the file is missing, not a manifest, empty, or has more broken entries than that.
        """
        path = Path(path)
        try:
            spans = _list_spans(path) if _is_json_list(path) else _line_spans(path)
        except OSError as error:
            raise UserError(f"manifest {path} cannot be read: {error.strerror}") from error
        manifest = cls(path, spans, require_captions, max_errors)
        errors = manifest._broken_entries(VALIDATED_ENTRIES)
        if len(errors) > max_errors:
            raise _too_many(manifest.name, "entries", list(errors.values()), max_errors)
        manifest.spans = np.delete(spans, list(errors), axis=0)
        if not len(manifest):
            found = f"no usable entry; {next(iter(errors.values()))}" if errors else "no entries"
            remedy = 'give it lines such as {"path": "a.png", "prompt": "a cat"}'
            raise UserError(f"manifest {path} has {found}; {remedy}")
        for error in errors.values():
            logger.warning("skipped %s (%d of at most %d)", error, len(errors), max_errors)
        return manifest

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`; a `UserError` names file and line of a broken entry."""
        with self.path.open("rb") as file:
            return self._read(file, operator.index(index))

    def _read(self, file: BinaryIO, index: int) -> Sample:
        start, end = self.spans[index].tolist()
        file.seek(start)
        try:
            return parse_entry(file.read(end - start), self.path.parent, self.require_captions)
        except ValueError as error:
            file.seek(0)
            line = file.read(start).count(b"\n") + 1
            raise UserError(f"{self.path}:{line}: {error}") from None

    def _broken_entries(self, limit: int) -> dict[int, str]:
        """index → message of the broken ones among the first `limit` entries; stops beyond `max_errors` of them."""
        errors: dict[int, str] = {}
        with self.path.open("rb") as file:
            for index in range(min(limit, len(self))):
                try:
                    self._read(file, index)
                except UserError as error:
                    errors[index] = str(error)
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
    return Sample(folder / path, _captions(fields, caption_field, image_field, require_captions), kind)


def _captions(fields: dict[str, Any], name: str, image_field: str, required: bool) -> tuple[str, ...]:
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


def _line_spans(path: Path) -> np.ndarray:
    """(N, 2) first byte and end of the lines that are not blank."""
    spans, start = array("q"), 0
    with path.open("rb") as file:
        for line in file:
            if not line.isspace():
                spans.extend((start, start + len(line)))
            start += len(line)
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


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
    """All images below root/split in the order of their names, without captions (the ImageNet layout of stage 1).

    Raises:
        UserError: the folder is missing or holds no image.
    """

    def __init__(self, root: Path | str, split: str, max_errors: int = MAX_ERRORS):
        self.folder = Path(root) / split
        super().__init__(str(self.folder), max_errors)
        if not self.folder.is_dir():
            raise UserError(f"image folder {self.folder} does not exist; expected <data_root>/{split}/**/*.JPEG")
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


# --- order ------------------------------------------------------------------------------------------------------


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The generator of one sample, independent of all others: a function of the seed and its position in training."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(position,)))


class ResumableSampler(Sampler[int]):
    """One rank's share of an endless stream of epochs, from `resume_step` to `total_steps`.

    The stream is one permutation per epoch, drawn with seed + epoch, after the other. Position p of the stream goes
    to rank p mod world_size, so that no sample is lost at the end of an epoch and every rank gets
    total_steps·global_batch_size // world_size of them; resuming skips what was consumed.

    Args:
        length: samples per epoch.
        global_batch_size: samples per step of all ranks together.
    """

    def __init__(
        self,
        length: int,
        rank: int,
        world_size: int,
        global_batch_size: int,
        total_steps: int,
        resume_step: int,
        seed: int,
    ):
        super().__init__()
        if length < 1 or global_batch_size < 1:
            raise UserError(f"nothing to sample: {length} samples, global batch size {global_batch_size}")
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} must be one of 0 .. world_size - 1 = {world_size - 1}")
        if not 0 <= resume_step <= total_steps:
            raise UserError(f"resume step {resume_step} must lie in 0 .. total steps = {total_steps}")
        self.length, self.rank, self.world_size, self.seed = length, rank, world_size, seed
        self.first = resume_step * global_batch_size // world_size  # counted within this rank
        self.end = total_steps * global_batch_size // world_size

    def __len__(self) -> int:
        return self.end - self.first

    def __iter__(self) -> Iterator[int]:
        return (index for _, index in self.iter_positions())

    def iter_positions(self) -> Iterator[tuple[int, int]]:
        """(position in the stream, sample index): the position is what `sample_rng` is keyed by."""
        current_epoch, permutation = -1, np.empty(0, dtype=np.int64)
        for turn in range(self.first, self.end):
            position = self.rank + turn * self.world_size
            epoch, offset = divmod(position, self.length)
            if epoch != current_epoch:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                current_epoch, permutation = epoch, torch.randperm(self.length, generator=generator).numpy()
            yield position, int(permutation[offset])
