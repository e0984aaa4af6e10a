"""Manifests, image folders, their error budgets, and the resumable order."""

import hashlib
import json
import logging
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from autoencoder.common.config import UserError
from autoencoder.images.order import sample_rng
from autoencoder.sources import manifest as manifest_module
from autoencoder.sources.entries import size_of
from autoencoder.sources.failures import Failures
from autoencoder.sources.folders import ImageFolder
from autoencoder.sources.manifest import Manifest
from autoencoder.sources.source import Reading, Sample
from autoencoder.sources.spans import FileChanged


def write_lines(path, *entries):
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries), encoding="utf-8")
    return path


def write_image(path, colour=(1, 2, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def item(number, **fields):
    return {"path": f"{number}.png", "prompt": f"caption {number}", **fields}


# --- reading


def test_both_conventions_and_caption_lists(tmp_path):
    path = write_lines(
        tmp_path / "m.jsonl",
        {"path": "a/b.png", "prompt": "a bird", "width": 7},
        "",
        {"image_path": "/data/c.png", "super_high_quality_caption": ["Vögel", "鳥"]},
        {"path": "d.png", "prompt": ["one"], "super_high_quality_caption": "not this one"},
    )
    assert list(Manifest.open(path)) == [
        Sample(tmp_path / "a/b.png", ("a bird",), "base"),
        Sample(manifest_module.Path("/data/c.png"), ("Vögel", "鳥"), "align"),
        Sample(tmp_path / "d.png", ("one",), "base"),
    ]


LAYOUTS = {
    "lines": lambda entries: "\n".join(json.dumps(e, ensure_ascii=False) for e in entries),
    "windows lines": lambda entries: "".join(json.dumps(e, ensure_ascii=False) + "\r\n" for e in entries),
    "list": lambda entries: json.dumps(entries, ensure_ascii=False),
    "indented list": lambda entries: "\n " + json.dumps(entries, ensure_ascii=False, indent=2) + "\n\n",
    "escaped list": lambda entries: json.dumps(entries),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_layouts(tmp_path, layout, mark):
    entries = [item(i, prompt=f"ä{'鳥' * i} [,]") for i in range(5)]
    path = tmp_path / "m.json"
    path.write_bytes((mark + LAYOUTS[layout](entries)).encode())
    manifest = Manifest.open(path)
    assert [sample.captions[0] for sample in manifest] == [entry["prompt"] for entry in entries]
    assert manifest[-1].path == tmp_path / "4.png"
    with pytest.raises(IndexError):
        manifest[5]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=6), st.sampled_from([None, 1]))
def test_any_caption_survives(tmp_path_factory, captions, indent):
    path = tmp_path_factory.mktemp("m") / "m.json"
    path.write_text(json.dumps([item(i, prompt=c) for i, c in enumerate(captions)], indent=indent))
    assert [sample.captions[0] for sample in Manifest.open(path)] == captions


def test_memory_and_pickling(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", *(item(i, prompt="long " * 100) for i in range(50)))
    state = pickle.dumps(Manifest.open(path))
    assert len(state) < 50 * 16 + 1000  # positions only
    assert pickle.loads(state)[49].path.name == "49.png"


def test_captions_are_optional_in_stage_1(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", {"path": "a.png"}, {"image_path": "b.png", "words": "not a caption"})
    assert [sample.captions for sample in Manifest.open(path, Reading(require_captions=False))] == [(), ()]
    with pytest.raises(UserError, match=r"m\.jsonl:1: field 'prompt', the caption of 'path', is missing"):
        Manifest.open(path)


# --- broken entries

BROKEN = {
    '{"path": "a.png", "prompt": "x"': "not valid JSON",
    '["a.png", "x"]': "expected an object with an image path and a caption, got list",
    '{"picked": "a.png", "prompt": "x"}': r"needs a field for the image path.*it has \['picked', 'prompt'\]; name it",
    '{"path": 3, "prompt": "x"}': "field 'path' must be a file name, got 3",
    '{"path": "", "prompt": "x"}': "field 'path' must be a file name, got ''",
    '{"path": "a\\u0000.png", "prompt": "x"}': "field 'path' must be a file name",
    '{"path": "a.png", "prompt": 5}': "field 'prompt' must be a text or a list of texts, got 5",
    '{"path": "a.png", "prompt": ["x", 5]}': "field 'prompt' must be a text or a list of texts",
    '{"path": "a.png", "prompt": []}': "field 'prompt', the caption of 'path', is an empty list",
    '{"path": "a.png", "prompt": null}': "field 'prompt', the caption of 'path', is null",
    '{"path": "a.png", "prompt": ["", " "]}': "field 'prompt', the caption of 'path', holds an empty caption",
    '{"image_path": "a.png", "words": "x"}': "field 'super_high_quality_caption', the caption of 'image_path'",
    "[" * 100_000: "not valid JSON",
}


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_broken_lines_are_named_and_skipped(tmp_path, caplog, line):
    path = write_lines(tmp_path / "m.jsonl", item(1), "", line, item(2))
    manifest = Manifest.open(path)
    assert [sample.path.name for sample in manifest] == ["1.png", "2.png"]
    with pytest.raises(UserError, match=rf"m\.jsonl:3: {BROKEN[line]}"):
        Manifest.open(path, Reading(failures=Failures(0)))
    assert len(caplog.records) == 1
    assert f"{path}:3: " in caplog.text


def test_lines_that_are_not_utf8(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"path": "a.png", "prompt": "\xff"}\n' + json.dumps(item(2)).encode())
    assert len(Manifest.open(path)) == 1
    with pytest.raises(UserError, match=r"m\.jsonl:1: not valid JSON"):
        Manifest.open(path, Reading(failures=Failures(0)))


def test_too_many_broken_lines(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", item(1), *["oops"] * 5)
    assert len(Manifest.open(path, Reading(failures=Failures(5)))) == 1
    message = r"more than 4 unusable samples.*: 5 × not valid JSON; repair or remove (.|\n)*jsonl:2: (.|\n)*jsonl:4: "
    with pytest.raises(UserError, match=message):
        Manifest.open(path, Reading(failures=Failures(4)))


def test_broken_elements_of_a_list_are_named_by_line(tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps([item(1), 7, item(2)], indent=1))
    assert len(Manifest.open(path)) == 2
    with pytest.raises(UserError, match=r"m\.json:6: expected an object"):
        Manifest.open(path, Reading(failures=Failures(0)))


@pytest.mark.parametrize(
    ("text", "line"),
    [("[\n{},\n]", 3), ("[\n{}\n{}]", 3), ("[{}", 1), ("[{}]\n\n[]", 3), ("[\n{'a': 1}]", 2), ("[", 1)],
)
def test_lists_that_are_not_json(tmp_path, text, line):
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"m\.json:{line}: not valid JSON: .*; repair the list"):
        Manifest.open(path)


@pytest.mark.parametrize("text", ["", "\n \n", "[]", "[ \n]"])
def test_empty_manifests(tmp_path, text):
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"m\.json has no entries; give it lines such as"):
        Manifest.open(path)


def test_manifest_without_a_usable_line(tmp_path):
    with pytest.raises(UserError, match=r"has no usable entry; .*m\.jsonl:1: not valid JSON"):
        Manifest.open(write_lines(tmp_path / "m.jsonl", "oops"))


def test_missing_manifest(tmp_path):
    with pytest.raises(UserError, match=r"manifest .*gone\.jsonl cannot be read: No such file"):
        Manifest.open(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        Manifest.open(tmp_path)


def test_late_entries_are_checked_on_access(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(manifest_module, "VALIDATED_ENTRIES", 3)
    monkeypatch.setattr(manifest_module, "FIRST_ENTRIES", 2)
    write_image(tmp_path / "1.png")
    manifest = Manifest.open(write_lines(tmp_path / "m.jsonl", item(1), item(1), "oops", item(1, prompt="last")))
    with pytest.raises(UserError, match=r"m\.jsonl:3: not valid JSON"):
        manifest[2]
    assert manifest.load(2)[1].captions == ("last",)
    assert "m.jsonl:3" in caplog.text


# --- loading


def test_load(tmp_path):
    write_image(tmp_path / "1.png", (10, 20, 30))
    image, sample, index = Manifest.open(write_lines(tmp_path / "m.jsonl", item(1))).load(0)
    assert index == 0
    assert image.getpixel((0, 0)) == (10, 20, 30)
    assert sample == Sample(tmp_path / "1.png", ("caption 1",), "base")


def test_unreadable_images_are_replaced_by_the_next(tmp_path, caplog):
    for number in (1, 3):
        write_image(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_bytes(b"broken")
    path = write_lines(tmp_path / "m.jsonl", *(item(i) for i in range(5)))
    used = [1, 1, 3, 3, 1]  # 0, 2 and 4 cannot be read
    for order in (range(5), reversed(range(5)), [2, 2, 4, 4, 0]):  # whatever was tried before
        manifest = Manifest.open(path, Reading(failures=Failures(3)))
        for index in order:
            assert manifest.load(index)[1].path.name == f"{used[index]}.png"
        assert sorted(manifest.failures.reasons) == [(str(path), 0), (str(path), 2), (str(path), 4)]
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 9  # each once per manifest
    assert "4.png: not a readable image" in caplog.text


def test_too_many_unreadable_images(tmp_path):
    write_image(tmp_path / "9.png")
    manifest = Manifest.open(
        write_lines(tmp_path / "m.jsonl", *(item(i) for i in range(10))), Reading(failures=Failures(3))
    )
    with pytest.raises(UserError, match=r"m\.jsonl: more than 3 unusable samples(.|\n)*0\.png: no such image file"):
        manifest.load(0)


def test_no_readable_image_at_all(tmp_path):
    manifest = Manifest.open(write_lines(tmp_path / "m.jsonl", item(1), item(2)))
    for _ in range(2):
        with pytest.raises(UserError, match="none of the 2 images is usable"):
            manifest.load(1)


# --- folders


def test_image_folder(tmp_path):
    for name in ("n02/b.JPEG", "n01/a.JPEG", "n01/é.png", "c.jpg"):
        write_image(tmp_path / "train" / name)
    (tmp_path / "train" / "n01" / "notes.txt").write_text("no image")
    os.symlink(tmp_path / "train" / "n01", tmp_path / "train" / "n03")
    folder = ImageFolder(tmp_path, "train")
    expected = ["c.jpg", "n01/a.JPEG", "n01/é.png", "n02/b.JPEG", "n03/a.JPEG", "n03/é.png"]
    assert [str(sample.path.relative_to(tmp_path / "train")) for sample in folder] == expected
    image, sample, _ = folder.load(2)
    assert image.size == (8, 8)
    assert sample.captions == ()
    assert len(pickle.loads(pickle.dumps(folder))) == 6


def test_image_folder_replaces_unreadable_images(tmp_path):
    write_image(tmp_path / "val" / "a.png")
    (tmp_path / "val" / "b.png").write_bytes(b"broken")
    assert ImageFolder(tmp_path, "val").load(1)[1].path.name == "a.png"


def test_missing_and_empty_image_folders(tmp_path):
    with pytest.raises(UserError, match=r"image folder .*train does not exist"):
        ImageFolder(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"image folder .*train holds no image"):
        ImageFolder(tmp_path, "train")


# --- order


def test_sample_rng_depends_on_seed_and_position_alone():
    draws = {key: sample_rng(*key).random(4).tolist() for key in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2**40)]}
    assert len({tuple(values) for values in draws.values()}) == len(draws)
    assert sample_rng(0, 1).random(4).tolist() == draws[0, 1]
    first = np.array([sample_rng(7, position).random() for position in range(500)])
    assert abs(first.mean() - 0.5) < 0.05  # σ = 0.013
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.15


# --- the example data


def test_example_manifest(repo_root):
    manifest = Manifest.open(repo_root / "configs" / "example.jsonl", Reading(failures=Failures(0)))
    assert len(manifest) == 8
    for index, sample in enumerate(manifest):
        image = manifest.load(index).image
        assert min(image.size) >= 192
        assert sample.path.stat().st_size < 10_000


def test_example_images_are_what_the_script_draws(repo_root, tmp_path):
    script = repo_root / "scripts" / "make_example_images.py"
    subprocess.run([sys.executable, script, "--output", tmp_path], check=True)
    committed = Manifest.open(repo_root / "configs" / "example.jsonl")
    drawn = Manifest.open(tmp_path / "example.jsonl")
    assert [s.captions for s in drawn] == [s.captions for s in committed]
    for index in range(len(drawn)):
        pixels = [np.array(source.load(index)[0]).astype(int) for source in (drawn, committed)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 2  # Pillow releases round differently


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"width": 1, "height": 1}, (1, 1)),
        ({"width": 0, "height": 5}, None),
        ({"width": 5, "height": 0}, None),
        ({"width": 5, "height": None}, None),
        ({"width": "5", "height": 5}, None),
        ({"height": 5}, None),
    ],
)
def test_a_size_is_known_where_both_sides_are_positive_numbers(fields, size):
    assert size_of(fields) == size


