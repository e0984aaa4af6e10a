"""Looking at a data set before training on it: numbers against independent ones, pictures as training cuts them."""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from autoencoder.common.config import UserError, build
from autoencoder.sources.opening import open_source
from autoencoder.sources.source import Reading
from svg_t2i import inspect_data
from svg_t2i.data.inspection import Inspection, SampleReader, settings
from svg_t2i.data.settings import DataConfig
from svg_t2i.data.sources import T2IDataset, make_datasets, open_sources
from svg_t2i.text.encoder import TextEncoder
from svg_t2i.text.toy import make_toy_text_encoder


@pytest.fixture
def folder(tmp_path):
    """Seven pictures: four wide, two of them the same file, two tall, one damaged; captions of 1 to 7 words."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i, size in enumerate([(96, 48), (96, 48), (48, 96), (64, 64), (300, 150), (40, 90), (64, 64)]):
        rng = np.random.default_rng(i)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(" ".join(["word"] * (i + 1)))
    shutil.copyfile(folder / "0.png", folder / "1.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    return folder


def inspect(folder, output, capsys, *options):
    inspect_data.main([str(folder), "--output", str(output), "--resolution", "64", *options])
    return json.loads((output / "report.json").read_text()), capsys.readouterr().out


@pytest.mark.parametrize("workers", ["0", "2"])
def test_report_counts_what_is_there(folder, tmp_path, capsys, workers):
    report, printed = inspect(folder, tmp_path / "out", capsys, "--num_workers", workers)
    assert (report["samples"], report["read"], report["usable"]) == (7, 7, 6)
    (kind,) = report["unusable"]["reasons"]
    assert kind == "not a readable image"
    assert report["unusable"]["reasons"][kind]["count"] == 1
    assert "3.png" in report["unusable"]["reasons"][kind]["examples"][0]
    (line,) = map(json.loads, (tmp_path / "out" / "unusable.jsonl").read_text().splitlines())
    assert line["sample"] == 3
    assert "3.png" in line["reason"]
    sizes = np.array([Image.open(folder / f"{i}.png").size for i in (0, 1, 2, 4, 5, 6)])
    assert report["images"]["width"]["max"] == sizes[:, 0].max()
    assert report["images"]["height"]["median"] == np.median(sizes[:, 1])
    assert report["images"]["aspect"]["max"] == 2.25
    assert report["images"]["enlarged_at"]["256"] == 1.0
    assert report["duplicates"] == {"images": 1, "groups": 1, "examples": [[0, 1]]}
    digests = [hashlib.sha256((folder / f"{i}.png").read_bytes()).digest() for i in range(7)]
    assert len(set(digests)) == 6  # the independent count
    assert sum(report["aspect_buckets"].values()) == 6
    assert report["captions"]["per_image"]["mean"] == 1
    for text in ("6 usable", "3.png", "such as samples 0, 1", "settings to use"):
        assert text in printed


def test_tokens_are_those_of_the_text_encoder(folder, tmp_path, capsys):
    encoder = make_toy_text_encoder(["word"], tmp_path / "encoder")
    report, printed = inspect(
        folder, tmp_path / "out", capsys, "--text_encoder", str(encoder), "--max_length", "20", "--num_workers", "0"
    )
    dataset = T2IDataset(open_source(folder), 64)
    tokenizer = TextEncoder.from_pretrained(encoder).tokenizer
    counts = [len(tokenizer(dataset.texts(dataset.manifest[i])[0])["input_ids"]) for i in (0, 1, 2, 4, 5, 6)]
    tokens = report["captions"]["tokens"]
    assert (tokens["min"], tokens["max"], tokens["median"]) == (min(counts), max(counts), np.median(counts))
    assert report["captions"]["cut"] == sum(count > 20 for count in counts) > 0
    assert report["captions"]["tokens_lost"] == sum(max(0, count - 20) for count in counts)
    assert not report["tokens_are_estimated"]
    assert "are cut at 20 tokens" in printed


def test_the_contact_sheet_shows_what_training_sees(folder, tmp_path, capsys):
    """Every crop of the sheet is found in it, pixel by pixel."""
    inspect(folder, tmp_path / "out", capsys, "--num_workers", "0", "--seed", "5")
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png").convert("RGB"))
    config = DataConfig(path=str(folder), resolution=64, caption_dropout_prob=0.0)
    (dataset,) = make_datasets(config, open_sources(config), seed=5, max_caption_tokens=256)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (1, 16, 3)).reshape(-1, 48)
    rows = {row.tobytes() for row in windows}
    for position, index in enumerate((0, 1, 2, 4, 5, 6)):
        crop = dataset[position, index].image.permute(1, 2, 0).numpy()
        assert np.ascontiguousarray(crop[5, 3:19]).tobytes() in rows, index
    histograms = Image.open(tmp_path / "out" / "histograms.png")
    assert len(histograms.convert("RGB").getcolors(1 << 24)) > 20


def test_settings_can_be_trained_with(folder, tmp_path, capsys):
    report, printed = inspect(folder, tmp_path / "out", capsys)
    printed_settings = yaml.safe_load(printed.partition("settings to use:\n")[2])
    assert printed_settings == report["settings"]
    config = build(DataConfig, printed_settings["data"])
    assert (config.resolution, config.max_aspect) == (256, 3.0)
    assert len(open_sources(config)[0]) == 7


def test_settings_follow_the_data():
    """Findings of a made-up data set: large JPEGs of one shape, three captions each, too many unusable."""
    source = open_source("configs/example.jsonl", Reading())
    inspection = Inspection(T2IDataset(source, 256))
    reader = SampleReader(inspection.dataset)
    for index in range(100):
        finding = reader[index % len(source)]
        inspection.add(type(finding)(index, size=(2048, 2048), digest=index, tokens=(40, 90, 300)))
    for index in range(100, 130):
        inspection.add(type(finding)(index, reason="a.png: no such image file"))
    chosen = settings(inspection, "data.jsonl", {"image_column": "photo", "caption_column": None})
    data = chosen["data"]
    assert (data["resolution"], data["max_aspect"], data["jpeg_draft"]) == (1024, 1.0, True)
    assert data["image_column"] == "photo"
    assert "caption_column" not in data
    assert data["max_errors"] >= 1
    assert set(data["caption_mix"]) == {"short", "middle", "long"}
    assert chosen["text_encoder"] == {"max_length": 320}
    build(DataConfig, data)


def test_images_without_captions(folder, tmp_path, capsys):
    for text in folder.glob("*.txt"):
        text.unlink()
    with pytest.raises(UserError, match="no captions"):
        inspect(folder, tmp_path / "out", capsys)
    report, printed = inspect(folder, tmp_path / "out", capsys, "--images_only", "--num_workers", "0")
    assert report["usable"] == 6
    assert report["captions"]["tokens"] == {}
    assert "captions:" not in printed
    assert "text_encoder" not in report["settings"]


def test_a_limit_spreads_over_the_data(folder, tmp_path, capsys):
    report, _ = inspect(folder, tmp_path / "out", capsys, "--limit", "3", "--num_workers", "0")
    assert (report["samples"], report["read"], report["usable"]) == (7, 3, 2)  # the first, the damaged, the last


def test_nothing_usable_is_an_error_behind_the_report(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(b"no image")
        (folder / f"{i}.txt").write_text("caption")
    with pytest.raises(UserError, match="none of the 3 samples is usable"):
        inspect(folder, tmp_path / "out", capsys, "--num_workers", "0")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["unusable"]["count"] == 3


def test_broken_lines_of_a_manifest_are_listed(folder, tmp_path, capsys):
    lines = [json.dumps({"path": str(folder / f"{i}.png"), "prompt": "a word"}) for i in (0, 2)]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, '{"path": "x.png", "prompt": null}']))
    report, _ = inspect(tmp_path / "data.jsonl", tmp_path / "out", capsys, "--num_workers", "0")
    assert (report["usable"], report["unusable"]["count"]) == (2, 1)
    ((kind, found),) = report["unusable"]["reasons"].items()
    assert "data.jsonl:3" in found["examples"][0], kind


def test_commands_of_the_guide_are_understood(repo_root):
    commands = re.findall(
        r"`python -m svg_t2i\.inspect_data ([^`]+)`", (repo_root / "docs" / "your-data.md").read_text()
    )
    assert len(commands) >= 7  # one for each layout
    for words in commands:
        assert inspect_data.parse_arguments(shlex.split(words)).path, words


def test_odd_files_from_the_command_line(odd_images, tmp_path, repo_root):
    """As a user types it; mistakes are one line."""
    command = [sys.executable, "-m", "svg_t2i.inspect_data"]
    done = subprocess.run(
        [*command, str(odd_images), "--output", str(tmp_path / "out"), "--resolution", "64"],
        cwd=repo_root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "10 samples, 10 read, 9 usable" in done.stdout
    assert "damaged.jpg" in done.stdout
    wrong = subprocess.run([*command, str(tmp_path / "nowhere")], cwd=repo_root, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1
