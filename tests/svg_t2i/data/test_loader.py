"""Steps: the same samples for any number of processes and workers, any dealing, after any interruption."""

import io
import itertools
import json
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from autoencoder.common.config import UserError, build
from autoencoder.sources.manifest import Manifest
from svg_t2i.data.draws import Augmentation
from svg_t2i.data.loader import build_loader
from svg_t2i.data.settings import DataConfig
from svg_t2i.data.sources import T2IDataset, make_datasets, open_sources

SIZES = [(64, 64), (128, 64), (64, 130), (70, 66)]
SYSTEM = "You are"  # every prompt begins with it


def picture(number):
    width, height = SIZES[number % len(SIZES)]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine images with their sizes in a manifest, and six others in two tar shards."""
    folder = tmp_path_factory.mktemp("sources")
    lines = []
    for i in range(9):
        picture(i).save(folder / f"{i}.png", compress_level=0)
        captions = [f"jsonl {i} " + "word " * (i * 11 % 60), f"jsonl {i} short"]
        width, height = SIZES[i % len(SIZES)]
        lines.append({"path": f"{i}.png", "prompt": captions, "width": width, "height": height})
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for shard in range(2):
        with tarfile.open(folder / f"t-{shard}.tar", "w") as tar:
            for i in range(3 * shard, 3 * shard + 3):
                buffer = io.BytesIO()
                picture(100 + i).save(buffer, "PNG", compress_level=0)
                for name, content in ((f"{i}.png", buffer.getvalue()), (f"{i}.txt", f"tar {i}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def datasets(folder):
    """Both sources, at two resolutions."""
    sources = [
        {"path": str(folder / "m.jsonl"), "weight": 3},
        {"path": str(folder / "t-{0..1}.tar"), "weight": 1, "resolution": 32},
    ]
    config = build(DataConfig, {"sources": sources, "resolution": 64})
    return make_datasets(config, open_sources(config), seed=3, max_caption_tokens=64)


def samples_of(steps):
    """position → (image's hash, resolution, caption), and the positions of each step."""
    found, positions = {}, []
    for step in steps:
        positions.append(sorted(position for batch in step for position in batch.positions.tolist()))
        for batch in step:
            images = itertools.chain(*batch.images)
            rows = zip(images, batch.captions, batch.positions.tolist(), batch.resolutions.tolist(), strict=True)
            for image, caption, position, resolution in rows:
                assert position not in found
                assert image.numel() <= 3 * resolution**2
                found[position] = (hash(image.numpy().tobytes()), resolution, caption)
    return found, positions


STREAM = {"global_batch_size": 12, "micro_batch_size": 3, "total_steps": 3, "weights": [3, 1]}


@pytest.fixture(scope="module")
def whole(datasets):
    """All samples, as one process without workers sees them."""
    return samples_of(build_loader(datasets, **STREAM))[0]


@settings(deadline=None, max_examples=12)
@given(
    world_size=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 3, None]),
    resume=st.integers(0, 2),
    budget=st.integers(90, 400),
)
def test_samples_do_not_depend_on_how_they_are_dealt(datasets, whole, world_size, micro, resume, budget):
    """micro None: by tokens."""
    stream = {**STREAM, "micro_batch_size": micro or 1, "micro_batch_tokens": None if micro else budget}
    together, counts = {}, set()
    for rank in range(world_size):
        steps = list(build_loader(datasets, **stream, resume_step=resume, rank=rank, world_size=world_size))
        found, _ = samples_of(steps)
        assert not found.keys() & together.keys()
        together |= found
        counts.add(tuple(map(len, steps)))
    assert together == {position: sample for position, sample in whole.items() if position >= 12 * resume}
    assert len(counts) == 1  # equally many micro-batches on every rank


@pytest.mark.parametrize("tokens", [None, 100])
def test_steps_do_not_depend_on_workers(datasets, whole, tokens):
    stream = {**STREAM, "micro_batch_tokens": tokens, "world_size": 2, "rank": 1}
    alone = list(build_loader(datasets, **stream))
    helped = list(build_loader(datasets, **stream, num_workers=2, prefetch=1))
    assert list(map(len, alone)) == list(map(len, helped))
    for a, b in zip(itertools.chain(*alone), itertools.chain(*helped), strict=True):
        assert a.captions == b.captions
        assert torch.equal(a.positions, b.positions)
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
        assert all(whole[p][2] == caption for p, caption in zip(a.positions.tolist(), a.captions))


def test_every_step_holds_its_positions(datasets):
    _, positions = samples_of(build_loader(datasets, **STREAM, micro_batch_tokens=150))
    assert positions == [list(range(12 * step, 12 * step + 12)) for step in range(3)]


def test_sources_come_with_their_weight_and_resolution(datasets):
    found, _ = samples_of(build_loader(datasets, **{**STREAM, "total_steps": 40}))
    shares = {64: 0, 32: 0}
    for _, resolution, caption in found.values():
        shares[resolution] += 1
        assert not caption or (" tar " in caption) == (resolution == 32)
        assert not caption or caption.startswith(SYSTEM)
    assert abs(shares[32] / len(found) - 0.25) < 5 * (0.25 * 0.75 / len(found)) ** 0.5


