"""The command that fills the table of reconstructions, as a user would run it, at a size of seconds."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

VIT = {"overrides": {"embed_dim": 32, "depth": 1, "num_heads": 1}, "outnorm": "per_image"}


def write_config(path, residual):
    dino = {"weights": "random", "overrides": {"embed_dim": 32, "depth": 1, "num_heads": 1}}
    dd = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 0, "z_channels": 40 if residual else 32}
    params = {"dinoconfig": dino, "ddconfig": dd, "extra_vit_config": VIT if residual else None}
    path.write_text(yaml.safe_dump({"model": {"params": params}}))


@pytest.fixture
def run_eval(tmp_path, repo_root):
    """run_eval(configs, *arguments) -> the finished process; without network weights, and without a network."""

    def run(configs, *arguments):
        environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NUM_WORKERS": "0"}
        environment |= {"TORCH_HOME": str(tmp_path / "torch"), "https_proxy": "http://127.0.0.1:9"}
        environment |= {"CONFIGS": configs, "RESOLUTIONS": "32 48", "OUTPUT": str(tmp_path / "out")}
        command = ["bash", str(repo_root / "autoencoder" / "run_eval.sh"), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    return run


def test_one_command_fills_the_table_and_goes_on_where_it_stopped(run_eval, tmp_path):
    (tmp_path / "photos").mkdir()
    for index in range(3):
        noise = np.random.default_rng(index).integers(0, 256, (60, 50 + 9 * index, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{index}.png")
    for name in ("pure", "residual"):
        write_config(tmp_path / f"{name}.yaml", residual=name == "residual")
    first = run_eval(f"{tmp_path}/absent.yaml {tmp_path}/pure.yaml", 1, "photos", "--device", "cpu")
    assert first.returncode == 2
    assert "absent.yaml was not evaluated" in first.stderr
    assert "Traceback" not in first.stderr
    assert "rfid is not available: InceptionV3 cannot be had" in first.stderr
    second = run_eval(f"{tmp_path}/pure.yaml {tmp_path}/residual.yaml", 1, "photos", "--device", "cpu")
    assert second.returncode == 0, second.stderr
    assert f"{tmp_path}/out/pure has results" in second.stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "out/table.md").open()]
    assert [row[:1] + row[2:4] for row in rows[2:]] == [
        [name, side, "3"] for name in ("pure", "residual") for side in ("32", "48")
    ]
    assert all(row[4] == row[7] == "n/a" and float(row[5]) > 0 and 0 < float(row[6]) < 1 for row in rows[2:])
    assert second.stdout.endswith((tmp_path / "out/table.md").read_text())


def test_without_settings_it_is_the_standard_run(run_eval, repo_root):
    script = (repo_root / "autoencoder" / "run_eval.sh").read_text()
    pattern = re.search(r"CONFIGS:-\$\(echo (\S+)\)", script)[1]
    configs = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True).stdout
    folder = repo_root / "autoencoder" / "configs" / "pre-trained"
    assert sorted(repo_root / "autoencoder" / name for name in configs.split()) == sorted(folder.iterdir())
    assert re.search(r"RESOLUTIONS:-([\d ]+)\}", script)[1].split() == ["256", "512", "1024"]
    result = run_eval("any.yaml", 1)
    assert result.returncode == 2
    assert "name a folder of images or a manifest" in result.stderr
