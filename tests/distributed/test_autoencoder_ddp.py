"""Two processes (gloo) against one with the same global batch, through the real entry."""

import os
import subprocess
import sys

import pytest
import torch

from autoencoder.train import main

NAME = "svg_autoencoder_P_dd_M_IN_stage1_bs64_256_gpu1_forTest"
ARGUMENTS = [
    "--config",
    f"configs/autoencoder/pure/{NAME}",
    "model.params.dinoconfig.weights=random",
    "model.params.dinoconfig.overrides={embed_dim: 32, depth: 1, num_heads: 1}",
    "model.params.embed_dim=32",
    "model.params.ddconfig={z_channels: 32, ch: 32, ch_mult: [1, 1, 1, 1, 1], num_res_blocks: 0}",
    "model.params.lossconfig.params.disc_ndf=8",
    "data.params.train_resol=64",
    "training.trainer.accelerator=cpu",
    "training.trainer.max_steps=3",
    "training.save_every_n_train_steps=2",
    "model.params.lossconfig.params.disc_start=4",  # the discriminator joins in the third step
]

pytestmark = pytest.mark.filterwarnings("ignore")


def read(folder, step):
    return torch.load(folder / NAME / "checkpoints" / f"step_{step:07d}.ckpt", weights_only=True)


def test_two_processes_equal_one(repo_root, tmp_path):
    arguments = [*ARGUMENTS, "data.params.batch_size=1", "training.accumulate_grad_batches=2"]
    result = subprocess.run(
        [sys.executable, "-m", "autoencoder.train", "--devices=2", *arguments, f"training.logdir={tmp_path}/two"],
        cwd=repo_root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step 3/3") == 1  # one process speaks
    main(["--devices=1", *ARGUMENTS, "data.params.batch_size=4", f"training.logdir={tmp_path}/one"])

    two, one = (read(tmp_path / folder, 2) for folder in ("two", "one"))
    assert two["ImageDataModule"] == one["ImageDataModule"] == {"position": 8, "seed": 0}
    for name, value in one["state_dict"].items():
        if name.startswith("decoder.") and name.endswith(".weight"):  # some biases have no gradient but rounding
            assert (two["state_dict"][name] - value).abs().mean() < 2e-6, name  # a step moves by up to 1e-4
    first, last = (read(tmp_path / "two", step)["state_dict"] for step in (2, 3))
    name = "loss.discriminator.main.0.weight"
    assert not torch.equal(first[name], last[name])
