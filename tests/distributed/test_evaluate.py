"""Two gloo processes against one: evaluation and statistics, to the last bit."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

# A process that forks, as imports take longest; torchrun would set the same variables.
SCRIPT = """
import os, socket, sys, warnings
import torch
from torch import nn
from autoencoder import evaluate_reconstruction, measure_latents

warnings.simplefilter("ignore")


class TinyFeatures(nn.Module):
    num_features = 12

    def forward(self, images):
        return images[:, :, 3, 2:6].float().flatten(1) / 255


class Distance(nn.Module):
    def forward(self, x, y):
        return (x - y).square().mean(dim=(1, 2, 3), keepdim=True)


networks = evaluate_reconstruction.Networks(lpips=Distance(), inception=TinyFeatures())
evaluate_reconstruction.Networks.build = lambda device: networks
measure_latents.CHUNKS_PER_ROUND = 2
folder = sys.argv[1]
shared = [f"{folder}/ae", "--data", f"{folder}/photos", "--resolution", "64", "32", "--device", "cpu"]
shared += ["--batch-size", "2"]


def evaluate(name):
    evaluate_reconstruction.main([*shared, "--output", f"{folder}/{name}"])


def evaluate_one_chunk(name):
    evaluate_reconstruction.main([*shared, "--batch-size", "16", "--output", f"{folder}/one_chunk_{name}"])


def measure(name):
    measure_latents.main([*shared, "--output", f"{folder}/{name}.safetensors", "--max-aspect", "4"])


def in_two_processes(entry):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            try:
                entry("of2")
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert statuses == [0, 0], statuses
    del os.environ["WORLD_SIZE"]


for entry in (evaluate, evaluate_one_chunk, measure):
    in_two_processes(entry)
for entry in (evaluate, evaluate_one_chunk, measure):
    entry("of1")
"""


@pytest.fixture
def folder(tmp_path):
    """A saved autoencoder and 11 images, one of them broken: the last chunk is partial, and one process has fewer."""
    from autoencoder.model import SVGAutoencoder

    dino = {"weights": "random", "overrides": {"embed_dim": 48, "depth": 1, "num_heads": 3}}
    dd = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 0, "z_channels": 48}
    config = {"model": {"params": {"dinoconfig": dino, "ddconfig": dd}}}
    (tmp_path / "ae.yaml").write_text(yaml.safe_dump(config))
    SVGAutoencoder.from_config(tmp_path / "ae.yaml").save_pretrained(tmp_path / "ae")
    rng = np.random.default_rng(3)
    (tmp_path / "photos").mkdir()
    for index in range(11):
        shape = (60 + 9 * index, 130 - 8 * index, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / "photos" / f"{index:02}.png")
    (tmp_path / "photos" / "04.png").write_text("broken")
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


@pytest.mark.filterwarnings("ignore:RANDOM ENCODER")
def test_two_processes_find_what_one_does(folder, repo_root):
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "script.py"), str(folder)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    for folders in (("of1", "of2"), ("one_chunk_of1", "one_chunk_of2")):  # one chunk: the other process has nothing
        reports = [json.loads((folder / name / "metrics.json").read_text()) for name in folders]
        for report in reports:
            del report["seconds"]
        assert reports[0] == reports[1]  # fp64 numbers, rFID among them: equal to the last bit
        assert [result["images"] for result in reports[0]["results"]] == [10, 10]
        assert reports[0]["results"][0]["rfid"] > 0
        assert reports[0]["unreadable"] == 1
        for name in ("images.csv", "metrics.csv"):
            assert len({(folder / one / name).read_bytes() for one in folders}) == 1
    for suffix in ("", "-32", "-64"):
        one, two = (load_file(folder / f"of{count}{suffix}.safetensors") for count in (1, 2))
        assert torch.equal(one["mean"], two["mean"])
        assert torch.equal(one["std"], two["std"])
