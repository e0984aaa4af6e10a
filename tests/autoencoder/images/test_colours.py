"""Every mode, bit depth, transparency and orientation → RGB, against values computed without Pillow's conversions."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from autoencoder.images.colours import grey_to_8bit, orientation_of, to_rgb
from autoencoder.images.files import ImageError, image_size, load_image, without_texts

WIDTH, HEIGHT = 24, 16


def noise(*shape, high=256, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, high, (HEIGHT, WIDTH, *shape)).astype(dtype)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def rgb(grey):
    """(H, W) → (H, W, 3)."""
    return np.repeat(np.asarray(grey, dtype=float)[..., None], 3, axis=2)


def on_white(colour, alpha):
    """(H, W, 3) and (H, W), both up to 255."""
    share = np.asarray(alpha, dtype=float)[..., None] / 255
    return colour * share + 255 * (1 - share)


def png(rows, depth, colour_type, *chunks):
    """A PNG file of packed rows, written without Pillow."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width = len(rows[0]) * 8 // (depth * {0: 1, 2: 3, 4: 2, 6: 4}[colour_type])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    more = b"".join(chunk(kind, content) for kind, content in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + more + data + chunk(b"IEND", b"")


def lab_to_rgb(lightness, a, b):
    """CIE L*a*b* under D50 → sRGB in [0, 255]: Bradford's matrix to D65, and sRGB's own."""
    fy = (lightness + 16) / 116
    f = np.stack([fy + a / 500, fy, fy - b / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1.0, 0.8249)
    matrix = np.array(
        [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    )
    linear = (xyz @ matrix.T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


# --- the table: kind → (file, the pixels it must become)

GREY, DEEP, COLOUR, ALPHA = noise(), noise(high=65536, dtype=np.uint16), noise(3, seed=1), noise(seed=2)
PALETTE = Image.fromarray(COLOUR).quantize(16)
TABLE = np.array(PALETTE.getpalette(), dtype=float).reshape(-1, 3)
INDEX = np.asarray(PALETTE)
CMYK = noise(4, seed=3)
SMOOTH = np.stack(np.meshgrid(np.linspace(45, 80, WIDTH), np.linspace(-12, 12, HEIGHT)), axis=-1).round()
LAB = np.concatenate([SMOOTH[..., :1] * 255 / 100, SMOOTH[..., 1:], SMOOTH[..., 1:] / 2], axis=-1).round()


def rgb_like(mode, pixels):
    return Image.frombytes(mode, (WIDTH, HEIGHT), np.ascontiguousarray(pixels).tobytes())


PALETTE_ALPHA = np.array([0, 128, 255] + [255] * 13)
KINDS = {
    "RGB": lambda: (encoded(Image.fromarray(COLOUR)), COLOUR),
    "grey": lambda: (encoded(Image.fromarray(GREY)), rgb(GREY)),
    "palette": lambda: (encoded(PALETTE), TABLE[INDEX]),
    "RGB with alpha": lambda: (
        encoded(Image.fromarray(np.dstack([COLOUR, ALPHA]), "RGBA")), on_white(COLOUR, ALPHA),
    ),
    "grey with alpha": lambda: (encoded(rgb_like("LA", np.dstack([GREY, ALPHA]))), on_white(rgb(GREY), ALPHA)),
    "webp with alpha": lambda: (
        encoded(Image.fromarray(np.dstack([COLOUR, ALPHA]), "RGBA"), "WEBP", lossless=True, exact=True),
        on_white(COLOUR, ALPHA),
    ),
    "palette, one transparent entry": lambda: (
        encoded(PALETTE, transparency=3), np.where(INDEX[..., None] == 3, 255, TABLE[INDEX]),
    ),
    "palette, alphas": lambda: (
        encoded(PALETTE, transparency=bytes(PALETTE_ALPHA.tolist())), on_white(TABLE[INDEX], PALETTE_ALPHA[INDEX]),
    ),
    "gif, one transparent entry": lambda: (
        encoded(PALETTE, "GIF", transparency=3), np.where(INDEX[..., None] == 3, 255, TABLE[INDEX]),
    ),
    "colour key": lambda: (
        encoded(Image.fromarray(COLOUR), transparency=tuple(COLOUR[3, 5].tolist())),
        np.where((COLOUR[3, 5] == COLOUR).all(axis=2, keepdims=True), 255, COLOUR),
    ),
    "grey key": lambda: (
        encoded(Image.fromarray(GREY), transparency=int(GREY[3, 5])), rgb(np.where(GREY[3, 5] == GREY, 255, GREY)),
    ),
    "bilevel": lambda: (encoded(Image.fromarray(GREY > 99)), rgb((GREY > 99) * 255)),
    "bilevel key": lambda: (png([b"\x55"] * 2, 1, 0, (b"tRNS", b"\0\0")), np.full((2, 8, 3), 255)),
    "2-bit grey key": lambda: (png([b"\x1b"], 2, 0, (b"tRNS", b"\0\1")), rgb([[0, 255, 170, 255]])),
    "4-bit grey key": lambda: (png([b"\x0f\x73"], 4, 0, (b"tRNS", b"\0\7")), rgb([[0, 255, 255, 51]])),
    "16-bit grey": lambda: (encoded(Image.fromarray(DEEP)), rgb(DEEP / 257)),
    "16-bit grey tiff": lambda: (encoded(Image.fromarray(DEEP), "TIFF"), rgb(DEEP / 257)),
    "16-bit grey tiff, big-endian": lambda: (
        encoded(Image.frombytes("I;16B", (WIDTH, HEIGHT), DEEP.astype(">u2").tobytes()), "TIFF"), rgb(DEEP / 257),
    ),
    "16-bit grey pgm": lambda: (b"P5 24 16 65535\n" + DEEP.astype(">u2").tobytes(), rgb(DEEP / 257)),
    "16-bit grey with alpha": lambda: (
        png([b"".join(struct.pack(">HH", v, 40000) for v in (0, 30000, 65535))], 16, 4),
        on_white(rgb([[0, 30000 / 257, 255]]), [[40000 / 257] * 3]),
    ),
    "16-bit grey key": lambda: (
        png([struct.pack(">4H", 300, 301, 40000, 65535)], 16, 0, (b"tRNS", struct.pack(">H", 300))),
        rgb([[255, 301 / 257, 40000 / 257, 255]]),
    ),
    "16-bit RGB": lambda: (png([noise(3, high=65536, dtype=">u2")[0].tobytes()], 16, 2),
                           noise(3, high=65536, dtype=np.uint16)[:1] / 257),
    "16-bit RGB key": lambda: (
        png([struct.pack(">6H", 300, 400, 50000, 40000, 0, 0)], 16, 2, (b"tRNS", struct.pack(">3H", 300, 400, 50000))),
        [[[255, 255, 255], [40000 / 257, 0, 0]]],
    ),
    "32-bit integers of 8 bits": lambda: (encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), rgb(GREY)),
    "32-bit integers of 16 bits": lambda: (encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), rgb(DEEP / 257)),
    "32-bit integers below 0": lambda: (
        encoded(Image.fromarray(DEEP.astype(np.int32) - 32768), "TIFF"),
        rgb((DEEP - float(DEEP.min())) / float(np.ptp(DEEP)) * 255),
    ),
    "float up to 1": lambda: (encoded(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), rgb(GREY)),
    "float up to 255": lambda: (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), rgb(GREY)),
    "float up to 65535": lambda: (encoded(Image.fromarray(DEEP.astype(np.float32)), "TIFF"), rgb(DEEP / 257)),
    "float beyond": lambda: (
        encoded(Image.fromarray(DEEP.astype(np.float32) * 100 - 7), "TIFF"),
        rgb((DEEP - float(DEEP.min())) / float(np.ptp(DEEP)) * 255),
    ),
    "CMYK tiff": lambda: (
        encoded(rgb_like("CMYK", CMYK), "TIFF"), (255 - CMYK[..., :3].astype(float)) * (255 - CMYK[..., 3:]) / 255,
    ),
    "Lab tiff": lambda: (
        encoded(rgb_like("LAB", LAB.astype(np.int16).astype(np.uint8)), "TIFF"),
        lab_to_rgb(LAB[..., 0] * 100 / 255, LAB[..., 1], LAB[..., 2]),
    ),
    "animation": lambda: (
        encoded(Image.fromarray(COLOUR), save_all=True, append_images=[Image.fromarray(255 - COLOUR)]), COLOUR,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_right_pixels(kind):
    data, expected = KINDS[kind]()
    found = load_image(data)
    assert found.mode == "RGB"
    assert "transparency" not in found.info
    assert np.abs(np.asarray(found, dtype=float) - expected).max() <= 2


def test_jpegs_of_four_and_other_colours_look_like_the_picture():
    picture = Image.fromarray(np.asarray(Image.fromarray(COLOUR).resize((6, 4))).repeat(32, 0).repeat(32, 1))
    for mode in ("CMYK", "YCbCr", "RGB"):
        found = load_image(encoded(picture.convert(mode), "JPEG", quality=97, subsampling=0))
        assert np.abs(np.asarray(found, dtype=float) - np.asarray(picture)).mean() < 2, mode


def test_modes_without_a_file_format():
    hsv = Image.fromarray(COLOUR).convert("HSV")
    assert np.abs(np.asarray(to_rgb(hsv), dtype=float) - COLOUR).mean() < 3  # HSV has 8 bits as well
    multiplied = Image.fromarray(np.dstack([COLOUR, ALPHA]), "RGBA").convert("RGBa")
    assert np.abs(np.asarray(to_rgb(multiplied), dtype=float) - on_white(COLOUR, ALPHA)).max() <= 2


def test_a_cmyk_picture_is_seen_through_its_profile(monkeypatch):
    seen = []

    def through(image, profile, screen, outputMode):
        seen.append((profile, outputMode))
        return Image.new("RGB", image.size, (1, 2, 3))

    monkeypatch.setattr(ImageCms, "ImageCmsProfile", lambda file: file.read())
    monkeypatch.setattr(ImageCms, "profileToProfile", through)
    data = encoded(Image.new("CMYK", (8, 8)), "JPEG", icc_profile=b"of a printer")
    assert load_image(data).getpixel((0, 0)) == (1, 2, 3)
    assert seen == [(b"of a printer", "RGB")]


def test_a_damaged_profile_is_ignored():
    data = encoded(rgb_like("CMYK", CMYK), "TIFF", icc_profile=b"no profile at all")
    plain = encoded(rgb_like("CMYK", CMYK), "TIFF")
    assert np.array_equal(load_image(data), load_image(plain))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(width=32), min_size=1, max_size=12))
