"""Measuring statistics: against a direct computation, interrupted and resumed, and the entry's refusals."""

import json
import tarfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from autoencoder.common.config import UserError
from autoencoder.evaluation import latent_statistics
from autoencoder.evaluation.crops import Crops
from autoencoder.images.files import aspect_buckets, crop_to_size, nearest_bucket, to_float, to_uint8_tensor
from autoencoder.latents.statistics import LatentStats
from autoencoder.measure_latents import main
from autoencoder.model import SVGAutoencoder
from autoencoder.sources import source as sources
from autoencoder.sources.opening import open_images, open_source
from autoencoder.sources.source import JoinedSources, Reading

pytestmark = pytest.mark.filterwarnings("ignore:RANDOM ENCODER")
D = 48
SIZES = [(150, 150), (300, 140), (128, 128), (140, 310), (200, 190)]


@pytest.fixture
def folder(tmp_path):
    """A config with a random encoder and a manifest of five images of several shapes, one entry without a caption."""
    dino = {"weights": "random", "overrides": {"embed_dim": D, "depth": 1, "num_heads": 3}}
    dd = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 0, "z_channels": D}
    config = {"model": {"params": {"dinoconfig": dino, "ddconfig": dd}}}
    (tmp_path / "ae.yaml").write_text(yaml.safe_dump(config))
    rng = np.random.default_rng(5)
    entries = []
    for index, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
        entries.append({"path": f"{index}.png", "prompt": "noise"} if index else {"path": "0.png"})
    (tmp_path / "images.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return tmp_path


def arguments(folder, *more):
    required = ["--manifest", folder / "images.jsonl", "--resolution", 128, "--output", folder / "s.safetensors"]
    return [str(value) for value in (folder / "ae.yaml", *required, "--device", "cpu", *more)]


def expected_latents(folder, model, indices, max_aspect):
    buckets = aspect_buckets(128, max_aspect)
    for index in indices:
        image = Image.open(folder / f"{index}.png")
        crop = crop_to_size(image, nearest_bucket(image.size, buckets), None)
        yield model.encode(to_float(to_uint8_tensor(crop))[None])[0].flatten(1)


@pytest.mark.parametrize(
    ("more", "indices", "max_aspect"),
    [(["--batch_size", "2"], range(5), 4.0), (["--max_images", "3", "--max_aspect", "1"], (0, 2, 4), 1.0)],
)
def test_equals_direct_computation(folder, more, indices, max_aspect, capsys):
    main(arguments(folder, *more))
    model = SVGAutoencoder.from_config(folder / "ae.yaml")
    stats = LatentStats.load(folder / "s.safetensors", D)
    values = torch.cat(list(expected_latents(folder, model, indices, max_aspect)), dim=1).double().numpy()
    np.testing.assert_allclose(stats.mean.numpy(), values.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(stats.std.numpy(), values.std(axis=1, ddof=1), rtol=1e-4)
    model.set_stats(stats)  # carries the fingerprint of this encoder
    assert stats.encoder == model.encoder.fingerprint()
    assert f"{len(indices)} images" in capsys.readouterr().out


def test_tar_shards_among_other_sources_are_measured_too(folder):
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for index in range(5):
            tar.add(folder / f"{index}.png", f"{index}.png")
    model = SVGAutoencoder.from_config(folder / "ae.yaml")
    shards = open_source(str(folder / "shard.tar"), Reading(require_captions=False))
    found = []
    for source in (shards, JoinedSources([shards]), JoinedSources([open_images(folder / "images.jsonl"), shards])):
        crops = Crops(source, [64], max_aspect=4.0)
        assert crops.sample(len(source) - 1).path.name == "4.png"
        found.append(latent_statistics.measure(model, crops)[0])
    assert found[0].count * 2 == found[2].count > 0
    for one in found[1:]:
        torch.testing.assert_close(one.moments()[0], found[0].moments()[0])


def test_other_encoder_refuses_the_file(folder):
    main(arguments(folder))
    with pytest.raises(UserError, match="another encoder"):
        SVGAutoencoder.from_config(
            folder / "ae.yaml",
            stats=folder / "s.safetensors",
            overrides=["model.params.dinoconfig.model_name=dinov3_vits16"],
        )


def test_overrides_reach_the_config(folder):
    main(arguments(folder, "model.params.dinoconfig.overrides.embed_dim=96", "model.params.ddconfig.z_channels=96"))
    assert LatentStats.load(folder / "s.safetensors", 96).channels == 96


def test_several_resolutions_are_measured_alone_and_pooled(folder, capsys):
    main(arguments(folder, "--resolution", "64", "128", "--max_aspect", "1", "--batch_size", "2"))
    model = SVGAutoencoder.from_config(folder / "ae.yaml")
    values = {}
    for side in (64, 128):
        images = (Image.open(folder / f"{index}.png") for index in range(5))
        crops = torch.stack([to_uint8_tensor(crop_to_size(image, (side, side), None)) for image in images])
        values[side] = model.encode(to_float(crops)).transpose(0, 1).flatten(1).double().numpy()
    values["all"] = np.concatenate([values[64], values[128]], axis=1)
    for key, name in ((64, "s-64"), (128, "s-128"), ("all", "s")):
        stats = LatentStats.load(folder / f"{name}.safetensors", D)
        np.testing.assert_allclose(stats.mean.numpy(), values[key].mean(axis=1), atol=1e-5)
        np.testing.assert_allclose(stats.std.numpy(), values[key].std(axis=1, ddof=1), rtol=1e-4)
        assert stats.resolutions == ((64, 128) if key == "all" else (key,))
    assert Image.open(folder / "s.png").size[0] > 500
    assert "s-64.safetensors: seen through the pooled statistics" in capsys.readouterr().out


def test_compared_files_that_do_not_fit_are_warned_of_with_numbers(folder, caplog, capsys):
    main(arguments(folder))
    stats = LatentStats.load(folder / "s.safetensors", D)
    LatentStats(stats.mean + 0.5 * stats.std, stats.std / 2).save(folder / "other.safetensors")
    compared = [str(folder / name) for name in ("s.safetensors", "other.safetensors")]
    main(arguments(folder, "--compare", *compared, "--output", str(folder / "t.safetensors")))
    assert "s.safetensors fits these images" in capsys.readouterr().out
    (warning,) = caplog.messages
    assert "other.safetensors does not fit" in warning
    assert "means of 1.000 rms" in warning  # (m − (m + s/2)) / (s/2)
    assert "from 2.00 to 2.00 instead of 1" in warning


def interrupted(monkeypatch, folder, after, *more):
    """Run `main` until the image number `after` is to be read."""
    load, calls = sources.load_image, []

    def load_image(path, **options):
        calls.append(path)
        if len(calls) > after:
            raise KeyboardInterrupt
        return load(path, **options)

    monkeypatch.setattr(sources, "load_image", load_image)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(folder, *more))
    monkeypatch.setattr(sources, "load_image", load)


def test_an_interrupted_run_goes_on_to_the_same_bits(folder, monkeypatch, capsys):
    monkeypatch.setattr(latent_statistics, "CHUNKS_PER_ROUND", 1)
    more = ["--batch_size", "2", "--resolution", "64", "128"]
    main(arguments(folder, *more, "--output", str(folder / "whole.safetensors")))
    interrupted(monkeypatch, folder, 3, *more)
    assert (folder / "s.partial.safetensors").exists()
    with pytest.raises(UserError, match="batch_size: 2 ≠ 1.*delete it"):
        main(arguments(folder, *more, "--batch_size", "1"))
    main(arguments(folder, *more))
    assert "going on after 2 of 5 images" in capsys.readouterr().out
    assert not (folder / "s.partial.safetensors").exists()
    for suffix in ("", "-64", "-128"):
        one, other = (LatentStats.load(folder / f"{name}{suffix}.safetensors", D) for name in ("whole", "s"))
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.std, other.std)


