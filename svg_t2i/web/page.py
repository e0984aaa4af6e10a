"""The page, built with Gradio: two tabs, the pictures that a request gives, and starting it all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData

from autoencoder.common.config import UserError
from svg_t2i.flow.solvers import SOLVERS
from svg_t2i.web.requests import (
    KEEP_SECONDS,
    RANDOM,
    Limits,
    Shown,
    Stopped,
    Studio,
    fitting_size,
    parameters_of,
)

MAX_UPLOAD = "20mb"
SHAPES = {"1:1": (1, 1), "3:2": (3, 2), "2:3": (2, 3), "4:3": (4, 3), "3:4": (3, 4), "16:9": (16, 9), "9:16": (9, 16)}
RESTORED = (
    "prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "seed", "solver",
)  # fmt: skip
FONTS = ("system-ui", "sans-serif")


def build_page(studio: Studio) -> Any:
    """The Gradio page of a studio: two tabs, text to image and image to image, that share no state."""
    with gr.Blocks(title="SVG-T2I", analytics_enabled=False, delete_cache=(3600, KEEP_SECONDS)) as page:
        gr.Markdown(f"# SVG-T2I\nImages from text, made of the features of a vision foundation model: {studio.name}")
        with gr.Tab("Text to image"):
            _text_tab(studio)
        with gr.Tab("Image to image"):
            _image_tab(studio)
    return page


def _text_tab(studio: Studio) -> None:
    limits, defaults = studio.limits, studio.pipeline.options
    with gr.Row():
        with gr.Column(scale=3):
            prompt = _prompt(limits, "prompt")
            go, stop = _buttons("draw", "Draw")
            negative = gr.Textbox(label="Negative prompt", max_length=limits.prompt_characters, elem_id="negative")
            with gr.Row():
                width = gr.Slider(16, limits.side, defaults.width, step=16, label="Width")
                height = gr.Slider(16, limits.side, defaults.height, step=16, label="Height")
            with gr.Row():
                shape = gr.Dropdown(list(SHAPES), value=None, label="Shape", elem_id="shape")
                swap = gr.Button("Swap width and height", size="sm", elem_id="swap")
            steps, scale = _steps_and_guidance(studio)
            with gr.Row():
                seed, images = _seed_and_count(limits)
                solver = gr.Dropdown(list(SOLVERS), value=defaults.solver, label="Solver")
            settings = [prompt, negative, width, height, steps, scale, seed, solver]
            _restoring(settings)
        pixels = defaults.width * defaults.height
        private = {"queue": False, "api_visibility": "private"}
        shape.input(lambda name: fitting_size(SHAPES[name], pixels), shape, [width, height], **private)
        swap.click(lambda *sides: sides[::-1], [width, height], [width, height], **private)
        inputs = [prompt, negative, width, height, steps, scale, seed, images, solver]
        _output_column(studio.draw, inputs, "draw", (go, stop), prompt)


def _image_tab(studio: Studio) -> None:
    limits = studio.limits
    with gr.Row():
        with gr.Column(scale=3):
            image = gr.Image(label="Image", type="filepath", sources=["upload", "clipboard"], elem_id="image")
            prompt = _prompt(limits, "image_prompt")
            go, stop = _buttons("redraw", "Redraw")
            strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="Strength", info="how much changes")
            steps, scale = _steps_and_guidance(studio)
            with gr.Row():
                seed, images = _seed_and_count(limits)
        inputs = [image, prompt, strength, steps, scale, seed, images]
        _output_column(studio.redraw, inputs, "redraw", (go, stop), prompt)


def _prompt(limits: Limits, name: str) -> Any:
    """One line that grows: Enter draws, Shift+Enter breaks the line."""
    return gr.Textbox(label="Prompt", lines=1, max_lines=8, max_length=limits.prompt_characters, elem_id=name)


def _buttons(name: str, label: str) -> tuple[Any, Any]:
    with gr.Row():
        return gr.Button(label, variant="primary", elem_id=name), gr.Button("Stop", elem_id=f"{name}_stop")


def _steps_and_guidance(studio: Studio) -> tuple[Any, Any]:
    limits, defaults = studio.limits, studio.pipeline.options
    with gr.Row():
        return (
            gr.Slider(2, limits.steps, defaults.num_inference_steps, step=1, label="Steps"),
            gr.Slider(0, limits.guidance, defaults.guidance_scales(None)[0], step=0.1, label="Guidance"),
        )


def _seed_and_count(limits: Limits) -> tuple[Any, Any]:
    seed = gr.Number(RANDOM, label="Seed (-1: a random one)", precision=0)
    return seed, gr.Slider(1, limits.images, 1, step=1, label="Images")


def _restoring(settings: list[Any]) -> None:
    """A place to drop an image of this page into, which gives its settings back."""
    with gr.Accordion("Settings of an image", open=False):
        file = gr.File(label="Drop a finished image here", type="filepath", elem_id="restore")

    def restore(path: str | None) -> list[Any]:
        with _messages():
            found = parameters_of(path) if path else {}
            if path and "prompt" not in found:
                raise UserError("this image does not say how it was made; drop one that this page made")
        return [found[name] if name in found else gr.skip() for name in RESTORED]

    file.upload(restore, file, settings, queue=False, api_visibility="private")


def _output_column(
    method: Callable[..., Iterator[Shown]], inputs: list[Any], name: str, buttons: tuple[Any, Any], prompt: Any
) -> None:
    """What a request is doing, its gallery, and the parameters of the image that is chosen in it."""
    go, stop = buttons
    with gr.Column(scale=3):
        status = gr.Markdown(elem_id=f"{name}_status")
        gallery = gr.Gallery(label="Images", columns=2, format="png", elem_id=f"{name}_gallery", object_fit="contain")
        parameters = gr.JSON(label="Parameters (also inside the PNG file)", elem_id=f"{name}_parameters")
        files = gr.State([])
    for component in inputs:
        component.preprocess = _as_sent
    run, outputs = _reporting(method), [gallery, files, parameters, status]
    asked = [go.click(run, inputs, outputs, api_name=name)]
    asked.append(prompt.submit(run, inputs, outputs, api_visibility="private"))
    stop.click(lambda: "stopped", None, status, cancels=asked, queue=False, api_visibility="private")

    def chosen(paths: list[str], event: gr.SelectData) -> dict[str, Any] | None:
        with _messages():
            return parameters_of(paths[event.index]) if event.index < len(paths) else None

    gallery.select(chosen, files, parameters, queue=False, api_visibility="private")


def _as_sent(value: Any) -> Any:
    """What a component hands over: its value unchecked, of an image the file. The studio checks it, and Gradio's own
    checks would print a traceback for it."""
    return value.path if isinstance(value, ImageData) else value


@contextmanager
def _messages() -> Iterator[None]:
    """A user's mistake becomes a message on the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _reporting(method: Callable[..., Iterator[Shown]]) -> Callable[..., Iterator[tuple]]:
    """What a studio yields → what the page shows. Its parameters have the method's names, in the page's API as well."""

    def run(*values: Any) -> Iterator[tuple]:
        with _messages(), suppress(Stopped):
            for shown in method(*values):
                if shown.items is None:
                    yield gr.skip(), gr.skip(), gr.skip(), shown.status
                    continue
                paths = [item for item, _ in shown.items if isinstance(item, str)]
                yield shown.items, paths, parameters_of(paths[0]) if paths else None, shown.status

    run.__signature__ = inspect.signature(method)
    return run


def launch(studio: Studio, *, max_waiting: int = 16, **options: Any) -> Any:
    """Start the page; returns the Gradio app. `options` go to Blocks.launch."""
    page = build_page(studio)
    page.queue(max_size=max_waiting, default_concurrency_limit=1)
    page.launch(
        theme=gr.themes.Soft(font=FONTS, font_mono=("ui-monospace", "monospace")),
        allowed_paths=[str(studio.folder)],
        max_file_size=MAX_UPLOAD,
        footer_links=[],
        ssr_mode=False,
        show_error=True,
        **options,
    )
    return page
