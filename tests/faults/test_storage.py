"""Folders, disks and files that fail: one line that says so, and nothing that was saved is lost."""

import errno
import json
import os
import shutil
import socket
import time
import zipfile

import pytest
import torch

from autoencoder.common import durable, lock
from autoencoder.common.config import UserError
from autoencoder.common.lock import FILE_NAME, RunLock
from autoencoder.common.weights import read_file

pytestmark = pytest.mark.filterwarnings("ignore")


def flip(path):
    """One bit in the middle of a file, where tensors are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, cut, os.truncate])
def test_the_newest_checkpoint_is_damaged(stage, tmp_path, damage, capfd, caplog):
    stage.main(tmp_path, stage.steps(2))
    damage(stage.path(tmp_path, 2), *([0] if damage is os.truncate else []))
    stage.main(tmp_path, stage.steps(3))
    said = capfd.readouterr().out + caplog.text
    assert "trying an older checkpoint" in said
    assert "resum" in said
    assert stage.saved(tmp_path) == [1, 2, 3]
    stage.main(tmp_path, stage.steps(4))  # and all that is there now is whole


def test_all_checkpoints_are_damaged(stage, tmp_path):
    stage.main(tmp_path, stage.steps(2))
    for step in (1, 2):
        flip(stage.path(tmp_path, step))
    before = {path: path.read_bytes() for path in (stage.path(tmp_path, step) for step in (1, 2))}
    with pytest.raises(UserError, match="none of the checkpoints there is whole"):
        stage.main(tmp_path, stage.steps(3))
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_truncated_last_checkpoint_of_its_own(tmp_path, stage):
    """Copied without its link, as `cp -L` or an upload does."""
    if stage.name == "dit":
        pytest.skip("there is no such file")
    stage.main(tmp_path, stage.steps(2))
    last = stage.results(tmp_path) / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    last.unlink()
    last.write_bytes(content[:-1000])
    stage.main(tmp_path, stage.steps(3))
    assert last.is_symlink()
    assert last.resolve().name == "step_0000003.ckpt"


@pytest.mark.parametrize("member", ["data.pkl", "data/0", "version"])
def test_a_flipped_bit_anywhere_in_a_torch_file_is_seen(tmp_path, member):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"a": torch.arange(1000.0)}}, path)
    read_file(path, "checkpoint", verify=True)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(member))
        start = content.index(archive.read(info), info.header_offset)
    damaged = bytearray(content)
    damaged[start + info.file_size // 2] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=str(path)):
        read_file(path, "checkpoint", verify=True)


def test_a_clock_that_was_set_back_keeps_the_newest(stage, tmp_path):
    stage.main(tmp_path, stage.steps(2))
    for step in (1, 2):
        os.utime(stage.path(tmp_path, step), (time.time() + 1e6,) * 2)
    stage.main(tmp_path, stage.steps(4), f"{stage.keep}=2")
    assert stage.saved(tmp_path) == [3, 4]


def test_a_full_disk_is_seen_before_a_save(stage, tmp_path, monkeypatch, capfd):
    usage = shutil.disk_usage(tmp_path)
    full = type(usage)(usage.total, usage.total - 1000, 1000)
    with monkeypatch.context() as patch:
        stage.at_step(patch, 2, lambda: setattr(shutil, "disk_usage", lambda _: full))
        assert stage.fork(tmp_path, stage.steps(3)) == 2
    error = capfd.readouterr().err
    assert "no space left for a checkpoint: needs" in error
    assert "1e-06 GB free" in error
    assert "Traceback" not in error
    assert stage.saved(tmp_path) == [1]
    stage.main(tmp_path, stage.steps(2))
    assert stage.saved(tmp_path) == [1, 2]


def test_a_disk_that_fills_up_during_a_save(stage, tmp_path, monkeypatch, capfd):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        stage.at_step(patch, 2, lambda: setattr(os, "fsync", fail))  # the data of a file reach the disk late
        assert stage.fork(tmp_path, stage.steps(3)) == 2
    error = capfd.readouterr().err
    assert "no space left for a checkpoint" in error
    assert "Traceback" not in error
    stage.main(tmp_path, stage.steps(2))
    assert stage.saved(tmp_path)[-1] == 2


def test_a_folder_that_is_removed(stage, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"

    def remove():
        stage.wait_for_the_first(folder)
        shutil.rmtree(stage.results(folder))

    stage.at_step(monkeypatch, 2, remove)
    assert stage.fork(folder, stage.steps(3)) == 2
    error = capfd.readouterr().err
    assert "is no longer this run's: it was deleted; stopped without another save" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_folder_that_is_a_file(stage, tmp_path, below, capfd):
    (tmp_path / "file").write_text("mine")
    assert stage.fork(tmp_path / "file" / below, stage.steps(1)) == 2
    assert "there is a file of this name; choose another folder" in capfd.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")  # the tests may run as root, who is never refused

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises(UserError, match=r"results_dir=.* cannot be written \(Permission denied\); change its permiss"):
        durable.make_folder(tmp_path / "a", "results_dir")


# --- two runs in one folder ---


def test_a_second_run_is_told_who_works_there(stage, tmp_path):
    with (
        RunLock(stage.results(tmp_path), stage.setting),
        pytest.raises(UserError, match=f"in use by another run: process {os.getpid()} on {socket.gethostname()}"),
    ):
        stage.main(tmp_path, stage.steps(1))
    assert stage.saved(tmp_path) == []
    stage.main(tmp_path, stage.steps(1))
    assert stage.saved(tmp_path) == [1]
    assert not (stage.results(tmp_path) / FILE_NAME).exists()


def test_a_run_whose_folder_was_taken_stops_without_a_save(stage, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    path = stage.results(tmp_path) / FILE_NAME

    def take():
        stage.wait_for_the_first(tmp_path)
        path.write_text(json.dumps({"token": "other", "pid": 17, "host": "elsewhere"}))
        time.sleep(0.5)

    stage.at_step(monkeypatch, 2, take)
    assert stage.fork(tmp_path, stage.steps(3)) == 2
    assert "no longer this run's: process 17 on elsewhere works there" in capfd.readouterr().err
    assert stage.saved(tmp_path) == [1]
    assert json.loads(path.read_text())["token"] == "other"  # it is not ours to remove


def hold(folder, **entries):
    """The lock file of another run."""
    folder.mkdir(exist_ok=True)
    path = folder / FILE_NAME
    path.write_text(json.dumps({"token": "other", "pid": 17, "host": "elsewhere", "job": "j1"} | entries))
    return path


def test_a_holder_that_no_longer_beats_loses_the_folder(tmp_path):
    path = hold(tmp_path / "run")
    long_ago = time.time() - 2 * lock.DEAD_AFTER
    os.utime(path, (long_ago, long_ago))
    with RunLock(tmp_path / "run", "results_dir") as own:
        assert own.lost is None
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_holder_that_was_killed_here_loses_the_folder_at_once(tmp_path):
    child = os.fork()
    if child == 0:
        RunLock(tmp_path, "results_dir").__enter__()
        os._exit(9)
    os.waitpid(child, 0)
    assert (tmp_path / FILE_NAME).exists()
    began = time.monotonic()
    with RunLock(tmp_path, "results_dir"):
        assert time.monotonic() - began < 5


def test_a_holder_elsewhere_that_beats_keeps_the_folder(tmp_path):
    path = hold(tmp_path / "run")
    child = os.fork()
    if child == 0:
        for _ in range(100):
            time.sleep(0.1)
            os.utime(path)
        os._exit(0)
    try:
        with pytest.raises(UserError, match="process 17 on elsewhere, job j1"), RunLock(tmp_path / "run", "x"):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert json.loads(path.read_text())["token"] == "other"


def test_of_many_that_start_at_once_one_gets_the_folder(tmp_path):
    path = hold(tmp_path / "run")
    os.utime(path, (0, 0))  # a dead holder, whom all want to replace
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with RunLock(tmp_path / "run", "results_dir"):
                    time.sleep(3)
                    code = 0
            except UserError:
                code = 2
            finally:
                os._exit(code)
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [0, 2, 2, 2, 2, 2]


def test_an_empty_folder_that_was_made_for_nothing_is_removed(tmp_path):
    with RunLock(tmp_path / "a" / "b", "results_dir"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()


def test_a_moment_of_trouble_does_not_cost_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with RunLock(tmp_path, "results_dir") as own:
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.read_text", lambda *_, **__: os.stat("/proc/self/mem/x"))  # NotADirectoryError
            patch.setattr(os, "utime", lambda *_: os.stat("/absent"))
            time.sleep(0.1)
            own.check(look=True)
        os.utime(own.path, (0, 0))
        time.sleep(0.2)
        assert own.path.stat().st_mtime > 0  # it goes on beating
        own.check(look=True)
