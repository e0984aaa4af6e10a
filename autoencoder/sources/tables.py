"""Tables (CSV, TSV, Parquet) and packed manifests, read from a copy in JSON lines that is made once.

Tables have no lines that could be found by counting: a quoted field may hold newlines, Parquet is stored by columns. So
the columns that matter are copied into a file of JSON lines, a line for each row, which is then read as any manifest.
Images that the table itself holds (the {"bytes", "path"} of the Hugging Face Hub, or plain bytes) go one after another
into a file beside it, and the line says where: {"image": {"at": [first byte, end], "path": "a.png"}}. Such a copy takes
as much room as the images do.

    <index folder>/<name>-<hash>-<hash of size and time>.jsonl, .images

Copies lie where indexes do and are renewed with their table, see `sources.spans`. Where nothing can be written, they
lie in a temporary folder while the run lasts.
"""

from __future__ import annotations

import atexit
import csv
import gzip
import io
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from autoencoder.common.config import UserError
from autoencoder.common.weights import replacing
from autoencoder.sources.captions import UTF16
from autoencoder.sources.entries import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    caption_column,
    image_column,
    missing_caption,
    missing_image,
    usual_columns,
)
from autoencoder.sources.manifest import Manifest, Origin
from autoencoder.sources.source import Reading
from autoencoder.sources.spans import index_path, one_at_a_time, remove_outdated

logger = logging.getLogger(__name__)

FORMAT = 2  # of the copies
DELIMITERS = (",", "\t", ";", "|")
FIELD_CHARACTERS = 1 << 27  # a longer field of a CSV file is one whose quotes do not end
IMAGE_ROWS, PLAIN_ROWS = 16, 8192  # read at a time from Parquet, with and without images
GZIP = b"\x1f\x8b"

Row = dict[str, Any] | str  # its fields, or what is wrong with it


def open_table(path: Path, kind: str, reading: Reading) -> Manifest:
    """The samples of a table or packed manifest. kind: "json", "csv" or "parquet", whether gzipped or not.

    Raises:
        UserError: it cannot be read, has no column for images or (where required) captions; or as `Manifest.open`.
    """
    try:
        copy = _copy_of(path, kind, reading)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}; download or pack it again") from error
    except UnicodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    images = copy.with_suffix(".images")
    return Manifest.open(copy, reading, Origin(path, kind != "json", images if images.is_file() else None))


def _copy_of(path: Path, kind: str, reading: Reading) -> Path:
    """Where the copy of a table is; it is made if there is none of this version."""
    status = path.stat()
    variant = f"|{reading.image_column}|{reading.caption_column}"
    version = (FORMAT, status.st_size, status.st_mtime_ns)
    name, folder = os.path.abspath(path), reading.index_folder
    copy = index_path(name, version, folder, path.parent, ".jsonl", variant)
    with one_at_a_time(copy):
        if copy.is_file():
            return copy
        try:
            _check_space(copy, status.st_size)
        except OSError as error:
            logger.warning("%s: no copy in lines was kept (%s); every start makes one", path, error)
            copy = _temporary_folder() / copy.name
        logger.info("%s is copied to %s", path, copy)
        _write(path, kind, reading, copy)
        for outdated in (copy, copy.with_suffix(".images")):
            remove_outdated(outdated)
    return copy


def _check_space(copy: Path, size: int) -> None:
    """OSError if no file of `size` bytes can be written there."""
    with replacing(copy.with_suffix(".try")):
        pass
    copy.with_suffix(".try").unlink()
    free = shutil.disk_usage(copy.parent).free
    if free < size:
        raise UserError(
            f"{copy.parent} has {free >> 20} MiB left, and a copy in lines may take {size >> 20}; choose another "
            "folder with SVG_T2I_INDEX or data.index_folder"
        )


def _temporary_folder() -> Path:
    """A folder that is removed when this process ends."""
    folder, process = tempfile.mkdtemp(prefix="svg_t2i_"), os.getpid()
    atexit.register(lambda: os.getpid() == process and shutil.rmtree(folder, ignore_errors=True))
    return Path(folder)


def _write(path: Path, kind: str, reading: Reading, copy: Path) -> None:
    """Write the copy, and the file of images before it: whoever sees the copy sees both."""
    with replacing(copy) as partial, partial.open("wb") as lines:
        if kind == "json":
            _unpack(path, lines)
            return
        with replacing(copy.with_suffix(".images")) as partial_images, partial_images.open("wb") as images:
            rows = _parquet_rows(path, reading) if kind == "parquet" else _csv_rows(path, reading)
            for row in rows:
                fields = {name: _plain(value, images) for name, value in row.items()} if isinstance(row, dict) else row
                lines.write(json.dumps(fields).encode() + b"\n")
            held = images.tell()
    if not held:
        copy.with_suffix(".images").unlink()


def _unpack(path: Path, lines: BinaryIO) -> None:
    if _begins(path) in UTF16:
        with _text(path) as file:
            lines.writelines(line.encode() for line in file)
        return
    with gzip.open(path) as file:
        shutil.copyfileobj(file, lines, 1 << 20)


