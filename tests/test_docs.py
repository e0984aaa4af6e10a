"""Commands in the README and docs/ name what exists, and those that need no download run, at toy size.

Of the rest `ELSEWHERE` says which test runs the same script or sub-command, or what they need.
"""

import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import pytest
from PIL import Image

from autoencoder.common.config import load_config
from autoencoder.sources.opening import open_source
from svg_t2i.planning.gpus import find_gpu
from svg_t2i.planning.training import plan_training
from svg_t2i.training.settings import TrainConfig
from svg_t2i.transformer.config import DiTConfig
from tests.test_commands import parsers

REPO_ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [REPO_ROOT / "README.md", REPO_ROOT / "CONTRIBUTING.md", *sorted((REPO_ROOT / "docs").glob("*.md"))]
FOREIGN = ("conda", "python3 -m venv", "ruff", "pip", "hf", "python geneval", "(cd ELLA", "source", "pytest")


def commands(text: str) -> list[tuple[str, str]]:
    """(folder the command runs in, command) of all bash blocks, which start and end at the repository's root."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        folder, variables = ".", {}
        for line in block.replace("\\\n", " ").splitlines():
            command = line.split("#")[0].strip()
            for name, value in variables.items():
                command = command.replace(f"${name}", value)
            if command.startswith("cd "):
                folder = os.path.normpath(Path(folder, command[3:]))
            elif assignment := re.fullmatch(r"(\w+)=(\S+)", command):
                variables[assignment[1]] = assignment[2]
            elif command:
                found.append((folder, command))
        assert folder == ".", f"a block ends in {folder}: the next one starts from the root\n{block}"
    return found


def check(folder: str, command: str) -> None:
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    start = REPO_ROOT / folder
    if words[0] == "bash":
        script = start / words[1]
        assert script.is_file(), f"{command}: no {words[1]} in {folder}"
        text = script.read_text()
        module = re.search(r"-m (autoencoder|svg_t2i)\.(\w+)", text)
        module = ".".join(module.groups()) if module else None
        rest = words[2:]
    elif "-m" in words:
        module, text = words[words.index("-m") + 1], ""
        rest = words[words.index("-m") + 2 :]
    else:
        pytest.fail(f"{command}: neither a script nor a module of ours")
    known = set(re.findall(r"--\w+", text))  # a script names its own at its top
    if module:
        known |= {name for parser in parsers(module).values() for name in parser._option_string_actions}
    for option in (word for word in rest if word.startswith("--")):
        assert option in known, f"{command}: there is no {option}"
    for word in rest:
        if word.startswith("configs/") and "*" not in word:
            assert any((base / (word + end)).exists() for base in (start, REPO_ROOT) for end in ("", ".yaml")), (
                f"{command}: {word} does not exist"
            )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(document):
    for folder, command in commands(document.read_text()):
        if not command.startswith(FOREIGN):
            check(folder, command)


def test_the_readme_names_the_published_commands():
    listed = commands((REPO_ROOT / "README.md").read_text())
    published = [
        ("autoencoder", "bash run_train.sh 1 configs/pure/svg_autoencoder_P_dd_M_IN_stage1_bs64_256_gpu1_forTest"),
        ("svg_t2i", "bash scripts/run_train_1gpus_forTest.sh 0"),
        ("svg_t2i", "bash scripts/run_train_8gpus.sh"),
        ("svg_t2i", "bash scripts/sample.sh"),
    ]
    assert [entry for entry in published if entry not in listed] == []


FLAGS = """data_path results_dir model max_steps global_bsz micro_bsz resol max_cap_len global_seed num_workers
log_every ckpt_every data_parallel checkpointing precision grad_precision lr no_auto_resume resume init_from grad_clip
wd qk_norm caption_dropout_prob snr_type mu no_shift single_shape autoencoder_path gemma2b"""


def test_every_published_flag_is_listed_with_keys_that_exist():
    lines = (REPO_ROOT / "docs" / "flags.md").read_text().splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:4] for line in lines if line.startswith("|")]
    listed = {match[1]: row for row in rows if (match := re.match(r" `--(\w+)", row[0]))}
    assert sorted(listed) == sorted(FLAGS.split())
    for flag, (_, keys, notes) in listed.items():
        assert re.search(r"`[a-z]", keys) or (keys.strip() == "–" and len(notes) > 40), flag  # no key: a reason
    for _, *cells in rows:
        for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)(?:: \w+)?`", cells[0]):
            settings = TrainConfig
            for name in key.split("."):
                assert is_dataclass(settings), key
                assert name in {field.name for field in fields(settings)}, key
                settings = DiTConfig if name == "model_overrides" else get_type_hints(settings)[name]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document):
    """In code spans such as `flow/solvers.py`, from the repository's root, a package or a room."""
    roots = ("autoencoder", "svg_t2i", "scripts", "configs/svg_t2i", "configs/autoencoder/demo")
    folders = [REPO_ROOT, *(REPO_ROOT / root for root in roots)]
    folders += [path.parent for path in REPO_ROOT.glob("[as]*/*/__init__.py")]
    for name in re.findall(r"`([\w./]+\.(?:py|sh|yaml))`", document.read_text()):
        assert any((folder / name).exists() for folder in folders), f"{document.name} names {name}"


