"""The most that a request of the page may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autoencoder.common.config import UserError


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for; checked on the server, whatever the page sends."""

    prompt_characters: int = 2000
    side: int = 2048
    steps: int = 200
    images: int = 4
    guidance: float = 20.0
    upload_pixels: int = 50_000_000

    def text(self, name: str, value: Any) -> str:
        """`value` without blanks around it; None is the empty text. UserError for what is no text, or too long."""
        if not isinstance(value, str | None):
            raise UserError(f"{name} = {value!r} must be a text")
        if len(value or "") > self.prompt_characters:
            raise UserError(f"{name} has {len(value)} characters; at most {self.prompt_characters}")
        return (value or "").strip()

    def whole(self, name: str, value: Any, least: int, most: int) -> int:
        """`value` as a whole number. UserError for anything else, or out of range."""
        number = self.number(name, value, least, most, "whole numbers")
        if number != int(number):
            raise UserError(f"{name} = {value}: whole numbers from {least} to {most}")
        return int(number)

    def number(self, name: str, value: Any, least: float, most: float, kind: str = "numbers") -> float:
        """`value` as a number. UserError for anything else, or out of range."""
        if type(value) not in (int, float) or not least <= value <= most:  # NaN is in no range
            raise UserError(f"{name} = {value}: {kind} from {least} to {most}")
        return float(value)
