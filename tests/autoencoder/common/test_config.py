from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

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