def test_the_tree_lists_every_room():
    text = (REPO_ROOT / "docs" / "architecture.md").read_text()
    (tree,) = re.findall(r"```\n(autoencoder/.*?)```", text, flags=re.DOTALL)
    for package in ("autoencoder", "svg_t2i"):
        rooms = {path.parent.name for path in (REPO_ROOT / package).glob("*/__init__.py")}
        part = tree.split(f"{package}/ ")[1].split("\nsvg_t2i/")[0].split("\nconfigs/")[0]
        assert set(re.findall(r"^  (\w+)/ ", part, flags=re.MULTILINE)) == rooms


def test_the_readme_fits_a_reader():
    assert len((REPO_ROOT / "README.md").read_text().splitlines()) <= 200


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


STAGES = ("stage1_256", "stage2_512", "stage3_1024", "stage4_sft")


@pytest.mark.parametrize("stage", STAGES)
def test_the_numbers_of_the_recipe_are_those_of_the_files(stage):
    (row,) = re.findall(rf"^\| `{stage}` \|(.*)\|$", (REPO_ROOT / "docs" / "recipe.md").read_text(), flags=re.MULTILINE)
    side, batch, steps, images, tokens, operations, total, hours = (float(cell) for cell in row.split("|"))
    config = load_config(TrainConfig, REPO_ROOT / "configs" / "svg_t2i" / f"{stage}.yaml")
    found = plan_training(config, find_gpu("h100"), gpus=64)
    assert (side, batch, steps) == (config.data.resolution, config.train.global_batch_size, config.train.max_steps)
    assert images == pytest.approx(batch * steps / 1e6, rel=0.01)
    assert tokens == pytest.approx(found.image_tokens * batch * steps / 1e9, rel=0.01)
    assert operations == pytest.approx(found.flops_per_image / 1e12, rel=0.01)
    assert total == pytest.approx(found.flops_per_image * batch * steps / 1e18, rel=0.01)
    assert hours == pytest.approx(64 * steps * found.best.seconds / 3600, rel=0.01)


# ---- running them ---------------------------------------------------------------------------------------------------

