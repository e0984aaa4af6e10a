"""Parity with the published release: every vector file in `--parity-dir` is run through our public classes."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from harness import Vectors

ON_THE_HOST = {"imageops", "latent_stats", "transport", "samplers"}  # or, as adaptive steps, at the mercy of rounding
IN_HALF_PRECISION = {"nextdit", "nextdit_p2", "encoder", "residual_vit", "conv_decoder", "hy3_decoder"}


def pytest_generate_tests(metafunc):
    if "vector_file" not in metafunc.fixturenames:
        return
    folder = Path(metafunc.config.getoption("--parity-dir"))
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    cases = [(file, "fp32") for file in files] + [(file, "bf16") for file in files if in_half_precision(file)]
    ids = [f"{file.stem}-{precision}" for file, precision in cases]
    metafunc.parametrize(("vector_file", "precision"), cases or [(None, "fp32")], ids=ids or ["absent"])


def component_of(vector_file):
    return json.loads(vector_file.read_text()).get("component", vector_file.stem)


def in_half_precision(vector_file):
    return component_of(vector_file) in IN_HALF_PRECISION and vector_file.with_suffix(".safetensors").exists()


def test_parity(vector_file, precision, request):
    """bf16: as networks run in training and sampling, within rounding; see `harness.BF16_LIMIT`."""
    if vector_file is None:
        pytest.skip(f"no vectors in {request.config.getoption('--parity-dir')}: give --parity-dir DIR")
    component = component_of(vector_file)
    if not (Path(__file__).parent / f"check_{component}.py").exists():
        pytest.fail(f"{vector_file}: no check for component {component!r}")
    check = importlib.import_module(f"check_{component}")
    device = request.config.getoption("--parity-device")
    if device != "cpu" and component in ON_THE_HOST:
        pytest.skip(f"{component} is computed on the host")
    vectors = Vectors.load(vector_file, device, precision)
    if vectors.tensors:
        # torch 2.10 would keep the halved weights of a pass without gradients for one with them
        half = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
        with torch.device(device), torch.backends.cudnn.flags(allow_tf32=False), half:
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
