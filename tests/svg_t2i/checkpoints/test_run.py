"""Checkpoints in the background: killed at any moment, pruned, verified; and copies, not views, of a changing state."""

import json
import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp

from autoencoder.common.config import UserError
from svg_t2i.checkpoints.run import Saver, load_checkpoint, newest_checkpoint, read_checkpoint_meta, save_checkpoint


def state(value, size=1000):
    tensors = {"a": torch.full((size,), float(value)), "b": torch.full((3, 5), float(value)), "step": torch.zeros(())}
    return {"model": tensors, "ema": {name: tensor + 1 for name, tensor in tensors.items()}}


def loaded(folder, size=1000):
    filled = state(-1, size)
    load_checkpoint(folder, filled)
    return filled


def assert_holds(folder, value, size=1000):
    for part, tensors in state(value, size).items():
        for name, tensor in tensors.items():
            assert torch.equal(loaded(folder, size)[part][name], tensor), (folder, part, name)


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_a_state_may_change_while_it_is_being_written(tmp_path, monkeypatch):
    hold, save = threading.Event(), dcp.save
    monkeypatch.setattr(dcp, "save", lambda *a, **k: (hold.wait(30), save(*a, **k))[1])
    saver, changing = Saver(tmp_path), state(1)
    saver.save(1, changing, {"note": "first"})
    for tensor in changing["model"].values():
        tensor.fill_(99.0)
    assert newest_checkpoint(tmp_path) is None  # save() did not wait
    hold.set()
    saver.close()
    assert_holds(newest_checkpoint(tmp_path, verify=True), 1)
    assert read_checkpoint_meta(tmp_path / "0000001")["note"] == "first"


def test_only_wanted_checkpoints_stay(tmp_path):
    saver = Saver(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 8):
        saver.save(step, state(step), {})
    saver.close()
    assert names(tmp_path) == ["0000004", "0000006", "0000007"]
    everything = Saver(tmp_path / "all")
    for step in range(1, 5):
        everything.save(step, state(step), {})
    everything.close()
    assert len(names(tmp_path / "all")) == 4


def test_a_flipped_bit_is_found(tmp_path, caplog):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step), {})
    shard = next((tmp_path / "0000002").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert newest_checkpoint(tmp_path).name == "0000002"  # names and sizes are right
    assert newest_checkpoint(tmp_path, verify=True).name == "0000001"
    assert f"damaged: {shard.name}" in caplog.text


@pytest.mark.parametrize("damage", ["no marker", "other meta"])
def test_uncommitted_checkpoint_is_passed_over(tmp_path, damage, caplog):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step), {})
    meta = tmp_path / "0000002" / "meta.json"
    if damage == "no marker":
        (tmp_path / "0000002" / "COMMITTED").unlink()
    else:
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"step": 3}))
    assert newest_checkpoint(tmp_path).name == "0000001"
    assert "not a whole checkpoint" in caplog.text


def test_failure_to_write_is_reported_by_the_next_save(tmp_path):
    root = tmp_path / "checkpoints"
    saver = Saver(root)
    (root / ".tmp-0000001").write_text("a file in the way")
    saver.save(1, state(1), {})
    with pytest.raises(UserError, match="checkpoints: a checkpoint could not be written"):
        saver.save(2, state(2), {})
    saver.close()


def save_for_ever(root, pipe):
    """Child process: one checkpoint after another, its step as content; tells of each save that has ended."""
    saver, step = Saver(root, keep_last=2), 0
    while True:
        step += 1
        saver.save(step, state(step, size=200_000), {})  # waits for the save before
        os.write(pipe, b"%d\n" % (step - 1))


def test_killed_at_any_moment_a_valid_checkpoint_is_left(tmp_path):
    rng = random.Random(0)
    interrupted = 0
    for attempt in range(10):
        root = tmp_path / str(attempt)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                save_for_ever(root, writing)
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as told:
            while told.readline() != "2\n":  # two saves are done
                pass
            time.sleep(rng.uniform(0, 0.06))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done = max((int(line) for line in told), default=2)
        interrupted += any(root.glob(".tmp-*"))
        newest = newest_checkpoint(root, verify=True)
        assert int(newest.name) >= done  # what had been reported as saved is not lost
        for folder in root.glob("0*"):
            assert read_checkpoint_meta(folder, verify=True)
        assert_holds(newest, int(newest.name), size=200_000)
        shutil.rmtree(root)
    assert interrupted >= 3  # else the kill came when nothing was being written


def test_writing_waits_for_no_stream_of_a_device(tmp_path, monkeypatch):
    """As with a GPU: the state was copied to the host once, and nothing waits for the training's stream again."""
    from torch.distributed.checkpoint import filesystem

    waits = []

    class Stream:
        device_type = "cuda"

        def wait_stream(self, other):
            waits.append(other)

        synchronize = record_event = lambda self, *_: waits.append(self)

    saver = Saver(tmp_path)
    monkeypatch.setattr(saver, "_staged", lambda state: (dict(state), None))  # there is no pinned memory here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream())
    monkeypatch.setattr(filesystem, "_get_available_device_type", lambda: "cuda")
    many = {"model": {f"w{i}": torch.full((600_000,), float(i)) for i in range(12)}}
    saver.save(1, many, {})
    saver.close()
    assert waits == []
    monkeypatch.undo()
    filled = {"model": {name: torch.empty(600_000) for name in many["model"]}}
    load_checkpoint(newest_checkpoint(tmp_path, verify=True), filled)
    assert all(torch.equal(filled["model"][name], tensor) for name, tensor in many["model"].items())
