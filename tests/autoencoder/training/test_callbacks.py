"""Checkpoints that survive what happens to runs, and when pictures are drawn."""

import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_lightning.utilities import rank_zero_only

from autoencoder.common.config import UserError
from autoencoder.training.callbacks import ConsoleLogger, ReconstructionGrid
from autoencoder.training.checkpoints import AtomicCheckpointIO, Checkpoints

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


NOT_ASKED = SimpleNamespace(stop=lambda trainer, saving: False)


def step_ended(callback, step, max_steps=99, rank=0, complete=True):
    """Play the end of a training step; -> what was saved."""
    saved = []
    trainer = SimpleNamespace(global_step=step, max_steps=max_steps, is_global_zero=rank == 0, optimizers=[])
    trainer.should_stop = False
    trainer.save_checkpoint = saved.append
    module = SimpleNamespace(step_complete=complete, trainer=trainer, parameters=list)
    callback.on_train_batch_end(trainer, module)
    return saved


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_speaks_and_tidies_up(tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    before = [".step_0000001.ckpt.7.tmp", "step_0000001.ckpt", "step_0000002.ckpt"]  # one of a run that was killed
    for name in before:
        (tmp_path / name).touch()
    checkpoints = Checkpoints(tmp_path, every=[3], keep=1, requests=NOT_ASKED)
    checkpoints.on_fit_start()
    assert step_ended(checkpoints, 3, rank=rank) == [tmp_path / "step_0000003.ckpt"]  # all processes take part
    ConsoleLogger(9).log_metrics({"train/rec_loss": 0.5}, step=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == (before if rank else ["last.ckpt", "step_0000002.ckpt"])
    assert capsys.readouterr().out == ("" if rank else "step 3/9  rec 0.5\n")


@pytest.mark.parametrize(
    ("step", "max_steps", "complete", "due"),
    [(6, 99, True, True), (4, 99, True, True), (5, 99, True, False), (5, 5, True, True), (6, 99, False, False)],
)
def test_checkpoints_are_saved_at_multiples_of_each_number_and_at_the_end(tmp_path, step, max_steps, complete, due):
    checkpoints = Checkpoints(tmp_path, every=[4, 6], keep=None, requests=NOT_ASKED)
    assert bool(step_ended(checkpoints, step, max_steps, rank=1, complete=complete)) is due
