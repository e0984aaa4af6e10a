"""Captions as people have them → texts that every tokeniser takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UTF16 = (b"\xff\xfe", b"\xfe\xff")  # how a text in UTF-16 begins


def decode_text(content: bytes) -> str:
    """A text in UTF-8, with or without a byte order mark, or in UTF-16 with one. UnicodeDecodeError for others."""
    return content.decode("utf-16" if content[:2] in UTF16 else "utf-8-sig")


def clean_text(text: str) -> str:
    """The text without a byte order mark and without halves of characters.

    JSON can hold half of an emoji ("\\ud83d", a lone surrogate), which cannot be encoded and which tokenisers refuse.
    Two halves that belong together become their character.
    """
    if not text.isascii():
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")
    return text.removeprefix("\ufeff")


def read_caption(content: bytes) -> str:
    """The text of a file beside an image, cleaned and without the blanks around it. ValueError as `decode_text`."""
    return clean_text(decode_text(content)).strip()


def parse_captions(fields: Mapping[str, Any], name: str, image_field: str, required: bool) -> tuple[str, ...]:
    """The text, or list of texts, in field `name`, cleaned; of several, those that are empty are left out.

    Raises:
        ValueError: it is neither, or there is no text and one is required.
    """
    value = fields.get(name)
    listed = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(caption is None or isinstance(caption, str) for caption in listed):
        raise ValueError(f"field {name!r} must be a text or a list of texts, got {value!r}")
    captions = tuple(text for caption in listed if caption is not None and (text := clean_text(caption)).strip())
    if required and not captions:
        if name not in fields:
            raise ValueError(f"field {name!r}, the caption of {image_field!r}, is missing; it has {sorted(fields)}")
        state = "is null" if value is None else "is an empty list" if not listed else "holds an empty caption"
        raise ValueError(f"field {name!r}, the caption of {image_field!r}, {state}")
    return captions