def test_any_floats_become_levels_in_their_order(values):
    levels = grey_to_8bit(np.array([values], dtype=np.float32))[0]
    finite = sorted((value, level) for value, level in zip(values, levels.tolist()) if np.isfinite(value))
    assert [level for _, level in finite] == sorted(level for _, level in finite)


# --- orientation

UPRIGHT = Image.fromarray(noise(3, seed=5))


def turned(orientation, format="PNG", **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(UPRIGHT, format, exif=exif, **options)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation, format):
    data = turned(orientation, format, **({"lossless": True} if format == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(load_image(data), expected)
    assert image_size(data) == expected.size == ((16, 24) if orientation > 4 else (24, 16))
    if format != "TIFF":  # which Pillow always turns
        assert load_image(data, turn=False).size == image_size(data, turn=False) == (24, 16)


def test_a_draft_covers_what_is_asked_for_after_turning():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(UPRIGHT.resize((640, 320)), "JPEG", exif=exif)
    asked = []
    drafted = load_image(data, shrink=lambda size: asked.append(size) or (80, 160))
    assert asked == [(320, 640)]
    assert drafted.size == (80, 160)


@pytest.mark.parametrize("orientation", [0, 9, 60000])
def test_nonsense_orientations_turn_nothing(orientation):
    assert load_image(turned(orientation)).size == (24, 16)


def test_damaged_exif_turns_nothing():
    data = turned(6, "JPEG").replace(b"Exif\0\0MM", b"Exif\0\0??")
    assert orientation_of(Image.open(io.BytesIO(data))) == 1
    assert load_image(data).size == (24, 16)


# --- texts of PNG files


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("megabytes", [3, 70])
def test_long_texts_are_left_out(zipped, megabytes):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * (megabytes << 20), zip=zipped)
    info.add_itxt("prompt", "y" * (megabytes << 20), zip=zipped)
    data = encoded(UPRIGHT, pnginfo=info, transparency=UPRIGHT.getpixel((0, 0)))
    assert load_image(data).getpixel((0, 0)) == (255, 255, 255)
    assert np.array_equal(np.asarray(load_image(data))[1:], np.asarray(UPRIGHT)[1:])


def test_long_profiles_are_kept(tmp_path):
    data = encoded(UPRIGHT, icc_profile=b"p" * (3 << 20))
    (tmp_path / "a.png").write_bytes(data)
    assert np.array_equal(load_image(tmp_path / "a.png"), UPRIGHT)
    assert without_texts(data)[1] == b"p" * (3 << 20)


def test_a_text_that_ends_nowhere():
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * (3 << 20), zip=True)
    data = encoded(UPRIGHT, pnginfo=info)
    with pytest.raises(ImageError, match="not a readable image"):
        load_image(data[:200])
