"""Commands in the README and docs/ that need no download run, at toy size, and so does the Python there.

Of the others `ELSEWHERE` says which test runs the same script or sub-command, or what they need.
"""

import importlib
import json
import logging
import re
import shlex
import shutil
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

from autoencoder.sources.opening import open_source
from tests.docs.documents import DOCUMENTS, REPO_ROOT, commands, stated_outputs, without_variables

EDITS = ("variation", "image_to_image", "inpaint", "interpolate")


@dataclass(frozen=True)
class AtToySize:
    """A command of the pages, made small: options to add, files that it then leaves in outputs/, what it prints."""

    options: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    prints: str = ""  # a regular expression


FEW_STEPS = ("--num_inference_steps", "2")
OF_TWO = ("--limit", "2", *FEW_STEPS)
# By the beginning of a command. They run in this order, each on the results of others.
AT_TOY_SIZE = {
    "python -m autoencoder.reconstruct": AtToySize(("--resolution", "64"), ("reconstructions/sheet.png",)),
    "python -m autoencoder.evaluate_reconstruction": AtToySize(
        ("--resolution", "64"),
        ("evaluation/table.md", "evaluation/metrics.json", "evaluation/images.csv"),
        r"PSNR(.|\n)*\| 8 \|",
    ),
    "python -m autoencoder.measure_latents": AtToySize(("--resolution", "64"), ("latent_stats.safetensors",)),
    "torchrun --nproc_per_node 2 -m svg_t2i.cache_features": AtToySize(("--batch_size", "64"), ("cache",)),
    "torchrun --nproc_per_node 2 -m svg_t2i.train": AtToySize(("train.max_steps=1",), ("from_cache/config.yaml",)),
    "python -m svg_t2i.inspect_data": AtToySize(
        makes=tuple(f"inspect_data/{name}" for name in ("report.json", "histograms.png", "contact_sheet.png"))
    ),
    "python -m svg_t2i.plan": AtToySize(prints=r"An estimate\."),
    "python -m svg_t2i.sample --checkpoint outputs/": AtToySize(FEW_STEPS, ("circles/data.json", "circles/index.html")),
    **{
        f"python -m svg_t2i.sample {verb}": AtToySize(FEW_STEPS, (f"{verb}/data.json", f"{verb}/index.html"))
        for verb in EDITS
    },
    "python -m svg_t2i.sample retrieve": AtToySize(  # among eight pictures: hundreds take half a minute
        ("--folder", "outputs/quickstart/samples/images"), ("retrieve/matches.json",)
    ),
    "python -m svg_t2i.benchmark folder --checkpoint": AtToySize(
        OF_TWO, ("benchmark/folder/metrics.json",), r"mmd: \S+\nfid: unavailable: .+\nclip_score: unavailable: "
    ),
    "python -m svg_t2i.benchmark folder --images": AtToySize((), ("benchmark/samples/metrics.json",), r"mmd: [-\d.]+"),
    "python -m svg_t2i.benchmark shapes --self_test": AtToySize(),
    "python -m svg_t2i.benchmark shapes --checkpoint": AtToySize(
        OF_TWO, ("benchmark/shapes/grid.png",), r"shapes/colour: [01](\.5)?\n"
    ),
    "python -m svg_t2i.benchmark sweep --checkpoint outputs/quickstart/transformer --over": AtToySize(
        ("--num_images", "4", *FEW_STEPS), ("benchmark/sweep/sweep.csv", "benchmark/sweep/sweep.png")
    ),
}
ELSEWHERE = {
    "python -m svg_t2i.benchmark sweep --checkpoint outputs/quickstart/transformer --preset": (
        "tests/svg_t2i/test_benchmark.py; six times all scenes would take minutes here"
    ),
    "conda": "the environment of the tests is such a one",
    "hf download": "a download",
    "pip": "the same",
    "uv": "the same",
    "bash scripts/quickstart.sh": "`--short` runs in .ci/run, its steps in the fixture `place`",
    "bash scripts/quickstart_lora.sh": "`--short` runs in .ci/run",
    "python -m benchmarks.ablation": "tests/scripts/test_ablation.py; its runs take minutes each",
    "python -m svg_t2i.train --config configs/svg_t2i/finetune_lora.yaml": "tests/svg_t2i/training/test_adapters.py",
    "python -m svg_t2i.sample --checkpoint results/my_lora": "tests/svg_t2i/training/test_adapters.py",
    "python -m svg_t2i.sample --checkpoint pre-trained --lora": "tests/svg_t2i/loading/test_adapters.py",
    "python -m svg_t2i.export results/my_lora": "tests/svg_t2i/training/test_adapters.py",
    "bash scripts/test.sh": "runs in .ci/run",
    "pytest tests/": "runs with all tests",
    "python3 -m venv": "the environment of the tests is such a one",
    "ruff": "runs in .ci/run",
    "bash run_train.sh": "tests/scripts/test_run_train.py",
    "bash run_eval.sh": "tests/scripts/test_run_train.py",
    "bash scripts/run_train_": "tests/scripts/test_dit_scripts.py",
    "bash scripts/sample.sh": "tests/scripts/test_sample_script.py",
    "python -m svg_t2i.app": "tests/svg_t2i/web/",
    "torchrun --nproc_per_node 8 -m svg_t2i.benchmark geneval": "tests/svg_t2i/test_benchmark.py",
    "torchrun --nproc_per_node 8 -m svg_t2i.benchmark dpg": "tests/svg_t2i/test_benchmark.py",
    "torchrun --nproc_per_node 8 -m svg_t2i.benchmark judge": "tests/distributed/test_benchmark_gloo.py",
    "python -m svg_t2i.benchmark summarise": "tests/svg_t2i/test_benchmark.py",
    "python geneval": "GenEval's own tool",
    "(cd ELLA": "DPG-Bench's own tool",
}


