"""Tar shards: local, remote, damaged; samples at any place without reading the rest."""

import io
import json
import os
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
from PIL import Image

from autoencoder.common.config import UserError
from autoencoder.sources import tar_shards
from autoencoder.sources.failures import Failures
from autoencoder.sources.manifest import Manifest
from autoencoder.sources.opening import open_source
from autoencoder.sources.source import Reading
from autoencoder.sources.tar_shards import TarShards, expand


def picture(number, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number, 16), (number, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, *members):
    """members: (name, content), in order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(number, caption=None):
    return (f"{number:04d}.png", picture(number)), (f"{number:04d}.txt", caption or f"caption {number}")


@pytest.fixture
def shards(tmp_path):
    """Ten samples in three shards, one of them empty; the folder they are in."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "s-0.tar", *(member for i in range(6) for member in sample(i)))
    write_tar(folder / "s-1.tar")
    write_tar(folder / "s-2.tar", *(member for i in range(6, 10) for member in sample(i)))
    return folder


def content(source):
    """(width, caption) of each sample."""
    return [(source.load(i)[0].width, source[i].captions[0]) for i in range(len(source))]


TEN = [(20 + i, f"caption {i}") for i in range(10)]


@pytest.mark.parametrize("pattern", ["", "/s-{0..2}.tar", "/s-{0,1,2}.tar", "/*.tar", "/s-?.tar"])
def test_local_shards(shards, pattern):
    source = open_source(f"{shards}{pattern}", Reading(failures=Failures(0)))
    assert isinstance(source, TarShards)
    assert content(source) == TEN
    assert source[-1].captions == ("caption 9",)
    with pytest.raises(IndexError):
        source[10]
    assert source.hint(3) == (None, (len("caption 3"),))


def test_other_paths_are_manifests(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"path": "a.png", "prompt": "x"}')
    assert isinstance(open_source(str(tmp_path / "m.jsonl")), Manifest)
    with pytest.raises(UserError, match=r"gone\.jsonl cannot be read"):
        open_source(str(tmp_path / "gone.jsonl"))


def test_members_and_captions(tmp_path):
    long_name = "folder.d/" + "n" * 150
    path = write_tar(
        tmp_path / "a.tar",
        ("a.jpeg", picture(1, "JPEG")),
        ("a.json", json.dumps({"caption": ["one", "two"], "width": 21, "height": 16})),
        ("a.depth.png", b"not this one"),
        ("b.json", json.dumps({"super_high_quality_caption": "aligned", "caption": "not this"})),
        ("b.PNG", picture(2)),
        ("b.txt", "nor this"),
        ("no_image.txt", "left out"),
        (f"{long_name}.png", picture(3)),  # names beyond 100 bytes have headers of their own
        (f"{long_name}.txt", " in the text\n"),
        (f"{long_name}.json", "{}"),
    )
    source = TarShards.open(str(path))
    a, b, c = source
    assert (a.captions, a.caption_kind, a.size) == (("one", "two"), "base", (21, 16))
    assert (b.captions, b.caption_kind, b.size) == (("aligned",), "align", None)
    assert c.captions == ("in the text",)
    assert [source.load(i)[0].width for i in range(3)] == [21, 22, 23]
    assert str(b.path) == f"{path}/b.PNG"


def test_unusable_samples_are_replaced_and_named(tmp_path, caplog):
    path = write_tar(
        tmp_path / "a.tar",
        *sample(0),
        ("1.png", b"broken"),
        ("1.txt", "x"),
        ("2.png", picture(2)),  # no caption
        ("3.png", picture(3)),
        ("3.json", "[]"),
        *sample(4),
    )
    source = TarShards.open(str(path), Reading(failures=Failures(3)))
    assert [source.load(i)[0].width for i in range(5)] == [20, 24, 24, 24, 24]
    assert f"{path}/1.png: not a readable image" in caplog.text
    assert "has no caption: no .txt, .caption or .json named as 2.png lies beside it" in caplog.text
    assert ".json must hold an object, not list" in caplog.text
    strict = TarShards.open(str(path), Reading(failures=Failures(2)))
    with pytest.raises(UserError, match="more than 2 unusable samples"):
        [strict.load(i) for i in range(5)]
    assert TarShards.open(str(path), Reading(require_captions=False))[2].captions == ()


