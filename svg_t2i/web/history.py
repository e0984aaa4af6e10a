"""The finished images of a visitor, below the tabs: kept by the browser, so that a reload finds them again.

The browser keeps names; the files are deleted after a day, and when the page ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from autoencoder.common.config import UserError
from svg_t2i.web.parts import PRIVATE, Tab, messages
from svg_t2i.web.requests import Studio
from svg_t2i.web.tabs import restored

TOLD: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None}  # queued: a message can be shown
MOST = 100  # names that a browser keeps


def add_history(page: gr.Blocks, studio: Studio, tabs: gr.Tabs, parts: Mapping[str, Tab]) -> None:
    """The gallery, and what can be done with the image that is chosen in it. parts: the tabs by their ids."""
    names, chosen = gr.BrowserState([], storage_key="svg_t2i_history"), gr.State(None)
    with gr.Accordion("Images of this browser", open=True):
        gallery = gr.Gallery(
            show_label=False, columns=8, height=180, format="png", elem_id="history", object_fit="contain",
            allow_preview=False, interactive=False,
        )  # fmt: skip
        with gr.Row():
            use = gr.Button("Use these settings", size="sm", elem_id="use")
            sends = {
                name: gr.Button(label, size="sm", elem_id=f"send_{name}")
                for name, label in (("image", "Redraw it"), ("inpaint", "Paint over it"), ("vary", "Vary it"))
            }
            clear = gr.Button("Forget them", size="sm", elem_id="forget")

    def remember(files: list[str], known: Any) -> tuple[list[str], list[str]]:
        paths = studio.kept([*(Path(file).name for file in files), *(known if isinstance(known, list) else [])])
        paths = list(dict.fromkeys(paths))[:MOST]
        return [Path(path).name for path in paths], paths

    def choose(known: Any, event: gr.SelectData) -> str | None:
        paths = studio.kept(known)
        return Path(paths[event.index]).name if event.index < len(paths) else None

    def path_of(name: str | None) -> str:
        with messages():
            found = studio.kept([name])
            if not found:
                raise UserError("choose an image below the tabs first")
        return found[0]

    def send(name: str | None, place: str) -> tuple[Any, Any]:
        path = path_of(name)
        return {"background": path, "layers": [], "composite": None} if place == "inpaint" else path, gr.Tabs(
            selected=place
        )

    for part in parts.values():
        for event in part.asked:
            event.success(remember, [part.files, names], [names, gallery], **PRIVATE)
    page.load(lambda known: remember([], known), names, [names, gallery], **PRIVATE)
    gallery.select(choose, names, chosen, **PRIVATE)
    clear.click(lambda: ([], [], None), None, [names, gallery, chosen], **PRIVATE)
    use.click(
        lambda name: (*restored(path_of(name)), gr.Tabs(selected="text")),
        chosen,
        [*parts["text"].settings, tabs],
        **TOLD,
    )
    for place, button in sends.items():
        button.click(lambda name, place=place: send(name, place), chosen, [parts[place].image, tabs], **TOLD)
