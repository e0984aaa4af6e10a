"""The reconstruction entry: every size, against the autoencoder itself; files, contact sheet, refusals."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from autoencoder import reconstruct as module
from autoencoder.common.config import UserError
from autoencoder.images.files import aspect_buckets, crop_to_size, nearest_bucket, to_float, to_pil, to_uint8_tensor
from autoencoder.model import SVGAutoencoder
from autoencoder.reconstruct import NamedImage, equal_size_batches, main

pytestmark = pytest.mark.filterwarnings("ignore:RANDOM ENCODER")
D = 48
SIZES = [(64, 64), (100, 37), (33, 90), (64, 64), (17, 5)]


@pytest.fixture
def folder(tmp_path):
    """A saved autoencoder with random weights, ae.yaml with its settings, and images of several sizes in photos/."""
    dino = {"weights": "random", "overrides": {"embed_dim": D, "depth": 1, "num_heads": 3}}
    dd = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 0, "z_channels": D}
    config = {"model": {"params": {"dinoconfig": dino, "ddconfig": dd}}}
    (tmp_path / "ae.yaml").write_text(yaml.safe_dump(config))
    SVGAutoencoder.from_config(tmp_path / "ae.yaml").save_pretrained(tmp_path / "ae")
    rng = np.random.default_rng(3)
    (tmp_path / "photos").mkdir()
    for index, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    return tmp_path


def arguments(folder, *more):
    return [str(value) for value in (folder / "ae", *more, "--device", "cpu", "--output", folder / "out")]


def halves(path):
    both = np.array(Image.open(path))
    width = both.shape[1] // 2
    return both[:, :width], both[:, width:]


@torch.no_grad()
def reconstruction(folder, image):
    """Of an image whose sides 16 divides."""
    model = SVGAutoencoder.from_pretrained(folder / "ae")
    return np.array(to_pil(model.decode(model.encode(to_float(to_uint8_tensor(image))[None]))[0])).astype(int)


def test_native_keeps_every_pixel(folder):
    main(arguments(folder, folder / "photos"))
    for index, (width, height) in enumerate(SIZES):
        image = np.array(Image.open(folder / "photos" / f"{index}.png"))
        original, recon = halves(folder / "out" / f"{index}_native.png")
        np.testing.assert_array_equal(original, image)
        padded = np.pad(image, ((0, -height % 16), (0, -width % 16), (0, 0)), mode="edge")
        expected = reconstruction(folder, Image.fromarray(padded))[:height, :width]
        assert np.abs(recon - expected).max() <= 1  # rounding may fall to either side
    assert (folder / "out" / "sheet.png").exists()


def test_resolutions_crop_to_aspect_buckets(folder, capsys):
    main(arguments(folder, folder / "photos" / "1.png", "--resolution", "64", "128"))
    image = Image.open(folder / "photos" / "1.png")
    for resolution in (64, 128):
        buckets = aspect_buckets(resolution, 4.0)
        crop = crop_to_size(image, nearest_bucket(image.size, buckets))
        original, recon = halves(folder / "out" / f"1_{resolution}.png")
        np.testing.assert_array_equal(original, np.array(crop))
        assert np.abs(recon - reconstruction(folder, crop)).max() <= 1
        text = Image.open(folder / "out" / f"1_{resolution}.png").text
        mse = np.square(original.astype(float) - recon).mean()
        assert float(text["psnr"]) == pytest.approx(10 * np.log10(255**2 / mse), abs=0.006)
        shift = (recon.astype(float) - original).mean(axis=(0, 1))
        np.testing.assert_allclose([float(value) for value in text["colour_shift"].split()], shift, atol=0.006)
    assert "PSNR" in capsys.readouterr().out


def test_images_files_folders_manifests_and_overrides_mix(folder):
    (folder / "list.jsonl").write_text(json.dumps({"path": "photos/2.png"}) + "\n")
    (folder / "other").mkdir()
    Image.open(folder / "photos" / "0.png").save(folder / "other" / "0.png")
    sources = [folder / "list.jsonl", folder / "photos" / "0.png", folder / "other"]
    override = "model.params.dinoconfig.overrides.depth=2"
    main([str(folder / "ae.yaml"), *map(str, sources), override, "--output", str(folder / "out"), "--device", "cpu"])
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {"2_native.png", "0_native.png", "0-2_native.png", "sheet.png"}  # same names stay apart


def test_batches_hold_every_image_once_and_one_size_each(monkeypatch):
    jobs = [NamedImage(str(i), torch.zeros(3, 16 * (1 + i % 2), 16)) for i in range(9)]
    batches = list(equal_size_batches(jobs, 3))
    assert sorted(job.name for batch in batches for job in batch) == [str(i) for i in range(9)]
    assert max(map(len, batches)) == 3
    assert all(len({job.image.shape for job in batch}) == 1 for batch in batches)
    monkeypatch.setattr(module, "PLAIN_PIXELS", 600)  # two images of 16×16 fit, one of 32×16
    assert {len(batch) * batch[0].image[0].numel() for batch in equal_size_batches(jobs, 3)} == {256, 512}


def test_large_images_are_decoded_in_stripes(folder, monkeypatch):
    main(arguments(folder, folder / "photos" / "0.png"))
    plain = halves(folder / "out" / "0_native.png")[1].astype(int)
    calls = []
    from autoencoder.decoders import striped

    real = striped.decode_in_stripes
    monkeypatch.setattr(striped, "PLAIN_PIXELS", 64 * 64 - 1)
    monkeypatch.setattr(striped, "decode_in_stripes", lambda *args: calls.append(1) or real(*args, 5000))
    main(arguments(folder, folder / "photos" / "0.png", "--overwrite"))
    assert calls
    assert np.abs(halves(folder / "out" / "0_native.png")[1] - plain).max() <= 1


def test_unreadable_images_are_left_out(folder, caplog):
    (folder / "photos" / "broken.png").write_text("no image")
    main(arguments(folder, folder / "photos", folder / "missing.png"))
    assert [("broken.png" in message, "missing.png" in message) for message in caplog.messages] == [
        (True, False),
        (False, True),
    ]
    assert len(list((folder / "out").glob("*_native.png"))) == len(SIZES)


def test_refusals(folder):
    (folder / "empty").mkdir()
    for more, message in (
        ([folder / "empty"], "empty holds no image"),
        ([folder / "nowhere"], "nowhere cannot be read: No such file"),
        ([folder / "missing.png"], "1 images are unreadable.*missing.png"),
        (["a.b=1"], "no images: name"),
        ([folder / "photos", "--resolution", "wide"], "--resolution wide"),
        ([folder / "photos", "--resolution", "100"], "multiple of 16"),
        ([folder / "photos", "--batch_size", "0"], "--batch_size 0"),
        ([folder / "photos", "model.params.num_layer=1"], "saved autoencoder and takes no overrides"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments(folder, *more))
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty.*--overwrite"):
        main(arguments(folder, folder / "photos"))
