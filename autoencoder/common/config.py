"""Configuration: YAML files and dotted overrides → plain mappings → typed, frozen dataclasses.

A config file is YAML with OmegaConf interpolation (`${data.resolution}`). It is read by `read_config`, changed by
overrides such as `optim.lr=1e-4`, and turned into a dataclass by `build`, which is strict: an unknown key, a missing
key or a value of the wrong type is a `ConfigError` that names the file, the field, the value and what would be right.

Resolvers (`${oc.env:HOME}`) read the environment, so only a file that the user named on the command line may use them:
`load_config`. What is saved of such a config keeps their text: see `Resolved`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")

REPO_ROOT = Path(__file__).resolve().parents[2]
NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"  # what means a float: YAML 1.1 reads `1e-4` as text


class UserError(ValueError):
    """A mistake in what the user gave us. The message is one sentence or two: file, field, value, remedy."""


class ConfigError(UserError):
    """A mistake in a configuration file or an override."""


class Resolved(str):
    """Text that a resolver made. written: the text that stands for it in the file, which is what `to_dict` gives."""

    written: str

    def __new__(cls, value: str, written: str) -> Resolved:
        text = super().__new__(cls, value)
        text.written = written
        return text

    def __getnewargs__(self) -> tuple[str, str]:
        return str(self), self.written


def short_path(path: str | os.PathLike) -> str:
    """The last two names of a path, which tell a run from its checkpoint: imagenet/val."""
    return "/".join(name for name in Path(path).parts[-2:] if name != "/")


def first_line(error: object) -> str:
    """The first line of an error's message; its type where there is none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def require(condition: bool, name: str, value: Any, rule: str) -> None:
    """UserError "name=value must be rule" unless the condition holds. For the checks of settings."""
    if not condition:
        raise UserError(f"{name}={value!r} must be {rule}")


def locate(path: str | os.PathLike) -> Path:
    """A path as given or, where nothing is there, below the repository or its svg_t2i.

    The published commands run inside autoencoder/ and svg_t2i/: this way what one of them wrote, and the release's
    pre-trained/ in svg_t2i/, is found from everywhere. What is nowhere is returned as given, for the reader to report.
    """
    given = Path(path).expanduser()
    candidates = (given, REPO_ROOT / given, REPO_ROOT / "svg_t2i" / given)
    return next((candidate for candidate in candidates if candidate.exists()), given)


def find_config(path: str | os.PathLike) -> Path:
    """Resolve a config path: as given, with `.yaml` appended, then both again below the repository root.

    Raises:
        ConfigError: if none of the candidates is a file; lists what was tried and similar names.
    """
    given = Path(path)
    names = [given, given.with_name(given.name + ".yaml")]
    candidates = names if given.is_absolute() else names + [REPO_ROOT / name for name in names]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    siblings = [p.name for folder in {c.parent for c in candidates} if folder.is_dir() for p in folder.glob("*.yaml")]
    raise ConfigError(f"config file {str(path)!r} does not exist{_nearest(given.name, siblings)}")


def read_config(path: str | os.PathLike, overrides: Sequence[str] = (), resolvers: bool = False) -> dict[str, Any]:
    """Read a YAML file into a plain dict, with `key.sub=value` overrides applied and interpolation resolved.

    resolvers: whether it may call OmegaConf's resolvers; their text becomes `Resolved`.

    Raises:
        ConfigError: no file, no YAML, no mapping, an override of another form, interpolation of what is not there, or
            a resolver where none is allowed.
    """
    path = find_config(path)
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file: {error}") from error
    if not OmegaConf.is_dict(config):
        raise ConfigError(f"{path}: expected a mapping of fields at the top level")
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key.strip("."):
            raise ConfigError(f"override {override!r} is not of the form key.sub=value, e.g. optim.lr=1e-4")
    try:
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
        written, calls = _without_resolvers(OmegaConf.to_container(config, resolve=False))
        if calls and not resolvers:
            field, text = next(iter(calls.items()))
            raise ConfigError(
                f"{path}: {field} = {text!r}: resolvers are for files given on the command line of a training or "
                "measuring command, since they can read this computer's environment; write the value itself"
            )
        values: Any = OmegaConf.to_container(config, resolve=True)
        return _keep_written(values, OmegaConf.to_container(OmegaConf.create(written), resolve=True))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} with overrides {list(overrides)}: {error}") from error


def _without_resolvers(raw: Any, name: str = "") -> tuple[Any, dict[str, str]]:
    """A config in which text that calls a resolver is escaped, so that it stays as it is, and these texts by field."""
    if isinstance(raw, dict):
        parts = {key: _without_resolvers(value, _join(name, key)) for key, value in raw.items()}
        calls = {field: text for _, found in parts.values() for field, text in found.items()}
        return {key: value for key, (value, _) in parts.items()}, calls
    if isinstance(raw, list):
        items = [_without_resolvers(value, f"{name}[{i}]") for i, value in enumerate(raw)]
        return [value for value, _ in items], {field: text for _, found in items for field, text in found.items()}
    if not isinstance(raw, str) or "${" not in (rest := raw):
        return raw, {}
    while rest != (rest := re.sub(r"\$\{[^${}:]*\}", "", rest)):  # `${data.resolution}`: inner ones first
        pass
    return (raw.replace("${", "\\${"), {name: raw}) if "${" in rest else (raw, {})


