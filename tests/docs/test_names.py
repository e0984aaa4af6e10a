"""Commands, files, links and rooms in the README and docs/ are named as they are."""

import re
import shlex
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest

from svg_t2i.training.settings import TrainConfig
from svg_t2i.transformer.config import DiTConfig
from tests.docs.documents import DOCUMENTS, REPO_ROOT, commands
from tests.test_commands import parsers

FOREIGN = ("conda", "python3 -m venv", "ruff", "pip", "uv", "hf", "python geneval", "(cd ELLA", "source", "pytest")


def check(folder: str, command: str) -> None:
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    start = REPO_ROOT / folder
    if words[0] == "bash":
        script = start / words[1]
        assert script.is_file(), f"{command}: no {words[1]} in {folder}"
        text = script.read_text()
        module = re.search(r"-m ((?:autoencoder|svg_t2i)\.\w+)(?![\w.])", text)  # not that of common.launch
        module = module[1] if module else None
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
