"""Any picture that Pillow can hold → RGB: colour spaces, bit depths, transparency, orientation.

colour spaces   CMYK with a profile through it, everything else by Pillow's plain formulas, profiles ignored, as in
                the published training data
bit depths      16-bit, 32-bit and float grey scaled to 8 bits, never clipped (`grey_to_8bit`)
transparency    an alpha channel, a palette with transparent entries or a colour key: composited on white
orientation     the EXIF tag, where asked for
"""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image, ImageCms

WHITE = (255, 255, 255)
OVERSHOOT = 0.05  # how far a filter may take float values beyond their range, as a share of it
# EXIF orientation → what turns the picture upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 … 8; 1 (upright) where there is none, or none that can be read.

    Pillow turns TIFFs itself. Of a PNG that is not decoded yet, only the tag before the pixels is seen, so that asking
    does not decode it.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info and image.tile):
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged tag: cameras and editors write many, and the picture is whole
        return 1
    return value if value in TURNS else 1


def to_rgb(image: Image.Image, turn: bool = False, bits: int = 8) -> Image.Image:
    """A picture of any mode as RGB, transparency composited on white.

    turn: apply the EXIF orientation.
    bits: of a sample in the file, which tells how its colour key (PNG's tRNS) counts.

    Raises:
        ValueError: Pillow cannot convert this mode.
    """
    step = TURNS.get(orientation_of(image)) if turn else None
    picture = _convert(image, bits)
    return picture if step is None else picture.transpose(step)


def _convert(image: Image.Image, bits: int) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_rgb(image)
    if image.mode == "CMYK":
        return _cmyk_to_rgb(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    key = image.info.get("transparency")
    if image.mode in ("L", "RGB") and key is not None:
        image.info["transparency"] = _key_to_8bit(key, bits)
    if image.mode in ("La", "RGBa"):  # colours that are multiplied by alpha already
        image = image.convert(image.mode.upper())
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, WHITE)
    white.paste(image, mask=image.getchannel("A"))
    return white


def _key_to_8bit(key: int | tuple[int, ...], bits: int) -> int | tuple[int, ...]:
    """A colour key in samples of `bits` bits, in those of the 8 bits that Pillow decodes to."""
    if isinstance(key, tuple):
        return tuple(_key_to_8bit(value, bits) for value in key)
    return key >> 8 if bits == 16 else key * 255 // (2**bits - 1)


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile:
        try:
            printer, screen = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, printer, screen, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # a damaged profile, or one of another colour space: as if there were none
    return image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    # Pillow holds the 16 bits of some formats in 32
    levels = grey_to_8bit(values.astype(np.uint16) if image.format in ("PNG", "PPM") else values)
    key = image.info.get("transparency")
    if isinstance(key, int):
        levels[values == key] = WHITE[0]
    return Image.fromarray(levels).convert("RGB")


def grey_to_8bit(values: np.ndarray) -> np.ndarray:
    """Grey values (H, W) of 16 or 32 bits, integers or floats → uint8, scaled and rounded.

    White is 65535 for 16 bits. 32 bits do not say what white is: 255 or 65535, for floats 1 too, whichever is the first
    that no value exceeds (floats may by 5 %, which is clipped). Where none fits, and where values are negative, the
    smallest becomes black and the largest white. Infinite values become the nearest finite one, NaN the smallest.
    """
    if values.dtype.kind == "u":
        return (values / 257).round().astype(np.uint8)
    is_float = values.dtype.kind == "f"
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    slack = OVERSHOOT if is_float else 0.0
    whites = (1.0, 255.0, 65535.0) if is_float else (255.0, 65535.0)
    white = next((white for white in whites if high <= white * (1 + slack) and low >= -white * slack), None)
    if white is None:
        values, white = values - low, high - low
    return (values.clip(0, white) * (255 / (white or 1))).round().astype(np.uint8)
