"""Indexes of large files: the same lines as in memory, shared, made once, renewed when their file changes."""

import os
import pickle
import threading
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autoencoder.sources import spans as spans_module
from autoencoder.sources.manifest import Manifest
from autoencoder.sources.source import Reading
from autoencoder.sources.spans import open_lines

LINES = [b'{"path": "%d.png", "prompt": "%s"}' % (i, b"x" * (1 + i % 50)) for i in range(300)]


@pytest.fixture
def large(monkeypatch):
    """Every file is large, and its blocks and chunks are shorter than many lines."""
    monkeypatch.setattr(spans_module, "MAPPED_BYTES", 0)
    monkeypatch.setattr(spans_module, "BLOCK_BYTES", 16)
    monkeypatch.setattr(spans_module, "CHUNK_BYTES", 64)
    monkeypatch.delenv("SVG_T2I_INDEX", raising=False)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n  \n", b""], ids=["unix", "windows", "blank", "no newline"])
def test_lines(large, tmp_path, end):
    path = tmp_path / "m.jsonl"
    content = b"\n \n" + (end or b"\n").join(LINES) + end
    path.write_bytes(content)
    lines = open_lines(path)
    assert [content[slice(*lines[i])].strip() for i in range(len(lines))] == LINES
    assert list(lines) == [lines[i] for i in range(300)]
    (index,) = (tmp_path / ".index").iterdir()
    assert len(pickle.dumps(lines)) < 500  # its name, not its numbers
    assert pickle.loads(pickle.dumps(lines))[7] == lines[7]
    counts = np.load(index)
    assert counts.shape == (-(-len(content) // 16) + 1,)
    assert counts.dtype == np.int64
    assert counts[-1] == 300


def pieces():
    """Files of lines and blanks that end anywhere."""
    return st.lists(st.sampled_from([b"\n", b"\r\n", b" ", b"\t", b"{}", b"\0", b"x" * 15, b"y" * 70]), max_size=30)


@settings(deadline=None, max_examples=150)
@given(pieces())
@example([b"x" * 15, b"\n", b"{}"])  # a line begins with a block
@example([b" " * 70, b"\n", b" " * 70, b"{}"])  # blanks longer than a block
def test_lines_are_those_that_reading_finds(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("lines") / "m.jsonl"
    path.write_bytes(b"".join(pieces))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans_module, "BLOCK_BYTES", 16)
        patch.setattr(spans_module, "CHUNK_BYTES", 64)
        lines = open_lines(path)
        found = [path.read_bytes()[slice(*lines[i])] for i in range(len(lines))]
    assert found == [line for line in path.open("rb") if line.strip()]


def test_counts_of_full_blocks_do_not_overflow(tmp_path):
    """Half of the bytes of a block begin a line: the most there can be."""
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"x\n" * 300_000)
    lines = open_lines(path)
    assert len(lines) == 300_000
    assert [lines[i] for i in (0, 2048, 299_999)] == [(0, 2), (4096, 4098), (599_998, 600_000)]
    with pytest.raises(IndexError):
        lines[300_000]


def test_a_mapped_manifest_is_the_same_manifest(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\n".join([*LINES[:5], b"broken", *LINES[5:]]))
    plain = Manifest.open(path)
    assert not (tmp_path / ".index").exists()
    monkeypatch.setattr(spans_module, "MAPPED_BYTES", 0)
    mapped = Manifest.open(path, Reading(index_folder=tmp_path / "elsewhere"))
    assert list(mapped) == list(plain)
    assert len(mapped) == 300
    assert mapped[-1] == mapped[299]
    assert mapped.fingerprint() == plain.fingerprint()
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_an_index_is_made_once_and_renewed_when_the_file_changes(large, tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\n".join(LINES))
    open_lines(path)
    with monkeypatch.context() as patch:
        patch.delattr(spans_module, "_count_lines")
        assert len(open_lines(path)) == 300
    path.write_bytes(b"\n".join(LINES[:200]))
    assert len(open_lines(path)) == 200
    time = path.stat().st_mtime_ns
    path.write_bytes(b"\n".join(reversed(LINES[:200])))  # same size, later
    os.utime(path, ns=(time + 10**9, time + 10**9))
    assert len(open_lines(path)) == 200
    assert len(list((tmp_path / ".index").iterdir())) == 1  # old ones go


def test_processes_that_start_together_make_one_index(large, tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\n".join(LINES))
    count, counted, lengths = spans_module._count_lines, [], []

    def slow(*arguments):
        counted.append(1)
        time.sleep(0.2)
        return count(*arguments)

    monkeypatch.setattr(spans_module, "_count_lines", slow)
    # threads that open the lock's file each for themselves exclude each other as processes do
    starts = [threading.Thread(target=lambda: lengths.append(len(open_lines(path)))) for _ in range(3)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert lengths == [300] * 3
    assert len(counted) == 1
    assert len(list((tmp_path / ".index").iterdir())) == 1  # and no lock


def test_without_a_place_for_an_index_lines_are_counted_in_memory(large, tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\n".join(LINES))
    (tmp_path / "file").write_text("in the way")
    assert len(open_lines(path, tmp_path / "file" / "folder")) == 300
    assert "no index was kept" in caplog.text


def test_where_indexes_go(large, tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\n".join(LINES))
    monkeypatch.setenv("SVG_T2I_INDEX", str(tmp_path / "asked"))
    open_lines(path)
    assert len(list((tmp_path / "asked").iterdir())) == 1
    monkeypatch.delenv("SVG_T2I_INDEX")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # a read-only data folder
    open_lines(path)
    assert len(list((tmp_path / "cache" / "svg_t2i" / "index").iterdir())) == 1
    assert not (tmp_path / ".index").exists()


def test_an_index_that_others_made_beside_the_file_is_used(large, tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\n".join(LINES))
    open_lines(path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.delattr(spans_module, "_count_lines")
    assert len(open_lines(path)) == 300
