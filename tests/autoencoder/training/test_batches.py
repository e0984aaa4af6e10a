"""Which samples make a batch: equal sizes, every sample once, the same for any processes, workers and interruptions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.common.config import ConfigError, UserError, build
from autoencoder.common.workers import WorkerLoader
from autoencoder.images.files import aspect_buckets, group_by_size, nearest_bucket
from autoencoder.images.order import SampleOrder
from autoencoder.sources.manifest import Manifest
from autoencoder.sources.source import Reading
from autoencoder.training.batches import (
    DATA,
    BatchStream,
    CropSizes,
    ImageDataset,
    validation_batches,
)

BUCKETS = aspect_buckets(128)
SIZES = [(90, 90), (200, 80), (80, 200), (128, 128), (70, 64), (256, 100), (150, 150)]


class FakeSizes(CropSizes):
    """Sizes of a large source without files: image i is cropped to bucket i·i mod 5."""

    def __init__(self, length):
        super().__init__(range(length), BUCKETS)
        self.read = []

    def _read(self, index):
        self.read.append(index)
        return index * index % 5


def make_source(folder, sizes=SIZES):
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    lines = [json.dumps({"path": f"{i}.png"}) for i in range(len(sizes))]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return Manifest.open(folder / "manifest.jsonl", Reading(require_captions=False))


def stream(sizes, shape, rank=0, steps=range(40), window=64, seed=3):
    return list(BatchStream(sizes, shape, rank, steps, seed, window))


def test_nearly_all_batches_have_one_size():
    sizes = FakeSizes(600)
    batches = stream(sizes, (1, 1, 4), steps=range(150), window=200)
    mixed = [len({index * index % 5 for _, index in batch}) > 1 for batch in batches]
    assert sum(mixed) <= 3 * (5 - 1)  # three windows of five sizes
    indices = sorted(index for batch in batches for _, index in batch)
    assert indices == list(range(600))  # an epoch: every image once
    assert len(sizes.read) == 600  # and every header once
    first_sizes = [batch[0][1] ** 2 % 5 for batch in batches[:50]]
    assert first_sizes != sorted(first_sizes)  # the steps of a window are shuffled


def test_positions_are_those_of_the_permutations():
    expected = dict(enumerate(SampleOrder([30], seed=3).locate(np.arange(90))[1].tolist()))
    keys = [key for batch in stream(FakeSizes(30), (1, 1, 3), steps=range(30), window=15) for key in batch]
    assert dict(keys) == expected
    assert len(keys) == len(expected) == 90


@pytest.mark.parametrize("window", [1, 64])
def test_a_step_is_the_same_set_of_samples_however_it_is_shared(window):
    def steps(accumulate, world_size, batch_size):
        sets = [[] for _ in range(40)]
        for rank in range(world_size):
            shape = (accumulate, world_size, batch_size)
            for i, batch in enumerate(stream(FakeSizes(500), shape, rank, window=window)):
                sets[i // accumulate] += batch
        return [sorted(step) for step in sets]

    alone = steps(1, 1, 12)
    assert all(len(step) == 12 for step in alone)
    assert steps(1, 2, 6) == steps(2, 3, 2) == steps(4, 1, 3) == alone


@pytest.mark.parametrize("first", [1, 16, 21])
def test_a_stream_goes_on_at_any_step(first):
    whole = stream(FakeSizes(300), (2, 1, 2))
    assert stream(FakeSizes(300), (2, 1, 2), steps=range(first, 40)) == whole[2 * first :]


def test_squares_are_not_sorted_and_no_header_is_read(tmp_path):
    sizes = CropSizes(make_source(tmp_path), aspect_buckets(64, 1.0))
    sizes._read = None
    keys = [key for batch in stream(sizes, (1, 1, 3), steps=range(7), window=1) for key in batch]
    assert [position for position, _ in keys] == list(range(21))


def test_headers_tell_the_crop_size_and_broken_ones_are_left_to_loading(tmp_path):
    source = make_source(tmp_path)
    (tmp_path / "2.png").write_bytes(b"no image")
    (tmp_path / "5.png").unlink()
    places = CropSizes(source, BUCKETS).of(np.arange(len(SIZES)))
    expected = [BUCKETS.index(nearest_bucket(size, BUCKETS)) for size in SIZES]
    assert [place for i, place in enumerate(places) if i not in (2, 5)] == [
        place for i, place in enumerate(expected) if i not in (2, 5)
    ]


def test_batches_do_not_depend_on_workers_or_processes(tmp_path):
    source = make_source(tmp_path)
    dataset = ImageDataset(source, BUCKETS, seed=3)

    def load(world_size, rank, workers):
        batches = BatchStream(CropSizes(source, BUCKETS), (1, world_size, 4 // world_size), rank, range(5), 3, 64)
        return list(WorkerLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=ImageDataset.collate))

    def images(batches):
        groups = [group for batch in batches for group in batch]
        return {position: image for group in groups for position, image in zip(group.places, group.images)}

    alone, worked = load(1, 0, 0), load(1, 0, 2)
    assert [[group.places for group in batch] for batch in alone] == [
        [group.places for group in batch] for batch in worked
    ]
    shared = images(load(2, 0, 0)) | images(load(2, 1, 0))
    for other in (images(worked), shared):
        assert other.keys() == images(alone).keys() == set(range(20))
        assert all(torch.equal(image, other[position]) for position, image in images(alone).items())


def test_groups_keep_every_image_with_its_position():
    sizes = [(16, 32), (32, 16), (16, 32), (32, 32)]
    batch = group_by_size([(10 + i, torch.full((3, *size), float(i))) for i, size in enumerate(sizes)])
    assert [tuple(group.images.shape) for group in batch] == [(2, 3, 16, 32), (1, 3, 32, 16), (1, 3, 32, 32)]
    assert batch[0].images[:, 0, 0, 0].tolist() == [0, 2]
    assert [group.places for group in batch] == [(10, 12), (11,), (13,)]


def test_stand_ins_are_counted(tmp_path):
    source = make_source(tmp_path)
    (tmp_path / "3.png").write_bytes(b"no image")
    dataset = ImageDataset(source, BUCKETS, 0)
    groups = dataset.collate([dataset[position, index] for position, index in enumerate([2, 3, 4, 3])])
    assert sum(group.replaced for group in groups) == 2
    assert sum(len(group.places) for group in groups) == 4


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_sees_every_image_once(world_size):
    shares = [validation_batches(FakeSizes(50), 4, rank, world_size) for rank in range(world_size)]
    assert sorted(i for share in shares for batch in share for _, i in batch) == list(range(50))
    assert all(len(batch) <= 4 for share in shares for batch in share)
    assert sum(len({i * i % 5 for _, i in batch}) > 1 for share in shares for batch in share) <= 4 * world_size


@pytest.mark.parametrize("workers", [0, 1])
def test_a_workers_user_error_arrives_as_it_was(tmp_path, workers):
    source = make_source(tmp_path)
    source.failures.max_errors = 0
    (tmp_path / "3.png").write_bytes(b"no image")
    loader = WorkerLoader(ImageDataset(source, BUCKETS, 0), batch_size=None, sampler=[(0, 3)], num_workers=workers)
    with pytest.raises(UserError, match=r"manifest.jsonl: more than 0 unusable samples") as caught:
        list(loader)
    assert "Traceback" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0 must be at least 1"),
        ({"num_workers": -1}, "num_workers = -1 not negative"),
        ({"bucket_window": 0}, "bucket_window = 0"),
    ],
)
def test_bad_params_are_named(params, message):
    given = {"batch_size": 1, "json_path": "x", "train_resol": 64} | params
    with pytest.raises(ConfigError, match=message):
        build(DATA["utils.data_module_allinone.DataModuleFromConfigJson"], given)


def test_both_splits_have_one_size():
    def split(name, size):
        return {"target": f"ldm.data.imagenet.ImageNet{name}", "params": {"data_root": ".", "size": size}}

    params = {"batch_size": 1, "train": split("Train", 256), "validation": split("Validation", 512)}
    with pytest.raises(ConfigError, match="validation.params.size = 512 must be train.params.size = 256"):
        build(DATA["utils.data_module_allinone.DataModuleFromConfig"], params)


def test_crops_are_cut_where_earlier_runs_cut_them(tmp_path):
    """The left edges of a picture's crops, whose columns are numbered by their colour."""
    Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[:, None], (64, 1, 3))).save(tmp_path / "0.png")
    (tmp_path / "manifest.jsonl").write_text('{"path": "0.png"}')
    source = Manifest.open(tmp_path / "manifest.jsonl", Reading(require_captions=False))

    def left_edges(seed):
        dataset = ImageDataset(source, aspect_buckets(64, 1.0), seed)
        return [int(dataset[position, 0][1][0, 0, 0]) for position in (0, 1, 2, 10**6)]

    assert left_edges(3) == [74, 13, 7, 56]
    assert left_edges(None) == [68] * 4


def test_batches_stay_those_of_earlier_runs():
    """Numbers that must not change: (position, index)."""
    assert stream(FakeSizes(20), (1, 1, 3), steps=range(2, 7), window=9) == [
        [(5, 5), (0, 6), (4, 1)],
        [(14, 10), (16, 15), (17, 0)],
        [(10, 14), (11, 11), (13, 19)],
        [(15, 4), (9, 17), (12, 13)],
        [(20, 10), (22, 15), (24, 5)],
    ]
