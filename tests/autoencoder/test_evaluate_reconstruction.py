"""The evaluation entry: its numbers against scikit-image, its files, what it counts, its refusals and warnings."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import nn

from autoencoder import evaluate_reconstruction
from autoencoder.common.config import UserError
from autoencoder.common.processes import World
from autoencoder.evaluate_reconstruction import add_rows, main
from autoencoder.evaluation.metrics import to_8bit
from autoencoder.evaluation.midpoints import PooledLatents
from autoencoder.evaluation.reconstruction import Networks
from autoencoder.images.files import crop_square, to_float, to_pil, to_uint8_tensor
from autoencoder.latents.statistics import LatentStats
from autoencoder.model import SVGAutoencoder
from svg_t2i.evaluation.distances import frechet_distance

pytestmark = pytest.mark.filterwarnings("ignore:RANDOM ENCODER")
D, COUNT = 48, 7


class TinyFeatures(nn.Module):
    num_features = 6

    def forward(self, images):
        return images[:, :, 3, 2:4].float().flatten(1) / 255


class Distance(nn.Module):
    def forward(self, x, y):
        return (x - y).square().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def networks(monkeypatch):
    """The metrics' networks that the entry gets: small ones, as no test downloads the real ones."""
    found = Networks(lpips=Distance(), inception=TinyFeatures())
    monkeypatch.setattr(evaluate_reconstruction.Networks, "build", lambda device: found)
    return found


