"""Names of the Hugging Face Hub, `owner/name`, told apart from paths that are not there.

A mistyped path must not be asked from the Hub: that takes long, tells a stranger the name, and might even be answered.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from autoencoder.common.config import REPO_ROOT, UserError, locate

NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
FILES = (
    "bin", "ckpt", "gz", "jpg", "json", "jsonl", "npz", "parquet", "pkl", "png", "pt", "pth", "safetensors", "tar",
    "txt", "yaml", "yml", "zip",
)  # fmt: skip


def folder_or_hub_name(given: str | os.PathLike, field: str, wanted: str) -> str:
    """`given` as a folder that exists (see `locate`), or as a name that the Hub may know.

    No name of the Hub is what has more than one slash, begins with a folder of the working directory or of the
    repository, or ends like a file.

    Args:
        field: what the value is called, for messages.
        wanted: what would be right, for messages.

    Raises:
        UserError: a folder that does not exist, with the nearest ones that do.
    """
    folder = locate(given)
    if str(given) and folder.is_dir():
        return str(folder)
    if folder.is_file():
        raise UserError(f"{field} = {str(given)!r} is a file; give {wanted}")
    if not could_be_hub_name(str(given)):
        raise UserError(f"{field} = {str(given)!r}: no such folder{nearest(given)}; give {wanted}")
    return str(given)


def could_be_hub_name(given: str) -> bool:
    """Whether a name that is no path here is worth asking the Hub for."""
    owner, slash, _ = given.partition("/")
    if NAME.fullmatch(given) is None or given.rpartition(".")[2].lower() in FILES:
        return False
    return not slash or not any((root / owner).is_dir() for root in _roots())


def nearest(given: str | os.PathLike) -> str:
    """ "(the nearest: …)" with up to three names that exist, near a path that does not; empty where none is near."""
    path = Path(given).expanduser()
    found: list[str] = []
    for root in [Path()] if path.is_absolute() else _roots():
        parent, names = root, list(path.parts)
        with suppress(OSError):  # a folder that may not be read
            while len(names) > 1 and (parent / names[0]).is_dir():
                parent /= names.pop(0)
            there = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
            close = difflib.get_close_matches(names[0] if names else "", there, n=3, cutoff=0.6)
            found += [str(parent / name) for name in close]
    return f" (the nearest: {', '.join(dict.fromkeys(found[:3]))})" if found else ""


@functools.cache
def announce(name: str) -> None:
    """Say on standard error, once, that the Hub is about to be asked; the first process of several says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}: taken from the Hugging Face Hub, or from its cache", file=sys.stderr, flush=True)


def _roots() -> list[Path]:
    """Where relative paths are looked for; of the repository only where this is one, not an installed package."""
    repository = [REPO_ROOT, REPO_ROOT / "svg_t2i"] if (REPO_ROOT / "pyproject.toml").is_file() else []
    return [Path(), *repository]
