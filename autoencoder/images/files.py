"""Image files: safe decoding, aspect buckets, crops, tensors, grids, PNG files.

Sizes are (width, height) as in Pillow; tensors are (3, H, W). Three representations occur:

    PIL "RGB"   what is decoded, cropped and saved
    uint8       (3, H, W) in [0, 255], what data loaders hand over (a quarter of the bytes of float32)
    float32     (3, H, W) in [-1, 1], what the autoencoder reads and writes
"""

from __future__ import annotations

import io
import math
import random
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from autoencoder.common.config import UserError
from autoencoder.common.weights import replacing
from autoencoder.images.colours import SIDEWAYS, orientation_of, to_rgb

MAX_IMAGE_PIXELS = 2**27  # 134 megapixels; Pillow itself refuses more than 179
MAX_ASPECT_RATIO = 64.0  # a thinner image would become gigantic when it is scaled to cover a crop
LATENT_PIXELS = 16  # pixels of image per latent cell

# Pillow can decode much more, among it formats that start an interpreter (EPS); these are refused.
Image.init()  # registers all decoders; AVIF came with Pillow 11.3
FORMATS = tuple(
    name for name in ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "TGA")
    if name in Image.OPEN
)  # fmt: skip
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE_BYTES = 1 << 26  # of a colour profile, inflated

Size = tuple[int, int]
Random = random.Random | np.random.Generator


class ImageError(UserError):
    """An image that cannot be used: missing, unreadable, truncated, oversized."""


def load_image(
    source: Path | str | bytes,
    max_pixels: int = MAX_IMAGE_PIXELS,
    shrink: Callable[[Size], Size] | None = None,
    name: str | None = None,
    turn: bool = True,
) -> Image.Image:
    """Decode an image file (or its bytes) to RGB, as `images.colours` says. The size is checked before any pixel is.

    Of an animation or a file of several pictures the first is taken.

    shrink: image size → the size it must still cover. A JPEG is then decoded at 1/2, 1/4 or 1/8 of its size (the scaled
        inverse DCT of libjpeg: several times faster, and close to the box-halving of `crop_to_size`).
    name: what messages call it; the file's name by default.
    turn: apply the EXIF orientation. The published training data was read without.

    Raises:
        ImageError: names the file and what is wrong with it, whatever it is.
    """
    name = name or ("image data" if isinstance(source, bytes) else str(source))
    try:
        with _opened(source) as image:
            _check_size(image.size, max_pixels)
            if shrink is not None:
                sideways = turn and orientation_of(image) in SIDEWAYS
                image.draft(None, shrink(image.size[::-1])[::-1] if sideways else shrink(image.size))
            bits = _bits_per_sample(image)
            image.load()
            return to_rgb(image, turn, bits)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise ImageError(f"{name}: no such image file") from None
    except Exception as error:  # every decoder has its own, and damaged data finds them all
        raise ImageError(f"{name}: not a readable image: {_reason(error)}") from error


def image_size(source: Path | str | bytes, turn: bool = True) -> Size:
    """(width, height) in pixels from the header of an image file, turned as in `load_image`.

    Raises:
        ImageError: as `load_image`, for faults that the header shows.
    """
    try:
        with _opened(source) as image:
            return image.size[::-1] if turn and orientation_of(image) in SIDEWAYS else image.size
    except Exception as error:
        raise ImageError(f"not a readable image: {_reason(error)}") from error


