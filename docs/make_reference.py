"""Writes docs/configuration.md and docs/python-api.md from the dataclasses and docstrings of the code.

    python docs/make_reference.py            write both
    python docs/make_reference.py --check    write nothing; exit status 1 where one is out of date

A setting's note is the comment behind its field, or the comment lines above it; what a section says of its settings is
its docstring.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

FOLDER = Path(__file__).resolve().parent
STAGE_1 = "autoencoder.training.settings.AutoencoderTrainConfig"
STAGE_2 = "svg_t2i.training.settings.TrainConfig"
MODEL = "svg_t2i.transformer.config.DiTConfig"
API = (
    ("Pipeline", "svg_t2i.pipeline.SVGT2IPipeline", (
        "from_pretrained", "__call__", "encode_prompt", "image_to_image", "variation", "inpaint", "interpolate",
        "retrieve", "enhance", "save_pretrained", "quantize", "set_attention_backend", "compile",
    )),
    ("Settings of sampling", "svg_t2i.sampling.options.SamplingOptions", ()),
    ("Autoencoder", "autoencoder.model.SVGAutoencoder", (
        "from_pretrained", "from_config", "encode", "normalize", "denormalize", "decode", "save_pretrained",
    )),
    ("Statistics of latents", "autoencoder.latents.statistics.LatentStats", ()),
    ("Transformer", "svg_t2i.transformer.model.SVGDiT", ("forward",)),
    ("Sizes of the transformer", "svg_t2i.transformer.config.DiTConfig", ()),
    ("Text encoder", "svg_t2i.text.encoder.TextEncoder", ("from_pretrained",)),
    ("Solvers", "svg_t2i.flow.solvers.sample", ()),
    ("Images and captions", "autoencoder.sources.opening.open_source", ()),
    ("Metrics of samples", "svg_t2i.evaluation.evaluate.evaluate", ()),
    ("Plan of a training", "svg_t2i.planning.training.plan_training", ()),
)  # fmt: skip


def find(name: str) -> Any:
    """The object of a dotted name."""
    module, attribute = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), attribute)


# ---- settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A dataclass, and the key of a file below which its fields are; "" for the whole file."""

    key: str
    settings: type

    def own(self) -> list[Field]:
        return [field for field in fields(self.settings) if not self.below(field)]

    def below(self, field: Field) -> type | None:
        """The dataclass that a field is a section of, if it is one."""
        return section_type(get_type_hints(self.settings)[field.name])

    def sections(self) -> Iterator[Section]:
        """This one, then those inside it."""
        yield self
        for field in fields(self.settings):
            if inner := self.below(field):
                yield from Section(f"{self.key}.{field.name}".lstrip("."), inner).sections()


def section_type(annotation: Any) -> type | None:
    """The dataclass in an annotation such as X, X | None or tuple[X, ...]."""
    if is_dataclass(annotation):
        return annotation
    if get_origin(annotation) in (Union, UnionType, tuple):
        return next((argument for argument in get_args(annotation) if is_dataclass(argument)), None)
    return None


def notes(settings: type) -> dict[str, str]:
    """Field → the comment behind it, or the comment lines above it."""
    found: dict[str, str] = {}
    for base in reversed([cls for cls in settings.__mro__ if is_dataclass(cls)]):
        above: list[str] = []
        for line in inspect.getsource(base).splitlines():
            comment = re.fullmatch(r"    # (?!-- )(.*)", line)
            declared = re.fullmatch(r"    (\w+): [^#]*?(?:  # (.*))?", line)
            if comment:
                above.append(comment[1])
            elif declared:
                found[declared[1]] = declared[2] or " ".join(above)
                above = []
            else:
                above = []
    return found


