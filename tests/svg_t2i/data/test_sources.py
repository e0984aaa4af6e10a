"""Samples and batches: the same crops and captions whatever the workers, ranks and interruptions."""

import dataclasses
import itertools
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.common.config import UserError
from autoencoder.images.order import SampleOrder
from autoencoder.sources.failures import Failures
from autoencoder.sources.folders import ImageFolder
from autoencoder.sources.manifest import Manifest
from autoencoder.sources.source import Reading
from svg_t2i.data.draws import Augmentation
from svg_t2i.data.loader import build_loader
from svg_t2i.data.sources import T2IDataset
from svg_t2i.text.encoder import SYSTEM_PROMPTS

SIZES = [(200, 200), (300, 150), (90, 260), (140, 128), (512, 200)]  # (width, height)
COUNT = 10


@pytest.fixture(scope="module")
def manifest_path(tmp_path_factory):
    """Ten images of noise (every crop differs) in five shapes, two captions each, both caption conventions."""
    folder = tmp_path_factory.mktemp("manifest")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(COUNT):
        width, height = SIZES[i % len(SIZES)]
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png", compress_level=0)
        captions = [f"first {i}", f"second {i}"]
        names = ("path", "prompt") if i % 2 else ("image_path", "super_high_quality_caption")
        lines.append(json.dumps({names[0]: f"{i}.png", names[1]: captions}))
    (folder / "all.jsonl").write_text("\n".join(lines))
    return folder / "all.jsonl"


@pytest.fixture
def dataset(manifest_path):
    return T2IDataset(Manifest.open(manifest_path), resolution=128, augmentation=Augmentation(seed=5))


def samples_of(steps):
    """position → (image bytes, size, caption) over all batches."""
    found = {}
    for batch in itertools.chain(*steps):
        images = [image for group in batch.images for image in group]
        for image, caption, position in zip(images, batch.captions, batch.positions.tolist(), strict=True):
            assert position not in found
            found[position] = (image.numpy().tobytes(), tuple(image.shape), caption)
    return found


def assert_same_batches(actual, expected):
    actual, expected = list(actual), list(expected)
    assert list(map(len, actual)) == list(map(len, expected))
    actual, expected = list(itertools.chain(*actual)), list(itertools.chain(*expected))
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.captions == b.captions
        assert torch.equal(a.positions, b.positions)
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))


STREAM = {"global_batch_size": 6, "micro_batch_size": 3, "total_steps": 5}


def test_batches_do_not_depend_on_workers(dataset):
    alone = list(build_loader(dataset, **STREAM))
    assert list(map(len, alone)) == [2] * 5
    assert_same_batches(build_loader(dataset, **STREAM, num_workers=2), alone)


def test_resuming_continues_the_interrupted_run(dataset):
    whole = list(build_loader(dataset, **STREAM))
    for step in (1, 3, 5):
        resumed = build_loader(dataset, **STREAM, resume_step=step, num_workers=step % 2)
        assert len(resumed) == 5 - step
        assert_same_batches(resumed, whole[step:])


