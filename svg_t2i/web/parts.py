"""What the tabs of the page are made of: fields that several share, the column of results, messages."""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from gradio.components.image_editor import EditorData
from gradio.data_classes import ImageData

from autoencoder.common.config import UserError
from svg_t2i.web.limits import Limits
from svg_t2i.web.requests import RANDOM, Shown, Stopped, Studio, parameters_of

PRIVATE: dict[str, Any] = {"queue": False, "api_visibility": "private"}


@dataclass
class Tab:
    """What a tab leaves for the page around it: the events of its requests, and its list of finished files."""

    asked: list[Any]
    files: Any
    image: Any = None  # where an image can be sent to
    settings: Sequence[Any] = field(default_factory=tuple)  # the fields that an image's settings go back to


def prompt_field(limits: Limits, name: str, label: str = "Prompt") -> Any:
    """One line that grows: Enter draws, Shift+Enter breaks the line."""
    return gr.Textbox(label=label, lines=1, max_lines=8, max_length=limits.prompt_characters, elem_id=name)


def buttons(name: str, label: str) -> tuple[Any, Any]:
    with gr.Row():
        return gr.Button(label, variant="primary", elem_id=name), gr.Button("Stop", elem_id=f"{name}_stop")


def image_field(name: str, label: str = "Image") -> Any:
    return gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], elem_id=name)


def steps_field(studio: Studio) -> Any:
    return gr.Slider(2, studio.limits.steps, studio.pipeline.options.num_inference_steps, step=1, label="Steps")


def guidance_field(studio: Studio) -> Any:
    own = studio.pipeline.options.guidance_scales(None)[0]
    return gr.Slider(0, studio.limits.guidance, own, step=0.1, label="Guidance")


def redrawing_fields(studio: Studio, strength: float) -> list[Any]:
    """Strength, steps, guidance, seed and number of images of a request that changes an image."""
    with gr.Column(elem_classes="settings"):
        change = gr.Slider(0.05, 1, strength, step=0.05, label="Strength", info="how much changes")
        with gr.Row():
            steps, scale = steps_field(studio), guidance_field(studio)
        with gr.Row():
            seed, images = seed_field(), count_field(studio.limits.images)
    return [change, steps, scale, seed, images]


def seed_field() -> Any:
    return gr.Number(RANDOM, label="Seed (-1: a random one)", precision=0)


def count_field(most: int, value: int = 1, least: int = 1) -> Any:
    return gr.Slider(least, most, value, step=1, label="Images")


def results(
    method: Callable[..., Iterator[Shown]],
    inputs: list[Any],
    name: str,
    pair: tuple[Any, Any],
    prompts: Sequence[Any] = (),
) -> Tab:
    """The column that shows what a request is doing, its gallery, and the parameters of the image chosen in it.

    pair: the buttons that start and stop it. prompts: fields in which Enter starts it as well.
    """
    go, stop = pair
    with gr.Column(scale=3, elem_classes="results"):
        status = gr.HTML(elem_id=f"{name}_status")
        gallery = gr.Gallery(label="Images", columns=2, format="png", elem_id=f"{name}_gallery", object_fit="contain")
        parameters = gr.JSON(label="Parameters (also inside the PNG file)", elem_id=f"{name}_parameters")
        files = gr.State([])
    for component in inputs:
        component.preprocess = _as_sent
    run, outputs = _reporting(method, len(inputs)), [gallery, files, parameters, status]
    asked = [go.click(run, inputs, outputs, api_name=name)]
    asked += [prompt.submit(run, inputs, outputs, api_visibility="private") for prompt in prompts]
    stop.click(lambda: "stopped", None, status, cancels=asked, **PRIVATE)

    def chosen(paths: list[str], event: gr.SelectData) -> dict[str, Any] | None:
        with messages():
            return parameters_of(paths[event.index]) if event.index < len(paths) else None

    gallery.select(chosen, files, parameters, **PRIVATE)
    return Tab(asked, files)


def _as_sent(value: Any) -> Any:
    """What a component hands over: its value unchecked, of images the files. The studio checks it, and Gradio's own
    checks would print a traceback for it."""
    if isinstance(value, EditorData):
        background = None if value.background is None else value.background.path
        return {"background": background, "layers": [layer.path for layer in value.layers]}
    return value.path if isinstance(value, ImageData) else value


@contextmanager
def messages() -> Iterator[None]:
    """A user's mistake becomes a message on the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _reporting(method: Callable[..., Iterator[Shown]], count: int) -> Callable[..., Iterator[tuple]]:
    """What a studio yields → what the page shows.

    Its parameters have the names of the method's first `count`, in the page's API as well.
    """

    def run(*values: Any) -> Iterator[tuple]:
        with messages(), suppress(Stopped):
            for shown in method(*values):
                words = _words(shown)
                if shown.items is None:
                    yield gr.skip(), gr.skip(), gr.skip(), words
                    continue
                paths = [item for item, _ in shown.items if isinstance(item, str)]
                yield shown.items, paths, parameters_of(paths[0]) if paths else None, words

    signature = inspect.signature(method)
    run.__signature__ = signature.replace(parameters=list(signature.parameters.values())[:count])
    return run


def _words(shown: Shown) -> str:
    """The line of words, under a bar while there are steps."""
    words = html.escape(shown.status)
    if shown.done is None:
        return words
    return f'<progress value="{shown.done:.3f}" max="1" style="width: 100%"></progress><br>{words}'
