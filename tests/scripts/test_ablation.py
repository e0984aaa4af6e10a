"""The table of the ablation, what it is made of, and what it refuses. The runs themselves take an hour."""

import json
import sys

import pytest
from PIL import Image

from autoencoder.common.config import UserError, build, load_config
from autoencoder.training.settings import AutoencoderTrainConfig
from svg_t2i.sampling.options import SamplingOptions
from svg_t2i.training.settings import TrainConfig


@pytest.fixture
def ablation(monkeypatch):
    pytest.importorskip("benchmarks.ablation")
    module = sys.modules["benchmarks.ablation"]
    monkeypatch.syspath_prepend(module.REPO_ROOT / "scripts" / "quickstart")
    return module


def row(option, seed, halfway, seconds=0.25):
    right = {"150": [0.0, 0.0], "300": [halfway, halfway / 2], "450": [0.97, 0.85], "600": [1.0, 0.9]}
    return {
        "option": option, "seed": seed, "steps": 600, "right": right, "right_few": [halfway, 0.25],
        "validation": 0.5 + seed, "validation_at_noise": 0.125, "seconds": seconds,
    }  # fmt: skip


def test_the_table_has_mean_and_spread_of_every_option(ablation):
    rows = [row("data", 0, 0.8), row("velocity", 0, 0.5), row("velocity", 1, 0.92)]
    lines = ablation.table(rows).splitlines()
    assert lines[0].startswith("| option | seeds | right after 150, one | right after 150, two | right after 300,")
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["velocity", "data"]  # in the order of OPTIONS
    velocity, data = ([cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:])
    assert velocity == [
        "2", "0 ± 0 %", "0 ± 0 %", "71 ± 30 %", "36 ± 15 %", "97 ± 0 %", "85 ± 0 %", "100 ± 0 %", "90 ± 0 %",
        "71 ± 30 %", "25 ± 0 %", "450, 450", "1.000 ± 0.707", "0.1250 ± 0.0000", "0.250 ± 0.000",
    ]  # fmt: skip
    assert data[3:5] == ["80 %", "40 %"]
    assert ablation.table([]) == "no results yet"
    assert ablation.steps_to({"4": [0.2, 0.4]}) is None


def test_every_option_is_a_change_that_the_quickstart_takes(ablation):
    for option, changes in ablation.OPTIONS.items():
        SamplingOptions(**changes.sampling)
        config = load_config(TrainConfig, ablation.CONFIG, list(changes.training))
        assert (config == load_config(TrainConfig, ablation.CONFIG)) == (option == "data, aux features")
        sizes = config.model_config(in_channels=192, cap_feat_dim=128)
        assert build(type(sizes), vars(sizes)) == sizes


def test_an_option_of_the_autoencoder_has_one_of_its_own(ablation, tmp_path, monkeypatch):
    """Trained once, on the quickstart's pictures; its statistics are the last that is made of it."""
    runs = []
    monkeypatch.setattr(ablation.Recipe, "run", lambda self, *words, **_: runs.append([str(word) for word in words]))
    own = ablation.Ablation(tmp_path / "quickstart", tmp_path, ablation.Budget(steps=4))
    assert own.parts("data") == tmp_path / "quickstart"
    assert runs == []
    folder = own.parts("data, four layers")
    assert folder.parent == tmp_path
    (train, measure) = runs
    assert f"data.params.json_path={tmp_path / 'quickstart' / 'data' / 'train.jsonl'}" in train
    assert train[-1] == "model.params.dinoconfig.layers=last_4"
    config = load_config(AutoencoderTrainConfig, ablation.REPO_ROOT / train[2], train[5:])
    assert config.model.params.dinoconfig.layers == "last_4"
    assert measure[-2:] == ["--output", str(folder / "latent_stats.safetensors")]
    folder.mkdir(exist_ok=True)
    (folder / "latent_stats.safetensors").touch()
    assert own.parts("data, four layers") == folder
    assert len(runs) == 2


def test_it_says_what_it_lacks_and_mixes_nothing(ablation, tmp_path, capsys):
    arguments = ["--quickstart", str(tmp_path / "none"), "--output", str(tmp_path)]
    with pytest.raises(UserError, match=r"has no trained model: bash scripts/quickstart\.sh makes one"):
        ablation.main(arguments)
    (tmp_path / "results.jsonl").write_text(json.dumps(row("data", 0, 0.5)) + "\n")
    ablation.main([*arguments, "--table", "--plot", str(tmp_path / "plot.png")])
    assert Image.open(tmp_path / "plot.png").size == (1200, 480)
    assert "| data | 1 |" in capsys.readouterr().out
    (tmp_path / "none" / "transformer" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds runs of 600 steps"):
        ablation.main([*arguments, "--steps", "8"])
    ablation.main([*arguments, "--options", "data", "--seeds", "1"])  # all of it is there: trains nothing
    assert "| data | 1 |" in capsys.readouterr().out
