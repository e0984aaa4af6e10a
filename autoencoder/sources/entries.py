"""One entry of a manifest or table → its image and its captions, whatever the columns are called.

    {"path": "a.png", "prompt": "a red bird"}                                   published for training; kind "base"
    {"image_path": "a.png", "super_high_quality_caption": ["a bird", "…"]}      published for alignment; kind "align"
    {"file_name": "a.png", "text": "a red bird"}                                ImageFolder; other usual names alike
    {"image": "a.png", "conversations": [{"from": "gpt", "value": "A bird"}]}   LLaVA: the first answer is the caption
    {"image": {"bytes": "<base64>", "path": "a.png"}, "caption": "…"}           the image itself, as the Hub has it

Names are compared without regard to case, blanks and hyphens. Where an entry has several of the known columns, the
first one of the lists below that holds something is taken. Paths are relative to the manifest's folder unless
absolute. They may begin with `~` or `file://`; those that do not exist as given are looked for with `/` in place of
`\\`, and with accented letters composed or decomposed, as other systems write them.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from autoencoder.images.files import Size
from autoencoder.sources.captions import parse_captions
from autoencoder.sources.source import CaptionKind, Reading, Sample

# fmt: off
IMAGE_COLUMNS = (
    "path", "image_path", "image", "file_name", "filepath", "filename", "file_path", "image_file_name", "image_file",
    "image_filename", "file", "img_path", "img", "images", "jpg", "jpeg", "png", "webp", "picture", "photo",
)
CAPTION_COLUMNS = (
    "prompt", "caption", "text", "captions", "super_high_quality_caption", "prompts", "texts", "txt", "description",
    "alt_text", "conversations", "messages",
)
# fmt: on
URL_COLUMNS = ("url", "image_url", "img_url", "image_link", "link")
ALIGNMENT_CAPTION = "super_high_quality_caption"
CONVENTIONS = {"path": "prompt", "image_path": ALIGNMENT_CAPTION}  # the published ones
COLUMNS_BESIDE = (ALIGNMENT_CAPTION, "prompt", "captions", *CAPTION_COLUMNS)  # of an object beside its image
ANSWERERS = {"gpt", "assistant", "model", "bot", "chatgpt"}
NAMING = "name it with {setting} (stage 2: data.{setting}, stage 1: data.params.{setting}, other commands: --{setting})"
REMEDY_FOR_URLS = "images must be local files or in tar shards; img2dataset downloads a list of URLs into such shards"


class Entry(NamedTuple):
    """A sample, and its image where that is no file: its bytes, or (first byte, end) in a file of images."""

    sample: Sample
    content: bytes | tuple[int, int] | None


def parse_line(line: bytes, folder: Path, reading: Reading, label: str) -> Entry:
    """One JSON object of a manifest in `folder` → its sample and image. label: names an image that has no name.

    The path is not looked for: see `find_file`.

    Raises:
        ValueError: says what is wrong with the entry and what would be right.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object with an image path and a caption, got {type(fields).__name__}")
    return parse_fields(fields, folder, reading, label)


def parse_fields(fields: Mapping[str, Any], folder: Path, reading: Reading, label: str) -> Entry:
    """As `parse_line`, of an entry that is parsed already; images may be bytes."""
    column = image_column(fields, reading)
    if column is None:
        raise ValueError(missing_image(fields, reading))
    name, content = _image(fields[column], column)
    captions, kind = _captions(fields, column, reading)
    if content is None:
        path = folder / name
    else:
        path = (folder / label).with_name(os.path.basename(name) or os.path.basename(label))
    return Entry(Sample(path, captions, kind, size_of(fields), tags_of(fields)), content)


def size_of(fields: Mapping[str, Any]) -> Size | None:
    """The fields width and height, if there are such."""
    width, height = fields.get("width"), fields.get("height")
    known = isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0
    return (width, height) if known else None


