"""Indexes of large files: the same lines as in memory, shared, renewed when their file changes."""

import os
import pickle

import numpy as np
import pytest

from autoencoder import spans as spans_module
from autoencoder.manifest import Manifest
from autoencoder.spans import line_spans

LINES = [b'{"path": "%d.png", "prompt": "%s"}' % (i, b"x" * (1 + i % 50)) for i in range(300)]


@pytest.fixture
def large(monkeypatch):
    """Every file is large, and scanned in chunks shorter than many lines."""
    monkeypatch.setattr(spans_module, "MAPPED_BYTES", 0)
    monkeypatch.setattr(spans_module, "CHUNK_BYTES", 37)
    monkeypatch.delenv("SVG_T2I_INDEX", raising=False)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n  \n", b""], ids=["unix", "windows", "blank", "no newline"])
def test_lines(large, tmp_path, end):
    path = tmp_path / "m.jsonl"
    content = b"\n \n" + (end or b"\n").join(LINES) + end
    path.write_bytes(content)
    spans = line_spans(path)
    assert [content[slice(*spans[i])].strip() for i in range(len(spans))] == LINES
    (index,) = (tmp_path / ".index").iterdir()
    assert len(pickle.dumps(spans)) < 500  # its name, not its rows
    assert pickle.loads(pickle.dumps(spans))[7] == spans[7]
    rows = np.load(index)
    assert rows.shape == (300, 2)
    assert rows.dtype == np.int64


def test_a_mapped_manifest_is_the_same_manifest(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\n".join([*LINES[:5], b"broken", *LINES[5:]]))
    plain = Manifest.open(path)
    assert not (tmp_path / ".index").exists()
    monkeypatch.setattr(spans_module, "MAPPED_BYTES", 0)
    mapped = Manifest.open(path, index_folder=tmp_path / "elsewhere")
    assert list(mapped) == list(plain)
    assert len(mapped) == 300
    assert mapped[-1] == mapped[299]
    assert mapped.fingerprint() == plain.fingerprint()
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_an_index_is_made_once_and_renewed_when_the_file_changes(large, tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\n".join(LINES))
    line_spans(path)
    with monkeypatch.context() as patch:
        patch.delattr(spans_module, "_scan_lines")
        assert len(line_spans(path)) == 300
    path.write_bytes(b"\n".join(LINES[:200]))
    assert len(line_spans(path)) == 200
    time = path.stat().st_mtime_ns
    path.write_bytes(b"\n".join(reversed(LINES[:200])))  # same size, later
    os.utime(path, ns=(time + 10**9, time + 10**9))
    assert len(line_spans(path)) == 200
    assert len(list((tmp_path / ".index").iterdir())) == 1  # old ones go


def test_where_indexes_go(large, tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\n".join(LINES))
    monkeypatch.setenv("SVG_T2I_INDEX", str(tmp_path / "asked"))
    line_spans(path)
    assert len(list((tmp_path / "asked").iterdir())) == 1
    monkeypatch.delenv("SVG_T2I_INDEX")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # a read-only data folder
    line_spans(path)
    assert len(list((tmp_path / "cache" / "svg_t2i" / "index").iterdir())) == 1
    assert not (tmp_path / ".index").exists()
