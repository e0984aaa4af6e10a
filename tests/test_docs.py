"""Commands in the README and docs/ name scripts, modules, options, configs and fields that exist."""

import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from svg_t2i.model import DiTConfig
from svg_t2i.settings import TrainConfig

REPO_ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [REPO_ROOT / "README.md", *sorted((REPO_ROOT / "docs").glob("*.md"))]
FOREIGN = ("conda", "pip", "hf", "python geneval", "(cd ELLA", "bash dpg_bench", "source", "pytest")


def commands(text: str) -> list[tuple[str, str]]:
    """(folder the command runs in, command) of all bash blocks; a `cd` holds to the end of its block."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        folder = "."
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("#")[0].split("&&"):
                command = command.strip()
                if command.startswith("cd "):
                    folder = command[3:]
                elif command:
                    found.append((folder, command))
    return found


def check(folder: str, command: str) -> None:
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    start = REPO_ROOT / folder
    if words[0] == "bash":
        script = start / words[1]
        assert script.is_file(), f"{command}: no {words[1]} in {folder}"
        text = script.read_text()
        module = re.search(r"-m (autoencoder|svg_t2i)\.(\w+)", text)
        source = "/".join(module.groups()) if module else None
        if "quickstart/recipe.py" in text:
            source = "scripts/quickstart/recipe.py"
        rest = words[2:]
    elif "-m" in words:
        source = words[words.index("-m") + 1].replace(".", "/")
        rest = words[words.index("-m") + 2 :]
    else:
        pytest.fail(f"{command}: neither a script nor a module of ours")
    if source:
        path = REPO_ROOT / (source if source.endswith(".py") else f"{source}.py")
        assert path.is_file(), f"{command}: no module {source}"
        known = "".join(p.read_text() for p in path.parent.glob("*.py"))
        for option in (word for word in rest if word.startswith("--")):
            assert f'"{option}"' in known, f"{command}: {source} knows no {option}"
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
