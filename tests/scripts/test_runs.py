"""The recipes of runs/: each says what it needs, and starts what it says, with stand-ins for Slurm and for training.

What they start is tested elsewhere: tests/scripts/test_dit_scripts.py, tests/svg_t2i/training/test_adapters.py, and
`scripts/quickstart.sh --short` in .ci/run.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_commands import parsers

REPO_ROOT = Path(__file__).resolve().parents[2]
RUNS = sorted((REPO_ROOT / "runs").glob("*.sh"))
STAGES = ["stage1_256", "stage2_512", "stage3_1024", "stage4_sft"]


def start(name, *arguments, path=None, **environment):
    """(exit status, standard output, standard error) of a recipe; programs in `path` come before the system's."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "DATA_", "MASTER_"))}
    variables |= environment | ({"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"} if path else {})
    command = ["bash", str(REPO_ROOT / "runs" / name), *arguments]
    done = subprocess.run(command, env=variables, cwd=REPO_ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def program(path, text):
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_recipe_says_what_it_needs(path):
    text = path.read_text()
    header = text.split("\nset -euo pipefail")[0]
    for what in ("Machine:", "[Tt]ime", "[Pp]rice", "Data:", "Out:"):
        assert re.search(rf"^# .*{what}", header, flags=re.MULTILINE), f"{path.name} does not say {what}"
    subprocess.run(["bash", "-n", path], check=True)
    for name in re.findall(r"\b(?:scripts|configs|runs)/[\w/]+\.(?:sh|yaml)", text):
        assert (REPO_ROOT / name).is_file(), name


def test_the_stages_run_one_after_another(tmp_path):
    launch = program(tmp_path / "launch.sh", 'echo "$CONFIG $DATA_PATH $*"\n')
    status, out, _ = start("node_8gpus.sh", "optim.lr=1e-4", LAUNCH=str(launch), DATA_PATH="/data", DATA_SFT="/sft")
    assert status == 0
    wanted = [
        f"configs/svg_t2i/{stage}.yaml {'/sft' if stage == 'stage4_sft' else '/data'} optim.lr=1e-4" for stage in STAGES
    ]
    assert out.splitlines() == wanted
    assert all((REPO_ROOT / line.split()[0]).is_file() for line in wanted)
    failing = program(tmp_path / "failing.sh", 'echo "$CONFIG"; exit 75\n')
    status, out, _ = start("node_8gpus.sh", LAUNCH=str(failing), DATA_PATH="/data")
    assert (status, len(out.splitlines())) == (75, 1)  # no stage begins with half of the one before


@pytest.mark.parametrize(
    ("name", "variable"), [("node_8gpus.sh", "DATA_PATH"), ("full_64gpus.sh", "DATA_PATH"), ("card_24gb.sh", "DATA")]
)
def test_a_missing_variable_is_named(name, variable):
    status, _, error = start(name)
    assert status != 0
    assert f"{variable}: set {variable} to" in error


def test_jobs_of_the_stages_wait_for_each_other(tmp_path):
    count = tmp_path / "count"
    submit = program(
        tmp_path / "submit",
        f'echo "$CONFIG $DATA_PATH $*" >> {count}; echo $((100 + $(wc -l < {count})))\n',
    )
    status, out, _ = start("full_64gpus.sh", SUBMIT=str(submit), DATA_PATH="/data", TURNS="3")
    assert status == 0
    assert out.splitlines() == [f"{stage}: job {101 + i}" for i, stage in enumerate(STAGES)]
    lines = count.read_text().splitlines()
    assert lines[0] == "configs/svg_t2i/stage1_256.yaml /data --array=1-3%1 runs/slurm.sh"
    assert lines[3] == "configs/svg_t2i/stage4_sft.yaml /data --dependency=afterany:103 --array=1-3%1 runs/slurm.sh"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (2, False)])
def test_a_slurm_job_is_queued_again_where_it_was_asked_to_end(tmp_path, code, requeued):
    """Stand-ins: srun runs the task of machine 1 of 2, python says what it was given."""
    program(tmp_path / "srun", 'SLURM_PROCID=1 exec "$@"\n')
    program(tmp_path / "python", f'echo "$*"; exit {code}\n')
    called = tmp_path / "called"
    program(tmp_path / "scontrol", f'echo "$*" >> {called}; echo node-a; echo node-b\n')
    slurm = {
        "SLURM_JOB_ID": "41234",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_NODELIST": "node-[a-b]",
    }
    slurm |= {"SLURM_SUBMIT_DIR": str(REPO_ROOT), "DATA_PATH": "/data"}
    status, out, _ = start("slurm.sh", "optim.lr=1e-4", path=tmp_path, **slurm)
    assert status == code
    assert "--nnodes 2 --node_rank 1 --master_addr node-a --master_port 21234 --nproc_per_node 4" in out
    assert "data.path=/data optim.lr=1e-4" in out
    assert ("requeue 41234" in called.read_text()) == requeued
    start("slurm.sh", path=tmp_path, **slurm, SLURM_ARRAY_TASK_ID="1")
    assert called.read_text().count("requeue") == requeued  # in an array the next turn goes on


def test_the_commands_of_the_small_card_exist(tmp_path):
    program(tmp_path / "python", 'echo "$*"\n')
    status, out, _ = start("card_24gb.sh", "lora.rank=8", path=tmp_path, DATA="photos", PROMPT="a red fox")
    assert status == 0
    lines = out.splitlines()
    modules = ["svg_t2i.inspect_data", "svg_t2i.train", "svg_t2i.sample"]
    assert [line.split()[1] for line in lines] == modules
    for module, line in zip(modules, lines):
        known = {name for parser in parsers(module).values() for name in parser._option_string_actions}
        assert set(re.findall(r"--\w+", line)) <= known
    assert "data.path=photos results_dir=results/my_lora init_from=svg_t2i/pre-trained lora.rank=8" in lines[1]


def test_the_recipe_of_a_cpu_passes_its_options_on(tmp_path):
    """With the quickstart's scripts in another folder, so that nothing is trained."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "runs").mkdir()
    for name in ("quickstart", "quickstart_lora"):
        program(tmp_path / "scripts" / f"{name}.sh", f'echo "{name} $*"\n')
    shutil.copy(REPO_ROOT / "runs" / "cpu.sh", tmp_path / "runs")
    done = subprocess.run(
        ["bash", tmp_path / "runs" / "cpu.sh", "--short"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == [
        "quickstart --output outputs/cpu/quickstart --short",
        "quickstart_lora --quickstart outputs/cpu/quickstart --output outputs/cpu/star --short",
    ]
