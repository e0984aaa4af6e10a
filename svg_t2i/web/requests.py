"""Requests of the page: checked against limits; previews during sampling, then finished files.

Independent of Gradio: the requests of a `Studio` (`draw`, `redraw`, `inpaint`, `vary`, `interpolate`) are generators of
`Shown`. They yield after every step, so that whoever stops reading stops the run at its next step.
"""

from __future__ import annotations

import queue
import re
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageChops
from torch import Tensor

from autoencoder.common.config import UserError, to_dict
from autoencoder.images.files import LATENT_PIXELS, load_image, to_pil
from autoencoder.images.saving import read_parameters, save_image
from svg_t2i.loading.adapters import AdapterShelf
from svg_t2i.sampling.inputs import crop_image
from svg_t2i.sampling.options import changed
from svg_t2i.sampling.steps import decode_latents
from svg_t2i.web.limits import Limits

if TYPE_CHECKING:
    from svg_t2i.pipeline import SVGT2IPipeline

GalleryItems = list[tuple[Any, str]]
MAX_SEED = 2**32 - 1
RANDOM = -1  # instead of a seed
MAX_LIKENESS = 0.95  # of a variation; an image itself would be 1
MAX_WAY = 9  # images between two prompts
MAX_WEIGHT = 4.0  # of an adapter
FILE_NAME = re.compile(r"[0-9a-f]{32}\.png")
KEEP_SECONDS = 24 * 60 * 60  # files of the page live for a day, and not longer than the page


@dataclass(frozen=True)
class Shown:
    """What the page shows from now on: a line of words, and gallery items, or None for those that are there.

    done: share of the steps, or None before and after them.
    """

    status: str
    items: GalleryItems | None = None
    done: float | None = None


class Stopped(Exception):
    """The visitor left or pressed Stop."""