def tags_of(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The field tags, a list of words or a text with commas between them."""
    value = fields.get("tags")
    words = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else ()
    return tuple(dict.fromkeys(word.strip() for word in words if isinstance(word, str) and word.strip()))


# --- columns ----------------------------------------------------------------------------------------------------


def image_column(fields: Mapping[str, Any], reading: Reading) -> str | None:
    """Which field is the image: the one that is asked for, else one that holds an image itself, else by name."""
    if reading.image_column is not None:
        return reading.image_column if reading.image_column in fields else None
    found = usual_columns(fields, IMAGE_COLUMNS)
    held = [name for name in found if _holds_image(fields[name])]
    return next(iter(held), None) or _first_filled(fields, found)


def caption_column(
    fields: Mapping[str, Any], image: str | None, reading: Reading, names: Sequence[str] = CAPTION_COLUMNS
) -> str | None:
    """Which field is the caption of the image in field `image` (None: it is in no field). names: the usual ones."""
    if reading.caption_column is not None:
        return reading.caption_column if reading.caption_column in fields else None
    published = CONVENTIONS.get(image)
    names = names if published is None else (published, *names)
    return _first_filled(fields, [name for name in usual_columns(fields, names) if name != image])


def usual_columns(fields: Iterable[str], names: Sequence[str]) -> list[str]:
    """The fields that are called by one of `names`, in the order of these."""
    return list(_usual_columns(tuple(fields), tuple(names)))


@lru_cache(maxsize=256)  # most entries of a source have the same fields
def _usual_columns(fields: tuple[str, ...], names: tuple[str, ...]) -> list[str]:
    plain = [name for name in names if name in fields]
    if plain:
        return plain
    folded = {re.sub(r"[\s-]+", "_", name.strip("\ufeff \t\r\n").lower()): name for name in fields}
    return [folded[name] for name in names if name in folded]


def missing_image(fields: Iterable[str], reading: Reading) -> str:
    """The message for fields among which none is the image."""
    fields = list(fields)
    naming = NAMING.format(setting="image_column")
    if reading.image_column is not None:
        return f"there is no image_column {reading.image_column!r}; it has {sorted(fields)}"
    if addresses := usual_columns(fields, URL_COLUMNS):
        return f"field {addresses[0]!r} holds URLs, and no other an image path; {REMEDY_FOR_URLS}"
    return f"needs a field for the image path, such as 'path' or 'image_path'; it has {sorted(fields)}; {naming}"


def missing_caption(fields: Iterable[str], image: str, reading: Reading) -> str:
    """The message for fields among which none is the caption."""
    name = reading.caption_column or CONVENTIONS.get(image, "prompt")
    naming = "" if reading.caption_column else f"; {NAMING.format(setting='caption_column')}"
    return f"field {name!r}, the caption of {image!r}, is missing; it has {sorted(fields)}{naming}"


def _first_filled(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if fields[name] not in (None, "", [])), next(iter(names), None))


def _holds_image(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, dict) and ("bytes" in value or "at" in value))


# --- values -----------------------------------------------------------------------------------------------------


def _captions(fields: Mapping[str, Any], image: str, reading: Reading) -> tuple[tuple[str, ...], CaptionKind]:
    name = caption_column(fields, image, reading)
    if name is None:
        if reading.require_captions:
            raise ValueError(missing_caption(fields, image, reading))
        return (), "base"
    published = (image, name) == ("image_path", ALIGNMENT_CAPTION)
    captions = parse_captions({name: _without_turns(fields[name])}, name, image, reading.require_captions)
    return captions, "align" if published else "base"


def captions_beside(fields: Any, text: str | None, image: str, reading: Reading) -> tuple[tuple[str, ...], CaptionKind]:
    """The captions of an image that has a JSON object beside it, in a tar shard or a folder, or a text file.

    They are what the object says in the column that is asked for, else in one of the usual ones; else the text.

    Args:
        fields: the object; {} without one. text: content of the text file; None without one. image: its name.

    Raises:
        ValueError: says what is wrong with them.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"its .json must hold an object, not {type(fields).__name__}")
    name = caption_column(fields, None, reading, COLUMNS_BESIDE)
    if text is not None and (name is None or fields[name] in (None, "", [])):
        fields, name = {"caption": text}, "caption"
    if name is None:
        if not reading.require_captions:
            return (), "base"
        raise ValueError(
            missing_caption(fields, image, reading)
            if fields
            else f"has no caption: no .txt, .caption or .json named as {image} lies beside it"
        )
    captions = parse_captions({name: _without_turns(fields[name])}, name, image, reading.require_captions)
    return captions, "align" if name == ALIGNMENT_CAPTION else "base"


def _without_turns(value: Any) -> Any:
    """A caption, or of a conversation the first answer."""
    conversation = isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value)
    return _first_answer(value) if conversation else value


def _first_answer(turns: Sequence[Mapping[str, Any]]) -> str | None:
    """What the model says first in a conversation."""
    for turn in turns:
        if str(turn.get("from", turn.get("role"))).lower() in ANSWERERS:
            said = turn.get("value", turn.get("content"))
            if isinstance(said, list):  # parts, of which some are texts
                texts = [part.get("text") for part in said if isinstance(part, Mapping)]
                said = " ".join(text for text in texts if isinstance(text, str) and text)
            return said
    return None


def _image(value: Any, column: str) -> tuple[str, bytes | tuple[int, int] | None]:
    """The value of an image field → the image's name, "" if it has none, and its content if it is no file."""
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"field {column!r} must hold one image, it holds {len(value)}")
        return _image(value[0], column)
    if isinstance(value, bytes):
        return "", value
    if isinstance(value, dict):
        name = value.get("path") if isinstance(value.get("path"), str) else ""
        if isinstance(value.get("at"), list):  # in a table's copy, see `sources.tables`
            return name, tuple(value["at"])
        content = value.get("bytes")
        if content is not None:
            return name, content if isinstance(content, bytes) else _decoded(content, column)
        value = name
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"field {column!r} must be a file name, got {value!r}")
    if value.startswith("data:"):
        return "", _decoded(value.partition(",")[2], column)
    return local_name(value, column), None


def _decoded(content: Any, column: str) -> bytes:
    try:
        return bytes(content) if isinstance(content, list) else base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise ValueError(f"field {column!r} must hold the image's bytes in base64") from None


# --- paths ------------------------------------------------------------------------------------------------------


def local_name(name: str, column: str) -> str:
    """A path as entries give it, without `file://` and `~`.

    Raises:
        ValueError: it is the URL of something elsewhere.
    """
    if scheme := re.match(r"(?i)([a-z][a-z0-9+.-]+)://", name):
        if scheme[1].lower() != "file":
            raise ValueError(f"field {column!r} is a URL: {name!r}; {REMEDY_FOR_URLS}")
        return unquote(urlsplit(name).path)
    return os.path.expanduser(name) if name.startswith("~") else name


def find_file(given: Path) -> Path:
    """The path itself; where it does not exist, the same with `/` for `\\` or in another Unicode form that does."""
    name = str(given)
    if (name.isascii() and "\\" not in name) or os.path.lexists(given):
        return given
    for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
        found = Path()
        for part in Path(spelling).parts:
            forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
            found = next((found / form for form in forms if os.path.lexists(found / form)), None)
            if found is None:
                break
        if found is not None:
            return found
    return given
