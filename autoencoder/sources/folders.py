"""Folders of images, with or without a text beside each image."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from autoencoder.common.config import UserError
from autoencoder.images.files import Size
from autoencoder.sources.captions import read_caption
from autoencoder.sources.entries import captions_beside, size_of, tags_of
from autoencoder.sources.source import (
    IMAGE_SUFFIXES,
    NOT_DATA,
    ImageSource,
    Reading,
    Sample,
    is_companion,
    is_image_name,
)

TEXTS = (".txt", ".caption", ".TXT", ".CAPTION")
# What replaces the image's suffix, the first that is there; "": there is none.
SIDECARS = ("", *TEXTS, ".json", ".JSON")


@dataclass
class Contents:
    """What a folder and its subfolders hold: paths relative to it.

    Attributes:
        images: (name, which of `SIDECARS` lies beside it) of each.
        others: the other files by their last suffix in lower case, such as ".tar".
    """

    images: list[tuple[bytes, int]] = field(default_factory=list)
    others: dict[str, list[str]] = field(default_factory=dict)


def survey(folder: Path | str) -> Contents:
    """Look through a folder, links followed."""
    contents = Contents()
    for root, names in _folders(folder):
        here, there = set(names), os.path.relpath(root, folder)
        pictures = {os.path.splitext(name)[0] for name in names if is_image_name(name)}
        for name in names:
            stem, suffix = os.path.splitext(name)
            path = name if there == "." else os.path.join(there, name)
            if is_image_name(name):
                beside = next((code for code, end in enumerate(SIDECARS) if code and stem + end in here), 0)
                contents.images.append((os.fsencode(path), beside))
            elif suffix not in TEXTS and not (suffix in SIDECARS and stem in pictures):
                contents.others.setdefault(suffix.lower(), []).append(path)
    for paths in (contents.images, *contents.others.values()):
        paths.sort()
    return contents


FINGERPRINTED_TEXTS = 4096  # whose content is looked at, evenly spread


class ImageFolder(ImageSource):
    """All images below root/split in the order of their names. (ImageNet's splits: train, val.)

    The caption of photo.jpg is what photo.txt or photo.caption beside it says, else an object in photo.json, as in tar
    shards. Where captions are required, images without such a file are left out, each counted as an unusable sample.

    contents: what `survey` found, if that was done.

    Raises:
        UserError: the folder is missing, holds no image, or no caption where captions are required.
    """

    def __init__(
        self, root: Path | str, split: str = "", reading: Reading | None = None, contents: Contents | None = None
    ):
        self.folder = Path(root) / split
        super().__init__(str(self.folder), reading or Reading(require_captions=False))
        if not self.folder.is_dir():
            layout = f"; expected <data_root>/{split}/**/*.JPEG" if split else ""
            raise UserError(f"image folder {self.folder} does not exist{layout}")
        images = (contents or survey(self.folder)).images
        if not images:
            raise UserError(f"image folder {self.folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        # One block of bytes: a million Python strings would be copied into every worker as they are touched.
        self.names = np.array([name for name, _ in images])
        self.sidecars = np.array([code for _, code in images], dtype=np.int8)  # places in SIDECARS
        self.failures.expect(self.name, len(self))
        if self.reading.require_captions:
            self._leave_out_those_without_captions()

    def _leave_out_those_without_captions(self) -> None:
        captioned = self.sidecars > 0
        if not captioned.any():
            raise UserError(
                f"image folder {self.folder} holds {len(self)} images and no captions; put a .txt, .caption or .json "
                "beside each image, or give a manifest or table of images and captions"
            )
        for name in self.names[~captioned]:
            path = self.folder / os.fsdecode(name)
            self.fail(path.name, f"{path}: has no caption: there is no {path.stem}.txt, .caption or .json beside it")
        self.names, self.sidecars = self.names[captioned], self.sidecars[captioned]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        path, sidecar = self._paths(index)
        if sidecar is None:
            return Sample(path, (), "base")
        try:
            return _described(path, sidecar, self.reading)
        except (OSError, ValueError, RecursionError) as error:
            if not self.reading.require_captions:
                return Sample(path, (), "base")
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(f"{sidecar}: {reason}") from None

    def hint(self, index: int) -> tuple[Size | None, tuple[int, ...]]:
        _, sidecar = self._paths(index)
        return None, () if sidecar is None else (sidecar.stat().st_size,)

    def _identity(self, index: int) -> bytes:
        return os.path.basename(bytes(self.names[index]))

    def _listing(self) -> Iterator[bytes | np.ndarray]:
        yield from (np.ascontiguousarray(self.names), self.sidecars)
        for index in np.unique(np.linspace(0, len(self) - 1, FINGERPRINTED_TEXTS).astype(int)).tolist():
            path = self._paths(index)[1]
            if path is not None:
                with suppress(OSError):
                    yield path.read_bytes()

    def _paths(self, index: int) -> tuple[Path, Path | None]:
        """The image at `index`, and the file that holds its caption."""
        index = range(len(self))[operator.index(index)]  # IndexError, negative indices
        path, code = self.folder / os.fsdecode(self.names[index]), self.sidecars[index]
        return path, Path(os.path.splitext(path)[0] + SIDECARS[code]) if code else None


def _described(path: Path, sidecar: Path, reading: Reading) -> Sample:
    """The image that a text, or a JSON object, beside it describes. ValueError or OSError where it cannot be read."""
    if sidecar.suffix.lower() == ".json":
        fields = json.loads(sidecar.read_bytes())
        captions, kind = captions_beside(fields, None, path.name, reading)
        return Sample(path, captions, kind, size_of(fields), tags_of(fields))
    text = read_caption(sidecar.read_bytes())
    if not text and reading.require_captions:
        raise ValueError("holds an empty caption")
    return Sample(path, (text,) if text else (), "base")


class FileList(ImageSource):
    """These image files, without captions. Those that are missing are found out when they are loaded."""

    def __init__(self, paths: Sequence[Path], reading: Reading | None = None):
        super().__init__(", ".join(map(str, paths[:3])), reading or Reading(require_captions=False))
        self.paths = tuple(paths)
        self.failures.expect(self.name, len(self))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.paths[operator.index(index)], (), "base")


def _folders(folder: Path | str) -> Iterator[tuple[str, list[str]]]:
    """A folder and those below it, links followed, with the files in each, but for what systems and tools put there.

    Loops of links end.
    """
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name not in NOT_DATA and not _leads_back(root, name)]
        yield root, [name for name in files if not is_companion(name)]


def _leads_back(root: str, name: str) -> bool:
    """Whether folder `name` in `root` is a link to one of the folders on the way to it."""
    path = os.path.join(root, name)
    if not os.path.islink(path):
        return False
    here = Path(root).absolute()
    return os.path.realpath(path) in {os.path.realpath(above) for above in (here, *here.parents)}


def list_images(folder: str | Path) -> list[Path]:
    """All image files below a folder, in the order of their names. UserError if there are none."""
    return [sample.path for sample in ImageFolder(folder)]