class Studio:
    """A pipeline that serves one request at a time.

    Attributes:
        adapters: those that a request may name.
        examples: prompts to begin with.
    """

    def __init__(
        self,
        pipeline: SVGT2IPipeline,
        limits: Limits | None = None,
        previews: int = 8,
        name: str = "a model of yours",
        licence: str | None = None,
        adapters: AdapterShelf | None = None,
        examples: Sequence[str] = (),
    ):
        """name, licence: of the model, for visitors."""
        self.pipeline, self.limits, self.previews = pipeline, limits or Limits(), previews
        self.name, self.licence, self.examples = name, licence, tuple(examples)
        self.adapters = adapters or AdapterShelf()
        self.folder = Path(tempfile.mkdtemp(prefix="svg_t2i_app_"))
        self._delete = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)  # at exit, too
        self._busy = threading.Lock()

    def draw(
        self, prompt: str, negative_prompt: str, width: int, height: int, num_inference_steps: int,
        guidance_scale: float, seed: int, images: int, solver: str, adapter: str | None = None,
        adapter_weight: float = 1.0,
    ) -> Iterator[Shown]:  # fmt: skip
        """Text to image: previews, then the finished images with their parameters. UserError as `Limits`."""
        prompt = self._prompt(prompt)
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

        yield from self._serve(run, {"prompt": prompt, **shared}, (adapter, adapter_weight))

    def redraw(
        self, image: str | Path | None, prompt: str, strength: float, num_inference_steps: int,
        guidance_scale: float, seed: int, images: int, adapter: str | None = None, adapter_weight: float = 1.0,
    ) -> Iterator[Shown]:  # fmt: skip
        """Image to image, at the pipeline's own size and in the shape of the image file. UserError as `Limits`."""
        require_image(image)
        prompt = self.limits.text("the prompt", prompt)
        shared = {
            "strength": self.limits.number("strength", strength, 0, 1),
            **self._images_and_seed(images, seed),
            **self._steps_and_guidance(num_inference_steps, guidance_scale),
        }
        fitting = self._fitting(image)

        def run(callback: Callable) -> Any:
            return self.pipeline.image_to_image(prompt, fitting, callback_on_step_end=callback, **shared)

        yield from self._serve(run, {"prompt": prompt, **_size(fitting), **shared}, (adapter, adapter_weight))

    def inpaint(
        self, drawing: dict[str, Any] | None, prompt: str, strength: float, num_inference_steps: int,
        guidance_scale: float, seed: int, images: int, adapter: str | None = None, adapter_weight: float = 1.0,
    ) -> Iterator[Shown]:  # fmt: skip
        """Repaint what was painted over: drawing = {"background": file, "layers": [file, …]}. UserError as `Limits`.

        A layer counts where it is not transparent; one without transparency, where it is white.
        """
        drawing = drawing if isinstance(drawing, dict) else {}
        require_image(drawing.get("background"))
        prompt = self._prompt(prompt)
        shared = {
            "strength": self.limits.number("strength", strength, 0, 1),
            **self._images_and_seed(images, seed),
            **self._steps_and_guidance(num_inference_steps, guidance_scale),
        }
        fitting = self._fitting(drawing.get("background"))
        mask = self._painted(drawing.get("layers") or [], fitting.size)

        def run(callback: Callable) -> Any:
            return self.pipeline.inpaint(prompt, fitting, mask, callback_on_step_end=callback, **shared)

        yield from self._serve(run, {"prompt": prompt, **_size(fitting), **shared}, (adapter, adapter_weight))

    def vary(
        self, image: str | Path | None, likeness: float, num_inference_steps: int, seed: int, images: int,
        adapter: str | None = None, adapter_weight: float = 1.0,
    ) -> Iterator[Shown]:  # fmt: skip
        """Images like a given one; likeness: the time t in [0, 0.95] to which it is noised. UserError as `Limits`."""
        require_image(image)
        shared = {
            "t": self.limits.number("likeness", likeness, 0, MAX_LIKENESS),
            **self._images_and_seed(images, seed),
            "num_inference_steps": self.limits.whole("steps", num_inference_steps, 1, self.limits.steps),
        }
        fitting = self._fitting(image)

        def run(callback: Callable) -> Any:
            return self.pipeline.variation(fitting, callback_on_step_end=callback, **shared)

        yield from self._serve(run, {"prompt": "", **_size(fitting), **shared}, (adapter, adapter_weight))

    def interpolate(
        self, prompt: str, second_prompt: str, num_inference_steps: int, guidance_scale: float, seed: int,
        images: int, adapter: str | None = None, adapter_weight: float = 1.0,
    ) -> Iterator[Shown]:  # fmt: skip
        """`images` steps on the way from one prompt to another, from one noise. UserError as `Limits`."""
        ends = [self._prompt(prompt), self._prompt(second_prompt)]
        images = self.limits.whole("images", images, 2, MAX_WAY)
        seed = self._images_and_seed(1, seed)["seed"]
        shared = {"seed": seed, **self._steps_and_guidance(num_inference_steps, guidance_scale)}

        def run(callback: Callable) -> Any:
            return self.pipeline.interpolate(ends, weights=images, callback_on_step_end=callback, **shared)

        parameters = {"prompt": ends[0], "second_prompt": ends[1], **shared}
        own = [{"weight": i / (images - 1), "seed": seed} for i in range(images)]
        yield from self._serve(run, parameters, (adapter, adapter_weight), own)

    def kept(self, names: Any) -> list[str]:
        """The finished images of these names that are still there, as paths; whatever else a browser sends is left."""
        known = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        paths = [self.folder / name for name in known if FILE_NAME.fullmatch(name)]
        return [str(path) for path in paths if path.is_file()]

    def _prompt(self, value: Any) -> str:
        prompt = self.limits.text("the prompt", value)
        if not prompt:
            raise UserError("write a prompt first")
        return prompt

    def _fitting(self, image: Any) -> Image.Image:
        """An uploaded image, cropped to its own shape at about the pipeline's number of pixels."""
        uploaded = load_image(image, self.limits.upload_pixels, name="the image")
        options = self.pipeline.options
        width, height = fitting_size(uploaded.size, options.height * options.width)
        self.limits.whole("width", width, LATENT_PIXELS, self.limits.side)
        self.limits.whole("height", height, LATENT_PIXELS, self.limits.side)
        return crop_image(uploaded, height, width)

    def _painted(self, layers: list[Any], size: tuple[int, int]) -> Image.Image:
        """Where any layer is painted on: white on black, of `size`."""
        mask = Image.new("L", size)
        for layer in layers:
            opaque = opaque_part(layer, self.limits.upload_pixels)
            mask = ImageChops.lighter(mask, crop_image(opaque, size[1], size[0]).convert("L"))
        if mask.getbbox() is None:
            raise UserError("paint over the part of the image that is to change")
        return mask

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

    def _serve(
        self,
        run: Callable[[Callable], Any],
        parameters: dict[str, Any],
        adapter: tuple[str | None, float],
        own: Sequence[dict[str, Any]] | None = None,
    ) -> Iterator[Shown]:
        """Run in a thread, hand steps and previews out as they come; a visitor who leaves stops it at its next step.

        adapter: name and weight. own: what parameters each image has for itself; its seed by default.
        """
        name, weight = adapter
        if name:
            self.adapters.check(name)
            weight = self.limits.number("the adapter's weight", weight, -MAX_WEIGHT, MAX_WEIGHT)
            parameters = {**parameters, "adapter": name, "adapter_weight": weight}
        shown: queue.Queue[Any] = queue.Queue()
        stop = threading.Event()

        def work() -> None:
            with self._busy:
                try:
                    if not stop.is_set():
                        self.adapters.put_on(self.pipeline, name or None, weight)
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
        own = own or [{"seed": parameters["seed"] + i} for i in range(len(item.images))]
        finished = self._finished(item.images, parameters, own)
        yield Shown(f"{len(finished)} finished; seed {parameters['seed']}", finished)

    def _step_callback(self, shown: queue.Queue, stop: threading.Event, parameters: dict[str, Any]) -> Callable:
        """Says after each step how long it takes, and shows every few steps where the images are heading.

        That is x + (1 − t)·dx/dt, with dx/dt from the last two steps.
        """
        steps = parameters["num_inference_steps"]
        every = max(1, steps // max(1, self.previews))
        begin, last = time.monotonic(), {}

        def on_step(pipeline: SVGT2IPipeline, step: int, t: float, kwargs: dict[str, Any]) -> None:
            """Tell the page how far it is, with a preview now and then; Stopped where nobody waits any more."""
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
            shown.put(Shown(status, items, min(1.0, (step + 1) / steps)))

        return on_step

    def _finished(
        self, images: list[Image.Image], parameters: dict[str, Any], own: Sequence[dict[str, Any]]
    ) -> GalleryItems:
        """Save each image with its parameters inside, and its seed as caption. Files of long ago are deleted."""
        for path in self.folder.glob("*.png"):
            if time.time() - path.stat().st_mtime > KEEP_SECONDS:
                path.unlink(missing_ok=True)
        common = {name: value for name, value in parameters.items() if name not in ("num_images_per_prompt", "seed")}
        shown = to_dict(self.pipeline.options) | common
        result = []
        for image, extra in zip(images, own, strict=True):
            path = self.folder / f"{secrets.token_hex(16)}.png"  # whoever does not know the name does not see it
            save_image(image, path, {**shown, **extra})
            weight = f", {extra['weight']:.0%}" if "weight" in extra else ""
            result.append((str(path), f"seed {extra['seed']}{weight}"))
        return result


def require_image(image: Any) -> None:
    """UserError where no image was chosen."""
    if not image:
        raise UserError("choose an image first")


def opaque_part(layer: Any, max_pixels: int) -> Image.Image:
    """Of an image file the opacity, or where it has none, the image itself; in grey. UserError for no image."""
    load_image(layer, max_pixels, name="the painted part")  # says what is wrong with it
    with Image.open(layer) as image:
        return (image.getchannel("A") if image.mode in ("RGBA", "LA") else image.convert("L")).copy()


def _size(image: Image.Image) -> dict[str, int]:
    return {"width": image.width, "height": image.height}


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