def _keep_written(value: Any, written: Any) -> Any:
    """`value` with its texts `Resolved` wherever they differ from `written`; what a resolver made a number stays one.

    Raises:
        ConfigError: a resolver made a list or a mapping, whose text could not be saved in its place.
    """
    if isinstance(value, dict) and isinstance(written, dict):
        return {key: _keep_written(item, written[key]) for key, item in value.items()}
    if isinstance(value, list) and isinstance(written, list):
        return [_keep_written(item, text) for item, text in zip(value, written, strict=True)]
    if isinstance(value, (dict, list)):
        raise ConfigError(f"{written!r} makes a {type(value).__name__}; a resolver may make a text or a number")
    return Resolved(value, written) if isinstance(value, str) and value != written else value


def load_config(schema: type[T], path: str | os.PathLike, overrides: Sequence[str] = ()) -> T:
    """`read_config` followed by `build`, for a file that was named on the command line: resolvers are allowed."""
    return build(schema, read_config(path, overrides, resolvers=True), source=str(path))


def build(schema: type[T], values: Mapping[str, Any] | None, source: str = "config") -> T:
    """Turn a mapping into an instance of the dataclass `schema`, strictly.

    Args:
        schema: a dataclass; field types may be nested dataclasses, Optional/Union, list, tuple, dict, Literal, Any
            and the primitives. Ints are accepted for floats, and strings such as "1e-4" that YAML 1.1 leaves as text.
        values: field values; None stands for an empty mapping. What the mapping of a nested dataclass leaves out is
            as in the default of its field.
        source: where the values come from, for messages.

    Raises:
        ConfigError: unknown key (with the nearest known one), missing key, wrong type, or the dataclass's own
            `__post_init__` complaint (a ValueError), prefixed with the source.
    """
    return _build(schema, {} if values is None else values, source, "")


def _build(schema: type, values: Any, source: str, prefix: str) -> Any:
    if isinstance(values, schema):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: {prefix or 'the file'} must be a mapping of fields, got {values!r}")
    hints = typing.get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema) if field.init}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{source}: unknown key {_join(prefix, key)!r}{_nearest(str(key), fields)}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            value = values[name]
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if dataclasses.is_dataclass(default) and isinstance(value, Mapping):
                value = vars(default) | dict(value)
            arguments[name] = _convert(hints[name], value, source, _join(prefix, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{source}: {_join(prefix, name)!r} is required and missing")
    try:
        return schema(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: {prefix + ': ' if prefix else ''}{error}") from error


def _convert(annotation: Any, value: Any, source: str, name: str) -> Any:
    """One value to one annotation; recursive through containers and nested dataclasses."""
    origin, choices = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if dataclasses.is_dataclass(annotation):
        return _build(annotation, value, source, name)
    if origin is Literal:
        value = str(value) if isinstance(value, Resolved) else value
        if value in choices and type(value) in {type(choice) for choice in choices}:
            return value
        raise ConfigError(f"{source}: {name} = {value!r}; choose one of {', '.join(map(str, choices))}")
    if origin in (Union, types.UnionType):
        return _convert_union(choices, value, source, name)
    if origin in (list, tuple) or annotation in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{source}: {name} = {value!r}; expected a list")
        if origin is tuple and choices and choices[-1] is not Ellipsis:
            if len(value) != len(choices):
                raise ConfigError(f"{source}: {name} = {value!r}; expected {len(choices)} entries")
            return tuple(_convert(c, v, source, f"{name}[{i}]") for i, (c, v) in enumerate(zip(choices, value)))
        item = choices[0] if choices else Any
        return (origin or annotation)(_convert(item, v, source, f"{name}[{i}]") for i, v in enumerate(value))
    if origin is dict or annotation is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{source}: {name} = {value!r}; expected a mapping")
        item = choices[1] if choices else Any
        return {k: _convert(item, v, source, _join(name, k)) for k, v in value.items()}
    return _convert_scalar(annotation, value, source, name)


def _convert_union(choices: tuple, value: Any, source: str, name: str) -> Any:
    if value is None and type(None) in choices:
        return None
    errors = []
    kind = str if isinstance(value, Resolved) else type(value)
    for choice in sorted((c for c in choices if c is not type(None)), key=lambda c: c is not kind):
        try:
            return _convert(choice, value, source, name)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _convert_scalar(annotation: type, value: Any, source: str, name: str) -> Any:
    if isinstance(value, Resolved):
        if annotation is str:
            return value
        value = str(value)
    if annotation is float and type(value) in (int, str) and re.fullmatch(NUMBER, str(value)):
        return float(value)
    elif annotation is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif annotation is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif annotation is str and isinstance(value, Path):
        return str(value)
    elif type(value) is annotation:
        return value
    raise ConfigError(f"{source}: {name} = {value!r}; expected {getattr(annotation, '__name__', annotation)}")


def to_dict(config: Any) -> Any:
    """A dataclass (or a container of them) as plain dicts, lists and scalars, ready for YAML or JSON.

    Text that a resolver made is given as it was written: nothing that is saved holds a value of the environment.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    if isinstance(config, Resolved):
        return config.written
    return str(config) if isinstance(config, Path) else config


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Write a dataclass or mapping as YAML; reading it back gives the same config."""
    Path(path).write_text(to_yaml(config))


def to_yaml(config: Any) -> str:
    """A config, or plain values, as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def resolve_target(name: str, field: str, table: Mapping[str, T]) -> T:
    """Look `name` up in an allow-list. `target:` never imports by itself: a config is data, not code.

    Raises:
        ConfigError: names the field, the value, the nearest entry and all choices.
    """
    if name in table:
        return table[name]
    raise ConfigError(f"{field}: unknown target {name!r}{_nearest(name, table)}; known: {', '.join(sorted(table))}")


def _join(prefix: str, key: object) -> str:
    return f"{prefix}.{key}" if prefix else str(key)


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if matches:
        return f" (did you mean {matches[0]!r}?)"
    return f" (known: {', '.join(sorted(known))})" if 0 < len(known) <= 40 else ""
