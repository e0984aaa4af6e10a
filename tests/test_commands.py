"""The command lines of all commands: one style, help and defaults everywhere, quick to answer, installed as scripts."""

import argparse
import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from autoencoder.common.commands import Parser, command, require_positive, with_underscores
from autoencoder.common.config import UserError

REPO_ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [
    "autoencoder.train", "autoencoder.reconstruct", "autoencoder.evaluate_reconstruction",
    "autoencoder.measure_latents",
    "svg_t2i.train", "svg_t2i.sample", "svg_t2i.benchmark", "svg_t2i.cache_features", "svg_t2i.inspect_data",
    "svg_t2i.export", "svg_t2i.app", "svg_t2i.plan",
]  # fmt: skip
HEAVY = ["transformers", "timm", "pytorch_lightning", "gradio", "torchmetrics", "diffusers", "torchvision"]


class Found(Exception):
    pass


def parsers(module: str) -> dict[str, argparse.ArgumentParser]:
    """The parser of a command and those of its sub-commands, by the words that choose them."""
    found: list[argparse.ArgumentParser] = []

    def parse(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        found.append(self)
        raise Found

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
            patch.setattr(Parser, name, parse)
        with pytest.raises(Found):
            importlib.import_module(module).main([])
    (top,) = found
    result = {"": top}
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            result |= action.choices
    return result


@pytest.mark.parametrize("module", COMMANDS)
def test_options_have_underscores_a_help_text_and_a_default(module):
    for name, parser in parsers(module).items():
        assert isinstance(parser, Parser)
        assert name or parser.description.startswith(importlib.import_module(module).__doc__[:30])
        for action in parser._actions:
            where = f"{module} {name} {action.option_strings or action.dest}"
            assert not any("-" in option[2:] for option in action.option_strings), f"{where}: dashes"
            if isinstance(action, argparse._SubParsersAction):
                assert all(choice.help for choice in action._choices_actions), where
                continue
            assert action.help, f"{where}: no help"
            takes_a_value = bool(action.option_strings) and action.nargs != 0
            if takes_a_value and not action.required and action.default in (None, []):
                several = isinstance(action, argparse._AppendAction)
                assert "default" in action.help or several, f"{where}: {action.help!r} says no default"
        parser.format_help()


@pytest.mark.parametrize("module", COMMANDS)
def test_help_comes_before_anything_heavy_is_imported(module):
    """In a process of its own, which prints what it has imported by then."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{module}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('{module}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        f"    print('imported:', end.code, [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    assert f"usage: python -m {module} " in done.stdout
    assert "imported: 0 []" in done.stdout


def test_dashes_are_underscores():
    assert with_underscores(["--batch-size", "3"]) == ["--batch_size", "3"]
    assert with_underscores(["--a-b=c-d", "e-f", "-g", "--", "--h-i"]) == ["--a_b=c-d", "e-f", "-g", "--", "--h-i"]
    parser = Parser()
    parser.add_argument("--batch_size", type=int, default=2, help="at once")
    parser.add_argument("--prompt", help="default: none")
    assert vars(parser.parse_args(["--batch-size", "3", "--prompt=a-b"])) == {"batch_size": 3, "prompt": "a-b"}
    assert "at once (default: 2)" in parser.format_help()
    assert "default: none\n" in parser.format_help()


@pytest.mark.parametrize(
    ("argv", "config", "overrides"),
    [
        (["a.yaml", "x=1", "--n", "2", "y=2"], "a.yaml", ["x=1", "y=2"]),
        (["--config", "a.yaml", "x=1"], "a.yaml", ["x=1"]),
        (["--n", "2", "a.yaml"], "a.yaml", []),
    ],
)
def test_the_config_may_come_first_or_by_name(argv, config, overrides):
    parser = Parser()
    parser.add_config("a file", positional=True)
    parser.add_argument("--n", type=int, help="default: none")
    arguments = parser.parse_intermixed_args(argv)
    assert (arguments.config, arguments.overrides) == (config, overrides)


def test_a_config_that_is_missing_is_named(capsys):
    parser = Parser()
    parser.add_config("a file", positional=True)
    with pytest.raises(SystemExit) as end:
        parser.parse_intermixed_args([])
    assert end.value.code == 2
    assert "required: --config" in capsys.readouterr().err


def test_numbers_below_one_are_refused():
    require_positive(argparse.Namespace(batch_size=1, limit=None), "batch_size", "limit", "elsewhere")
    with pytest.raises(UserError, match="--batch_size 0 must be at least 1"):
        require_positive(argparse.Namespace(batch_size=0), "batch_size")


def test_a_users_mistake_is_one_line_on_the_command_line_and_an_error_in_python(capsys, monkeypatch):
    @command
    def main(argv):
        raise UserError(f"bad {argv[0]}")

    monkeypatch.setattr("sys.argv", ["main", "thing"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: bad thing\n"
    with pytest.raises(UserError, match="bad other"):
        main(["other"])


def test_a_mistyped_sub_command_gets_the_list(capsys, monkeypatch):
    for module, known in (("svg_t2i.sample", "image_to_image"), ("svg_t2i.benchmark", "geneval")):
        monkeypatch.setattr("sys.argv", ["command", "inpant", "--checkpoint", "x"])
        with pytest.raises(SystemExit) as end:
            importlib.import_module(module).main()
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert "invalid choice: 'inpant'" in error
        assert known in error


def scripts() -> dict[str, str]:
    """Console scripts of pyproject.toml: name → module. Read without tomllib, which Python 3.10 lacks."""
    section = (REPO_ROOT / "pyproject.toml").read_text().split("[project.scripts]\n")[1].split("\n[")[0]
    return dict(re.findall(r'^([\w-]+) = "([\w.]+):main"$', section, flags=re.MULTILINE))


def test_every_command_is_a_console_script():
    expected = {f"svg-{m.replace('svg_t2i', 't2i').replace('.', '-').replace('_', '-')}": m for m in COMMANDS}
    assert scripts() == expected


def test_the_wheel_holds_all_rooms(tmp_path):
    """Built offline from a copy of what git would commit; the links to configs and scripts stay outside."""
    pytest.importorskip("setuptools", minversion="77")
    build = "import sys, setuptools.build_meta as backend\nprint('wheel:', backend.build_wheel(sys.argv[1]))\n"
    source = tmp_path / "source"
    for package in ("autoencoder", "svg_t2i"):
        for path in (REPO_ROOT / package).rglob("*.py"):
            target = source / path.relative_to(REPO_ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        for link in (REPO_ROOT / package).iterdir():
            if link.is_symlink():
                (source / package / link.name).symlink_to(link.resolve())
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        (source / name).write_bytes((REPO_ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.split("wheel: ")[1].strip()) as wheel:
        names = {name for name in wheel.namelist() if not name.startswith("svg_t2i-")}
        entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert set(scripts()) == set(re.findall(r"^(\S+) = ", wheel.read(entry_points).decode(), flags=re.MULTILINE))
    modules = [path for package in ("autoencoder", "svg_t2i") for path in (REPO_ROOT / package).rglob("*.py")]
    assert names == {str(path.relative_to(REPO_ROOT)) for path in modules}
