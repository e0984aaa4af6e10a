from __future__ import annotations

import pickle
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
import yaml

from autoencoder.common import config
from autoencoder.common.config import (
    ConfigError,
    build,
    find_config,
    load_config,
    read_config,
    resolve_target,
    save_config,
    to_dict,
)


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int | None = None


@dataclass(frozen=True)
class Config:
    name: str
    optim: Optim = field(default_factory=Optim)
    precision: Literal["fp32", "bf16"] = "bf16"
    sizes: list[int] = field(default_factory=list)
    tags: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if self.name == "":
            raise ValueError("name is empty; give the run a name")


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: first\noptim: {lr: 1e-4, warmup_steps: 10}\nsizes: [1, 2]\n")
    return path


def test_reads_overrides_and_types(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: first\noptim: {lr: 1e-4, warmup_steps: 10}\nsizes: [1, 2]\n")
    config = load_config(Config, path, ["optim.lr=3e-5", "precision=fp32", "optim.warmup_steps=null", "sizes=[4]"])
    assert config == Config("first", Optim(3e-5, (0.9, 0.95), None), "fp32", [4])


def test_interpolation_and_round_trip(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: x\noptim: {lr: 2}\nsizes: ['${optim.lr}', 5]\n")
    config = load_config(Config, path)
    assert config.sizes == [2, 5]
    save_config(config, tmp_path / "copy.yaml")
    assert load_config(Config, tmp_path / "copy.yaml") == config
    assert to_dict(config)["optim"]["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"unknown key 'optim\.lrr'.*did you mean 'lr'"),
        ("nme=1", r"unknown key 'nme'.*did you mean 'name'"),
        ("optim.lr=fast", r"optim\.lr = 'fast'; expected float"),
        ("optim.lr=true", r"optim\.lr = True; expected float"),
        ("optim.warmup_steps=1.5", r"optim\.warmup_steps = 1\.5; expected int"),
        ("precision=fp8", r"precision = 'fp8'; choose one of fp32, bf16"),
        ("optim.betas=[0.9]", r"expected 2 entries"),
        ("sizes=3", r"sizes = 3; expected a list"),
        ("name=3", r"name = 3; expected str"),
        ("optim.betas=[0.9,0.95,1]", r"expected 2 entries"),
        ("optim=3", r"optim must be a mapping"),
        ("name=''", r"name is empty"),
        ("justakey", r"not of the form key\.sub=value"),
    ],
)
def test_bad_values_name_the_field_and_the_remedy(tmp_path, override, message):
    path = tmp_path / "run.yaml"
    path.write_text("name: first\n")
    with pytest.raises(ConfigError, match=message):
        load_config(Config, path, [override])


def test_paths_are_text_and_text_is_a_path_where_that_is_asked_for():
    @dataclass
    class Files:
        name: str
        folder: Path

    files = build(Files, {"name": Path("a"), "folder": "b"}, "here")
    assert (files.name, files.folder) == ("a", Path("b"))
    with pytest.raises(ConfigError, match="folder = 3; expected Path"):
        build(Files, {"name": "a", "folder": 3}, "here")
    with pytest.raises(ConfigError, match="warmup_steps = PosixPath"):
        build(Optim, {"warmup_steps": Path("a")}, "here")


def test_missing_key_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="'name' is required"):
        build(Config, {}, "run.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        read_config(tmp_path / "list.yaml")


def test_find_config_tries_yaml_and_the_repo_root(config_file, repo_root, monkeypatch, tmp_path):
    assert find_config(config_file.with_suffix("")) == config_file
    monkeypatch.chdir(tmp_path)
    assert find_config("pyproject.toml") == repo_root / "pyproject.toml"
    with pytest.raises(ConfigError, match=r"does not exist.*did you mean 'run\.yaml'"):
        find_config(tmp_path / "runs.yaml")


def test_targets_are_looked_up_never_imported():
    table = {"ldm.Decoder": 1}
    assert resolve_target("ldm.Decoder", "model.target", table) == 1
    with pytest.raises(ConfigError, match=r"model\.target: unknown target 'os\.system'"):
        resolve_target("os.system", "model.target", table)


def test_paths_are_found_from_every_folder(tmp_path, monkeypatch):
    repository, here = tmp_path / "repository", tmp_path / "here"
    for path in (repository / "data" / "a", repository / "svg_t2i" / "pre-trained" / "a", here / "data" / "b"):
        path.mkdir(parents=True)
    monkeypatch.setattr(config, "REPO_ROOT", repository)
    monkeypatch.chdir(here)
    assert config.locate("data/b") == Path("data/b")  # what is given wins
    assert config.locate("data/a") == repository / "data" / "a"
    assert config.locate("pre-trained/a") == repository / "svg_t2i" / "pre-trained" / "a"
    assert config.locate("pre-trained/b") == Path("pre-trained/b")
    assert config.locate(str(here)) == here


# --- resolvers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(monkeypatch) -> str:
    monkeypatch.setenv("SVG_SECRET", "s3cr3t")
    return "s3cr3t"


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:SVG_SECRET}",
        "owner/${oc.env:SVG_SECRET}",
        "${oc.env:SVG_SECRET,default}",
        "${oc.decode:${oc.env:SVG_SECRET}}",
        "${oc.${part}:SVG_SECRET}",
        "${ oc.env : SVG_SECRET }",
        "${name}/${oc.env:SVG_SECRET}",
    ],
)
def test_a_file_that_nobody_named_calls_no_resolver(tmp_path, secret, text):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "part": "env", "model": {"parts": [{"weights": text}]}}))
    with pytest.raises(ConfigError, match="write the value itself") as error:
        read_config(path)
    assert str(path) in str(error.value)
    assert "model.parts[0].weights" in str(error.value)
    assert secret not in str(error.value)


