"""Shared by the tests of stage 2: the tiny pipeline, one for all and as it is loaded."""

import pytest

from svg_t2i.pipeline import SVGT2IPipeline


@pytest.fixture
def pipeline(toy_pipeline):
    yield toy_pipeline
    toy_pipeline.set_guide(None)
    toy_pipeline.scheduler = None


@pytest.fixture
def loaded(saved_pipeline):
    pipeline = SVGT2IPipeline.from_pretrained(saved_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