EDITS = ("variation", "image_to_image", "inpaint", "interpolate", "retrieve")
# Beginning of a command → what is added here to make it small. They run in this order, each on the results of others.
AT_TOY_SIZE = {
    "python -m autoencoder.reconstruct": ["--resolution", "64"],
    "python -m autoencoder.evaluate_reconstruction": ["--resolution", "64"],
    "python -m autoencoder.measure_latents": ["--resolution", "64"],
    "torchrun --nproc_per_node 2 -m svg_t2i.cache_features": ["--batch_size", "64"],
    "torchrun --nproc_per_node 2 -m svg_t2i.train": ["train.max_steps=1"],
    "python -m svg_t2i.inspect_data": [],
    "python -m svg_t2i.plan": [],
    "python -m svg_t2i.sample --checkpoint outputs/": ["--num_inference_steps", "2"],
    **{f"python -m svg_t2i.sample {verb}": ["--num_inference_steps", "2"] for verb in EDITS[:-1]},
    f"python -m svg_t2i.sample {EDITS[-1]}": [],
    "python -m svg_t2i.benchmark folder --checkpoint": ["--limit", "2", "--num_inference_steps", "2"],
    "python -m svg_t2i.benchmark folder --images": [],
    "python -m svg_t2i.benchmark shapes": ["--limit", "2", "--num_inference_steps", "2"],
    "python -m svg_t2i.benchmark sweep --checkpoint outputs/quickstart/transformer --over": [
        "--num_images",
        "4",
        "--num_inference_steps",
        "2",
    ],
}
ELSEWHERE = {
    "python -m svg_t2i.benchmark sweep --checkpoint outputs/quickstart/transformer --preset": (
        "tests/svg_t2i/test_benchmark.py; six times all scenes would take minutes here"
    ),
    "conda": "the environment of the tests is such a one",
    "hf download": "a download",
    "pip": "the same",
    "bash scripts/quickstart.sh": "`--short` runs in .ci/run, its steps in the fixture `quickstart`",
    "bash scripts/quickstart_lora.sh": "`--short` runs in .ci/run",
    "python -m benchmarks.ablation": "tests/scripts/test_ablation.py; its runs take minutes each",
    "python -m svg_t2i.train --config configs/svg_t2i/finetune_lora.yaml": "tests/svg_t2i/training/test_adapters.py",
    "python -m svg_t2i.sample --checkpoint results/my_lora": "tests/svg_t2i/training/test_adapters.py",
    "python -m svg_t2i.sample --checkpoint pre-trained --lora": "tests/svg_t2i/test_diffusers.py",
    "python -m svg_t2i.export results/my_lora": "tests/svg_t2i/training/test_adapters.py",
    "bash scripts/test.sh": "runs in .ci/run",
    "pytest tests/": "runs with all tests",
    "python3 -m venv": "the environment of the tests is such a one",
    "ruff": "runs in .ci/run",
    "bash run_train.sh": "tests/scripts/test_run_train.py",
    "bash run_eval.sh": "tests/scripts/test_run_train.py",
    "bash scripts/run_train_": "tests/scripts/test_dit_scripts.py",
    "bash scripts/sample.sh": "tests/scripts/test_sample_script.py",
    "python -m svg_t2i.app": "tests/svg_t2i/test_app.py",
    "torchrun --nproc_per_node 8 -m svg_t2i.benchmark geneval": "tests/svg_t2i/test_benchmark.py",
    "torchrun --nproc_per_node 8 -m svg_t2i.benchmark dpg": "tests/svg_t2i/test_benchmark.py",
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


def without_variables(command: str) -> str:
    return re.sub(r"^([A-Z_]+=\S*\s+)*", "", command)


@pytest.mark.filterwarnings("ignore:RANDOM ENCODER")
def test_commands_run_one_after_another(place, monkeypatch):
    """As written but for options that make them small, on what those before them left."""
    monkeypatch.chdir(place)
    found = [command for document in DOCUMENTS for _, command in commands(document.read_text())]
    for command in found:
        for start, smaller in AT_TOY_SIZE.items():
            if command.startswith(start):
                run(*shlex.split(command)[1:], *smaller)
    made = [
        "reconstructions/sheet.png", "evaluation/table.md", "latent_stats.safetensors", "cache",
        "from_cache/config.yaml", "circles/data.json",
        *(f"{verb}/data.json" for verb in EDITS[:-1]), "retrieve/matches.json", "benchmark/folder/metrics.json",
        "benchmark/samples/metrics.json", "benchmark/shapes/grid.png", "benchmark/sweep/sweep.csv",
    ]  # fmt: skip
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
