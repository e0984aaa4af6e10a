"""The tabs of the page: from text, from an image, inpainting with a brush, variations, ways between two prompts.

`shared`: fields beside the tabs that every request takes last (the adapter).
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from autoencoder.common.config import UserError
from svg_t2i.flow.solvers import SOLVERS
from svg_t2i.web.parts import (
    PRIVATE,
    Tab,
    buttons,
    count_field,
    guidance_field,
    image_field,
    messages,
    prompt_field,
    redrawing_fields,
    results,
    seed_field,
    steps_field,
)
from svg_t2i.web.requests import MAX_LIKENESS, MAX_WAY, Studio, fitting_size, parameters_of

SHAPES = {"1:1": (1, 1), "3:2": (3, 2), "2:3": (2, 3), "4:3": (4, 3), "3:4": (3, 4), "16:9": (16, 9), "9:16": (9, 16)}
RESTORED = (
    "prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "seed", "solver",
)  # fmt: skip


def restored(path: str | None) -> list[Any]:
    """The settings of an image of this page, for the fields of `Tab.settings`; those that it lacks stay."""
    with messages():
        found = parameters_of(path) if path else {}
        if path and "prompt" not in found:
            raise UserError("this image does not say how it was made; drop one that this page made")
    return [found[name] if name in found else gr.skip() for name in RESTORED]


def text_tab(studio: Studio, shared: list[Any]) -> Tab:
    """Text to image, with examples, and the settings of a dropped image."""
    limits, defaults = studio.limits, studio.pipeline.options
    with gr.Row():
        with gr.Column(scale=3, elem_classes="ask"):
            prompt = prompt_field(limits, "prompt")
            pair = buttons("draw", "Draw")
            if studio.examples:
                gr.Examples([[text] for text in studio.examples], prompt, label="Examples", api_visibility="private")
            with gr.Column(elem_classes="settings"):
                negative = gr.Textbox(label="Negative prompt", max_length=limits.prompt_characters, elem_id="negative")
                with gr.Row():
                    width = gr.Slider(16, limits.side, defaults.width, step=16, label="Width")
                    height = gr.Slider(16, limits.side, defaults.height, step=16, label="Height")
                with gr.Row():
                    shape = gr.Dropdown(list(SHAPES), value=None, label="Shape", elem_id="shape")
                    swap = gr.Button("Swap width and height", size="sm", elem_id="swap")
                with gr.Row():
                    steps, scale = steps_field(studio), guidance_field(studio)
                with gr.Row():
                    seed, images = seed_field(), count_field(limits.images)
                    solver = gr.Dropdown(list(SOLVERS), value=defaults.solver, label="Solver")
                with gr.Accordion("Settings of an image", open=False):
                    file = gr.File(label="Drop a finished image here", type="filepath", elem_id="restore")
            settings = [prompt, negative, width, height, steps, scale, seed, solver]
        pixels = defaults.width * defaults.height
        file.upload(restored, file, settings, **PRIVATE)
        shape.input(lambda name: fitting_size(SHAPES[name], pixels), shape, [width, height], **PRIVATE)
        swap.click(lambda *sides: sides[::-1], [width, height], [width, height], **PRIVATE)
        inputs = [prompt, negative, width, height, steps, scale, seed, images, solver, *shared]
        tab = results(studio.draw, inputs, "draw", pair, [prompt])
    tab.settings = settings
    return tab


def image_tab(studio: Studio, shared: list[Any]) -> Tab:
    """An image redrawn after a prompt."""
    with gr.Row():
        with gr.Column(scale=3, elem_classes="ask"):
            image = image_field("image")
            prompt = prompt_field(studio.limits, "image_prompt")
            pair = buttons("redraw", "Redraw")
            settings = redrawing_fields(studio, strength=0.6)
        inputs = [image, prompt, *settings, *shared]
        tab = results(studio.redraw, inputs, "redraw", pair, [prompt])
    tab.image = image
    return tab


def inpainting_tab(studio: Studio, shared: list[Any]) -> Tab:
    """An image whose painted part is redrawn."""
    with gr.Row():
        with gr.Column(scale=3, elem_classes="ask"):
            drawing = gr.ImageEditor(
                label="Image; paint over what is to change", type="filepath", sources=["upload", "clipboard"],
                brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"), layers=False, transforms=(), format="png",
                elem_id="drawing",
            )  # fmt: skip
            prompt = prompt_field(studio.limits, "inpaint_prompt")
            pair = buttons("inpaint", "Repaint")
            settings = redrawing_fields(studio, strength=1.0)
        inputs = [drawing, prompt, *settings, *shared]
        tab = results(studio.inpaint, inputs, "inpaint", pair, [prompt])
    tab.image = drawing
    return tab


def variation_tab(studio: Studio, shared: list[Any]) -> Tab:
    """Images like a given one."""
    with gr.Row():
        with gr.Column(scale=3, elem_classes="ask"):
            image = image_field("vary_image")
            pair = buttons("vary", "Vary")
            with gr.Column(elem_classes="settings"):
                likeness = gr.Slider(
                    0, MAX_LIKENESS, 0.3, step=0.05, label="Likeness", info="how much of the image stays"
                )
                with gr.Row():
                    steps, seed = steps_field(studio), seed_field()
                    images = count_field(studio.limits.images, min(2, studio.limits.images))
        inputs = [image, likeness, steps, seed, images, *shared]
        tab = results(studio.vary, inputs, "vary", pair)
    tab.image = image
    return tab


def interpolation_tab(studio: Studio, shared: list[Any]) -> Tab:
    """Images on the way from one prompt to another."""
    with gr.Row():
        with gr.Column(scale=3, elem_classes="ask"):
            first = prompt_field(studio.limits, "first_prompt", "From")
            second = prompt_field(studio.limits, "second_prompt", "To")
            pair = buttons("interpolate", "Draw the way")
            with gr.Column(elem_classes="settings"):
                with gr.Row():
                    steps, scale = steps_field(studio), guidance_field(studio)
                with gr.Row():
                    seed, images = seed_field(), count_field(MAX_WAY, 5, least=2)
        inputs = [first, second, steps, scale, seed, images, *shared]
        return results(studio.interpolate, inputs, "interpolate", pair, [first, second])