def test_samples_do_not_depend_on_ranks_and_micro_batches(dataset):
    whole = samples_of(build_loader(dataset, **STREAM))
    assert set(whole) == set(range(30))
    stream = {**STREAM, "micro_batch_size": 1}
    shares = [samples_of(build_loader(dataset, **stream, rank=rank, world_size=2)) for rank in range(2)]
    assert not set(shares[0]) & set(shares[1])
    assert {**shares[0], **shares[1]} == whole
    steps = [{position // 6 for position in list(share)[3:6]} for share in shares]
    assert steps == [{1}, {1}]  # step 1 holds the same positions 6 … 11 on two ranks as on one


def test_order_is_the_samplers(dataset):
    batches = list(build_loader(dataset, **STREAM))
    captions = {position: caption for position, (_, _, caption) in samples_of(batches).items()}
    for position, index in enumerate(SampleOrder([COUNT], seed=5).locate(np.arange(30))[1]):
        assert captions[position] == "" or captions[position].endswith(f" {index}")
    for number, batch in enumerate(itertools.chain(*batches)):
        assert sorted(batch.positions.tolist()) == list(range(3 * number, 3 * number + 3))


def test_randomness_is_keyed_by_seed_and_position(dataset):
    squares, other = (T2IDataset(dataset.manifest, 64, 1.0, augmentation=Augmentation(seed=seed)) for seed in (5, 6))
    wide = 4  # 512 x 200: a hundred places to cut a square from
    first = squares[7, wide]
    assert len({squares[position, wide].image.numpy().tobytes() for position in range(4)}) == 4
    assert torch.equal(squares[7, wide].image, first.image)  # whatever was drawn in between
    assert squares[7, wide].caption == first.caption
    assert not torch.equal(other[7, wide].image, first.image)


def test_the_dropout_rate_changes_no_crop_and_no_other_caption(dataset):
    never, always = (T2IDataset(dataset.manifest, 128, augmentation=Augmentation(p, seed=5)) for p in (0.0, 1.0))
    for position in range(40):
        item, kept = dataset[position, position % COUNT], never[position, position % COUNT]
        assert torch.equal(item.image, kept.image)
        assert item.caption in (kept.caption, "")
        assert always[position, position % COUNT].caption == ""


def test_shares_of_dropped_and_alternative_captions(manifest_path):
    dataset = T2IDataset(Manifest.open(manifest_path), 64, 1.0, "empty", Augmentation(0.3))
    drawn = Counter(dataset[position, 3].caption for position in range(600))
    assert set(drawn) == {"", "first 3", "second 3"}
    deviation = (600 * 0.3 * 0.7) ** 0.5
    assert abs(drawn[""] - 180) < 4 * deviation
    assert abs(drawn["first 3"] - 210) < 4 * deviation


def test_system_prompts(manifest_path):
    manifest = Manifest.open(manifest_path)
    published = T2IDataset(manifest, 64, 1.0, None, Augmentation(0))
    assert published[0, 1].caption.startswith(SYSTEM_PROMPTS["base"])
    assert published[0, 2].caption.startswith(SYSTEM_PROMPTS["align"])
    real = T2IDataset(manifest, 64, 1.0, "real", Augmentation(0))
    assert real[0, 1].caption.startswith(SYSTEM_PROMPTS["real"])
    with pytest.raises(UserError, match="'none' does not exist"):
        T2IDataset(manifest, 64, system_prompt="none")


def test_groups_hold_equal_sizes(dataset):
    items = [dataset[position, index] for position, index in enumerate([0, 1, 5, 2, 6, 0])]
    batch = dataset.collate(items)
    assert len(batch) == 6
    assert [tuple(group.shape[2:]) for group in batch.images] == [(128, 128), (80, 192), (192, 64)]
    assert [len(group) for group in batch.images] == [3, 2, 1]
    assert batch.positions.tolist() == [0, 2, 5, 1, 4, 3]
    assert batch.sizes == tuple(tuple(items[p].image.shape[1:]) for p in batch.positions.tolist())
    for row, position in enumerate(batch.positions.tolist()):
        assert torch.equal([image for group in batch.images for image in group][row], items[position].image)
        assert batch.captions[row] == items[position].caption
    assert all(group.dtype == torch.uint8 for group in batch.images)


def test_squares_only(manifest_path):
    dataset = T2IDataset(Manifest.open(manifest_path), 64, max_aspect=1.0)
    for (batch,) in build_loader(dataset, global_batch_size=5, micro_batch_size=5, total_steps=2):
        assert [tuple(group.shape) for group in batch.images] == [(5, 3, 64, 64)]


def test_batch_moves_and_the_dataset_pickles(dataset):
    batch = dataset.collate([dataset[0, 0], dataset[1, 1]])
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in (*moved.images, moved.positions, moved.resolutions)} == {"meta"}
    others = {field.name for field in dataclasses.fields(batch)} - {"images", "positions", "resolutions"}
    assert "captions" in others
    assert all(getattr(moved, name) == getattr(batch, name) for name in others)
    copy = pickle.loads(pickle.dumps(dataset))  # worker processes may be spawned instead of forked
    assert torch.equal(copy[3, 3].image, dataset[3, 3].image)


def test_iterating_leaves_the_global_generator_alone(dataset):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    next(iter(build_loader(dataset, **STREAM)))
    assert torch.equal(torch.rand(2), expected)


# --- faults -----------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_manifest(manifest_path, tmp_path):
    """The first image does not exist."""
    lines = manifest_path.read_text().splitlines()
    entries = [json.loads(line) for line in lines[:4]]
    entries[0]["image_path"] = "missing.png"
    for entry in entries[1:]:
        field = "path" if "path" in entry else "image_path"
        entry[field] = str(manifest_path.parent / entry[field])
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def test_an_unreadable_image_is_replaced_by_its_neighbour(broken_manifest):
    stream = {"global_batch_size": 4, "micro_batch_size": 2, "total_steps": 3}
    dataset = T2IDataset(Manifest.open(broken_manifest), 64, 1.0, augmentation=Augmentation(0))
    steps = list(build_loader(dataset, **stream))
    found = samples_of(steps)
    assert sum(batch.replaced for step in steps for batch in step) == 3
    indices = Counter(caption[-1] for _, _, caption in found.values())
    assert indices == {"1": 6, "2": 3, "3": 3}  # three epochs, 0 replaced by 1
    fresh = T2IDataset(Manifest.open(broken_manifest), 64, 1.0, augmentation=Augmentation(0))
    assert samples_of(build_loader(fresh, **stream, num_workers=2)) == found


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_unreadable_images_end_with_one_plain_message(broken_manifest, num_workers):
    dataset = T2IDataset(Manifest.open(broken_manifest, Reading(failures=Failures(0))), 64, 1.0)
    loader = build_loader(dataset, global_batch_size=4, micro_batch_size=4, total_steps=1, num_workers=num_workers)
    with pytest.raises(UserError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith(str(broken_manifest))
    assert "missing.png" in message
    assert "Traceback" not in message


def test_images_without_captions(manifest_path):
    dataset = T2IDataset(ImageFolder(manifest_path.parent.parent, manifest_path.parent.name), 64)
    with pytest.raises(UserError, match="0.png has no caption"):
        dataset[0, 0]


def test_arguments(dataset):
    with pytest.raises(UserError, match="resolution 100 .*multiple of 16"):
        T2IDataset(dataset.manifest, resolution=100)
    with pytest.raises(UserError, match="caption_dropout_prob=1.5"):
        Augmentation(caption_dropout_prob=1.5)
