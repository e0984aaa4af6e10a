"""The rules of who may import whom, room by room, read from the source."""

import ast
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parent.parent

# Rooms by floor, lowest first: a room imports from lower floors only. Rooms of one floor do not know each other.
FLOORS = {
    "autoencoder": [
        {"common"},
        {"images", "encoders", "decoders", "latents"},
        {"sources"},
        {"model"},
        {"evaluation"},
        {"training"},
        {"commands"},
    ],
    "svg_t2i": [
        {"transformer", "flow"},
        {"text", "checkpoints"},
        {"data"},
        {"features"},
        {"sampling"},
        {"loading"},
        {"rendering"},
        {"pipeline"},
        {"evaluation"},
        {"training", "web"},
        {"planning"},
        {"commands"},
    ],
}
FACES = {"autoencoder.model", "svg_t2i.pipeline"}
COMMANDS = {
    "autoencoder": {"train", "reconstruct", "evaluate_reconstruction", "measure_latents"},
    "svg_t2i": {"train", "sample", "benchmark", "cache_features", "inspect_data", "export", "app", "plan"},
}
# Heavy or process-wide libraries, and the only rooms or modules that may import them.
ONLY_IN = {
    "transformers": {
        "svg_t2i.text", "svg_t2i.evaluation.clip_score", "svg_t2i.evaluation.detector", "svg_t2i.pipeline",
    },
    "diffusers": {
        "svg_t2i.pipeline", "svg_t2i.loading.components", "svg_t2i.sampling.inputs", "svg_t2i.sampling.schedulers",
    },
    "peft": {"svg_t2i.checkpoints.adapters"},
    "torchao": {"svg_t2i.loading.quantization"},
    "tokenizers": {"svg_t2i.text.toy"},
    "timm": {"autoencoder.encoders"},
    "pytorch_lightning": {"autoencoder.training"},
    "omegaconf": {"autoencoder.common.config"},
    "torchmetrics": {"autoencoder.evaluation.metrics"},
    "matplotlib": {"autoencoder.latents.drift", "svg_t2i.data.inspection", "svg_t2i.evaluation.sweep"},
    "fsspec": {"autoencoder.sources.tar_shards"},
    "pyarrow": {"autoencoder.sources.tables"},
    "datasets": {"autoencoder.sources.hub"},
    "gradio": {"svg_t2i.web.page", "svg_t2i.web.parts", "svg_t2i.web.tabs", "svg_t2i.web.history"},
    "huggingface_hub": {"svg_t2i.loading.sources", "svg_t2i.checkpoints.weights"},
    "torch.distributed": {
        "autoencoder.common.processes", "autoencoder.common.launch", "autoencoder.training", "svg_t2i.checkpoints",
        "svg_t2i.training",
    },
}  # fmt: skip
# The method itself: torch, the standard library and each other, nothing else. No files, no settings, no processes.
TORCH_ONLY = {"svg_t2i.flow", "svg_t2i.transformer.attention", "svg_t2i.transformer.cpu_kernels"}
PURE = {
    "collections",
    "contextlib",
    "dataclasses",
    "functools",
    "inspect",
    "itertools",
    "math",
    "re",
    "typing",
    "__future__",
}

MODULES = {
    ".".join(path.relative_to(REPO_ROOT).with_suffix("").parts): path
    for package in FLOORS
    for path in sorted((REPO_ROOT / package).rglob("*.py"))
    if path.name != "__init__.py"
}


def imported(path: Path) -> set[str]:
    """Absolute dotted names of everything a file imports, function bodies included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; import absolutely"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_modules(path: Path) -> set[str]:
    return imported(path) & set(MODULES)


def room(module: str) -> str:
    """autoencoder.images.files → images; autoencoder.train → commands; autoencoder.model → model."""
    package, *inner = module.split(".")
    return inner[0] if len(inner) > 1 or module in FACES else "commands"


def floor(module: str) -> int:
    package = module.split(".")[0]
    (number,) = [number for number, rooms in enumerate(FLOORS[package]) if room(module) in rooms]
    return number


def inside(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


@pytest.mark.parametrize("module", MODULES)
def test_imports_lead_downwards(module):
    package = module.split(".")[0]
    for other in own_modules(MODULES[module]):
        if other.split(".")[0] == package:
            allowed = room(other) == room(module) or floor(other) < floor(module)
        else:
            allowed = package == "svg_t2i" and room(other) != "commands"
        assert allowed, f"{module} must not import {other}"


@pytest.mark.parametrize("module", MODULES)
def test_libraries_are_imported_in_their_place(module):
    names = imported(MODULES[module])
    for library, places in ONLY_IN.items():
        used = [name for name in names if name == library or name.startswith(library + ".")]
        assert not used or inside(module, places), f"{module} imports {used}; only {sorted(places)} may"
    if inside(module, TORCH_ONLY):
        foreign = {name for name in names if name.split(".")[0] not in PURE | {"torch"} and name not in PURE}
        own = {name for name in foreign if inside(name, {"svg_t2i.flow", "svg_t2i.transformer"})}
        assert foreign == own, f"{module} imports {sorted(foreign - own)}; it may import torch only"


def test_no_circles():
    waiting = {module: own_modules(path) for module, path in MODULES.items()}
    while ready := [module for module, needed in waiting.items() if not needed & set(waiting)]:
        for module in ready:
            del waiting[module]
    assert not waiting, f"these import each other in a circle, or import one of those: {sorted(waiting)}"


@pytest.mark.parametrize("package", FLOORS)
def test_the_top_of_a_package_holds_its_commands_and_its_face(package):
    face = {name.split(".")[1] for name in FACES if name.startswith(package + ".")}
    found = {path.stem for path in (REPO_ROOT / package).glob("*.py")}
    assert found == COMMANDS[package] | face | {"__init__"}


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_says_what_it_is_for(package):
    doors = sorted((REPO_ROOT / package).rglob("__init__.py"))
    rooms = {path.parent.relative_to(REPO_ROOT / package).as_posix() for path in doors} - {"."}
    assert rooms | FACES_OF[package] | {"commands"} == set().union(*FLOORS[package])
    for path in doors:
        (statement,) = ast.parse(path.read_text()).body
        assert isinstance(statement, ast.Expr), f"{path}: one docstring and no code"
        assert len(statement.value.value.strip()) > 40, f"{path}: does not say what it is for"


FACES_OF = {package: {name.split(".")[1] for name in FACES if name.startswith(package)} for package in FLOORS}


def test_tests_are_where_their_modules_are():
    for package in FLOORS:
        folders = {path.parent for path in (REPO_ROOT / "tests" / package).rglob("test_*.py")}
        rooms = {folder.relative_to(REPO_ROOT / "tests" / package).as_posix() for folder in folders} - {"."}
        assert rooms <= set().union(*FLOORS[package]), f"tests/{package} has folders that are no rooms"
