"""Cached features: whole, matching, and as good as images for training."""

import itertools
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoencoder.common.config import UserError, load_config
from autoencoder.common.processes import World
from autoencoder.latents.statistics import LatentStats
from svg_t2i import cache_features, train
from svg_t2i.cache_features import CacheWriter
from svg_t2i.checkpoints.weights import read_transformer
from svg_t2i.data import feature_cache
from svg_t2i.data.feature_cache import check_fingerprint
from svg_t2i.data.loader import build_loader
from svg_t2i.data.sources import make_datasets, open_caches, open_sources
from svg_t2i.features.frozen import load_frozen
from svg_t2i.training.settings import TrainConfig
from svg_t2i.transformer.model import SVGDiT

ALONE = World()
STREAM = {"global_batch_size": 4, "micro_batch_size": 2, "total_steps": 6}


@pytest.fixture(scope="module")
def parts(toy_parts, tmp_path_factory):
    """The toy parts, with several captions per image."""
    folder = tmp_path_factory.mktemp("parts")
    lines = [json.loads(line) for line in (toy_parts / "manifest.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["path"] = str(toy_parts / line["path"])
        line["prompt"] = [line["prompt"], "a picture", "much noise number " * (i + 1)][: 1 + i % 3]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def settings(toy_parts, parts, cache, *overrides):
    """The toy run on cached features of two crops an image."""
    own = [f"data.path={parts / 'manifest.jsonl'}", "data.crops_per_image=2", f"data.feature_cache={cache}"]
    return [
        "--config",
        str(toy_parts / "train.yaml"),
        *own,
        "data.caption_dropout_prob=0.3",
        "data.resolution=128",
        *overrides,
    ]


def make(toy_parts, parts, cache, *arguments):
    cache_features.main([*settings(toy_parts, parts, cache), "--shard_size", "3", "--batch_size", "4", *arguments])
    return cache


@pytest.fixture(scope="module")
def cache(toy_parts, parts, tmp_path_factory):
    return make(toy_parts, parts, tmp_path_factory.mktemp("cache") / "features")


def loaders(toy_parts, parts, cache, *overrides):
    """From images and from the cache; and the frozen networks."""
    arguments = settings(toy_parts, parts, cache, *overrides)
    config = load_config(TrainConfig, arguments[1], arguments[2:])
    frozen = load_frozen(config.autoencoder, config.text_encoder, config.train.precision, ALONE)
    datasets = make_datasets(config.data, open_sources(config.data), config.train.seed, config.text_encoder.max_length)
    cached = open_caches(config.data, datasets, frozen.fingerprints)
    return frozen, build_loader(datasets, **STREAM), build_loader(cached, **STREAM)


def test_what_is_in_it(cache):
    assert sorted(path.name for path in cache.iterdir()) == [
        "00000.safetensors",
        "00001.safetensors",
        "00002.safetensors",
        "cache.json",
        "unconditional.safetensors",
    ]
    shard = load_file(cache / "00000.safetensors")
    assert shard["sizes"].shape == (3, 2, 2)
    assert shard["captions"].tolist() == [1, 2, 3]
    assert shard["latents"].shape == (shard["sizes"].prod(-1).sum(), 32)
    assert shard["text"].shape == (shard["text_lengths"].sum(), 32)
    assert shard["latents"].dtype == torch.float32


def test_batches_are_those_made_from_images(toy_parts, parts, cache):
    frozen, images, features = loaders(toy_parts, parts, cache)
    model = SVGDiT(load_config(TrainConfig, toy_parts / "train.yaml").model_config(32, 32))
    dropped = 0
    for ours, theirs in zip(itertools.chain(*features), itertools.chain(*images), strict=True):
        a, b = frozen.prepare([ours, theirs], model, torch.device("cpu"))
        order = [ours.positions.tolist().index(position) for position in theirs.positions.tolist()]
        assert tuple(a.sizes[i] for i in order) == b.sizes
        assert torch.equal(a.resolutions[order], b.resolutions)
        parts_a = a.tokens.split([h * w for h, w in a.sizes])
        torch.testing.assert_close(torch.cat([parts_a[i] for i in order]), b.tokens, atol=1e-5, rtol=0)
        text = a.text.select(order)
        assert text.lengths == b.text.lengths
        torch.testing.assert_close(text.features, b.text.features, atol=1e-5, rtol=0)
        dropped += sum(caption == "" for caption in theirs.captions)
    assert 0 < dropped < 24


def test_training_from_features_equals_training_from_images(toy_parts, parts, cache, tmp_path):
    cached = settings(toy_parts, parts, cache)
    images = [argument for argument in cached if "feature_cache" not in argument]
    for arguments, name in ((cached, "features"), (images, "images")):
        train.main([*arguments, f"results_dir={tmp_path / name}"])
    a, b = (
        read_transformer(tmp_path / name / "checkpoints" / "0000004", ema=False).state
        for name in ("features", "images")
    )
    assert max((a[key] - b[key]).abs().max().item() for key in a) <= 1e-6
    assert a["final_layer.linear.weight"].abs().max() > 1e-4  # starts at zero


def test_packed_by_tokens_it_gives_the_same_weights(toy_parts, parts, cache, tmp_path):
    for name, overrides in {"even": (), "packed": ("data.micro_batch_tokens=180",)}.items():
        train.main(settings(toy_parts, parts, cache, f"results_dir={tmp_path / name}", *overrides))
    a, b = (
        read_transformer(tmp_path / name / "checkpoints" / "0000004", ema=False).state for name in ("even", "packed")
    )
    assert max((a[key] - b[key]).abs().max().item() for key in a) <= 1e-6


def test_lengths_are_known_without_reading(toy_parts, parts, cache):
    _, _, features = loaders(toy_parts, parts, cache)
    dataset = next(iter(features._loader.dataset.datasets))
    for position in range(20):
        item = dataset[position, position % 7]
        assert dataset.tokens(position, position % 7) == len(item.latents) + len(item.text)


def test_an_interrupted_cache_goes_on(toy_parts, parts, cache, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(cache, tmp_path / "features")
    (folder / "00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"is incomplete: 1 files such as 00001.safetensors; fill it with: python -m"):
        loaders(toy_parts, parts, folder)
    kept = (folder / "00000.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(CacheWriter, "_write", lambda *_: pytest.fail("stopped"))
    with pytest.raises(BaseException, match="stopped"):
        make(toy_parts, parts, folder)
    monkeypatch.undo()
    capsys.readouterr()
    make(toy_parts, parts, folder)
    output = capsys.readouterr().out
    assert "7 samples × 2 crops" in output
    assert "33% of it to be made" in output
    assert output.index("GiB free") < output.index("1 of 1 shards")
    assert (folder / "00001.safetensors").read_bytes() == (cache / "00001.safetensors").read_bytes()
    assert (folder / "00000.safetensors").stat().st_mtime_ns == kept


def test_half_precision_latents(toy_parts, parts, cache, tmp_path):
    half = make(toy_parts, parts, tmp_path / "half", "--latent_dtype", "float16")
    a, b = (load_file(folder / "00001.safetensors")["latents"] for folder in (cache, half))
    assert b.dtype == torch.float16
    torch.testing.assert_close(b.float(), a, atol=1e-3, rtol=1e-3)
    _, _, features = loaders(toy_parts, parts, half)
    assert next(iter(features))[0].unpacked()[0].dtype == torch.float32


def test_a_cache_of_anything_else_is_refused(toy_parts, parts, cache, tmp_path):
    stats = LatentStats.load(toy_parts / "autoencoder" / "latent_stats.safetensors", 32)
    LatentStats(stats.mean + 1, stats.std, encoder=stats.encoder).save(tmp_path / "stats.safetensors")
    (tmp_path / "other.jsonl").write_text((parts / "manifest.jsonl").read_text().replace("picture", "painting"))
    for override, named in {
        f"autoencoder.stats={tmp_path / 'stats.safetensors'}": "autoencoder stats: ",
        f"data.path={tmp_path / 'other.jsonl'}": "source: ",
        "data.resolution=64": "resolution: 128 ≠ 64",
        "data.single_shape=true": "crop sizes: ",
        "data.crops_per_image=3": "crops per image: 2 ≠ 3",
        "data.system_prompt=real": "system prompts: ",
        "data.jpeg_draft=true": "jpeg draft: False ≠ True",
        "data.exif_orientation=ignore": "EXIF orientation: apply ≠ ignore",
        "text_encoder.max_length=64": "caption tokens: 256 ≠ 64",
    }.items():
        with pytest.raises(UserError, match=f"was made for something else .*{named}"):
            loaders(toy_parts, parts, cache, override)
    # the training may change what the features do not depend on
    loaders(toy_parts, parts, cache, "data.caption_dropout_prob=0.5", "train.seed=9", "data.num_workers=1")
    with pytest.raises(UserError, match="was made for something else .*crops per image"):
        make(toy_parts, parts, cache, "data.crops_per_image=3")


def test_one_edited_caption_among_many_is_noticed_and_older_caches_are_read(toy_parts, parts, cache, tmp_path):
    made = json.loads((cache / "cache.json").read_text())
    fingerprint = dict(made["fingerprint"])
    check_fingerprint(cache, made, fingerprint)
    with pytest.raises(UserError, match="was made for something else .*content: "):
        check_fingerprint(cache, made, fingerprint | {"content": "0" * 16})
    for name in ("content", "EXIF orientation"):
        del made["fingerprint"][name]
    check_fingerprint(cache, made, fingerprint)
    check_fingerprint(cache, made, fingerprint | {"content": "0" * 16})


# -- data that changed ------------------------------------------------------------------------------------------------


@pytest.fixture
def own_parts(parts, tmp_path):
    """The parts with images of their own, which a test may change."""
    folder = tmp_path / "own"
    folder.mkdir()
    lines = [json.loads(line) for line in (parts / "manifest.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["path"] = str(shutil.copy(line["path"], folder / f"{i}.png"))
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def own_cache(toy_parts, own_parts, tmp_path):
    return make(toy_parts, own_parts, tmp_path / "own_cache")


def edit_a_caption(folder):
    text = (folder / "manifest.jsonl").read_text()
    assert text.count("noise number 4") == 1
    (folder / "manifest.jsonl").write_text(text.replace("noise number 4", "noise number X"))


def replace_an_image(folder):
    shutil.copy(folder / "0.png", folder / "4.png")


def append_a_sample(folder):
    with (folder / "manifest.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"path": str(folder / "0.png"), "prompt": "one more"}))


@pytest.mark.parametrize(("change", "stale"), [(edit_a_caption, "1"), (replace_an_image, "1"), (append_a_sample, "2")])
def test_what_changed_is_noticed_and_made_anew(toy_parts, own_parts, own_cache, tmp_path, capsys, change, stale):
    """And nothing else; afterwards the cache is that of the changed data."""
    before = {path.name: path.stat().st_mtime_ns for path in own_cache.glob("0*.safetensors")}
    change(own_parts)
    with pytest.raises(UserError, match="python -m svg_t2i.cache_features"):
        loaders(toy_parts, own_parts, own_cache)
    capsys.readouterr()
    make(toy_parts, own_parts, own_cache)
    assert "captions or images of 1 of 3 shards have changed; these are made anew" in capsys.readouterr().out
    changed = {path.name for path in own_cache.glob("0*") if path.stat().st_mtime_ns != before[path.name]}
    assert changed == {f"0000{stale}.safetensors"}
    fresh = make(toy_parts, own_parts, tmp_path / "fresh")
    for path in fresh.glob("0*"):
        a, b = load_file(path), load_file(own_cache / path.name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), path.name
    assert json.loads((fresh / "cache.json").read_text()) == json.loads((own_cache / "cache.json").read_text())
    loaders(toy_parts, own_parts, own_cache)


def test_the_cache_of_other_data_is_left_alone(toy_parts, own_parts, own_cache, tmp_path):
    lines = [json.dumps({"path": str(own_parts / f"{i}.png"), "prompt": f"other {i}"}) for i in range(7)]
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.jsonl").write_text("\n".join(lines))
    before = {path: path.read_bytes() for path in own_cache.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="was made for something else .*content: "):
        make(toy_parts, other, own_cache)
    for i in range(7):
        os.utime(own_parts / f"{i}.png", (1, 1))
    with pytest.raises(UserError, match="all 3 shards have another size or time .*give another folder, or delete"):
        make(toy_parts, own_parts, own_cache)
    assert {path: path.read_bytes() for path in before} == before


def test_shards_of_older_versions_go_with_the_fingerprint(toy_parts, own_parts, own_cache, capsys):
    for path in own_cache.glob("0*"):
        tensors = load_file(path)
        del tensors["replaced"]
        save_file(tensors, path)
    loaders(toy_parts, own_parts, own_cache)
    make(toy_parts, own_parts, own_cache)
    edit_a_caption(own_parts)
    with pytest.raises(UserError, match="content: .*make anew what has changed"):  # which of them, nobody can tell
        make(toy_parts, own_parts, own_cache)


def test_only_some_shards_of_a_large_cache_are_looked_at(toy_parts, own_parts, own_cache, monkeypatch):
    monkeypatch.setattr(feature_cache, "CHECKED_SAMPLES", 6)  # 2 of 3 shards, the first and the last
    replace_an_image(own_parts)
    loaders(toy_parts, own_parts, own_cache)
    shutil.copy(own_parts / "1.png", own_parts / "6.png")
    with pytest.raises(UserError, match="1 of 2 shards looked at, such as 00002.safetensors"):
        loaders(toy_parts, own_parts, own_cache)


def test_replaced_samples_are_known_in_training(toy_parts, own_parts, tmp_path, caplog):
    (own_parts / "2.png").write_bytes(b"damaged")
    cache = make(toy_parts, own_parts, tmp_path / "features")
    assert load_file(cache / "00000.safetensors")["replaced"].tolist() == [0, 0, 1]
    _, images, features = loaders(toy_parts, own_parts, cache)
    counts = [[sum(batch.replaced for batch in step) for step in loader] for loader in (images, features)]
    assert counts[0] == counts[1]
    assert sum(counts[0]) > 0


def test_mistakes_are_named(toy_parts, parts, cache, tmp_path):
    with pytest.raises(UserError, match=r"data.feature_cache=.*nothing holds no features; fill it with"):
        loaders(toy_parts, parts, tmp_path / "nothing")
    with pytest.raises(UserError, match="data.feature_cache is not set"):
        cache_features.main(["--config", str(toy_parts / "train.yaml")])
    with pytest.raises(UserError, match="data.crops_per_image is not set"):
        cache_features.main(["--config", str(toy_parts / "train.yaml"), f"data.feature_cache={tmp_path}"])
    broken = shutil.copytree(cache, tmp_path / "broken")
    (broken / "00000.safetensors").write_bytes(b"broken")
    _, _, features = loaders(toy_parts, parts, broken)
    with pytest.raises(UserError, match=r"00000.safetensors cannot be read .*delete it and make it again"):
        list(features)
    (broken / "cache.json").write_text("{}")
    with pytest.raises(UserError, match=r"cache.json is broken"):
        loaders(toy_parts, parts, broken)


def test_a_full_disk_is_noticed_before_it_starts(toy_parts, parts, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(cache_features.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="GiB needed, 0.0 GiB free"):
        make(toy_parts, parts, tmp_path / "full")
    assert not list((tmp_path / "full").glob("0*"))