def test_a_fingerprint_is_the_hash_of_the_count_and_the_entries(tmp_path):
    """Caches of features are known by it."""
    path = write_lines(tmp_path / "m.jsonl", "one", *map(item, range(3)))
    entries = path.read_bytes().splitlines()[1:]
    assert Manifest.open(path).fingerprint() == hashlib.sha256(b"3" + b"".join(entries)).hexdigest()[:16]


# --- files that change while they are in use -----------------------------------------------------------------------


def test_a_manifest_that_is_replaced_stays_what_was_opened(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", *map(item, range(50)))
    manifest = Manifest.open(path)
    write_lines(tmp_path / "new.jsonl", *(item(9, prompt="other") for _ in range(3))).replace(path)
    assert [sample.captions[0] for sample in manifest] == [f"caption {number}" for number in range(50)]
    with pytest.raises(FileChanged, match=r"m\.jsonl was changed while it was in use; put the old one back"):
        pickle.loads(pickle.dumps(manifest))[0]  # as a worker process would open it
    path.unlink()
    with pytest.raises(FileChanged):
        pickle.loads(pickle.dumps(manifest))[0]


@pytest.mark.parametrize("size", [0, 25])
def test_a_manifest_that_is_cut_short_ends_the_run_in_one_line(size, tmp_path):
    path = write_lines(tmp_path / "m.jsonl", *map(item, range(50)))
    write_image(tmp_path / "0.png")
    manifest = Manifest.open(path, Reading(failures=Failures(1000)))
    os.truncate(path, size)
    for index in (0, 20, 49):
        with pytest.raises(FileChanged, match="was changed while it was in use"):
            manifest.load(index)  # it is no sample's fault, so none is replaced
    assert not len(manifest.failures)


def test_content_fingerprints_see_every_caption(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", *map(item, range(1000)))
    before, quick = Manifest.open(path).content_fingerprint, Manifest.open(path).fingerprint()
    assert Manifest.open(path).content_fingerprint == before
    path.write_text(path.read_text().replace("caption 780", "caption 7x0"))
    assert Manifest.open(path).content_fingerprint != before
    assert Manifest.open(path).fingerprint() == quick  # a look at 64 entries


def test_content_fingerprints_of_folders(tmp_path):
    for name in "abc":
        write_image(tmp_path / f"{name}.png")
    before = ImageFolder(tmp_path).content_fingerprint
    assert ImageFolder(tmp_path).content_fingerprint == before
    write_image(tmp_path / "d.png")
    (tmp_path / "d.txt").write_text("a caption")
    captioned = ImageFolder(tmp_path).content_fingerprint
    assert captioned != before
    (tmp_path / "d.txt").write_text("a Caption")
    assert ImageFolder(tmp_path).content_fingerprint != captioned
