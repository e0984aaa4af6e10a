"""Prompt files: .txt (a prompt a line), .json (a list) and .jsonl, of strings or records; .csv and .tsv with a header.

Lines end at line feeds only. Files are UTF-8, or UTF-16 with its mark.

A file is checked as a whole before anything else happens: what is wrong in it is said together, with line numbers.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoencoder.common.config import UserError
from autoencoder.sources.captions import decode_text

# Fields of a prompt record that hold the prompt, in order of preference.
PROMPT_FIELDS = ("refined_prompt", "prompt", "gpt_4_caption", "caption", "text", "description", "query", "prompts")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
MAX_PROBLEMS = 5  # named in one message
MAX_SEED = 2**62  # below which seeds are


@dataclass(frozen=True)
class Prompt:
    """A prompt, with the settings that its record names for it alone."""

    text: str
    settings: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file. A record's prompt is its first field of `PROMPT_FIELDS`; of a list of captions the first.

    Raises:
        UserError: file missing, of another kind, empty, or records without a prompt or with a wrong setting; names file
            and lines.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"prompt file {path} does not exist")
    text, kind = read_text(path, "prompt file "), path.suffix.lower()
    if kind == ".txt":
        prompts = [Prompt(line) for _, line in numbered_lines(text)]
    elif kind == ".json":
        records = _parse(text) if text.strip() else []
        if not isinstance(records, list):
            raise UserError(f"{path}: expected a list of prompts or records, got {type(records).__name__}")
        prompts = checked(path, enumerate(records, 1), _prompt_of)
    elif kind == ".jsonl":
        prompts = checked(path, numbered_lines(text), lambda line: _prompt_of(_parse(line)))
    elif kind in DELIMITERS:
        prompts = checked(path, _table_rows(text, DELIMITERS[kind], path), _prompt_of)
    else:
        raise UserError(f"prompt file {path}: unknown kind {path.suffix!r}; use .txt, .json, .jsonl, .csv or .tsv")
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt; write one a line")
    return prompts


def read_text(path: Path, what: str = "") -> str:
    """A file in UTF-8, with or without a byte order mark, or in UTF-16 with one. UserError for another encoding."""
    try:
        return decode_text(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{what}{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers, without blanks around them.

    `str.splitlines` would also cut at U+2028, U+0085 and others, which are characters of a JSON text or a prompt.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _table_rows(text: str, delimiter: str, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table, each with the number of its last line. Columns in lower case, without empty cells."""
    rows = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    try:
        columns = [name.strip().lower() for name in rows.fieldnames or ()]
        if columns and not set(columns) & set(PROMPT_FIELDS):
            raise UserError(f"{path}: none of the columns {columns} holds prompts; name it {', '.join(PROMPT_FIELDS)}")
        rows.fieldnames = columns
        for row in rows:
            cells = {name: cell.strip() for name, cell in row.items() if isinstance(cell, str)}
            yield rows.line_num, {name: cell for name, cell in cells.items() if cell}
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num + 1}: no valid table ({error})") from error


def checked(path: Path, entries: Iterator[tuple[int, Any]], read: Callable[[Any], Any]) -> list[Any]:
    """What `read` makes of all numbered entries of a file. UserError that names all (of the first) it refuses."""
    made, problems = [], []
    for number, entry in entries:
        try:
            made.append(read(entry))
        except UserError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise UserError("; ".join(problems[:MAX_PROBLEMS]) + more)
    return made


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"not valid JSON ({error}); fix or remove it") from error


def _prompt_of(record: Any) -> Prompt:
    if isinstance(record, str):
        return Prompt(record)
    fields = {name: value for name, value in record.items() if value is not None} if isinstance(record, dict) else {}
    value = next((fields[name] for name in PROMPT_FIELDS if name in fields), None)
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise UserError(f"no prompt; a record needs one of the fields {', '.join(PROMPT_FIELDS)}")
    settings: dict[str, Any] = {}
    if "negative_prompt" in fields:
        if not isinstance(fields["negative_prompt"], str):
            raise UserError(f"negative_prompt = {fields['negative_prompt']!r} is no text")
        settings["negative_prompt"] = fields["negative_prompt"]
    if "guidance_scale" in fields:
        settings["guidance_scale"] = _finite("guidance_scale", fields["guidance_scale"])
    if "seed" in fields:
        settings["seed"] = _seed(fields["seed"])
    return Prompt(value, settings)


def _seed(value: Any) -> int:
    text = str(value)  # a cell of a table is text
    if not text.isdecimal() or len(text) > 19 or int(text) >= MAX_SEED:
        raise UserError(f"seed = {value!r} is no whole number from 0 to 2^62 - 1")
    return int(text)


def _finite(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} = {value!r} is no finite number")
    return number
