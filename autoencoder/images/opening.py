"""The door to all data: what a path is, and the source that reads it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from autoencoder.common.config import UserError
from autoencoder.images.folders import ImageFolder
from autoencoder.images.manifest import Manifest
from autoencoder.images.sources import ImageSource, Reading
from autoencoder.images.tar_shards import TarShards


def open_source(path: str, reading: Reading | None = None) -> ImageSource:
    """A manifest (.jsonl, .json), or tar shards: one, a folder of them, a pattern (`a-{000..127}.tar`), URLs.

    Raises:
        UserError: as `Manifest.open` and `TarShards.open`.
    """
    folder = Path(path).expanduser()
    tar = "://" in path or re.search(r"[{*?]|\.tar(\.\w+)?$|\.tgz$", path)
    if not tar and not folder.is_dir():
        return Manifest.open(folder, reading)
    return TarShards.open(path if tar else str(folder / "*.tar"), reading)


def open_images(path: str | Path, reading: Reading | None = None) -> ImageSource:
    """A folder of images (with all its subfolders) or a manifest; captions are not needed."""
    path, reading = Path(path).expanduser(), replace(reading or Reading(), require_captions=False)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder of images or a manifest (.jsonl, .json)")
    return ImageFolder(path, reading=reading) if path.is_dir() else Manifest.open(path, reading)
