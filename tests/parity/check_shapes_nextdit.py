"""Key names, shapes and parameter counts of the published model sizes, built without memory on the meta device."""

from __future__ import annotations

import torch

from harness import Vectors, check_keys
from svg_t2i.transformer.model import build_model, published_state_dict


def check_shapes(vectors: Vectors) -> None:
    for name, published in vectors.meta["models"].items():
        with torch.device("meta"):
            state = published_state_dict(build_model(name))
        check_keys({key: value.shape for key, value in state.items()}, published["keys"], name)
        parameters = sum(value.numel() for value in state.values())
        if parameters != published["parameters"]:
            raise AssertionError(f"{name}: {parameters} parameters, published {published['parameters']}")
