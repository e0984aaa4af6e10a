"""A page that shows all images of a run in a browser, with their prompts and seeds; without any script or network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 14px system-ui, sans-serif }}
body {{ margin: 1.5rem }}
main {{ display: grid; gap: 1.5rem 1rem; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)) }}
figure {{ margin: 0 }}
img {{ width: 100%; height: auto; border-radius: 4px }}
figcaption {{ margin-top: .4rem; overflow-wrap: anywhere }}
small {{ opacity: .7 }}
</style></head><body>
<h1>{title}</h1>
<main>
{figures}
</main></body></html>
"""
FIGURE = (
    '<figure><a href="{file}"><img src="{file}" loading="lazy" width="{width}" height="{height}" alt="{caption}"></a>'
    "<figcaption>{caption}<br><small>seed {seed} · {width}×{height}</small></figcaption></figure>"
)


def contact_sheet(title: str, records: Iterable[Mapping[str, Any]]) -> str:
    """The page's HTML. `records`: those of data.json, whose images lie in images/ beside the page."""
    figures = []
    for record in records:
        width, _, height = record["resolution"].partition("x")
        file = "images/" + quote(Path(record["image_url"]).name)
        caption = escape(record["caption"] or "without a prompt")
        figures.append(FIGURE.format(file=file, caption=caption, seed=record["seed"], width=width, height=height))
    return PAGE.format(title=escape(title), figures="\n".join(figures))
