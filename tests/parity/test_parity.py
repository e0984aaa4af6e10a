"""Parity with the published release: every vector file in `--parity-dir` is run through our public classes."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from harness import Vectors

ON_THE_HOST = {"imageops", "latent_stats", "transport", "samplers"}  # or, as adaptive steps, at the mercy of rounding


def pytest_generate_tests(metafunc):
    if "vector_file" not in metafunc.fixturenames:
        return
    folder = Path(metafunc.config.getoption("--parity-dir"))
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    metafunc.parametrize("vector_file", files or [None], ids=[f.stem for f in files] or ["absent"])


def test_parity(vector_file, request):
    if vector_file is None:
        pytest.skip(f"no vectors in {request.config.getoption('--parity-dir')}: give --parity-dir DIR")
    meta = json.loads(vector_file.read_text())
    component = meta.get("component", vector_file.stem)
    if not (Path(__file__).parent / f"check_{component}.py").exists():
        pytest.fail(f"{vector_file}: no check for component {component!r}")
    check = importlib.import_module(f"check_{component}")
    device = request.config.getoption("--parity-device")
    if device != "cpu" and component in ON_THE_HOST:
        pytest.skip(f"{component} is computed on the host")
    vectors = Vectors.load(vector_file, device)
    if vectors.tensors:
        with torch.device(device), torch.backends.cudnn.flags(allow_tf32=False):
            check.check(vectors)
        vectors.finish()
    else:
        check.check_shapes(vectors)


def test_every_tensor_file_is_described(request):
    folder = Path(request.config.getoption("--parity-dir"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: give --parity-dir DIR")
    undescribed = [f.name for f in folder.glob("*.safetensors") if not f.with_suffix(".json").exists()]
    assert not undescribed, f"vector files without a description: {undescribed}"
