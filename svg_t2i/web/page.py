"""The page, built with Gradio: two tabs, the pictures that a request gives, and starting it all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData

from autoencoder.common.config import UserError
from svg_t2i.flow.solvers import SOLVERS
from svg_t2i.web.requests import (
    KEEP_SECONDS,
    MAX_SEED,
    GalleryItems,
    Limits,
    Stopped,
    Studio,
    parameters_of,
    random_seed,
)

MAX_UPLOAD = "20mb"
FONTS = ("system-ui", "sans-serif")


def build_page(studio: Studio) -> Any:
    """The Gradio page of a studio: two tabs, text to image and image to image, that share no state."""
    with gr.Blocks(title="SVG-T2I", analytics_enabled=False, delete_cache=(3600, KEEP_SECONDS)) as page:
        gr.Markdown("# SVG-T2I\nImages from text, made of the features of a vision foundation model.")
        with gr.Tab("Text to image"):
            _text_tab(studio)
        with gr.Tab("Image to image"):
            _image_tab(studio)
    return page


def _text_tab(studio: Studio) -> None:
    limits, defaults = studio.limits, studio.pipeline.options
    with gr.Row():
        with gr.Column(scale=3):
            prompt = gr.Textbox(label="Prompt", lines=3, max_length=limits.prompt_characters, elem_id="prompt")
            negative = gr.Textbox(label="Negative prompt", max_length=limits.prompt_characters, elem_id="negative")
            with gr.Row():
                width = gr.Slider(16, limits.side, defaults.width, step=16, label="Width")
                height = gr.Slider(16, limits.side, defaults.height, step=16, label="Height")
            with gr.Row():
                steps = gr.Slider(2, limits.steps, defaults.num_inference_steps, step=1, label="Steps")
                scale = gr.Slider(0, limits.guidance, defaults.guidance_scales(None)[0], step=0.1, label="Guidance")
            with gr.Row():
                seed, images = _seed_and_count(limits)
                solver = gr.Dropdown(list(SOLVERS), value=defaults.solver, label="Solver")
        inputs = [prompt, negative, width, height, steps, scale, seed, images, solver]
        _output_column(studio.draw, inputs, "draw", "Draw")


def _image_tab(studio: Studio) -> None:
    limits, defaults = studio.limits, studio.pipeline.options
    with gr.Row():
        with gr.Column(scale=3):
            image = gr.Image(label="Image", type="filepath", sources=["upload", "clipboard"], elem_id="image")
            prompt = gr.Textbox(label="Prompt", lines=2, max_length=limits.prompt_characters, elem_id="image_prompt")
            strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="Strength", info="how much changes")
            with gr.Row():
                steps = gr.Slider(2, limits.steps, defaults.num_inference_steps, step=1, label="Steps")
                scale = gr.Slider(0, limits.guidance, defaults.guidance_scales(None)[0], step=0.1, label="Guidance")
            with gr.Row():
                seed, images = _seed_and_count(limits)
        _output_column(studio.redraw, [image, prompt, strength, steps, scale, seed, images], "redraw", "Redraw")


def _seed_and_count(limits: Limits) -> tuple[Any, Any]:
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
    gr.Button("Random seed", size="sm").click(random_seed, None, seed, queue=False, api_visibility="private")
    return seed, gr.Slider(1, limits.images, 1, step=1, label="Images")


def _output_column(method: Callable[..., Iterator[GalleryItems]], inputs: list[Any], name: str, label: str) -> None:
    """Button, gallery, and the parameters of the image that is chosen in it."""
    with gr.Column(scale=3):
        with gr.Row():
            go = gr.Button(label, variant="primary", elem_id=name)
            stop = gr.Button("Stop", elem_id=f"{name}_stop")
        gallery = gr.Gallery(label="Images", columns=2, format="png", elem_id=f"{name}_gallery", object_fit="contain")
        parameters = gr.JSON(label="Parameters (also inside the PNG file)", elem_id=f"{name}_parameters")
        files = gr.State([])
    for component in inputs:
        component.preprocess = _as_sent
    running = go.click(_reporting(method), inputs, [gallery, files, parameters], api_name=name)
    stop.click(None, cancels=[running])

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


def _reporting(method: Callable[..., Iterator[GalleryItems]]) -> Callable[..., Iterator[tuple]]:
    """Gallery items → what the page shows."""

    def run(*values: Any) -> Iterator[tuple]:
        with _messages(), suppress(Stopped):
            for items in method(*values):
                paths = [item for item, _ in items if isinstance(item, str)]
                yield items, paths, parameters_of(paths[0]) if paths else None

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