# What becomes of the fourth sample on, and how many are known to be whole: the third might have had more members.
DAMAGES = {
    "truncated": (lambda tar, at: tar[: at + 700], 3),
    "overwritten": (lambda tar, at: tar[:at] + b"#" * 600, 2),
    "no tar": (lambda tar, at: b"#" * 2000, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_serves_what_is_before_the_damage(shards, damage, caplog):
    path, (spoil, whole) = shards / "s-0.tar", DAMAGES[damage]
    table = open_source(str(path)).tables[0]
    starts = [table[i][0] for i in range(4)]
    path.write_bytes(spoil(path.read_bytes(), starts[3]))
    for _ in range(2):  # is reported at every start
        caplog.clear()
        source = open_source(str(shards))
        assert f"{path} is damaged behind byte {starts[whole]}" in caplog.text
        assert content(source) == TEN[:whole] + TEN[6:]
    with pytest.raises(UserError, match="more than 0 unusable samples.*damaged"):
        open_source(str(shards), Reading(failures=Failures(0)))


def test_a_shard_changed_after_indexing_is_indexed_again(shards):
    assert len(open_source(str(shards))) == 10
    write_tar(shards / "s-1.tar", *sample(11))
    assert content(open_source(str(shards))) == TEN[:6] + [(31, "caption 11")] + TEN[6:]


def test_fingerprints_tell_sources_apart(shards):
    whole = open_source(str(shards)).fingerprint()
    assert open_source(str(shards)).fingerprint() == whole
    assert TarShards.open(str(shards / "s-0.tar")).fingerprint() != whole


def test_mistakes_are_named(shards, tmp_path):
    with pytest.raises(UserError, match="there is no tar shard of this name"):
        open_source(f"{shards}/no-*.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no image, no tar shard and no table; it holds nothing; give a folder"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"gone\.tar cannot be read: FileNotFoundError"):
        open_source(str(shards / "gone.tar"))
    with pytest.raises(UserError, match=r"compressed shard; unpack it"):
        open_source(str(shards / "s-0.tar.gz"))
    with pytest.raises(UserError, match="no image in 1 tar shard"):
        open_source(str(shards / "s-1.tar"))


def test_braces():
    assert expand("https://host/a-{098..101}-{x,y}.tar")[2:6] == [
        "https://host/a-099-x.tar",
        "https://host/a-099-y.tar",
        "https://host/a-100-x.tar",
        "https://host/a-100-y.tar",
    ]


# --- remote -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(shards):
    """Serves the folder on 127.0.0.1 with ranges; .requests counts (method, path), .failing lists statuses to send."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.respond(with_body=False)

        def do_GET(self):
            self.respond(with_body=True)

        def respond(self, with_body):
            server.requests[self.command, self.path] += 1
            if with_body and server.failing:
                return self.send(server.failing.pop(), b"", {})
            path = shards / self.path.lstrip("/")
            if not path.is_file():
                return self.send(404, b"", {})
            body, status, headers = path.read_bytes(), 200, {"ETag": str(path.stat().st_mtime_ns)}
            if server.ranges:
                headers["Accept-Ranges"] = "bytes"
                if "Range" in self.headers:
                    first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                    status = 206
                    headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                    body = body[int(first) : int(last) + 1]
            server.bytes += len(body) if with_body else 0
            return self.send(status, body if with_body else b"", headers, len(body))

        def send(self, status, body, headers, length=None):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.failing, server.ranges, server.bytes = Counter(), [], True, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(tar_shards.time, "sleep", lambda _: None)


def test_remote_shards(server, url, shards, tmp_path):
    source = open_source(f"{url}/s-{{0..2}}.tar", Reading(failures=Failures(0), index_folder=tmp_path / "index"))
    assert content(source) == TEN
    assert len(list((tmp_path / "index").iterdir())) == 3
    server.requests.clear()
    server.bytes = 0
    again = open_source(f"{url}/s-{{0..2}}.tar", Reading(index_folder=tmp_path / "index"))
    assert {method for method, _ in server.requests} == {"HEAD"}  # the index is enough
    assert again.load(7)[0].width == 27
    assert server.requests["GET", "/s-2.tar"] == 1
    assert server.bytes == 4 * 512  # one sample: two headers, two contents, nothing else of the shard


def test_a_remote_read_is_tried_again(server, url, tmp_path, caplog):
    source = open_source(f"{url}/s-0.tar", Reading(index_folder=tmp_path))
    server.failing += [503, 500]
    assert source[2].captions == ("caption 2",)
    assert "trying again" in caplog.text
    server.failing += [503] * 4
    with pytest.raises(UserError, match=r"s-0\.tar cannot be read: ClientResponseError: 503"):
        source[2]


def test_remote_mistakes_are_named(server, url, tmp_path):
    with pytest.raises(UserError, match=r"gone\.tar cannot be read: FileNotFoundError"):
        open_source(f"{url}/gone.tar", Reading(index_folder=tmp_path))
    server.ranges = False
    with pytest.raises(UserError, match="its server ignores ranges; .*filecache::http"):
        open_source(f"{url}/s-0.tar", Reading(index_folder=tmp_path))


def test_a_remote_shard_kept_in_a_local_file(server, url, tmp_path, monkeypatch):
    server.ranges = False
    monkeypatch.setitem(fsspec.config.conf, "filecache", {"cache_storage": str(tmp_path / "copies")})
    source = open_source(f"filecache::{url}/s-0.tar", Reading(index_folder=tmp_path / "index"))
    assert content(source) == TEN[:6]
    assert server.requests["GET", "/s-0.tar"] <= 2  # twelve samples were read


def test_worker_processes_read_remote_shards(server, url, tmp_path):
    """A forked process must not use its parent's connections."""
    from torch.utils.data import DataLoader

    source = open_source(f"{url}/s-0.tar", Reading(index_folder=tmp_path))
    source[0]
    loader = DataLoader(source, batch_size=None, num_workers=2, collate_fn=lambda item: item.captions[0])
    assert list(loader) == [caption for _, caption in TEN[:6]]


def test_spans_cover_the_records(shards):
    source = TarShards.open(str(shards / "s-0.tar"))
    rows = np.array([source.tables[0][i] for i in range(6)])
    assert (rows[1:, 0] == rows[:-1, 1]).all()
    assert rows[0, 0] == 0


@pytest.mark.parametrize("change", ["replaced", "truncated", "deleted"])
def test_a_shard_that_changes_ends_the_run_in_one_line(change, shards):
    source = open_source(shards, Reading(failures=Failures(1000)))
    shard = shards / "s-0.tar"
    if change == "replaced":
        write_tar(shard, *(member for i in range(6) for member in sample(i, "other words")))
    elif change == "truncated":
        os.truncate(shard, 3000)
    else:
        shard.unlink()
    with pytest.raises(UserError, match=r"s-0\.tar was changed while it was in use; put the old one back"):
        source.load(0)
    assert not len(source.failures)
    assert source.load(6).sample.captions == ("caption 6",)  # another shard