def test_a_folder_is_measured_and_broken_images_count_nothing(folder, caplog):
    images = folder / "images" / "some"
    images.mkdir(parents=True)
    for index in (1, 3):
        (folder / f"{index}.png").rename(images / f"{index}.png")
    (images / "2.png").write_bytes((images / "1.png").read_bytes()[:300])
    main(arguments(folder, "--data", str(folder / "images"), "--output", str(folder / "t.safetensors")))
    (warning,) = caplog.messages
    assert "skipped" in warning
    assert "2.png" in warning
    (images / "2.png").unlink()
    main(arguments(folder, "--data", str(folder / "images"), "--output", str(folder / "u.safetensors")))
    one, other = (LatentStats.load(folder / f"{name}.safetensors", D) for name in "tu")
    torch.testing.assert_close(one.mean, other.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.std, other.std, rtol=1e-6, atol=0)


def test_refusals_come_before_the_work(folder):
    with pytest.raises(UserError, match="multiple of 16"):
        main(arguments(folder, "--resolution", "100"))
    with pytest.raises(UserError, match="--max_images 0"):
        main(arguments(folder, "--max_images", "0"))
    with pytest.raises(UserError, match="--device nowhere"):
        main(arguments(folder, "--device", "nowhere"))
    with pytest.raises(UserError, match="ending .safetensors"):
        main(arguments(folder, "--output", "stats.pt"))
    with pytest.raises(UserError, match="names a resolution twice"):
        main(arguments(folder, "--resolution", "64", "64"))
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no image"):
        main(arguments(folder, "--data", str(folder / "empty")))
    with pytest.raises(UserError, match="nowhere cannot be read: No such file"):
        main(arguments(folder, "--data", str(folder / "nowhere")))
    (folder / "s.safetensors").write_text("precious")
    with pytest.raises(UserError, match="exists.*--overwrite"):
        main(arguments(folder))
    assert (folder / "s.safetensors").read_text() == "precious"
    main(arguments(folder, "--overwrite"))
    assert LatentStats.load(folder / "s.safetensors", D).channels == D