def test_micro_batches_keep_their_budget(datasets):
    """By the estimate exactly; it knows image sizes from the manifest and the drawn caption's length."""
    budget = 90
    stream = {**STREAM, "micro_batch_tokens": budget, "total_steps": 2}
    for step in build_loader(datasets, **stream):
        assert len(step) > 3
        for batch in step:
            tokens = sum(h * w // 256 for h, w in batch.sizes)
            tokens += sum(min(64, 1 + -(-len(caption.encode()) // 4)) for caption in batch.captions)
            assert tokens <= budget


def test_estimates_follow_the_drawn_caption(datasets):
    manifest, tar = datasets
    for position in range(20):
        item, about = manifest[position, 7], manifest.tokens(position, 7)
        caption = min(64, 1 + -(-len(item.caption) // 4))
        assert about == item.image.shape[1] * item.image.shape[2] // 256 + caption
        assert tar.tokens(position, 0) in (4 + 1, 4 + 1 + -(-(len(item.caption) or 1) // 4), 4 + 26, 4 + 28, 4 + 27)


def test_fixed_crops_repeat_and_are_few(folder):
    manifest = Manifest.open(folder / "m.jsonl")
    dataset = T2IDataset(manifest, 64, 1.0, augmentation=Augmentation(crops_per_image=3))
    crops = {dataset[position, 1].image.numpy().tobytes() for position in range(60)}
    fixed = dataset.fixed_crops(1, dataset.load(1)[0])
    assert crops == {crop.numpy().tobytes() for crop in fixed}
    assert len(crops) == 3
    centre = picture(1).crop((32, 0, 96, 64))
    assert torch.equal(fixed[0], torch.from_numpy(np.array(centre)).permute(2, 0, 1))


def test_jpeg_draft_shows_the_same_picture(tmp_path):
    y, x = np.mgrid[0:600, 0:900] / 900
    smooth = np.stack([x, y, (np.sin(9 * x) + 1) / 2], axis=2)
    Image.fromarray((255 * smooth).astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    (tmp_path / "m.jsonl").write_text('{"path": "a.jpg", "prompt": "x"}')
    manifest = Manifest.open(tmp_path / "m.jsonl")
    full, draft = (T2IDataset(manifest, 64, jpeg_draft=draft)[5, 0].image.float() for draft in (False, True))
    assert full.shape == draft.shape
    assert (full - draft).abs().mean() < 2
    assert T2IDataset(manifest, 64, jpeg_draft=True).load(0)[0].size == (113, 75)  # an eighth, and still large enough
    assert T2IDataset(manifest, 512, jpeg_draft=True).load(0)[0].size == (900, 600)
    assert T2IDataset(manifest, 64).load(0)[0].size == (900, 600)  # whole unless drafts are asked for


def test_errors_of_the_reading_ahead_worker_are_plain(datasets):
    loader = build_loader(datasets, **STREAM, micro_batch_tokens=40, num_workers=1)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert str(caught.value).startswith("data.micro_batch_tokens=40 is too small")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "path=None must be given, or sources"),
        ({"path": "a", "sources": [{"path": "b"}]}, "path='a' must be given, or sources"),
        ({"path": "a", "crops_per_image": 0}, "crops_per_image=0 must be at least 1"),
        ({"path": "a", "prefetch": 0}, "prefetch=0 must be at least 1"),
        ({"path": "a", "caption_mix": {"short": 0, "middle": 0, "long": 0}}, "caption_mix"),
        ({"sources": [{"path": "a", "feature_cache": "c"}, {"path": "b"}]}, "for all sources or for none"),
    ],
)
def test_mistakes_in_the_settings_are_named(data, message):
    with pytest.raises(UserError, match=message):
        build(DataConfig, data)


def test_samples_stay_those_of_earlier_runs(whole):
    """Numbers that must not change: source, image and caption, "" where it was dropped, of the first positions."""
    captions = [whole[position][2].rpartition(" <Prompt Start> ")[2] for position in range(12)]
    assert [caption[:12].strip() for caption in captions] == [
        "jsonl 1 word", "jsonl 2 shor", "", "jsonl 3 shor", "jsonl 8 word", "jsonl 8 shor",
        "tar 2", "jsonl 7 word", "jsonl 6 word", "tar 3", "tar 1", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fixed", "expected"), [(None, [123, 72, 127, 128, 126, 13, 59, 34]), (4, [49, 114, 49, 49, 49, 68, 92, 92])]
)
def test_crops_are_cut_where_earlier_runs_cut_them(tmp_path, fixed, expected):
    """The left edges of a picture's crops, whose columns are numbered by their colour."""
    Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[:, None], (64, 1, 3))).save(tmp_path / "0.png")
    (tmp_path / "m.jsonl").write_text('{"path": "0.png", "prompt": "x"}')
    augmentation = Augmentation(crops_per_image=fixed, seed=3)
    dataset = T2IDataset(Manifest.open(tmp_path / "m.jsonl"), 64, 1.0, augmentation=augmentation)
    assert [int(dataset[position, 0].image[0, 0, 0]) for position in range(8)] == expected


def test_a_rank_without_a_sample_keeps_in_step(datasets):
    """5 samples, 4 processes, one at a time: three of them get a second micro-batch that does not count."""
    stream = {**STREAM, "global_batch_size": 5, "micro_batch_size": 1, "total_steps": 2}
    positions = []
    for rank in range(4):
        for number, step in enumerate(build_loader(datasets, **stream, rank=rank, world_size=4)):
            assert sum(batch.counted for batch in step) == (2 if rank == 0 else 1)
            assert len(step) == 2
            assert all(len(batch) == 1 for batch in step)
            positions += [(number, *batch.positions.tolist()) for batch in step if batch.counted]
    assert sorted(positions) == [(step, 5 * step + i) for step in range(2) for i in range(5)]