def default(field: Field) -> str:
    """A field's default as YAML writes it."""
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is MISSING:
        return "needed"
    if isinstance(value, (tuple, list)):
        return f"`[{', '.join(map(str, value))}]`"
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower()}`".replace("none", "null")
    return f"`{value}`" if value != "" else '`""`'


def kind(annotation: str) -> str:
    """A type as a table shows it."""
    annotation = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace(", ", " | "), annotation)
    text = annotation.replace("None", "null").replace('"', "").replace("tuple[", "list[").replace(", ...]", "]")
    return f"`{text}`".replace("|", "\\|")


def table(section: Section) -> str:
    """A section's settings, with what its docstring says."""
    title = f"## `{section.key}`" if section.key else "## The file itself"
    lines = [title, "", text_of(section.settings), ""]
    rows, said = section.own(), notes(section.settings)
    if rows:
        lines += ["| Key | Values | Default | |", "|---|---|---|---|"]
        for field in rows:
            key = f"{section.key}.{field.name}".lstrip(".")
            note = re.sub(r"\bNone\b", "null", said.get(field.name, "")).replace("|", "\\|")
            lines.append(f"| `{key}` | {kind(str(field.type))} | {default(field)} | {note} |")
        lines.append("")
    return "\n".join(lines)


CONFIGURATION = """# Configuration

Every key of the YAML files of both stages. Any of them can be changed behind a command: `train.max_steps=10`. A key
that does not exist, or a value that does not fit, is refused before anything is loaded, with the names that do exist.

Written by `python docs/make_reference.py` from the code. `null` switches a setting off unless its note says otherwise.

# Stage 2: transformer

{stage_2}
## `model_overrides`

Any size of the model that `model` names, one of the table in `svg_t2i/transformer/config.py`.

{model}
# Stage 1: autoencoder

{stage_1}"""


def configuration() -> str:
    """docs/configuration.md."""
    stage_1, stage_2 = (
        "\n".join(table(section) for section in Section("", find(name)).sections()) for name in (STAGE_1, STAGE_2)
    )
    model = table(Section("model_overrides", find(MODEL))).split("\n", 2)[2]  # without its title
    return CONFIGURATION.format(stage_1=stage_1, stage_2=stage_2, model=model).rstrip() + "\n"


# ---- docstrings -----------------------------------------------------------------------------------------------------


def text_of(thing: Any) -> str:
    """A docstring; in a code block where its lines are laid out."""
    text = inspect.getdoc(thing) or ""
    if is_dataclass(thing) and text.startswith(f"{thing.__name__}("):
        return ""
    first, _, rest = text.partition("\n")
    return f"{first}\n\n```text\n{textwrap.dedent(rest).strip()}\n```" if rest.strip() else first


def signature(thing: Callable, name: str) -> str:
    """`name(arguments)`, an argument a line where they are many."""
    found = inspect.signature(thing)
    kept = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    found = found.replace(parameters=kept)
    text = plain(str(found))
    if len(name + text) > 100:
        inner = ",\n    ".join(plain(str(p)) for p in kept)
        result = text.rsplit(" -> ", 1)[1] if " -> " in text else "None"
        text = f"(\n    {inner},\n) -> {result}"
    return f"```python\n{name}{text}\n```"


def plain(text: str) -> str:
    """A signature without the quotes around its annotations."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)


def entry(title: str, name: str, methods: tuple[str, ...]) -> str:
    """One object, and its methods."""
    thing = find(name)
    short = name.rsplit(".", 1)[1]
    lines = [f"## {title}", "", f"`{name}`", ""]
    if not inspect.isclass(thing):
        lines += [signature(thing, short), ""]
    lines += [text_of(thing), ""]
    for method in methods:
        call = getattr(thing, method)
        lines += [f"### `{method}`" if method != "__call__" else "### A call", ""]
        lines += [signature(call, short if method == "__call__" else method), "", text_of(call), ""]
    return "\n".join(lines)


PYTHON_API = """# Python API

What is meant to be used from Python, from the docstrings of the code. `SVGT2IPipeline` is a `DiffusionPipeline` of
diffusers: what is not listed here is
[the library's](https://huggingface.co/docs/diffusers/api/pipelines/overview).

Written by `python docs/make_reference.py`.

"""


def python_api() -> str:
    """docs/python-api.md."""
    return PYTHON_API + "\n".join(entry(*what) for what in API).rstrip() + "\n"


PAGES = {"configuration.md": configuration, "python-api.md": python_api}


def main(argv: list[str] | None = None) -> int:
    """Write the pages that are out of date, or with --check name them; returns the exit code."""
    parser = argparse.ArgumentParser(description="write the reference pages of the documentation")
    parser.add_argument("--check", action="store_true", help="write nothing; say which pages are out of date")
    arguments = parser.parse_args(argv)
    stale = False
    for name, make in PAGES.items():
        path, text = FOLDER / name, make()
        if is_current(path, text):
            continue
        stale = True
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
        print(f"{path} {'is out of date' if arguments.check else 'written'}")
    return int(arguments.check and stale)


def is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
