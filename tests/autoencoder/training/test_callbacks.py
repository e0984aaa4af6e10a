"""Checkpoints that survive what happens to runs, and when pictures are drawn."""

import os
import signal
import time

import numpy as np
import pytest
import torch

from autoencoder.common.config import UserError
from autoencoder.training.callbacks import AtomicCheckpointIO, ReconstructionGrid

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_killed_run_goes_on_as_if_nothing_had_happened(toy, assert_equal):
    settings = ["training.trainer.max_steps=20", "training.save_every_n_train_steps=2", "training.keep_last_k=2"]
    settings += ["model.params.lossconfig.params.disc_start=8", "training.ema_decay=0.9"]
    whole = toy.run(*settings)
    killed = toy.folder / "killed" / toy.name / "checkpoints"
    for last in (2, 8):
        if not (child := os.fork()):
            try:
                toy.run(*settings, logdir="killed")
            finally:
                os._exit(0)
        deadline = time.monotonic() + 60
        while not (killed / f"step_{last:07d}.ckpt").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(np.random.default_rng().uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        time.sleep(1)  # event files of one second are read in the order of their process numbers
    resumed = toy.run(*settings, logdir="killed")
    for part in ("state_dict", "ema_state_dict", "optimizer_states", "ImageDataModule", "global_step"):
        assert_equal(toy.read(resumed, 20)[part], toy.read(whole, 20)[part], part)
    assert sorted(path.name for path in killed.iterdir()) == ["last.ckpt", "step_0000018.ckpt", "step_0000020.ckpt"]
    losses = [toy.scalars(folder)[0]["train/rec_loss"] for folder in (resumed, whole)]
    assert losses[0] == losses[1]


def test_weights_that_are_not_finite_are_not_saved(toy):
    quiet = ["training.log_every_n_steps=100", "training.save_every_n_train_steps=1"]
    folder = toy.run("training.trainer.max_steps=1", *quiet)
    with pytest.raises(UserError, match="weights are not finite at step 2, and nothing was saved"):
        toy.run("training.trainer.max_steps=9", *quiet, "model.base_learning_rate=1e30", "training.warmup_steps=0")
    assert [path.stem for path in (folder / "checkpoints").glob("step_*")] == ["step_0000001"]


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path, files = tmp_path / "last.ckpt", AtomicCheckpointIO()
    files.save_checkpoint({"state_dict": {"a": torch.ones(2)}}, path)

    def interrupted(checkpoint, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.save_checkpoint({"state_dict": {"a": torch.zeros(2)}}, path)
    assert torch.equal(files.load_checkpoint(path)["state_dict"]["a"], torch.ones(2))


def test_pictures_are_drawn_at_powers_of_two_then_regularly():
    assert [step for step in range(1, 40) if ReconstructionGrid(12).due(step)] == [1, 2, 4, 8, 12, 24, 36]