@contextmanager
def _opened(source: Path | str | bytes) -> Iterator[Image.Image]:
    """A Pillow image that is not decoded yet. A PNG whose texts are larger than Pillow allows is read without them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's soft size limit (ours follows) and remarks about metadata
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        try:
            image = Image.open(file, formats=FORMATS)
        except ValueError:
            content = source if isinstance(source, bytes) else Path(source).read_bytes()
            if not content.startswith(PNG_SIGNATURE):
                raise
            content, profile = without_texts(content)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            image.info |= {"icc_profile": profile} if profile else {}
        with image:
            yield image


def without_texts(png: bytes) -> tuple[bytes, bytes | None]:
    """A PNG file without its texts and its colour profile, and that profile inflated, if there is one to be had."""
    pieces, profile, place = [PNG_SIGNATURE], None, len(PNG_SIGNATURE)
    while place < len(png):
        kind, end = png[place + 4 : place + 8], place + 12 + int.from_bytes(png[place : place + 4], "big")
        if kind == b"iCCP":  # name, 0, method of compression, compressed profile
            inflate, data = zlib.decompressobj(), png[place + 8 : end - 4].partition(b"\0")[2][1:]
            with suppress(zlib.error):
                profile = inflate.decompress(data, MAX_PROFILE_BYTES)
        elif kind not in (b"tEXt", b"zTXt", b"iTXt"):
            pieces.append(png[place:end])
        place = end
    return b"".join(pieces), profile


def _bits_per_sample(image: Image.Image) -> int:
    """Of a PNG that is not decoded yet; 8 for other formats."""
    mode = image.tile[0].args if image.format == "PNG" and image.tile else None  # such as "L;4" and "RGB;16B"
    digits = re.search(r";(\d+)", mode) if isinstance(mode, str) else None
    return int(digits[1]) if digits else 8


def _reason(error: Exception) -> str:
    """What went wrong; the kind of error where it says nothing itself."""
    return str(error) or type(error).__name__


def _check_size(size: Size, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"empty image ({width}x{height})")
    if width * height > max_pixels:
        raise ImageError(f"{width}x{height} is more than the limit of {max_pixels} pixels; scale it down")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ImageError(f"{width}x{height} is more elongated than {MAX_ASPECT_RATIO:g}:1; crop it")


# --- aspect buckets ---------------------------------------------------------------------------------------------


def frontier_sizes(num_patches: int, patch_size: int, max_aspect: float) -> tuple[Size, ...]:
    """Sizes of at most `num_patches` patches along the frontier w·h ≤ num_patches, from widest to tallest.

    The frontier is a staircase from (num_patches, 1) to (1, num_patches): the height grows while it fits, then the
    width shrinks by one. So at width w it visits the heights from ⌊N/(w+1)⌋, where w+1 left off, to ⌊N/w⌋. Kept are
    sizes within the aspect ratio whose sides, floor-divided by 32, are even: multiples of 64, or 16 px above one.
    """
    sizes = []
    for w in range(num_patches, 0, -1):
        for h in range(max(1, num_patches // (w + 1)), num_patches // w + 1):
            width, height = w * patch_size, h * patch_size
            if max(w, h) / min(w, h) <= max_aspect and width // 32 % 2 == 0 and height // 32 % 2 == 0:
                sizes.append((width, height))
    return tuple(sizes)


def aspect_buckets(resolution: int, max_aspect: float = 4.0) -> tuple[Size, ...]:
    """Crop sizes with about resolution² pixels and sides divisible by 16; `max_aspect` 1 gives the square alone.

    Raises:
        UserError: if the resolution is not a multiple of 16 or leaves no size.
    """
    if resolution < LATENT_PIXELS or resolution % LATENT_PIXELS:
        raise UserError(f"resolution {resolution} is not a positive multiple of {LATENT_PIXELS}")
    if max_aspect < 1:
        raise UserError(f"max_aspect {max_aspect} must be at least 1 (squares only)")
    if max_aspect == 1:  # also for resolutions such as 288 or 32, which the published rule leaves without a size
        return ((resolution, resolution),)
    sizes = frontier_sizes((resolution // LATENT_PIXELS) ** 2, LATENT_PIXELS, max_aspect)
    if not sizes:
        raise UserError(
            f"resolution {resolution} with max_aspect {max_aspect:g} leaves no crop size; use a multiple of 64"
        )
    return sizes


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket that keeps most of an image of `size`: largest min(cw/w, ch/h) / max(cw/w, ch/h)."""

    def overlap(bucket: Size) -> tuple[float, Size]:
        scales = bucket[0] / size[0], bucket[1] / size[1]
        return min(scales) / max(scales), bucket  # ties: the larger (width, height)

    return max(buckets, key=overlap)


# --- crops ------------------------------------------------------------------------------------------------------


def crop_to_size(image: Image.Image, size: Size, rng: Random | None = None) -> Image.Image:
    """Scale an image until it covers `size` and cut that size out, at a random offset or (`rng` None) in the middle.

    Large images are first halved with a box filter while both sides are at least twice the target, then scaled with
    the bicubic filter.
    """
    width, height = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = halved(image)
    scale = max(width / image.width, height / image.height)
    covering = round(image.width * scale), round(image.height * scale)
    image = image.resize(covering, Image.Resampling.BICUBIC)
    left = _offset(image.width - width, rng)
    top = _offset(image.height - height, rng)
    return image.crop((left, top, left + width, top + height))


