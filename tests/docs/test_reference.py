"""The pages that are written from the code are current, and all pages build as a site."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest

from autoencoder.common.config import load_config
from svg_t2i.training.settings import TrainConfig
from tests.docs.documents import REPO_ROOT


@pytest.mark.parametrize("page", ["configuration.md", "python-api.md"])
def test_the_reference_is_that_of_the_code(page):
    """`python docs/make_reference.py` writes it anew."""
    spec = importlib.util.spec_from_file_location("make_reference", REPO_ROOT / "docs" / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_reference"] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    assert (REPO_ROOT / "docs" / page).read_text() == module.PAGES[page]()


def test_the_reference_has_every_setting():
    listed = set(re.findall(r"^\| `([\w.]+)` \|", (REPO_ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE))
    config = load_config(TrainConfig, REPO_ROOT / "configs" / "svg_t2i" / "stage1_256.yaml")
    for section in fields(config):
        value = getattr(config, section.name)
        if is_dataclass(value):
            assert {f"{section.name}.{field.name}" for field in fields(value) if field.name != "sources"} <= {
                *listed,
                "data.caption_mix",
            }


def test_the_pages_build_as_a_site_without_a_warning(tmp_path):
    """Links and anchors included."""
    pytest.importorskip("material", reason="the site needs mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", ".ci/mkdocs.yml"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*command, "--site-dir", tmp_path], cwd=REPO_ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for document in (REPO_ROOT / "docs").glob("*.md"):
        name = "index.html" if document.stem == "index" else f"{document.stem}/index.html"
        assert (tmp_path / name).is_file()
