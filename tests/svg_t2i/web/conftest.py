"""Shared by the tests of the page: what it serves, and where."""

from __future__ import annotations

import os

import pytest

from svg_t2i import app
from svg_t2i.web.limits import Limits
from svg_t2i.web.requests import Studio


@pytest.fixture(scope="module")
def studio(toy_pipeline):
    """A model of four steps; or the one in SVG_T2I_APP_CHECKPOINT, for screenshots with good pictures."""
    if checkpoint := os.environ.get("SVG_T2I_APP_CHECKPOINT"):
        return app.load_studio(app.parse_arguments(["--checkpoint", checkpoint, "--preset", "quickstart"]))
    return Studio(toy_pipeline, Limits(side=64, steps=20, images=2, prompt_characters=60))


@pytest.fixture(scope="module")
def address(studio):
    """The page, served on a free port."""
    pytest.importorskip("gradio", reason="gradio is not installed (pip install 'svg-t2i[app]')")
    from svg_t2i.web.page import launch

    page = launch(studio, max_waiting=4, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()