def test_an_override_of_such_a_file_calls_none_either(config_file, secret):
    with pytest.raises(ConfigError, match="name = "):
        read_config(config_file, ["name=${oc.env:SVG_SECRET}"])


def test_names_of_other_fields_are_no_resolvers(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("a: {b: [3, x]}\nc: ${a.b[1]}/${a.b[0]}\nk: b\nd: ${a.${k}}\ne: ${.c}\n")
    assert read_config(path) == {"a": {"b": [3, "x"]}, "c": "x/3", "k": "b", "d": [3, "x"], "e": "x/3"}


def test_what_is_saved_keeps_the_text_of_a_resolver(tmp_path, secret):
    path = tmp_path / "run.yaml"
    path.write_text("name: a/${oc.env:SVG_SECRET}\nprecision: ${oc.env:SVG_NONE,fp32}\ntags: {x: 1}\n")
    given = load_config(Config, path)
    assert given.name == f"a/{secret}"
    assert given.precision == "fp32"
    for same in (given, replace(given, sizes=[1]), pickle.loads(pickle.dumps(given)), deepcopy(given)):
        assert to_dict(same)["name"] == "a/${oc.env:SVG_SECRET}"
        save_config(same, tmp_path / "saved.yaml")
        assert secret not in (tmp_path / "saved.yaml").read_text()
        assert load_config(Config, tmp_path / "saved.yaml") == same


def test_text_made_of_a_resolved_one_is_saved_as_written_too(tmp_path, secret):
    path = tmp_path / "run.yaml"
    path.write_text("root: {a: '${oc.env:SVG_SECRET}', n: 1}\nb: ${root.a}/x\nc: ${root}\nd: [plain, '${root.n}']\n")
    values = read_config(path, resolvers=True)
    for text, found in ((secret, values), ("${oc.env:SVG_SECRET}", to_dict(values))):
        root = {"a": text, "n": 1}
        assert found == {"root": root, "b": f"{text}/x", "c": root, "d": ["plain", 1]}


def test_a_resolver_may_make_a_number_but_no_list(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nsizes: ['${oc.decode:${oc.env:SVG_SIZE}}']\n")
    monkeypatch.setenv("SVG_SIZE", "8")
    assert load_config(Config, path).sizes == [8]
    monkeypatch.setenv("SVG_SIZE", "[8, s3cr3t]")
    with pytest.raises(ConfigError, match="makes a list") as error:
        load_config(Config, path)
    assert "s3cr3t" not in str(error.value)


@dataclass(frozen=True)
class Kinds:
    path: Path
    number: float
    either: int | str | None


def test_resolved_text_becomes_whatever_text_may_become(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text("path: ${oc.env:SVG_A}/x\nnumber: ${oc.env:SVG_N}\neither: ${oc.env:SVG_A}\n")
    monkeypatch.setenv("SVG_A", "a")
    monkeypatch.setenv("SVG_N", "1e-4")
    built = load_config(Kinds, path)
    assert built == Kinds(Path("a/x"), 1e-4, "a")
    assert to_dict(built)["either"] == "${oc.env:SVG_A}"
