"""Decoding, RGB rules, buckets, crops, tensors, grids and PNG files."""

import io
import os
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from autoencoder.common.config import UserError
from autoencoder.images import files as images
from autoencoder.images.files import ImageError


def noise_image(width, height, seed=0, mode="RGB"):
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


# --- decoding


@pytest.mark.parametrize("format", ["PNG", "BMP", "PPM", "TIFF"])
def test_load_image_from_file_and_bytes(tmp_path, format):
    image = noise_image(31, 24)
    path = tmp_path / "image.any"
    path.write_bytes(encoded(image, format))
    for source in (path, str(path), path.read_bytes()):
        loaded = images.load_image(source)
        assert loaded.mode == "RGB"
        assert np.array_equal(loaded, image)


def test_load_image_reads_what_phones_write():
    data = encoded(noise_image(32, 16), "MPO", save_all=True, append_images=[noise_image(32, 16, seed=1)])
    assert images.load_image(data).size == (32, 16)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(ImageError, match=r"gone\.png: no such image file"):
        images.load_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="not a readable image"):
        images.load_image(tmp_path)  # a folder
    with pytest.raises(ImageError, match="not a readable image"):
        images.load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")  # would start Ghostscript
    with pytest.raises(ImageError, match="not a readable image"):
        images.load_image(b"")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files(format):
    data = encoded(noise_image(64, 64), format)
    with pytest.raises(ImageError, match="not a readable image"):
        images.load_image(data[: len(data) // 2])


def test_damaged_files_raise_nothing_but_image_error():
    rng = random.Random(0)
    intact = [encoded(noise_image(24, 17), format) for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")]
    refused = 0
    for data in intact * 60:
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(min(len(damaged), 200))] = rng.randrange(256)
        try:
            images.load_image(bytes(damaged))
        except ImageError:
            refused += 1
    assert refused > 100


def test_size_limit_is_checked_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded(Image.new("RGB", (300, 200))))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"bomb\.png: 300x200 is more than the limit of 59999 pixels"):
        images.load_image(path, max_pixels=59_999)


def test_size_limit_replaces_pillows_softer_one(monkeypatch):
    data = encoded(Image.new("RGB", (300, 200)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)  # 60,000 pixels: Pillow would warn
        assert images.load_image(data, max_pixels=60_000).size == (300, 200)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)  # beyond twice this Pillow refuses
    with pytest.raises(ImageError, match="decompression bomb"):
        images.load_image(data)


def test_extreme_aspect_ratios_are_refused():
    with pytest.raises(ImageError, match="700x10 is more elongated than 64:1"):
        images.load_image(encoded(noise_image(700, 10)))


# --- buckets


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 600), st.sampled_from([1.0, 1.5, 2.0, 4.0]))
def test_frontier_is_the_staircase_walk(num_patches, max_aspect):
    """Against the walk the docstring describes, one step at a time."""
    walked, width, height = [], num_patches, 1
    while width > 0:
        if max(width, height) / min(width, height) <= max_aspect and width // 2 % 2 == 0 and height // 2 % 2 == 0:
            walked.append((width * 16, height * 16))
        if (height + 1) * width <= num_patches:
            height += 1
        else:
            width -= 1
    assert list(images.frontier_sizes(num_patches, 16, max_aspect)) == walked


@pytest.mark.parametrize("resolution", [64, 256, 320, 512, 768, 1024])
def test_buckets_are_valid_sizes(resolution):
    buckets = images.aspect_buckets(resolution)
    assert (resolution, resolution) in buckets
    assert resolution % 128 or (2 * resolution, resolution // 2) in buckets  # the widest
    assert set(buckets) == {(h, w) for w, h in buckets}
    assert all(
        w % 16 == 0 and h % 16 == 0 and w * h <= resolution**2 and max(w, h) <= 4 * min(w, h) for w, h in buckets
    )
    assert images.aspect_buckets(resolution, 1.0) == ((resolution, resolution),)


def test_buckets_of_impossible_requests():
    for resolution in (100, 0, -16):
        with pytest.raises(UserError, match=f"resolution {resolution} is not a positive multiple of 16"):
            images.aspect_buckets(resolution)
    with pytest.raises(UserError, match="max_aspect 0.5 must be at least 1"):
        images.aspect_buckets(256, 0.5)
    with pytest.raises(UserError, match="resolution 48 with max_aspect 1.2 leaves no crop size"):
        images.aspect_buckets(48, 1.2)


def test_nearest_bucket_keeps_most_of_the_image():
    buckets = images.aspect_buckets(512)
    assert images.nearest_bucket((640, 480), buckets) == (576, 448)
    for width, height in [(700, 300), (300, 700), (333, 334), (5000, 100)]:
        kept = []
        for w, h in buckets:
            scale = max(w / width, h / height)  # what is visible of the image scaled to cover the bucket
            kept.append(w * h / (width * scale * height * scale))
        assert images.nearest_bucket((width, height), buckets) == buckets[int(np.argmax(kept))]


def test_ties_go_to_the_larger_bucket():
    assert images.nearest_bucket((100, 100), [(32, 64), (64, 32)]) == (64, 32)


# --- crops


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 70), st.integers(2, 70), st.integers(0, 9))
def test_halving_gives_the_pixels_of_a_box_filter(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    assert np.array_equal(images.halved(image), expected)


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (48, 48)])
@pytest.mark.parametrize("source", [(300, 200), (33, 400), (20, 10), (64, 32)])
@pytest.mark.parametrize("make_rng", [lambda: None, lambda: random.Random(1), lambda: np.random.default_rng(1)])
def test_crop_has_the_size_asked_for(size, source, make_rng):
    crops = [images.crop_to_size(noise_image(*source), size, make_rng()) for _ in range(2)]
    assert crops[0].size == size
    assert np.array_equal(*crops)  # a function of the generator's state alone