def halved(image: Image.Image) -> Image.Image:
    """Half as wide and half as high, rounded down, with a box filter: the pixels of Pillow's `resize`, twice as fast.

    That scales the rows, rounds, and scales the columns, which for even sides is what `reduce` does in one direction.
    """
    width, height = image.width // 2, image.height // 2
    even = image.width % 2 == 0
    image = image.reduce((2, 1)) if even else image.resize((width, image.height), Image.Resampling.BOX)
    return image.reduce((1, 2)) if image.height % 2 == 0 else image.resize((width, height), Image.Resampling.BOX)


def crop_square(image: Image.Image, size: int, rng: Random | None = None) -> Image.Image:
    """Scale the shorter side to `size` and cut a square out, as `crop_to_size` does."""
    return crop_to_size(image, (size, size), rng)


def _offset(slack: int, rng: Random | None) -> int:
    """Uniform on 0 .. slack; `random()` in [0, 1) is what both kinds of generator offer."""
    return slack // 2 if rng is None else int(rng.random() * (slack + 1))


# --- tensors ----------------------------------------------------------------------------------------------------


def to_uint8_tensor(image: Image.Image) -> Tensor:
    """RGB image → (3, H, W) uint8."""
    return torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))  # Pillow splits fastest


class Group(NamedTuple):
    """Images of one size: their places in a pass or a stream, and uint8 (n, 3, H, W)."""

    places: tuple[int, ...]
    images: Tensor
    replaced: int = 0  # how many of them stand in for unusable ones


def group_by_size(pairs: Iterable[tuple[int, Tensor]]) -> list[Group]:
    """(place, image) pairs → a group for each size, in the order of their first appearance."""
    by_size: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for place, image in pairs:
        by_size.setdefault(image.shape, []).append((place, image))
    return [Group(places, torch.stack(images)) for places, images in (zip(*group) for group in by_size.values())]


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] → float32 in [-1, 1], any shape, on the tensor's device."""
    return images.float() / 127.5 - 1.0


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] → RGB image, rounded and clipped; inverse of `to_float(to_uint8_tensor(image))`."""
    levels = ((image.detach().float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())  # (3, H, W) → (H, W, 3)


# --- output -----------------------------------------------------------------------------------------------------


def image_grid(
    images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None, gap: int = 4
) -> Image.Image:
    """Paste images row by row on white, `columns` per row, each centred in its cell above its (wrapped) label.

    Raises:
        ValueError: no images, no columns, or another number of labels than images.
    """
    if not images or columns < 1:
        raise ValueError(f"a grid needs images and columns, got {len(images)} images and {columns} columns")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    image_width, image_height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    font = ImageFont.load_default()
    cell_width = image_width if labels is None else max(image_width, 120)  # room for a few words under small images
    texts = [_wrap(label, font, cell_width) for label in labels or [""] * len(images)]
    line_height = sum(font.getbbox("Ag")[1::2]) + 2
    label_height = 0 if labels is None else max(text.count("\n") + 1 for text in texts) * line_height
    step_x, step_y = cell_width + gap, image_height + label_height + gap
    grid = Image.new("RGB", (columns * step_x + gap, rows * step_y + gap), (255, 255, 255))
    draw = ImageDraw.Draw(grid)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = gap + i % columns * step_x, gap + i // columns * step_y
        grid.paste(image, (x + (cell_width - image.width) // 2, y + (image_height - image.height) // 2))
        draw.multiline_text((x, y + image_height + 1), text, fill=(0, 0, 0), font=font, spacing=1)
    return grid


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """Break a label into lines of at most `width` pixels, between words where possible."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return "\n".join(lines)


def save_png(image: Image.Image, path: Path | str, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG with `text` as its text chunks; readers see the old file or the whole new one, never a part."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)  # UTF-8 (iTXt) where Latin-1 (tEXt) cannot hold it
    with replacing(Path(path)) as partial:
        image.save(partial, format="PNG", pnginfo=info)
