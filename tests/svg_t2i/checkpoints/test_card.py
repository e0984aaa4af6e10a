"""The model card of an export says what the checkpoint records, and nothing of the machine it was trained on."""

import json

import pytest
from huggingface_hub import ModelCard

from autoencoder.common.config import REPO_ROOT, UserError, load_config, to_dict
from svg_t2i import export as export_command
from svg_t2i.app import stated_licence
from svg_t2i.checkpoints.card import model_card, read_metrics
from svg_t2i.checkpoints.weights import save_transformer
from svg_t2i.training.settings import TrainConfig
from svg_t2i.transformer.config import MODELS
from svg_t2i.transformer.model import SVGDiT

SIZES = MODELS["tiny"]


def meta_of(*changes):
    config = load_config(TrainConfig, REPO_ROOT / "configs" / "svg_t2i" / "stage2_512.yaml", list(changes))
    prints = {"autoencoder": {"encoder": "abc", "stats": "def", "channels": 384}, "text_encoder": "123"}
    return {"step": 1000, "config": to_dict(config), "fingerprints": prints, "code": "c0ffee", "torch": "2.10"}


def card(meta, **more):
    return model_card(meta, SIZES, 2_600_000_000, **({"name": "mine", "weights": "averaged"} | more))


def rows(text, title):
    """The table under a title, name → value."""
    part = text.split(f"## {title}\n")[1].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ") and line != "| | |"]
    return dict(cells)


def test_a_card_is_one_of_the_hub_and_has_what_was_recorded():
    text = card(meta_of("data.path=/secret/place/photos"), licence="apache-2.0", metrics={"fid": 12.3456, "kid": None})
    parsed = ModelCard(text)
    assert parsed.data.license == "apache-2.0"
    assert parsed.data.pipeline_tag == "text-to-image"
    assert "2.6 billion parameters" in text
    training = rows(text, "Training")
    assert training["Data"] == "place/photos"
    assert training["Steps"] == "1,000"
    assert training["Images seen"] == "768,000"
    assert training["Began with"] == "results/stage1_256"
    assert training["Weights"] == "averaged, decay 0.95"
    assert training["Times"] == "uniform, shift: flux"
    assert "Auxiliary head" not in training
    assert rows(text, "Frozen networks")["Text encoder"] == "google/gemma-2-2b"
    assert rows(text, "Metrics") == {"fid": "12.35"}
    assert "DINOv3 License" in text
    assert "Gemma Terms of Use" in text
    assert "secret" not in text


def test_a_card_of_other_trainings():
    text = card(meta_of("aux={loss: features, block: 4}", "flow.shift=false", "init_from=null"), weights="raw")
    training = rows(text, "Training")
    assert training["Auxiliary head"] == "features"
    assert training["Times"] == "uniform, shift: none"
    assert training["Began with"] == "random weights"
    assert training["Weights"] == "raw"
    several = "data.sources=[{path: /a/b/shards, weight: 1.0}, {path: c.jsonl, weight: 2.0}]"
    assert rows(card(meta_of("data.path=null", several)), "Training")["Data"] == "b/shards, c.jsonl"
    assert rows(card(meta_of("lora={rank: 4}")), "Training")["Began with"] == "an adapter of results/stage1_256"
    bare = card({})
    assert "records no training" in bare
    assert "license:" not in bare
    assert "No licence was stated" in bare


def test_export_writes_it(tmp_path):
    folder = save_transformer(SVGDiT(SIZES), tmp_path / "model")
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({"mmd": 4.5, "fid": {"unavailable": "no network"}}))
    out = tmp_path / "my_model"
    export_command.main([str(folder), str(out), "--license", "mit", "--metrics", str(metrics)])
    text = (out / "README.md").read_text()
    assert text.split("\n# ")[1].startswith("my_model\n")
    assert rows(text, "Metrics") == {"mmd": "4.5"}
    assert stated_licence(out) == "mit"
    export_command.main([str(folder), str(tmp_path / "bare")])
    assert stated_licence(tmp_path / "bare") is None


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("{", "cannot be read"), ('{"fid": null}', "holds no numbers")]
)
def test_metrics_that_are_none_are_named_before_anything_is_written(tmp_path, content, message):
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_metrics(path)
    with pytest.raises(UserError, match=message):
        export_command.main([str(tmp_path), str(tmp_path / "out"), "--metrics", str(path)])
    with pytest.raises(UserError, match="which --published does not write"):
        export_command.main([str(tmp_path), str(tmp_path / "out"), "--published", "--license", "mit"])
    assert not (tmp_path / "out").exists()
