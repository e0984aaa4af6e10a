"""The house rules of who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parent.parent

# Floors of each package, lowest first: a module imports only from floors below its own.
FLOORS = {
    "autoencoder": [
        {"config", "collectives"},
        {"images", "weights", "order", "parallel", "encoder_table", "published_keys"},
        {"positions", "spans", "latents", "decoder", "losses"},
        {"manifest", "encoders", "residual", "hy_decoder", "drift", "metrics"},
        {"tar_shards", "striped"},
        {"model"},
        {"data", "sweep"},
        {"settings", "evaluation"},
        {"training"},
        {"callbacks"},
        {"train", "reconstruct", "evaluate_reconstruction", "measure_latents"},
    ],
    "svg_t2i": [
        {"attention", "flow", "batching", "draws", "prompts", "memory", "saving", "stopping"},
        {"packing", "fused"},
        {"model", "solvers", "guidance"},
        {"text", "flops", "published", "feature_cache"},
        {"distances", "clip_score", "shapes", "suites", "options", "enhance"},
        {"evaluation_config"},
        {"settings", "sweep"},
        {"parallel", "optimizer", "checkpoint", "data"},
        {"loader", "frozen", "rendering", "denoising", "export"},
        {"monitor", "parts"},
        {"training", "loading", "generation"},
        {"editing"},
        {"pipeline"},
        {"evaluation", "studio"},
        {"samples"},
        {"suite_images"},
        {"train", "sample", "cache_features", "app"},
        {"benchmark"},
    ],
}
# Heavy or process-wide libraries, and the only modules that may import them.
ONLY_IN = {
    "transformers": {"svg_t2i.text.encoder", "svg_t2i.text.enhance", "svg_t2i.evaluation.clip_score"},  # the last: a metric of evaluations
    "tokenizers": {"svg_t2i.text.encoder"},
    "timm": {"autoencoder.encoder_table", "autoencoder.encoders", "autoencoder.residual"},
    "pytorch_lightning": {"autoencoder.training", "autoencoder.callbacks", "autoencoder.train"},
    "omegaconf": {"autoencoder.config"},
    "torchmetrics": {"autoencoder.metrics"},
    "matplotlib": {"autoencoder.drift", "svg_t2i.evaluation.sweep"},
    "fsspec": {"autoencoder.tar_shards"},
    "gradio": {"svg_t2i.app"},
    "torch.distributed": {
        "autoencoder.collectives",
        "autoencoder.parallel",
        "svg_t2i.training.sharding",
        "svg_t2i.checkpoints.weights",
        "svg_t2i.checkpoints.run",
        "svg_t2i.sample",
    },
}
TORCH_ONLY = {"svg_t2i.transformer.attention", "svg_t2i.flow.paths", "svg_t2i.flow.solvers", "svg_t2i.flow.guidance", "svg_t2i.transformer.cpu_kernels"}

MODULES = sorted(
    path for package in FLOORS for path in (REPO_ROOT / package).glob("*.py") if path.name != "__init__.py"
)


def imported_modules(path: Path) -> set[str]:
    """Absolute dotted names of everything a file imports, function bodies included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; scripts run from inside the package, import absolutely"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor_of(package: str, module: str) -> int:
    return next(number for number, floor in enumerate(FLOORS[package]) if module in floor)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_import_direction(path):
    package, module = path.parent.name, path.stem
    imports = imported_modules(path)
    for other in {name.split(".")[1] for name in imports if name.startswith(f"{package}.")}:
        assert floor_of(package, other) < floor_of(package, module), f"{package}.{module} must not import {other}"
    if package == "autoencoder":
        assert not any(name.split(".")[0] == "svg_t2i" for name in imports), "autoencoder never imports svg_t2i"
    for library, allowed in ONLY_IN.items():
        if f"{package}.{module}" not in allowed:
            offenders = [name for name in imports if name == library or name.startswith(library + ".")]
            assert not offenders, f"{package}.{module} imports {offenders}; only {sorted(allowed)} may"
    if f"{package}.{module}" in TORCH_ONLY:
        standard = {"__future__", "collections", "dataclasses", "functools", "inspect", "itertools", "math", "re"}
        roots = {name.split(".")[0] for name in imports}
        extra = roots - standard - {"typing", "torch"}
        allowed_here = {"svg_t2i"} if package == "svg_t2i" else set()
        assert extra <= allowed_here, f"{package}.{module} imports {sorted(extra)}; it may import torch only"


def test_every_module_has_a_floor():
    unplaced = [f"{p.parent.name}.{p.stem}" for p in MODULES if not any(p.stem in f for f in FLOORS[p.parent.name])]
    assert not unplaced, f"add {unplaced} to FLOORS, or find their room in an existing module"
