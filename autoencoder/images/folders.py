"""Folders of images."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from autoencoder.common.config import UserError
from autoencoder.images.sources import (
    IMAGE_SUFFIXES,
    NOT_DATA,
    ImageSource,
    Reading,
    Sample,
    is_companion,
    is_image_name,
)


class ImageFolder(ImageSource):
    """All images below root/split in the order of their names, without captions. (ImageNet's splits: train, val.)

    Raises:
        UserError: the folder is missing or holds no image.
    """

    def __init__(self, root: Path | str, split: str = "", reading: Reading | None = None):
        self.folder = Path(root) / split
        super().__init__(str(self.folder), reading or Reading(require_captions=False))
        if not self.folder.is_dir():
            layout = f"; expected <data_root>/{split}/**/*.JPEG" if split else ""
            raise UserError(f"image folder {self.folder} does not exist{layout}")
        names = [os.path.relpath(path, self.folder) for path in walk(self.folder) if is_image_name(path)]
        if not names:
            raise UserError(f"image folder {self.folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        # One block of bytes: a million Python strings would be copied into every worker as they are touched.
        self.names = np.sort(np.array([os.fsencode(name) for name in names]))
        self.failures.expect(self.name, len(self))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.folder / os.fsdecode(self.names[operator.index(index)]), (), "base")


def walk(folder: Path | str) -> Iterator[str]:
    """All files below a folder, links followed, but for what systems and tools put there. Loops of links end."""
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name not in NOT_DATA and not _leads_back(root, name)]
        yield from (os.path.join(root, name) for name in files if not is_companion(name))


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
