"""Command lines: one style of options, and one way from a command line into `main`."""

from __future__ import annotations

import argparse
import errno
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from autoencoder.common.config import UserError
from autoencoder.common.stopping import INTERRUPTED

# What a file system refuses by no fault of the code, and what its user can do.
REFUSALS = {
    errno.ENOSPC: "free some space there, or write to another disk",
    errno.EDQUOT: "free some space there, or write to another disk",
    errno.EROFS: "write to another folder",
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
    errno.ENOTDIR: "a part of this path is a file; choose another path",
    errno.EMFILE: "too many files are open; raise the limit with `ulimit -n`",
}
CONSOLE_SCRIPTS = "svg-"  # how the names of those in pyproject.toml begin


class _Help(argparse.RawDescriptionHelpFormatter):
    """The description as it is written; every default behind its option, unless the text names it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        unset = default in (None, False, argparse.SUPPRESS) or default == []
        if text is None or "default" in text or unset or not action.option_strings:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{text} (default: {shown})".replace("()", "")


class Parser(argparse.ArgumentParser):
    """Options with underscores, as published: `--batch_size`. With dashes they are the same options.

    Args:
        module: for `python -m MODULE`, how the usage line begins, but for an installed console script.
        description: shown as it is.
    """

    def __init__(self, module: str | None = None, description: str | None = None, **options: Any) -> None:
        script = os.path.basename(sys.argv[0])
        if module is not None:
            options["prog"] = script if script.startswith(CONSOLE_SCRIPTS) else f"python -m {module}"
        super().__init__(description=description, formatter_class=_Help, **options)
        self._positional_config = False

    def add_config(self, help: str, positional: bool = False, words: str = "key.sub=value") -> None:
        """`--config FILE`, and `overrides`: the words that follow.

        positional: the file may also be the first word, without `--config`. words: what the others are.
        """
        by_place = " (default: the first word that belongs to no option)" if positional else ""
        self.add_argument("--config", required=not positional, help=help + by_place)
        metavar = f"config|{words}" if positional else words
        meaning = "first the config, where --config does not name it; then " if positional else ""
        self.add_argument("overrides", nargs="*", metavar=metavar, help=f"{meaning}changes of its entries")
        self._positional_config = positional

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # noqa: D102
        return super().parse_known_args(with_underscores(sys.argv[1:] if args is None else args), namespace)

    def parse_intermixed_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's; where `add_config` allows it, the first positional argument is the config."""
        arguments = super().parse_intermixed_args(args, namespace)
        if self._positional_config and arguments.config is None:
            if not arguments.overrides:
                self.error("the following arguments are required: --config")
            arguments.config = arguments.overrides.pop(0)
        return arguments


def with_underscores(argv: Iterable[str]) -> list[str]:
    """`--batch-size=8` → `--batch_size=8`. Values, and everything behind a bare `--`, stay."""
    result, options = [], True
    for word in argv:
        options = options and word != "--"
        name, equals, value = word.partition("=")
        if options and name.startswith("--"):
            word = "--" + name[2:].replace("-", "_") + equals + value
        result.append(word)
    return result


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    """UserError for an option that was given a number below 1."""
    for name in names:
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")


def command(main: Callable[[list[str]], None]) -> Callable[..., None]:
    """`main(argv)` of a command, as `python -m`, a console script and tests call it.

    Without `argv` it takes the command line, and these end it with one line on stderr, without a traceback: a
    `UserError` and what the file system refuses (exit code 2), and Ctrl-C (130; once more ends it at once). With `argv`
    the error is the caller's.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> None:
        if argv is not None:
            main(list(argv))
            return
        try:
            with showing_loads():
                main(sys.argv[1:])
        except UserError as error:
            _end(f"error: {error}", 2)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            where = error.filename or "writing a file"
            _end(f"error: {where}: {os.strerror(error.errno).lower()}; {REFUSALS[error.errno]}", 2)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            _end("\ninterrupted; what is written is whole, and the same command goes on or starts again", INTERRUPTED)

    return run


@contextmanager
def showing_loads() -> Iterator[None]:
    """Inside it, what loads of weights did (`common.weights.report_load`) is printed on standard error, a line each."""
    loads = logging.getLogger("autoencoder.loads")  # importing common.weights would import torch
    before, lines = (loads.level, loads.propagate), _Lines()
    loads.setLevel(logging.INFO)
    loads.propagate = False
    loads.addHandler(lines)
    try:
        yield
    finally:
        loads.removeHandler(lines)
        loads.setLevel(before[0])
        loads.propagate = before[1]


class _Lines(logging.Handler):
    """Messages as lines on what is standard error at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)


def _end(line: str, code: int) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(code) from None
