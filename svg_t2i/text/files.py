"""Prompt files: .txt (a prompt a line), .json (a list) and .jsonl, of strings or records."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoencoder.common.config import UserError

# Fields of a prompt record that hold the prompt, in order of preference.
PROMPT_FIELDS = ("refined_prompt", "prompt", "gpt_4_caption", "caption", "text", "description", "query")
OWN_SETTINGS = {"negative_prompt": str, "guidance_scale": float}  # what a record may say for itself


@dataclass(frozen=True)
class Prompt:
    """A prompt, with the settings that its record names for it alone."""

    text: str
    settings: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file. A record's prompt is its first field of `PROMPT_FIELDS`; of a list of captions the first.

    Raises:
        UserError: file missing, of another kind, empty, or a record without a prompt; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"prompt file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if path.suffix == ".txt":
        prompts = [Prompt(line.strip()) for line in text.splitlines() if line.strip()]
    elif path.suffix in (".json", ".jsonl"):
        prompts = [_prompt_of(record, f"{path}:{number}") for number, record in _records(text, path)]
    else:
        raise UserError(f"prompt file {path}: unknown kind {path.suffix!r}; use .txt, .json or .jsonl")
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt; write one a line")
    return prompts


def _records(text: str, path: Path) -> list[tuple[int, Any]]:
    if path.suffix == ".json":
        records = _parse(text, f"{path}") if text.strip() else []
        if not isinstance(records, list):
            raise UserError(f"{path}: expected a list of prompts or records, got {type(records).__name__}")
        return list(enumerate(records, 1))
    lines = enumerate(text.splitlines(), 1)
    return [(number, _parse(line, f"{path}:{number}")) for number, line in lines if line.strip()]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); fix or remove it") from error


def _prompt_of(record: Any, where: str) -> Prompt:
    if isinstance(record, str):
        return Prompt(record)
    fields = record if isinstance(record, dict) else {}
    value = next((fields[name] for name in PROMPT_FIELDS if name in fields), None)
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise UserError(f"{where}: no prompt; a record needs one of the fields {', '.join(PROMPT_FIELDS)}")
    settings = {}
    for name, kind in OWN_SETTINGS.items():
        if name in fields:
            try:
                settings[name] = kind(fields[name])
            except (TypeError, ValueError) as error:
                raise UserError(f"{where}: {name} = {fields[name]!r} is no {kind.__name__}") from error
    return Prompt(value, settings)
