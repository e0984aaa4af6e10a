"""Requests of the page: checked against limits; previews during sampling, then finished files.

Independent of Gradio: `Studio.draw` and `Studio.redraw` are generators of `Shown`. They yield after every step, so that
whoever stops reading stops the run at its next step.
"""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from autoencoder.common.config import UserError, to_dict
from autoencoder.images.files import LATENT_PIXELS, load_image, to_pil
from autoencoder.images.saving import read_parameters, save_image
from svg_t2i.sampling.inputs import crop_image
from svg_t2i.sampling.options import changed
from svg_t2i.sampling.steps import decode_latents

if TYPE_CHECKING:
    from svg_t2i.pipeline import SVGT2IPipeline

GalleryItems = list[tuple[Any, str]]
MAX_SEED = 2**32 - 1
RANDOM = -1  # instead of a seed
KEEP_SECONDS = 24 * 60 * 60  # files of the page live for a day, and not longer than the page


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for; checked on the server, whatever the page sends."""

    prompt_characters: int = 2000
    side: int = 2048
    steps: int = 200
    images: int = 4
    guidance: float = 20.0
    upload_pixels: int = 50_000_000

    def text(self, name: str, value: Any) -> str:
        """`value` without blanks around it; None is the empty text. UserError for what is no text, or too long."""
        if not isinstance(value, str | None):
            raise UserError(f"{name} = {value!r} must be a text")
        if len(value or "") > self.prompt_characters:
            raise UserError(f"{name} has {len(value)} characters; at most {self.prompt_characters}")
        return (value or "").strip()

    def whole(self, name: str, value: Any, least: int, most: int) -> int:
        """`value` as a whole number. UserError for anything else, or out of range."""
        number = self.number(name, value, least, most, "whole numbers")
        if number != int(number):
            raise UserError(f"{name} = {value}: whole numbers from {least} to {most}")
        return int(number)

    def number(self, name: str, value: Any, least: float, most: float, kind: str = "numbers") -> float:
        """`value` as a number. UserError for anything else, or out of range."""
        if type(value) not in (int, float) or not least <= value <= most:  # NaN is in no range
            raise UserError(f"{name} = {value}: {kind} from {least} to {most}")
        return float(value)


@dataclass(frozen=True)
class Shown:
    """What the page shows from now on: a line of words, and gallery items, or None for those that are there."""

    status: str
    items: GalleryItems | None = None


class Stopped(Exception):
    """The visitor left or pressed Stop."""


class Studio:
    """A pipeline that serves one request at a time."""

    def __init__(
        self, pipeline: SVGT2IPipeline, limits: Limits | None = None, previews: int = 8, name: str = "a model of yours"
    ):
        """name: of the model, for visitors."""
        self.pipeline, self.limits, self.previews, self.name = pipeline, limits or Limits(), previews, name
        self.folder = Path(tempfile.mkdtemp(prefix="svg_t2i_app_"))
        self._delete = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)  # at exit, too
        self._busy = threading.Lock()

    def draw(
        self, prompt: str, negative_prompt: str, width: int, height: int, num_inference_steps: int,
        guidance_scale: float, seed: int, images: int, solver: str,
    ) -> Iterator[Shown]:  # fmt: skip
        """Text to image: previews, then the finished images with their parameters. UserError as `Limits`."""
        prompt = self.limits.text("the prompt", prompt)
        if not prompt:
            raise UserError("write a prompt first")
        settings = {
            "negative_prompt": self.limits.text("the negative prompt", negative_prompt),
            "width": self.limits.whole("width", width, LATENT_PIXELS, self.limits.side),
            "height": self.limits.whole("height", height, LATENT_PIXELS, self.limits.side),
            **self._steps_and_guidance(num_inference_steps, guidance_scale),
            "solver": solver or self.pipeline.options.solver,
        }
        changed(self.pipeline.options, settings)
        shared = {**self._images_and_seed(images, seed), **settings}

        def run(callback: Callable) -> Any:
            return self.pipeline(prompt, callback_on_step_end=callback, **shared)

        yield from self._serve(run, {"prompt": prompt, **shared})

    def redraw(
        self, image: str | Path | None, prompt: str, strength: float, num_inference_steps: int,
        guidance_scale: float, seed: int, images: int,
    ) -> Iterator[Shown]:  # fmt: skip
        """Image to image, at the pipeline's own size and in the shape of the image file. UserError as `Limits`."""
        if not image:
            raise UserError("choose an image first")
        prompt = self.limits.text("the prompt", prompt)
        strength = self.limits.number("strength", strength, 0, 1)
        settings = self._steps_and_guidance(num_inference_steps, guidance_scale)
        changed(self.pipeline.options, settings)
        shared = {"strength": strength, **self._images_and_seed(images, seed), **settings}
        uploaded = load_image(image, self.limits.upload_pixels, name="the image")
        width, height = fitting_size(uploaded.size, self.pipeline.options.height * self.pipeline.options.width)
        self.limits.whole("width", width, LATENT_PIXELS, self.limits.side)
        self.limits.whole("height", height, LATENT_PIXELS, self.limits.side)
        fitting = crop_image(uploaded, height, width)

        def run(callback: Callable) -> Any:
            return self.pipeline.image_to_image(prompt, fitting, callback_on_step_end=callback, **shared)

        yield from self._serve(run, {"prompt": prompt, "width": width, "height": height, **shared})

    def _steps_and_guidance(self, steps: Any, scale: Any) -> dict[str, Any]:
        return {
            "num_inference_steps": self.limits.whole("steps", steps, 1, self.limits.steps),
            "guidance_scale": self.limits.number("guidance", scale, 0, self.limits.guidance),
        }

    def _images_and_seed(self, images: Any, seed: Any) -> dict[str, Any]:
        """Without a seed, or with -1, a random one."""
        return {
            "num_images_per_prompt": self.limits.whole("images", images, 1, self.limits.images),
            "seed": random_seed() if seed in (None, RANDOM) else self.limits.whole("seed", seed, 0, MAX_SEED),
        }

    def _serve(self, run: Callable[[Callable], Any], parameters: dict[str, Any]) -> Iterator[Shown]:
        """Run in a thread, hand steps and previews out as they come; a visitor who leaves stops it at its next step."""
        shown: queue.Queue[Any] = queue.Queue()
        stop = threading.Event()

        def work() -> None:
            with self._busy:
                try:
                    if not stop.is_set():
                        shown.put(run(self._step_callback(shown, stop, parameters)))
                except BaseException as error:  # handed over to the visitor's thread, which raises it
                    shown.put(error)

        item: Any = Shown("waiting for another visitor's pictures" if self._busy.locked() else "reading the prompt")
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while isinstance(item, Shown):
                yield item
                item = shown.get()
        finally:
            stop.set()
            worker.join()
        if isinstance(item, BaseException):
            raise item
        finished = self._finished(item.images, parameters)
        yield Shown(f"{len(finished)} finished; seed {parameters['seed']}", finished)

    def _step_callback(self, shown: queue.Queue, stop: threading.Event, parameters: dict[str, Any]) -> Callable:
        """Says after each step how long it takes, and shows every few steps where the images are heading.

        That is x + (1 − t)·dx/dt, with dx/dt from the last two steps.
        """
        steps = parameters["num_inference_steps"]
        every = max(1, steps // max(1, self.previews))
        begin, last = time.monotonic(), {}

        def on_step(pipeline: SVGT2IPipeline, step: int, t: float, kwargs: dict[str, Any]) -> None:
            if stop.is_set():
                raise Stopped
            x: Tensor = kwargs["latents"]
            if step == 0:  # an adaptive solver makes one image after the other
                last.clear()
            left = max(0, steps - step - 1) * (time.monotonic() - begin) / (step + 1)
            status, items = f"step {step + 1} of {steps}, {left:.0f} s left", None
            if self.previews and last and step % every == 0 and t < 1:
                heading = x + (1 - t) * (x - last["x"]) / (t - last["t"])
                decoded = decode_latents(pipeline.networks, list(heading))
                items = [(to_pil(image), f"step {step + 1}") for image in decoded]
            last.update(x=x, t=t)
            shown.put(Shown(status, items))

        return on_step

    def _finished(self, images: list[Image.Image], parameters: dict[str, Any]) -> GalleryItems:
        """Save each image with its parameters inside, and its seed as caption. Files of long ago are deleted."""
        for path in self.folder.glob("*.png"):
            if time.time() - path.stat().st_mtime > KEEP_SECONDS:
                path.unlink(missing_ok=True)
        common = {name: value for name, value in parameters.items() if name not in ("num_images_per_prompt", "seed")}
        shown = to_dict(self.pipeline.options) | common
        result = []
        for i, image in enumerate(images):
            own = {**shown, "seed": parameters["seed"] + i}
            path = self.folder / f"{time.time_ns()}_{own['seed']}.png"
            save_image(image, path, own)
            result.append((str(path), f"seed {own['seed']}"))
        return result


def fitting_size(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """(width, height) in multiples of 16 with about `pixels` pixels in the shape of an image of `size`."""
    scale = (pixels / (size[0] * size[1])) ** 0.5
    width, height = (max(16, round(side * scale / 16) * 16) for side in size)
    return width, height


def parameters_of(path: str | Path) -> dict[str, Any]:
    """What a finished image says about itself. UserError if it was deleted since."""
    if not Path(path).is_file():
        raise UserError("this image was deleted, since it is old; draw it again")
    return read_parameters(Path(path))


def random_seed() -> int:
    """A seed that the global generators neither give nor notice."""
    return int(torch.randint(MAX_SEED, (), generator=torch.Generator().manual_seed(time.time_ns() % 2**63)))
