"""The door to all data: what a path is, and the source that reads it. Files are known by their content."""

from __future__ import annotations

import gzip
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from autoencoder.common.config import UserError, locate, require
from autoencoder.sources.captions import UTF16
from autoencoder.sources.entries import IMAGE_COLUMNS, find_file, usual_columns
from autoencoder.sources.folders import Contents, ImageFolder, survey
from autoencoder.sources.hub import open_hub, open_saved
from autoencoder.sources.manifest import Manifest
from autoencoder.sources.source import ImageSource, JoinedSources, Reading, is_image_name
from autoencoder.sources.tables import open_table, read_columns, unpacked
from autoencoder.sources.tar_shards import TarShards, expand, matching

logger = logging.getLogger(__name__)

KINDS = (
    "a folder of images, a manifest (JSON lines or list), a table (CSV, TSV, Parquet), tar shards, or "
    "hf://datasets/owner/name"
)
TAR_NAME = re.compile(r"(?i)\.tar(\.\w+)?$|\.t[gbx]z2?$")
PACKED = {
    b"PK\x03\x04": "a zip archive", b"BZh": "compressed by bzip2", b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd", b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a rar archive",
}  # fmt: skip
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of Hugging Face's ImageFolder
TABLES = (".parquet", ".jsonl", ".gz", ".csv", ".tsv", ".json")  # in folders without images; the first kind is taken
NOT_TABLES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of Hugging Face
BEGINNING = 1 << 16  # bytes of a file that tell its kind


def open_source(path: str | Path, reading: Reading | None = None) -> ImageSource:
    """The images and captions that a path stands for, whatever it is.

        folder/                      images with .txt or .caption beside them, or in class folders; or, by what it
                                     holds, ImageFolder with metadata files, tar shards, Parquet files, …
        data.jsonl, data.json, …     JSON lines or a JSON list, gzipped or not, under any name
        data.csv, .tsv, .parquet     a table
        a-{000..127}.tar, *.parquet  several tar shards or tables; tar shards may be URLs
        hf://datasets/owner/name     a data set of the Hugging Face Hub

    Raises:
        UserError: there is nothing, or something else; or as the source that it is.
    """
    reading, text = reading or Reading(), str(path)
    require(text.strip() != "", "path", text, KINDS)
    if re.match(r"(?i)file:/", text):
        text = unquote(urlsplit(text).path)
    if "://" in text:
        return _open_url(text, reading)
    place = find_file(locate(text))
    if place.is_dir():
        return _open_folder(place, reading)
    if place.exists():
        return _open_file(place, reading)
    return _open_pattern(text, reading)


def open_images(path: str | Path, reading: Reading | None = None) -> ImageSource:
    """As `open_source`, where captions are not needed."""
    return open_source(path, replace(reading or Reading(), require_captions=False))


def _open_url(url: str, reading: Reading) -> ImageSource:
    name = url.partition("?")[0]
    if url.startswith("hf://") and not TAR_NAME.search(name):
        return open_hub(url, reading)
    if re.search(r"(?i)\.(jsonl?|ndjson|csv|tsv|parquet|gz|zip)$", name) and not TAR_NAME.search(name):
        raise UserError(f"{url}: only tar shards are read over the network; download the file and give its path")
    return TarShards.open(url, reading)


def _open_pattern(text: str, reading: Reading) -> ImageSource:
    """What is no file and no folder: several files, or a mistake."""
    if TAR_NAME.search(text):
        return TarShards.open(text, reading)
    files = [Path(name) for name in matching(text) if os.path.exists(name)] if re.search(r"[{*?\[]", text) else []
    if not files:
        raise UserError(f"{text} cannot be read: No such file or directory; give {KINDS}")
    if all(TAR_NAME.search(file.name) or _is_tar(file) for file in files):
        return TarShards.open(text, reading, expand(text))
    return _joined([open_source(file, reading) for file in files], text)


def _joined(sources: Sequence[ImageSource], name: str) -> ImageSource:
    return sources[0] if len(sources) == 1 else JoinedSources(sources, name)


# --- folders ----------------------------------------------------------------------------------------------------