def _plain(value: Any, images: BinaryIO) -> Any:
    """A value as JSON can hold it; bytes go into the file of images."""
    if isinstance(value, bytes):
        first = images.tell()
        images.write(value)
        return {"at": [first, images.tell()]}
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return {"path": value.get("path"), **_plain(value["bytes"], images)}
        return {name: _plain(part, images) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part, images) for part in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _chosen(path: Path, columns: Sequence[str], reading: Reading) -> list[str]:
    """The columns to copy: those that may be image, captions, size and tags.

    Raises:
        UserError: none is the image or, where it is required, the caption.
    """
    filled = dict.fromkeys(columns, "?")
    image = image_column(filled, reading)
    if image is None:
        raise UserError(f"{path}: {missing_image(columns, reading)}")
    caption = caption_column(filled, image, reading)
    if caption is None and reading.require_captions:
        raise UserError(f"{path}: {missing_caption(columns, image, reading)}")
    usual = usual_columns(columns, IMAGE_COLUMNS) + usual_columns(columns, CAPTION_COLUMNS)
    wanted = {image, caption, "width", "height", "tags", "super_high_quality_caption", *usual}
    return [name for name in dict.fromkeys(columns) if name in wanted]


# --- CSV --------------------------------------------------------------------------------------------------------


def _csv_rows(path: Path, reading: Reading) -> Iterator[Row]:
    """The rows of a table whose first line names the columns, parted by one of `DELIMITERS`."""
    csv.field_size_limit(FIELD_CHARACTERS)
    with _text(path) as file:
        delimiter, columns = _header(file)
        chosen = _chosen(path, columns, reading)
        places = [(name, columns.index(name)) for name in chosen]
        rows = csv.reader(file, delimiter=delimiter)
        try:
            for row in rows:
                if not any(row):
                    continue
                if len(row) > len(columns):
                    yield f"it has {len(row)} fields, the header {len(columns)}; quote fields that hold {delimiter!r}"
                else:
                    yield _row({name: row[place] for name, place in places if place < len(row)})
        except csv.Error as error:
            raise UserError(f"{path}:{rows.line_num + 1}: {error}; is a quote missing?") from None


def _row(fields: dict[str, Any]) -> Row:
    """The fields of a row of texts: sizes become numbers, and bytes that are no UTF-8 are its fault."""
    for name, value in fields.items():
        if not value.isascii() and any("\udc80" <= letter <= "\udcff" for letter in value):
            return f"column {name!r} is not UTF-8: {ascii(value[:80])}; save the table as UTF-8"
        if name in ("width", "height") and value.isdecimal():
            fields = fields | {name: int(value)}
    return fields


def _header(file: TextIO) -> tuple[str, list[str]]:
    """The delimiter and the names of the columns, read from the first line that is not blank.

    Of the possible delimiters the one that gives a column for images, else the one that gives most columns.
    """
    line = next((line for line in file if line.strip()), "")
    if line.lower().startswith("sep=") and len(line.strip()) == 5:  # Excel's
        return line[4], next(csv.reader([next(file, "")], delimiter=line[4]), [])
    found = [(mark, next(csv.reader([line], delimiter=mark))) for mark in DELIMITERS]
    return max(found, key=lambda pair: (bool(usual_columns(pair[1], IMAGE_COLUMNS)), len(pair[1])))


def read_columns(path: Path) -> list[str]:
    """The names of the columns of a text file, if it is a table."""
    with _text(path) as file:
        return _header(file)[1]


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """A text file, gzipped or not, in UTF-8 or UTF-16. What is no UTF-8 becomes lone surrogates."""
    encoding = "utf-16" if _begins(path) in UTF16 else "utf-8-sig"
    with unpacked(path) as file:
        yield io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")


@contextmanager
def unpacked(path: Path) -> Iterator[BinaryIO]:
    """The content of a file, gzipped or not."""
    opened: Callable[..., BinaryIO] = gzip.open if _begins(path, packed=True) == GZIP else open
    with opened(path, "rb") as file:
        yield file


def _begins(path: Path, packed: bool = False) -> bytes:
    """The first two bytes of a file or, unless `packed`, of what is packed in it."""
    with path.open("rb") as file:
        start = file.read(2)
    if start != GZIP or packed:
        return start
    with gzip.open(path) as file:
        return file.read(2)


# --- Parquet ----------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, reading: Reading) -> Iterator[Row]:
    """The rows of a Parquet file, some at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} is a Parquet file, which needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            chosen = _chosen(path, schema.names, reading)
            binary = [name for name in chosen if "binary" in str(schema.field(name).type)]
            images = set(usual_columns(chosen, IMAGE_COLUMNS)) | {reading.image_column}
            for batch in file.iter_batches(IMAGE_ROWS if binary else PLAIN_ROWS, columns=chosen):
                for row in batch.to_pylist():
                    texts = {name: row[name] for name in binary if name not in images}
                    yield row | {name: _decoded(value) for name, value in texts.items()}
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error


def _decoded(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