def test_crop_of_the_right_size_is_the_image():
    image = noise_image(48, 32)
    assert np.array_equal(images.crop_to_size(image, (48, 32), random.Random(0)), image)


def test_random_offsets_are_uniform_and_reach_both_ends():
    ramp = Image.fromarray(np.tile(np.arange(36, dtype=np.uint8), (32, 1))).convert("RGB")  # 36 wide, no scaling
    rng = np.random.default_rng(0)
    lefts = [images.crop_to_size(ramp, (32, 32), rng).getpixel((0, 0))[0] for _ in range(1000)]
    counts = np.bincount(lefts, minlength=5)
    assert len(counts) == 5
    assert counts.min() > 150  # 200 expected, σ = 12.6
    assert images.crop_to_size(ramp, (32, 32)).getpixel((0, 0))[0] == 2


def test_crop_square_scales_the_shorter_side():
    red_left = Image.new("RGB", (300, 100), (255, 0, 0))
    red_left.paste((0, 0, 255), (150, 0, 300, 100))
    crop = images.crop_square(red_left, 50)
    assert crop.size == (50, 50)
    assert crop.getpixel((10, 25)) == (255, 0, 0)
    assert crop.getpixel((40, 25)) == (0, 0, 255)


# --- tensors


def test_tensor_round_trip_is_exact():
    image = noise_image(19, 7)
    tensor = images.to_uint8_tensor(image)
    assert tensor.shape == (3, 7, 19)
    assert tensor.dtype == torch.uint8
    floats = images.to_float(tensor)
    assert floats.dtype == torch.float32
    assert np.array_equal(images.to_pil(floats), image)


def test_value_range():
    levels = torch.arange(256, dtype=torch.uint8)
    floats = images.to_float(levels)
    assert (floats[0], floats[255]) == (-1.0, 1.0)
    assert torch.allclose(floats.double(), levels.double() / 255 * 2 - 1, atol=1e-6)
    extremes = images.to_pil(torch.tensor([-3.0, -1.0, 0.003, 3.0]).view(1, 1, 4).expand(3, 1, 4))
    assert [extremes.getpixel((x, 0))[0] for x in range(4)] == [0, 0, 128, 255]


# --- output


def test_grid_places_images_row_by_row():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    grid = images.image_grid([Image.new("RGB", (10, 8), colour) for colour in colours], columns=2, gap=4)
    assert grid.size == (2 * 14 + 4, 2 * 12 + 4)
    assert [grid.getpixel(xy) for xy in ((5, 5), (19, 5), (5, 17))] == colours
    assert grid.getpixel((19, 17)) == (255, 255, 255)


def test_grid_centres_small_images_in_their_cells():
    red, blue = (255, 0, 0), (0, 0, 255)
    grid = np.array(images.image_grid([Image.new("RGB", (10, 20), red), Image.new("RGB", (30, 8), blue)], 2, gap=4))
    for colour, box in ((red, (14, 4, 24, 24)), (blue, (38, 10, 68, 18))):  # left, top, right, bottom
        rows, columns = np.nonzero((grid == colour).all(axis=2))
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == box


def test_grid_labels_are_drawn_below_and_wrapped():
    blank = Image.new("RGB", (64, 64), (255, 255, 255))
    labels = ["short", "a label of so many words that it has to go on for several lines", "x" * 60]
    grid = np.array(images.image_grid([blank] * 3, columns=3, labels=labels))
    ink = grid.min(axis=2) < 128
    assert not ink[:69].any()
    assert not ink[-4:].any()  # there is room for every line
    cells = [ink[:, 4 + i * 124 : 124 + i * 124] for i in range(3)]
    heights = [cell.any(axis=1).sum() for cell in cells]
    assert 0 < heights[0] < heights[1]
    assert heights[2] > heights[0]
    assert ink.sum() == sum(cell.sum() for cell in cells)  # nothing runs into the neighbour or off the edge


@pytest.mark.parametrize(("count", "columns", "labels"), [(0, 2, None), (2, 0, None), (2, 2, ["only one"])])
def test_grid_refuses_nonsense(count, columns, labels):
    with pytest.raises(ValueError, match="grid needs images|labels for"):
        images.image_grid([noise_image(4, 4)] * count, columns, labels)


def test_save_png_keeps_pixels_and_text(tmp_path):
    path = tmp_path / "new" / "image.png"
    text = {"prompt": "ein Vögelchen 鳥", "seed": "3"}
    images.save_png(noise_image(9, 5), path, text)
    with Image.open(path) as saved:
        assert saved.text == text
        assert np.array_equal(saved, noise_image(9, 5))
    assert os.listdir(path.parent) == ["image.png"]


def test_save_png_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "image.png"
    images.save_png(noise_image(9, 5), path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="cannot write mode"):
        images.save_png(Image.new("HSV", (4, 4)), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["image.png"]
