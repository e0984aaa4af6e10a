"""Prior preservation: what is drawn, how often it is seen, and what is refused."""

import re

import numpy as np
import pytest
import torch

from autoencoder.common.config import UserError, load_config
from autoencoder.sources.opening import open_source
from autoencoder.sources.source import Reading
from svg_t2i.checkpoints.weights import read_transformer
from svg_t2i.data.sources import make_datasets, open_sources
from svg_t2i.evaluation.evaluate import sample_batch
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.training import loop
from svg_t2i.training.settings import TrainConfig

PRIOR = (
    "prior_preservation.prompts=[a picture of noise, much noise]",
    "prior_preservation.num_images=5",
    "samples.num_inference_steps=3",
    "samples.guidance_scale=2",
    "samples.time_shift=2",
)


@pytest.fixture
def train(tune):
    return lambda name, *overrides: tune(name, *PRIOR, *overrides)


@pytest.mark.parametrize("kind", [["lora.rank=2", "train.ema_decay=0"], ["train.ema_decay=0"]])
def test_the_model_draws_what_it_could_before(train, base, toy_parts, kind):
    """All weights start from the raw ones, an adapter is put on the averaged ones."""
    folder = train("run", "train.max_steps=1", *kind)
    config = load_config(TrainConfig, folder / "config.yaml")
    assert config.data.path == str(toy_parts / "manifest.jsonl")  # as it was given
    source = open_source(folder / "prior_images" / "images.jsonl", Reading())
    captions = [source[i].captions[0] for i in range(5)]
    assert captions == ["a picture of noise", "much noise"] * 2 + ["a picture of noise"]
    pipeline = SVGT2IPipeline.from_pretrained(base, use_ema="lora.rank=2" in kind)
    pipeline.set_progress_bar_config(disable=True)
    wanted = sample_batch(pipeline, captions, range(4), 0, config.samples.options(64))
    for i in range(4):
        assert np.array_equal(np.asarray(source.load(i).image), np.asarray(wanted[i]))


@pytest.mark.parametrize(("weight", "share"), [(1, 1 / 2), (3, 3 / 4)])
def test_how_often_they_are_seen(train, toy_parts, monkeypatch, weight, share):
    seen, step = [], loop.train_step

    def spy(state, objective, batches, *others):
        seen.extend(caption for batch in batches for caption in batch.captions)
        step(state, objective, batches, *others)

    monkeypatch.setattr(loop, "train_step", spy)
    train("run", f"prior_preservation.weight={weight}", "train.max_steps=16", "data.caption_dropout_prob=0")
    drawn = sum(caption.endswith(("a picture of noise", "much noise")) for caption in seen)
    assert drawn == pytest.approx(len(seen) * share, abs=6)  # drawn by chance


def test_a_run_goes_on_with_the_same_images(train, tmp_path):
    def weights(folder):
        return read_transformer(folder, ema=False).state

    straight = train("straight", "train.ckpt_every=2")
    broken = train("broken", "train.max_steps=2")
    images = {path.name: path.stat().st_mtime_ns for path in (broken / "prior_images").iterdir()}
    train("broken", "train.max_steps=4")
    assert images == {path.name: path.stat().st_mtime_ns for path in (broken / "prior_images").iterdir()}
    one, two = weights(straight), weights(broken)
    assert all(torch.equal(one[name], two[name]) for name in one)
    (broken / "prior_images" / "images.jsonl").unlink()
    with pytest.raises(UserError, match="images.jsonl is gone, and the model has learnt since"):
        train("broken", "train.max_steps=5")


def test_prompts_from_a_file(train, tmp_path):
    (tmp_path / "prompts.txt").write_text("noise\npicture\n")
    folder = train("run", f"prior_preservation.prompts={tmp_path / 'prompts.txt'}", "train.max_steps=1")
    source = open_source(folder / "prior_images" / "images.jsonl", Reading())
    assert [source[i].captions[0] for i in range(5)] == ["noise", "picture", "noise", "picture", "noise"]


def test_own_sources_keep_their_shares(toy_parts):
    manifest = toy_parts / "manifest.jsonl"
    sources = f"data.sources=[{{path: {manifest}, weight: 1}}, {{path: {manifest}, weight: 3, resolution: 128}}]"
    config = load_config(TrainConfig, toy_parts / "train.yaml", ["data.path=null", sources, "init_from=x", *PRIOR])
    assert len(make_datasets(config.data, open_sources(config.data), 0, 16)) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["init_from=null"], "init_from=None must be given with prior_preservation"),
        (["prior_preservation.prompts=[]"], "prior_preservation: prompts=() must be at least one"),
        (["prior_preservation.weight=0"], "prior_preservation: weight=0.0 must be positive"),
        (["data.feature_cache=x"], "data.feature_cache='x' must be null with prior_preservation"),
        (["data.path=null", "data.sources=[{path: a}, {path: b}]"], "must be given a weight each beside a prior"),
        (["prior_preservation.prompts=nowhere.txt"], "prompt file nowhere.txt does not exist"),
    ],
)
def test_mistakes_are_told(train, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        train("run", *settings)
