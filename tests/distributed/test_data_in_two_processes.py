"""Two processes over gloo against one: the same feature cache, and the same training on batches packed by tokens."""

import os
import subprocess
import sys

import pytest

from svg_t2i import cache_features, train
from svg_t2i.checkpoints.weights import read_transformer

BOTH = """
import sys
from autoencoder.common.config import load_config
from svg_t2i.cache_features import *
from svg_t2i import train

config = load_config(TrainConfig, sys.argv[2], sys.argv[3:])
with start_world() as world:
    start_logging(world)
    fill_caches(config, world, batch_size=32, shard_size=2, latent_dtype=torch.float32)
    train.run(config, world)
"""


def settings(toy_parts, folder):
    data = ["resolution=128", "crops_per_image=2", "micro_batch_tokens=180", f"feature_cache={folder / 'features'}"]
    overrides = [f"results_dir={folder / 'run'}", *(f"data.{value}" for value in data)]
    return ["--config", str(toy_parts / "train.yaml"), *overrides]


@pytest.fixture(scope="module")
def two(toy_parts, tmp_path_factory, repo_root):
    """A cache made, and a run on it, by two processes."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "both.py").write_text(BOTH)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(folder / "both.py"), *settings(toy_parts, folder)],
        env={**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 of 2 shards" in result.stdout  # of four, on the main rank
    return folder


def test_cache_and_weights_are_those_of_one_process(two, toy_parts, tmp_path):
    arguments = settings(toy_parts, tmp_path)
    cache_features.main([*arguments, "--shard_size", "2"])
    names = sorted(path.name for path in (two / "features").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "features").iterdir())
    assert len(names) == 4 + 2
    for name in names:
        assert (two / "features" / name).read_bytes() == (tmp_path / "features" / name).read_bytes()
    train.main(arguments)
    a, b = (read_transformer(run / "run/checkpoints/0000004", ema=False).state for run in (two, tmp_path))
    assert max((a[key] - b[key]).abs().max().item() for key in a) <= 1e-6
    assert a["final_layer.linear.weight"].abs().max() > 1e-4  # starts at zero
