"""Requests of the page: checked against limits; previews during sampling, then finished files.

Independent of Gradio: `Studio.draw` and `Studio.redraw` are generators of gallery items, (image or file, caption).
"""

from __future__ import annotations

import json
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from autoencoder.common.config import UserError, to_dict
from autoencoder.images.files import save_png, to_pil
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.sampling.from_images import crop_image
from svg_t2i.sampling.options import changed
from svg_t2i.sampling.steps import decode_latents

GalleryItems = list[tuple[Any, str]]
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for; checked on the server, whatever the page sends."""

    prompt_characters: int = 2000
    side: int = 2048
    steps: int = 200
    images: int = 4

    def check(self, *, prompts: tuple[str, ...], width: int, height: int, steps: int, images: int, seed: int) -> None:
        """UserError naming the first value out of its range."""
        for prompt in prompts:
            if len(prompt) > self.prompt_characters:
                raise UserError(f"a prompt of {len(prompt)} characters; at most {self.prompt_characters}")
        ranges = {
            "width": (width, 16, self.side),
            "height": (height, 16, self.side),
            "steps": (steps, 1, self.steps),
            "images": (images, 1, self.images),
            "seed": (seed, 0, MAX_SEED),
        }
        for name, (value, least, most) in ranges.items():
            if not isinstance(value, (int, float)) or value != int(value) or not least <= value <= most:
                raise UserError(f"{name} = {value}: whole numbers from {least} to {most}")


class Stopped(Exception):
    """The visitor left or pressed Stop."""


class Studio:
    """A pipeline that serves one request at a time."""

    def __init__(self, pipeline: SVGT2IPipeline, limits: Limits | None = None, previews: int = 8):
        self.pipeline, self.limits, self.previews = pipeline, limits or Limits(), previews
        self.folder = Path(tempfile.mkdtemp(prefix="svg_t2i_app_"))
        self._busy = threading.Lock()

    def draw(
        self, prompt: str, negative_prompt: str, width: int, height: int, num_inference_steps: int,
        guidance_scale: float, seed: int, images: int, solver: str,
    ) -> Iterator[GalleryItems]:  # fmt: skip
        """Text to image: previews, then the finished images with their parameters."""
        if not prompt.strip():
            raise UserError("write a prompt first")
        self.limits.check(
            prompts=(prompt, negative_prompt), width=width, height=height, steps=num_inference_steps, images=images,
            seed=seed,
        )  # fmt: skip
        settings = {
            "negative_prompt": negative_prompt.strip(),
            "width": int(width),
            "height": int(height),
            "num_inference_steps": int(num_inference_steps),
            "guidance_scale": float(guidance_scale),
            "solver": solver,
        }
        changed(self.pipeline.options, settings)
        shared = {"num_images_per_prompt": int(images), "seed": int(seed), **settings}

        def run(callback: Callable) -> Any:
            return self.pipeline(prompt.strip(), callback_on_step_end=callback, **shared)

        yield from self._serve(run, {"prompt": prompt.strip(), **shared})

    def redraw(
        self, image: Image.Image | None, prompt: str, strength: float, num_inference_steps: int,
        guidance_scale: float, seed: int, images: int,
    ) -> Iterator[GalleryItems]:  # fmt: skip
        """Image to image, at the pipeline's own size and in the image's shape."""
        if image is None:
            raise UserError("choose an image first")
        width, height = fitting_size(image.size, self.pipeline.options.height * self.pipeline.options.width)
        self.limits.check(
            prompts=(prompt,), width=width, height=height, steps=num_inference_steps, images=images, seed=seed
        )
        fitting = crop_image(image, height, width)
        settings = {"num_inference_steps": int(num_inference_steps), "guidance_scale": float(guidance_scale)}
        changed(self.pipeline.options, settings)
        shared = {"strength": float(strength), "num_images_per_prompt": int(images), "seed": int(seed), **settings}

        def run(callback: Callable) -> Any:
            return self.pipeline.image_to_image(prompt.strip(), fitting, callback_on_step_end=callback, **shared)

        yield from self._serve(run, {"prompt": prompt.strip(), "width": width, "height": height, **shared})

    def _serve(self, run: Callable[[Callable], Any], parameters: dict[str, Any]) -> Iterator[GalleryItems]:
        """Run in a thread, hand previews out as they come; a visitor who leaves stops the run at its next step."""
        items: queue.Queue[Any] = queue.Queue()
        stop = threading.Event()

        def work() -> None:
            with self._busy:
                try:
                    items.put(run(self._preview_callback(items, stop, parameters["num_inference_steps"])))
                except BaseException as error:  # handed over to the visitor's thread, which raises it
                    items.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while isinstance(item := items.get(), list):
                yield item
        finally:
            stop.set()
            worker.join()
        if isinstance(item, BaseException):
            raise item
        yield self._finished(item.images, parameters)

    def _preview_callback(self, items: queue.Queue, stop: threading.Event, steps: int) -> Callable:
        """Every few steps, decode where the images are heading: x + (1 − t)·dx/dt, dx/dt from the last two steps."""
        every = max(1, steps // max(1, self.previews))
        last: dict[str, Any] = {}

        def on_step(pipeline: SVGT2IPipeline, step: int, t: float, kwargs: dict[str, Any]) -> None:
            if stop.is_set():
                raise Stopped
            x: Tensor = kwargs["latents"]
            if step == 0:  # an adaptive solver makes one image after the other
                last.clear()
            if self.previews and last and step % every == 0 and t < 1:
                heading = x + (1 - t) * (x - last["x"]) / (t - last["t"])
                decoded = decode_latents(pipeline.networks, list(heading), pipeline.decode_pixels)
                items.put([(to_pil(image), f"step {step + 1}") for image in decoded])
            last.update(x=x, t=t)

        return on_step

    def _finished(self, images: list[Image.Image], parameters: dict[str, Any]) -> GalleryItems:
        """Save each image with its parameters inside, and show them as its caption."""
        common = {name: value for name, value in parameters.items() if name not in ("num_images_per_prompt", "seed")}
        shown = to_dict(self.pipeline.options) | common
        result = []
        for i, image in enumerate(images):
            own = {**shown, "seed": parameters["seed"] + i}
            path = self.folder / f"{time.time_ns()}_{own['seed']}.png"
            save_png(image, path, {"parameters": json.dumps(own, ensure_ascii=False)})
            result.append((str(path), f"seed {own['seed']}"))
        return result


def fitting_size(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """(width, height) in multiples of 16 with about `pixels` pixels in the shape of an image of `size`."""
    scale = (pixels / (size[0] * size[1])) ** 0.5
    width, height = (max(16, round(side * scale / 16) * 16) for side in size)
    return width, height


def parameters_of(path: str | Path) -> dict[str, Any]:
    """What a finished image says about itself."""
    with Image.open(path) as image:
        return json.loads(image.text["parameters"])


def random_seed() -> int:
    """A seed that the global generators neither give nor notice."""
    return int(torch.randint(MAX_SEED, (), generator=torch.Generator().manual_seed(time.time_ns() % 2**63)))