def _open_folder(folder: Path, reading: Reading) -> ImageSource:
    """A folder by what it and its subfolders hold: metadata files, else images or tar shards, else tables."""
    saved = open_saved(folder, reading)
    if saved is not None:
        return saved
    contents = survey(folder)
    others, images = contents.others, len(contents.images)
    metadata = [name for end in (".jsonl", ".csv", ".parquet") for name in others.get(end, [])]
    beside = {os.path.dirname(name): name for name in reversed(metadata) if os.path.basename(name) in METADATA}
    metadata = sorted(beside.values())  # one of each folder
    shards = [str(folder / name) for name in others.get(".tar", [])]
    if metadata:
        return _joined([_open_file(folder / name, reading) for name in metadata], str(folder))
    if images and shards:
        logger.warning(
            "%s holds %d images and %d tar shards; only the %s are read, as the more numerous", folder, images,
            len(shards), "images" if images > len(shards) else "tar shards",
        )  # fmt: skip
    if shards and images <= len(shards):
        return TarShards.open(f"{folder}/*.tar", reading, shards)
    if images:
        return _open_images(folder, contents, reading)
    for end in TABLES:
        names = [name for name in others.get(end, []) if os.path.basename(name) not in NOT_TABLES]
        if names:
            return _joined([_open_file(folder / name, reading) for name in names], str(folder))
    counts = Counter({end or "without a suffix": len(names) for end, names in others.items()})
    listed = ", ".join(f"{count} × {end}" for end, count in counts.most_common(5)) or "nothing"
    raise UserError(f"folder {folder} holds no image, no tar shard and no table; it holds {listed}; give {KINDS}")


def _open_images(folder: Path, contents: Contents, reading: Reading) -> ImageSource:
    try:
        return ImageFolder(folder, reading=reading, contents=contents)
    except UserError as error:
        tables = [name for end in TABLES for name in contents.others.get(end, []) if os.sep not in name]
        if not tables or not reading.require_captions or any(code for _, code in contents.images):
            raise
        raise UserError(f"{error}. The folder also holds {', '.join(tables[:5])}: give that file") from None


# --- files ------------------------------------------------------------------------------------------------------


def _open_file(path: Path, reading: Reading) -> ImageSource:
    """A file by its content."""
    kind = kind_of(path)
    if kind == "tar":
        return TarShards.open(str(path), reading)
    if kind == "json":
        return Manifest.open(path, reading)
    return open_table(path, kind.removeprefix("packed "), reading)


def kind_of(path: Path) -> str:
    """What a file is: "tar", "json" (lines or a list), "packed json" (gzipped or UTF-16), "csv" or "parquet".

    Raises:
        UserError: it is none of these, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(BEGINNING)
        with unpacked(path) as file:
            content = file.read(BEGINNING)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}; download or pack it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    packed = start[:2] != content[:2]
    if _looks_like_tar(content):
        return "tar" if not packed else _refuse_packed_tar(path)
    if TAR_NAME.search(path.name) and not packed:
        return "tar"
    if start.startswith(b"PAR1"):
        return "parquet"
    for mark, name in PACKED.items():
        if start.startswith(mark):
            raise UserError(f"{path} is {name}; unpack it and give what was inside")
    if is_image_name(path.name):
        raise UserError(f"{path} is an image; give {KINDS}")
    return _kind_of_text(path, content, packed)


def _kind_of_text(path: Path, content: bytes, packed: bool) -> str:
    text = content
    if content[:2] in UTF16:
        text, packed = content.decode("utf-16", "replace").encode(), True
    if b"\0" in text:
        raise UserError(f"{path} is neither text nor Parquet nor a tar; give {KINDS}")
    text = text.removeprefix(b"\xef\xbb\xbf").lstrip()
    named_json = re.search(r"(?i)\.(jsonl?|ndjson)(\.gz)?$", path.name)
    json_kind = "packed json" if packed else "json"
    if text[:1] in (b"{", b"[") or not text:
        return json_kind
    columns = read_columns(path)
    if usual_columns(columns, IMAGE_COLUMNS) or re.search(r"(?i)\.(csv|tsv|tab|psv)(\.gz)?$", path.name):
        return "csv"
    if named_json:  # whose first line is broken
        return json_kind
    if len(columns) == 1:
        raise UserError(f"{path} is neither JSON nor a table; give {KINDS}")
    return "csv"


def _looks_like_tar(content: bytes) -> bool:
    return content[257:262] == b"ustar"


def _is_tar(path: Path) -> bool:
    with path.open("rb") as file:
        return _looks_like_tar(file.read(BEGINNING))


def _refuse_packed_tar(path: Path) -> str:
    raise UserError(f"{path}: samples cannot be found in a compressed shard; unpack it to a plain .tar")