FOR_TEST = "configs/autoencoder/pure/svg_autoencoder_P_dd_M_IN_stage1_bs64_256_gpu1_forTest"


def run(*words: object) -> None:
    """`python -m MODULE ARGUMENTS`, also behind torchrun, in this process: imports take longer than all the rest."""
    words = ["-m", *map(str, words)]
    module, *arguments = words[len(words) - words[::-1].index("-m") :]
    logging.getLogger().handlers.clear()  # those of the last entry write where nobody reads any more
    importlib.import_module(module).main(arguments)


@pytest.fixture(scope="module")
def recipe():
    """The quickstart's module, running its commands in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO_ROOT / "scripts" / "quickstart")
        module = importlib.import_module("recipe")
        patch.setattr(module.Recipe, "run", lambda self, *words, processes=1: run(*words))
        yield module


@pytest.fixture(scope="module")
def place(tmp_path_factory, recipe, tiny_for_test):
    """A folder to stand in, with what the quickstart and the README's first training leave there, hardly trained.

    It passes for the repository's root: what the README's commands once left in the real one is not found.
    """
    for module in ("evaluation.shapes", "train"):
        importlib.import_module(f"svg_t2i.{module}")  # with the real root, however few tests are run
    folder = tmp_path_factory.mktemp("root")
    (folder / "configs").symlink_to(REPO_ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("autoencoder.common.config.REPO_ROOT", folder)
        plan = recipe.Plan(copies=1, autoencoder_steps=1, transformer_steps=1, prompts=4, pictures_per_prompt=1)
        recipe.run_on_shapes(recipe.Recipe(folder / "outputs" / "quickstart", 64, plan, processes=1, threads=1))
        mask = folder / "outputs" / "quickstart" / "pictures" / "inputs" / "mask.png"
        mask.parent.mkdir(parents=True)
        Image.linear_gradient("L").point(lambda value: 255 * (value > 127)).save(mask)
        own = ["training.trainer.max_steps=1", f"training.logdir={folder}/autoencoder/logs"]
        run("autoencoder.train", "--config", FOR_TEST, *tiny_for_test, *own)
        yield folder


def test_every_command_is_run_somewhere():
    for document in DOCUMENTS:
        for _, command in commands(document.read_text()):
            known = [start for start in (*AT_TOY_SIZE, *ELSEWHERE) if without_variables(command).startswith(start)]
            assert len(known) == 1, f"{command}: add it to AT_TOY_SIZE, or say in ELSEWHERE where it runs"
    for path in re.findall(r"tests/\S+\.py", "\n".join(ELSEWHERE.values())):
        assert (REPO_ROOT / path).is_file()


@pytest.mark.filterwarnings("ignore:RANDOM ENCODER")
def test_commands_run_one_after_another(place, monkeypatch, capsys):
    """As written but for options that make them small, on what those before them left, with the results they state."""
    monkeypatch.chdir(place)
    texts = [document.read_text() for document in DOCUMENTS]
    found = [command for text in texts for _, command in commands(text)]
    stated = dict(pair for text in texts for pair in stated_outputs(text))
    for command in found:
        for start, small in AT_TOY_SIZE.items():
            if command.startswith(start):
                capsys.readouterr()
                run(*shlex.split(command)[1:], *small.options)
                printed = capsys.readouterr().out
                assert re.search(small.prints, printed), f"{command} prints\n{printed}"
                assert stated.pop(command, "") in printed, f"{command} prints\n{printed}"
    assert not stated, f"outputs of commands that do not run here: {list(stated)}"
    made = [name for small in AT_TOY_SIZE.values() for name in small.makes]
    assert [name for name in made if not (place / "outputs" / name).exists()] == []


def example_as(layout: str, folder: Path) -> Path:
    """The example's images and captions in another layout; returns the path to give."""
    samples = [(sample.path, sample.captions[0]) for sample in open_source(REPO_ROOT / "configs" / "example.jsonl")]
    if layout == "manifest":
        return REPO_ROOT / "configs" / "example.jsonl"
    for number, (path, caption) in enumerate(samples):
        shutil.copy(path, folder / f"{number}{path.suffix}")
        (folder / f"{number}.txt").write_text(caption)
    if layout == "ImageFolder":
        names = [f"{number}{path.suffix}" for number, (path, _) in enumerate(samples)]
        lines = [{"file_name": name, "text": caption} for name, (_, caption) in zip(names, samples, strict=True)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if layout == "tar":
        with tarfile.open(folder.parent / "shard.tar", "w") as shard:
            shard.add(folder, ".")
        return folder.parent / "shard.tar"
    return folder


@pytest.mark.filterwarnings("ignore:RANDOM ENCODER")
@pytest.mark.parametrize("layout", ["manifest", "folder", "ImageFolder", "tar"])
def test_the_quickstart_runs_on_own_images(layout, place, recipe, monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    data, output = example_as(layout, tmp_path / "data"), tmp_path / "example"
    monkeypatch.chdir(place)
    monkeypatch.setattr(recipe, "ON_DATA", replace(recipe.ON_DATA, autoencoder_steps=1, transformer_steps=1, prompts=3))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe.main(["--data", str(data), "--resolution", "64", "--output", str(output)])
    report = json.loads((output / "report.json").read_text())
    assert (report["images"], report["pictures"]) == (8, 3)
    assert 0 <= report["own_image"] <= 1
    assert 0 < report["reconstruction_psnr_min"] <= report["reconstruction_psnr"] < 30
    with Image.open(output / "reconstructions.png") as grid:
        assert grid.width > 3 * 64 * 2


@pytest.mark.filterwarnings("ignore:RANDOM ENCODER")
def test_the_quickstart_of_a_gpu_runs_at_its_own_size(place, recipe, monkeypatch, tmp_path):
    """Here on the CPU, at 128 px, and with few of everything."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan = replace(recipe.ON_GPU, side=128, autoencoder_batch=2, transformer_batch=4)
    here = {
        name: tuple(change for change in getattr(plan, name) if "num_workers" not in change)
        for name in ("autoencoder_changes", "transformer_changes")
    }
    here["transformer_changes"] += ("validation.num_samples=2",)
    monkeypatch.setattr(recipe, "ON_GPU", replace(plan, **here))
    monkeypatch.setattr(recipe, "SHORT", recipe.SHORT | {"autoencoder_steps": 1, "transformer_steps": 1, "prompts": 1})
    write = recipe.write_data_set

    def write_few(folder, copies, side):
        write(folder, copies, side=side)
        lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
        (folder / "train.jsonl").write_text("".join(lines[:16]))
        return 16

    monkeypatch.setattr(recipe, "write_data_set", write_few)
    recipe.main(["--gpu", "--short", "--output", str(tmp_path / "gpu")])
    report = json.loads((tmp_path / "gpu" / "report.json").read_text())
    assert report["pictures"] == 2
    assert set(report["pairs"]) == {"attributes", "relation", "all"}
    for folder in ("data/images", "data/held_out", "samples/images"):
        assert {Image.open(path).size for path in list((tmp_path / "gpu" / folder).iterdir())[:4]} == {(128, 128)}


def test_python_in_the_readme_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    (code,) = re.findall(r"```python\n(.*?)```", (REPO_ROOT / "README.md").read_text(), flags=re.DOTALL)
    names = {}
    exec(code, names)
    assert [image.size for image in names["images"]] == [(64, 64)] * 2


@pytest.mark.filterwarnings("ignore:RANDOM ENCODER")
def test_the_notebook_runs(place):
    """On what the quickstart left, with fewer steps of sampling: each cell, and a picture below each that shows one."""
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    notebook = nbformat.read(REPO_ROOT / "examples" / "svg_t2i_tour.ipynb", as_version=4)
    shows = [cell for cell in notebook.cells if cell.cell_type == "code" and "\nshow(" in f"\n{cell.source}"]
    assert len(shows) == 9
    assert all(any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in shows)  # as committed
    start = notebook.cells[1]
    environment = {"QUICKSTART": str(place / "outputs" / "quickstart"), "OMP_NUM_THREADS": "1"}
    start.source = f"import os\nos.environ |= {environment}\n{start.source}\nfrom dataclasses import replace\n"
    start.source += "pipeline.options = replace(pipeline.options, num_inference_steps=5)"
    for cell in shows:
        cell.outputs = []
    folder = {"metadata": {"path": str(REPO_ROOT / "examples")}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=folder).execute()
    assert all(any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in shows)


def test_python_about_diffusers_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    (code,) = re.findall(r"```python\n(.*?)```", (REPO_ROOT / "docs/sampling.md").read_text(), flags=re.DOTALL)
    names = {}
    exec(code, names)
    assert names["image"].size == (64, 64)
    assert type(names["same"]) is type(names["pipeline"])
    assert len(names["output"].seeds) == 1
