"""The page, built with Gradio: tabs that share no state, the visitor's images below them, and starting it all."""

from __future__ import annotations

from typing import Any

import gradio as gr

from svg_t2i.web.history import add_history
from svg_t2i.web.requests import KEEP_SECONDS, Studio
from svg_t2i.web.tabs import image_tab, inpainting_tab, interpolation_tab, text_tab, variation_tab

MAX_UPLOAD = "20mb"
FONTS = ("system-ui", "sans-serif")
CSS = """
#history .grid-container { grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)) !important }
@media (max-width: 640px) {  /* a phone: what is asked, what comes of it, and then the settings */
    .ask { display: contents }
    .ask > *, .results { flex: 1 1 100% !important; order: 1 }
    .ask > .settings { order: 2 }
}
"""
TABS = {
    "text": ("Text to image", text_tab),
    "image": ("Image to image", image_tab),
    "inpaint": ("Inpainting", inpainting_tab),
    "vary": ("Variations", variation_tab),
    "interpolate": ("Interpolation", interpolation_tab),
}


def build_page(studio: Studio) -> Any:
    """The Gradio page of a studio."""
    licence = f" Licence of the model: {studio.licence}." if studio.licence else ""
    with gr.Blocks(title="SVG-T2I", analytics_enabled=False, delete_cache=(3600, KEEP_SECONDS)) as page:
        gr.Markdown(
            f"# SVG-T2I\nImages from text, made of the features of a vision foundation model: {studio.name}.{licence}"
        )
        shared = _adapters(studio)
        with gr.Tabs(elem_id="tabs") as tabs:
            parts = {}
            for name, (title, make) in TABS.items():
                with gr.Tab(title, id=name):
                    parts[name] = make(studio, shared)
        add_history(page, studio, tabs, parts)
    return page


def _adapters(studio: Studio) -> list[Any]:
    """Which adapter acts in all tabs, and how much; nothing where there are none."""
    if not studio.adapters.files:
        return []
    with gr.Row():
        names = [("none", ""), *((name, name) for name in studio.adapters.files)]
        return [
            gr.Dropdown(names, value="", label="Adapter", elem_id="adapter"),
            gr.Slider(-1, 2, 1, step=0.05, label="Weight of the adapter"),
        ]


def launch(studio: Studio, *, max_waiting: int = 16, **options: Any) -> Any:
    """Start the page; returns the Gradio app. `options` go to Blocks.launch."""
    page = build_page(studio)
    page.queue(max_size=max_waiting, default_concurrency_limit=1)
    page.launch(
        theme=gr.themes.Soft(font=FONTS, font_mono=("ui-monospace", "monospace")),
        css=CSS,
        allowed_paths=[str(studio.folder)],
        max_file_size=MAX_UPLOAD,
        footer_links=[],
        ssr_mode=False,
        show_error=True,
        **options,
    )
    return page