@pytest.fixture
def folder(tmp_path, networks):
    """A config with a random encoder, and images of several sizes in photos/."""
    dino = {"weights": "random", "overrides": {"embed_dim": D, "depth": 1, "num_heads": 3}}
    dd = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 0, "z_channels": D}
    params = {"dinoconfig": dino, "ddconfig": dd}
    (tmp_path / "ae.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    state = SVGAutoencoder.from_config(tmp_path / "ae.yaml").state_dict()
    torch.save({"state_dict": state}, tmp_path / "ae.ckpt")  # the decoder's weights are random, and kept here
    rng = np.random.default_rng(3)
    (tmp_path / "photos").mkdir()
    for index in range(COUNT):
        shape = (50 + 7 * index, 90 - 5 * index, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / "photos" / f"{index}.png")
    return tmp_path


def arguments(folder, *more):
    given = [folder / "ae.yaml", "--checkpoint", folder / "ae.ckpt", "--data", folder / "photos"]
    given += ["--resolution", 48, 32, "--device", "cpu", "--output", folder / "out"]
    return [str(value) for value in (*given, *more)]


def evaluated(folder, *more):
    main(arguments(folder, "--overwrite", *more))
    return json.loads((folder / "out" / "metrics.json").read_text())


def test_the_numbers_are_those_of_the_images(folder):
    report = evaluated(folder, "--batch_size", "3")
    model = SVGAutoencoder.from_config(folder / "ae.yaml", folder / "ae.ckpt")
    expected, shifts = [], []
    for index in range(COUNT):
        crop = crop_square(Image.open(folder / "photos" / f"{index}.png"), 48)
        with torch.no_grad():
            recon = to_pil(model.decode(model.encode(to_float(to_uint8_tensor(crop)[None])))[0])
        expected.append(peak_signal_noise_ratio(np.array(crop), np.array(recon), data_range=255))
        shifts.append((np.array(recon, dtype=float) - np.array(crop)).mean(axis=(0, 1)))
    first, second = report["results"]
    assert (first["resolution"], second["resolution"], first["images"]) == (48, 32, COUNT)
    assert first["psnr"] == pytest.approx(np.mean(expected), abs=1e-3)
    np.testing.assert_allclose(first["colour_shift"], np.mean(shifts, axis=0), atol=0.02)
    assert first["unavailable"] == {}
    assert first["psnr"] != second["psnr"]
    rows = list(csv.DictReader((folder / "out" / "images.csv").open()))
    assert [float(row["psnr"]) for row in rows[:COUNT]] == pytest.approx(expected, abs=1e-3)
    assert rows[0]["path"].endswith("photos/0.png")
    assert len(rows) == 2 * COUNT


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tar"])
def test_every_tag_has_the_means_of_its_images(folder, kind):
    tags = [["faces"], ["faces", "text"], "text , flat", None, [], "", ["flat"]]
    paths = [folder / "photos" / f"{index}.png" for index in range(COUNT)]
    data = folder / f"data.{kind}"
    if kind == "jsonl":
        data.write_text("".join(json.dumps({"path": str(p), "tags": t}) + "\n" for p, t in zip(paths, tags)))
    elif kind == "csv":
        with data.open("w", newline="") as file:
            texts = [", ".join(t) if isinstance(t, list) else t or "" for t in tags]
            csv.writer(file).writerows([("path", "tags"), *zip(map(str, paths), texts)])
    else:
        with tarfile.open(data, "w") as shard:
            for path, t in zip(paths, tags):
                shard.add(path, path.name)
                content = json.dumps({"tags": t}).encode()
                member = tarfile.TarInfo(f"{path.stem}.json")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    report = evaluated(folder, "--data", str(data))
    rows = list(csv.DictReader((folder / "out" / "images.csv").open()))
    for number, result in enumerate(report["results"]):
        own = rows[number * COUNT : (number + 1) * COUNT]
        expected = {"faces": (0, 1), "flat": (2, 6), "text": (1, 2)}
        assert set(result["groups"]) == set(expected)
        for tag, places in expected.items():
            group = result["groups"][tag]
            assert group["images"] == len(places)
            for metric in ("psnr", "ssim", "lpips"):
                assert group[metric] == pytest.approx(np.mean([float(own[place][metric]) for place in places]))


def test_nothing_depends_on_the_batch_size(folder):
    whole, *others = (evaluated(folder, "--batch_size", str(n))["results"] for n in (COUNT, 1, 3))
    for other in others:
        for one, two in zip(whole, other):
            assert two["images"] == COUNT
            for name in ("rfid", "psnr", "ssim", "lpips"):  # up to the networks' own rounding
                assert two[name] == pytest.approx(one[name], rel=1e-3)


def test_a_metric_without_its_network_is_null_with_a_reason(folder, networks, caplog):
    networks.inception, networks.missing["rfid"] = None, "no weights to be had"
    report = evaluated(folder)
    for result in report["results"]:
        assert result["rfid"] is None
        assert result["unavailable"] == {"rfid": "no weights to be had"}
        assert min(result["psnr"], result["lpips"]) > 0
    assert "rfid is not available: no weights to be had" in caplog.messages
    table = (folder / "out" / "table.md").read_text().splitlines()
    assert "n/a" in table[2]
    assert list(csv.DictReader((folder / "out" / "metrics.csv").open()))[0]["rfid"] == ""


def test_rows_are_added_to_a_table_and_replaced_in_it(folder, tmp_path):
    table = tmp_path / "table.md"
    evaluated(folder, "--table", str(table), "--name", "a|b")
    evaluated(folder, "--table", str(table), "--name", "second")
    evaluated(folder, "--table", str(table), "--name", "a|b", "--resolution", "32", "--max_images", "3")
    cells = [[cell.strip() for cell in line.split("|")[1:5]] for line in table.read_text().splitlines()]
    data = f"{tmp_path.name}/photos"
    assert cells[2:] == [
        ["a/b", data, "48", "7"],
        ["second", data, "48", "7"],
        ["second", data, "32", "7"],
        ["a/b", data, "32", "3"],
    ]
    (tmp_path / "other.md").write_text("# my notes\n")
    with pytest.raises(UserError, match="other.md is not a table"):
        add_rows(tmp_path / "other.md", [["a"] * 8])
    assert (tmp_path / "other.md").read_text() == "# my notes\n"


def test_a_broken_image_counts_nothing(folder, caplog):
    whole = evaluated(folder)
    (folder / "photos" / "3x.png").write_bytes((folder / "photos" / "3.png").read_bytes()[:500])
    report = evaluated(folder)
    assert report["unreadable"] == 1
    assert any("skipped" in message and "3x.png" in message for message in caplog.messages)
    assert [r["images"] for r in report["results"]] == [COUNT, COUNT]
    assert report["results"][0]["psnr"] == pytest.approx(whole["results"][0]["psnr"], abs=1e-3)


def test_statistics_that_do_not_fit_are_warned_of_with_numbers(folder, caplog):
    stats = LatentStats(torch.full((D,), 5.0), torch.full((D,), 0.5))
    stats.save(folder / "stats.safetensors")
    report = evaluated(folder, "--stats", str(folder / "stats.safetensors"))
    warnings = [message for message in caplog.messages if "do not fit" in message]
    assert len(warnings) == 2
    assert "images of 48 px: normalised latents have means of" in warnings[0]
    assert report["results"][0]["normalised_latents"]["shift_rms"] == pytest.approx(10, rel=0.3)


def test_midpoints_are_those_of_nearest_latents(folder, networks):
    assert [result["ifid"] for result in evaluated(folder)["results"]] == [None, None]
    report = evaluated(folder, "--midpoints", "--batch_size", "3")
    model = SVGAutoencoder.from_config(folder / "ae.yaml", folder / "ae.ckpt").eval()
    crops = [crop_square(Image.open(folder / "photos" / f"{i}.png"), 48) for i in range(COUNT)]
    images = torch.stack([to_uint8_tensor(crop) for crop in crops])
    with torch.no_grad():
        latents = model.encode(to_float(images))
        pooled = latents.mean(dim=(2, 3))
        similar = torch.nn.functional.cosine_similarity(pooled[:, None], pooled[None], dim=2).fill_diagonal_(-1)
        between = model.decode((latents + latents[similar.argmax(dim=1)]) / 2)
    features = [TinyFeatures()(one).double() for one in (images, to_8bit(between))]
    assert report["results"][0]["ifid"] == pytest.approx(frechet_distance(*features), rel=1e-3)
    assert report["results"][0]["ifid"] != pytest.approx(report["results"][0]["rfid"], rel=1e-3)
    networks.inception = None
    assert evaluated(folder, "--midpoints")["results"][0]["ifid"] is None


def test_images_of_other_sizes_are_no_neighbours():
    pooled = PooledLatents()
    pooled.add([4, 1], torch.tensor([[1.0, 0], [1, 0.1]])[:, :, None, None].expand(2, 2, 3, 2))
    pooled.add([7], torch.tensor([[1.0, 0]])[:, :, None, None].expand(1, 2, 2, 3))
    pooled.add([0], torch.tensor([[-1.0, 0]])[:, :, None, None].expand(1, 2, 3, 2))
    assert pooled.pairs(World()) == [[(0, 1), (1, 4), (4, 1)]]


def test_exact_reproductions_have_no_mean_psnr(folder, monkeypatch):
    def grey_picture(self, latents):
        return latents.new_zeros(len(latents), 3, 16 * latents.shape[2], 16 * latents.shape[3])

    monkeypatch.setattr("autoencoder.model.SVGAutoencoder.decode", grey_picture)
    grey = Image.new("RGB", (48, 48), (128, 128, 128))  # 0 in [-1, 1] rounds to 128
    for index in range(COUNT):
        grey.save(folder / "photos" / f"{index}.png")
    (result,) = evaluated(folder, "--resolution", "48")["results"]
    assert result["psnr"] is None
    assert "7 images are reproduced exactly" in result["unavailable"]["psnr"]
    assert result["ssim"] == pytest.approx(1)
    assert result["artefacts"]["shift_error"] == 0
    assert result["artefacts"]["flat_texture"] == 0
    assert result["artefacts"]["flat_error"] > 50


def test_values_that_are_not_finite_are_no_result(folder):
    checkpoint = torch.load(folder / "ae.ckpt", weights_only=True)
    checkpoint["state_dict"]["decoder.conv_out.bias"][1] = torch.nan
    torch.save(checkpoint, folder / "ae.ckpt")
    with pytest.raises(UserError, match=r"7 of 7 reconstructions at 48 px .*not finite \(the first: .*0.png\)"):
        main(arguments(folder))
    assert not (folder / "out").exists()


def test_refusals(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no image"):
        main(arguments(folder, "--data", str(tmp_path / "empty")))
    with pytest.raises(UserError, match="multiple of 16"):
        main(arguments(folder, "--resolution", "40"))
    with pytest.raises(UserError, match="--batch_size 0"):
        main(arguments(folder, "--batch_size", "0"))
    with pytest.raises(UserError, match="no such device"):
        main(arguments(folder, "--device", "abacus"))
    main(arguments(folder))
    with pytest.raises(UserError, match="has results.*--overwrite"):
        main(arguments(folder))
    for index in range(COUNT):
        (folder / "photos" / f"{index}.png").write_text("nothing")
    with pytest.raises(UserError, match="none of the 7 images is readable"):
        main(arguments(folder, "--overwrite"))
