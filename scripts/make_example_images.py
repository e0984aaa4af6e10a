"""Draw the example images and their manifest: `python scripts/make_example_images.py [--output configs]`.

Eight small scenes (a few kB each) of several shapes, written as OUTPUT/example_images/*.png and OUTPUT/example.jsonl.
They let every command of the README run without a download; nobody should expect a model to learn from them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

SMOOTHING = 4  # everything is drawn this much larger and scaled down

Colour = tuple[int, int, int]


class Canvas:
    """Drawing in fractions of the picture: (0, 0) is top left, (1, 1) bottom right; radii are in heights."""

    def __init__(self, width: int, height: int, top: Colour, bottom: Colour):
        self.size = width, height
        self.large = width * SMOOTHING, height * SMOOTHING
        column = Image.new("RGB", (1, height))
        for y in range(height):
            mix = y / (height - 1)
            column.putpixel((0, y), tuple(round(a + (b - a) * mix) for a, b in zip(top, bottom)))
        self.image = column.resize(self.large, Image.Resampling.NEAREST)
        self.draw = ImageDraw.Draw(self.image)

    def polygon(self, colour: Colour, *points: tuple[float, float]) -> None:
        self.draw.polygon([(x * self.large[0], y * self.large[1]) for x, y in points], colour)

    def box(self, colour: Colour, left: float, top: float, right: float, bottom: float) -> None:
        self.polygon(colour, (left, top), (right, top), (right, bottom), (left, bottom))

    def disc(self, colour: Colour, x: float, y: float, radius: float, stretch: float = 1.0) -> None:
        centre_x, centre_y, ry = x * self.large[0], y * self.large[1], radius * self.large[1]
        rx = ry * stretch
        self.draw.ellipse((centre_x - rx, centre_y - ry, centre_x + rx, centre_y + ry), colour)

    def finish(self) -> Image.Image:
        return self.image.resize(self.size, Image.Resampling.BOX)


def sunset() -> Canvas:
    c = Canvas(256, 256, (70, 60, 140), (255, 170, 90))
    c.disc((255, 225, 120), 0.5, 0.6, 0.15)
    c.box((40, 60, 110), 0, 0.62, 1, 1)
    for i in range(5):
        c.box((250, 190, 110), 0.42 - 0.02 * i, 0.66 + 0.06 * i, 0.58 + 0.02 * i, 0.675 + 0.06 * i)
    return c


def house() -> Canvas:
    c = Canvas(320, 256, (120, 190, 240), (215, 235, 250))
    c.disc((255, 255, 255), 0.2, 0.2, 0.07, stretch=2.2)
    c.disc((90, 165, 70), 0.5, 1.35, 0.65, stretch=2.0)
    c.box((205, 60, 50), 0.36, 0.47, 0.64, 0.78)
    c.polygon((95, 50, 40), (0.32, 0.48), (0.5, 0.26), (0.68, 0.48))
    c.box((80, 45, 30), 0.46, 0.6, 0.54, 0.78)
    c.box((250, 235, 150), 0.39, 0.54, 0.44, 0.62)
    c.box((250, 235, 150), 0.56, 0.54, 0.61, 0.62)
    return c


def boat() -> Canvas:
    c = Canvas(256, 320, (150, 205, 245), (225, 240, 250))
    c.box((30, 110, 170), 0, 0.7, 1, 1)
    c.polygon((120, 70, 40), (0.2, 0.68), (0.8, 0.68), (0.7, 0.77), (0.3, 0.77))
    c.box((80, 50, 30), 0.49, 0.18, 0.51, 0.68)
    c.polygon((255, 255, 255), (0.53, 0.2), (0.53, 0.64), (0.8, 0.64))
    c.polygon((235, 80, 60), (0.47, 0.28), (0.47, 0.64), (0.26, 0.64))
    return c


def night() -> Canvas:
    c = Canvas(256, 256, (8, 10, 40), (35, 40, 90))
    rng = random.Random(7)
    for _ in range(40):
        c.disc((240, 240, 255), rng.random(), rng.random() * 0.75, rng.uniform(0.003, 0.008))
    c.disc((245, 240, 205), 0.7, 0.27, 0.13)
    c.disc((14, 16, 48), 0.645, 0.245, 0.12)
    c.polygon((15, 20, 30), (0, 1), (0, 0.85), (0.3, 0.62), (0.55, 0.86), (0.8, 0.7), (1, 0.84), (1, 1))
    return c


def desert() -> Canvas:
    c = Canvas(320, 192, (110, 180, 230), (250, 225, 180))
    c.disc((235, 195, 120), 0.25, 1.3, 0.65, stretch=2.2)
    c.disc((220, 175, 100), 0.8, 1.35, 0.65, stretch=2.2)
    green = (50, 120, 60)
    for box in ((0.47, 0.3, 0.53, 0.88), (0.36, 0.5, 0.49, 0.57), (0.36, 0.38, 0.4, 0.57), (0.51, 0.6, 0.64, 0.67)):
        c.box(green, *box)
    c.box(green, 0.6, 0.44, 0.64, 0.67)
    c.disc(green, 0.5, 0.3, 0.05)
    return c


def balloon() -> Canvas:
    c = Canvas(256, 384, (90, 160, 235), (205, 230, 250))
    for x, y in ((0.2, 0.2), (0.8, 0.45), (0.25, 0.8)):
        c.disc((255, 255, 255), x, y, 0.035, stretch=2.5)
    for colour, stretch in (((230, 60, 60), 0.85), ((250, 200, 60), 0.5), ((60, 110, 210), 0.18)):
        c.disc(colour, 0.5, 0.37, 0.2, stretch)
    c.polygon((90, 60, 40), (0.4, 0.53), (0.41, 0.53), (0.46, 0.66), (0.45, 0.66))
    c.polygon((90, 60, 40), (0.59, 0.53), (0.6, 0.53), (0.55, 0.66), (0.54, 0.66))
    c.box((150, 100, 50), 0.44, 0.65, 0.56, 0.71)
    return c


def winter() -> Canvas:
    c = Canvas(256, 256, (170, 195, 220), (235, 240, 248))
    c.disc((250, 252, 255), 0.5, 1.5, 0.75, stretch=1.8)
    c.box((95, 65, 45), 0.47, 0.72, 0.53, 0.86)
    for top, bottom, half in ((0.42, 0.74, 0.24), (0.28, 0.56, 0.18), (0.16, 0.38, 0.12)):
        c.polygon((35, 95, 65), (0.5, top), (0.5 - half, bottom), (0.5 + half, bottom))
    c.polygon((245, 248, 252), (0.5, 0.16), (0.46, 0.23), (0.54, 0.23))
    return c


def lighthouse() -> Canvas:
    c = Canvas(192, 320, (60, 80, 130), (230, 160, 140))
    c.polygon((255, 235, 170), (0.5, 0.26), (0, 0.12), (0, 0.34))
    c.polygon((70, 65, 70), (0, 1), (0.1, 0.82), (0.9, 0.8), (1, 1))
    for i in range(5):
        top, bottom = 0.32 + 0.1 * i, 0.42 + 0.1 * i
        half_top, half_bottom = 0.12 + 0.02 * i, 0.14 + 0.02 * i
        colour = (215, 50, 50) if i % 2 else (245, 245, 245)
        c.polygon(
            colour,
            (0.5 - half_top, top),
            (0.5 + half_top, top),
            (0.5 + half_bottom, bottom),
            (0.5 - half_bottom, bottom),
        )
    c.box((255, 235, 120), 0.41, 0.22, 0.59, 0.32)
    c.polygon((60, 40, 50), (0.36, 0.22), (0.5, 0.14), (0.64, 0.22))
    return c


SCENES: dict[Callable[[], Canvas], str | list[str]] = {
    sunset: "the sun goes down behind a calm sea, its light drawn on the water",
    house: "a red house with a brown roof on a green hill under a blue sky",
    boat: "a wooden boat with a white and a red sail on blue water",
    night: ["a crescent moon and stars over dark mountains", "a clear night in the mountains"],
    desert: "a green cactus between yellow dunes",
    balloon: ["a hot-air balloon with red, yellow and blue stripes", "a balloon between small white clouds"],
    winter: "a single fir tree on a field of snow",
    lighthouse: "a red and white lighthouse on a rock sends its light over the sea at dusk",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent / "configs")
    folder = parser.parse_args().output
    (folder / "example_images").mkdir(parents=True, exist_ok=True)
    lines = []
    for scene, caption in SCENES.items():
        name = f"example_images/{scene.__name__}.png"
        scene().finish().save(folder / name, optimize=True)
        lines.append(json.dumps({"path": name, "prompt": caption}) + "\n")
    (folder / "example.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
