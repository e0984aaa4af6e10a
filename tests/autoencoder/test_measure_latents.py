"""Measuring statistics over a manifest: against a direct computation, and the entry's refusals."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from autoencoder.config import UserError
from autoencoder.images import aspect_buckets, crop_to_size, nearest_bucket, to_float, to_uint8_tensor
from autoencoder.latents import LatentStats
from autoencoder.measure_latents import equal_size_batches, main
from autoencoder.model import SVGAutoencoder

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
    [(["--batch-size", "2"], range(5), 4.0), (["--max-images", "3", "--max-aspect", "1"], (0, 2, 4), 1.0)],
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


def test_batches_hold_every_image_once_and_one_size_each():
    images = [torch.full((3, 16 * (1 + i % 2), 16), i) for i in range(7)]
    batches = list(equal_size_batches(images, 3))
    assert sorted(value for batch in batches for value in batch[:, 0, 0, 0].tolist()) == list(range(7))
    assert max(map(len, batches)) == 3


def test_refusals_come_before_the_work(folder):
    with pytest.raises(UserError, match="multiple of 16"):
        main(arguments(folder, "--resolution", "100"))
    with pytest.raises(UserError, match="--max-images 0"):
        main(arguments(folder, "--max-images", "0"))
    with pytest.raises(UserError, match="--device nowhere"):
        main(arguments(folder, "--device", "nowhere"))
    with pytest.raises(UserError, match="ending .safetensors"):
        main(arguments(folder, "--output", "stats.pt"))
    (folder / "s.safetensors").write_text("precious")
    with pytest.raises(UserError, match="exists.*--overwrite"):
        main(arguments(folder))
    assert (folder / "s.safetensors").read_text() == "precious"
    main(arguments(folder, "--overwrite"))
    assert LatentStats.load(folder / "s.safetensors", D).channels == D
