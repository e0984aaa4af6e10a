"""What paths people give, and the images and captions that are found there."""

import gzip
import json
import logging
import os
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from autoencoder.common.config import UserError
from autoencoder.sources import tables, tar_shards
from autoencoder.sources.failures import Failures
from autoencoder.sources.folders import ImageFolder
from autoencoder.sources.opening import open_images, open_source
from autoencoder.sources.source import JoinedSources, Reading
from tests.autoencoder.sources import layouts
from tests.autoencoder.sources.layouts import (
    CAPTIONS,
    COLOURS,
    FOUND,
    LAYOUTS,
    gzip_lines,
    lines,
    pictures,
    png,
    put,
    seen,
    sidecars,
    table,
    tar,
    unsorted_tar,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts(layout, tmp_path):
    path = layout(tmp_path / "data")
    assert seen(open_source(path)) == FOUND
    assert seen(open_source(path)) == FOUND  # from indexes and copies that are there already
    assert [colour for colour, *_ in seen(open_images(str(path)))] == list(COLOURS)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_stamps_change_with_the_samples(layout, tmp_path, monkeypatch):
    path = layout(tmp_path / "data")
    before, again = ([open_source(path).stamp(index) for index in range(3)] for _ in range(2))
    assert before == again
    assert len(set(before)) == 3
    changed = CAPTIONS[:2] + ("something quite different",)
    monkeypatch.setattr(layouts, "CAPTIONS", changed)
    monkeypatch.setattr(layouts, "FOUND", list(zip(COLOURS, changed, strict=True)))
    shutil.rmtree(tmp_path / "data")
    after = open_source(layout(tmp_path / "data"))
    assert after.stamp(2) != before[2]
    assert JoinedSources([after, after]).stamp(5) == after.stamp(2)


def test_the_stamp_of_an_image_changes_with_its_file_alone(tmp_path):
    for path in (sidecars(tmp_path / "a"), put(tmp_path / "b" / "t.csv", table(tmp_path / "b", "path", "text"))):
        before = [open_source(path).stamp(index) for index in range(3)]
        put((path if path.is_dir() else path.parent) / "1.png", png(COLOURS[0], (30, 30)))
        after = [open_source(path).stamp(index) for index in range(3)]
        assert [x == y for x, y in zip(before, after, strict=True)] == [True, False, True]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("image", ["path", "image", "image_path", "file_name", "filepath"])
@pytest.mark.parametrize("caption", ["prompt", "caption", "text", "captions"])
def test_columns_of_tables(image, caption, delimiter, tmp_path):
    path = put(tmp_path / "t.csv", table(tmp_path, image, caption, delimiter))
    assert seen(open_source(path)) == FOUND


OBJECT = {"caption": "alternative text", "Long Caption": "", "vlm": "what a model saw", "tags": "a, b"}


@pytest.mark.parametrize("kind", ["tar", "folder"])
@pytest.mark.parametrize(
    ("column", "text", "captions"),
    [
        (None, None, ("alternative text",)),
        ("vlm", None, ("what a model saw",)),
        ("vlm", "a text file", ("what a model saw",)),
        ("Long Caption", "a text file", ("a text file",)),
        ("nothing", "a text file", ("a text file",)),
    ],
)
def test_the_column_that_is_asked_for_of_an_object_beside_an_image(kind, column, text, captions, tmp_path):
    """In a folder the text file counts before the object."""
    files = [("0.png", png(COLOURS[0])), ("0.json", json.dumps(OBJECT))] + ([("0.txt", text)] if text else [])
    if kind == "tar":
        path = tar(tmp_path / "shard.tar", files)
    else:
        path, captions = tmp_path / "folder", (text,) if text else captions
        for name, content in files:
            put(path / name, content)
    source = open_source(path, Reading(caption_column=column))
    found = source.load(0).sample
    assert found.captions == captions
    assert kind == "folder" and text or found.tags == ("a", "b")


@pytest.mark.parametrize("kind", ["tar", "folder"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"title": "x"}', r"field 'text2', the caption of '0.png', is missing; it has \['title'\]"),
        ("[1]", "its .json must hold an object, not list"),
        ('{"text2": 3}', "field 'text2' must be a text or a list of texts, got 3"),
    ],
)
def test_an_object_without_a_caption_is_refused(kind, content, message, tmp_path, caplog):
    files = [
        ("0.png", png(COLOURS[0])),
        ("0.json", content),
        ("1.png", png(COLOURS[1])),
        ("1.json", '{"text2": "fine"}'),
    ]
    path = tar(tmp_path / "shard.tar", files) if kind == "tar" else tmp_path / "folder"
    for name, text in files if kind == "folder" else ():
        put(path / name, text)
    source = open_source(path, Reading(caption_column="text2", failures=Failures(1)))
    assert source.load(0).sample.captions == ("fine",)  # in its place
    assert re.search(message, next(iter(source.failures.reasons.values())))
    assert open_images(path).load(0).sample.captions == ()


def test_classes_need_no_captions(tmp_path):
    pictures(tmp_path, ("n01/a.JPEG", "n01/b.JPEG", "n02/a.JPEG"))
    assert [colour for colour, *_ in seen(open_images(tmp_path))] == list(COLOURS)
    with pytest.raises(
        UserError, match=r"holds 3 images and no captions; put a \.txt, \.caption or \.json beside each"
    ):
        open_source(tmp_path)


def test_an_image_without_a_text_is_left_out(tmp_path):
    sidecars(tmp_path)
    (tmp_path / "1.txt").unlink()
    source = open_source(tmp_path)
    assert [sample.captions for sample in source] == [(CAPTIONS[0],), (CAPTIONS[2],)]
    assert "1.png: has no caption: there is no 1.txt, .caption or .json beside it" in next(
        iter(source.failures.reasons.values())
    )
    with pytest.raises(UserError, match="has no caption"):
        open_source(tmp_path, Reading(failures=Failures(0)))


def test_a_table_that_changes_is_read_anew(tmp_path):
    path = put(tmp_path / "t.csv", table(tmp_path, "path", "prompt"))
    before = open_source(path)
    put(path, f"path,prompt\n0.png,{'other words' * 3}\n")
    after = open_source(path)
    assert (len(before), len(after), after[0].captions) == (3, 1, ("other words" * 3,))
    assert before.fingerprint() != after.fingerprint()


def test_rows_that_are_broken_are_named(tmp_path):
    pictures(tmp_path)
    path = put(tmp_path / "t.csv", b"path,prompt\n0.png,fine\n1.png,a,b\n2.png,\n2.png,caf\xe9\n")
    source = open_source(path)
    assert [sample.captions for sample in source] == [("fine",)]
    reasons = "\n".join(source.failures.reasons.values())
    assert "t.csv:row 2: it has 3 fields, the header 2; quote fields that hold ','" in reasons
    assert "t.csv:row 3: field 'prompt', the caption of 'path', holds an empty caption" in reasons
    assert "t.csv:row 4: column 'prompt' is not UTF-8" in reasons


# --- columns that cannot be guessed -------------------------------------------------------------------------------


def test_unknown_columns_list_what_is_there_and_the_setting(tmp_path):
    path = put(tmp_path / "t.csv", table(tmp_path, "bild", "worte"))
    with pytest.raises(UserError, match=r"needs a field for the image path.*'bild', 'score', 'worte'.*image_column"):
        open_source(path)
    with pytest.raises(UserError, match=r"caption of 'bild', is missing; .*'worte'.*data\.caption_column"):
        open_source(path, Reading(image_column="bild"))
    named = Reading(image_column="bild", caption_column="worte")
    assert seen(open_source(path, named)) == FOUND
    with pytest.raises(UserError, match="there is no image_column 'picture'"):
        open_source(path, Reading(image_column="picture"))


@pytest.mark.parametrize("column", ["url", "path"])
def test_urls_must_be_local(column, tmp_path):
    path = put(tmp_path / "m.jsonl", lines({column: "https://host/a.jpg", "prompt": "x"}))
    with pytest.raises(UserError, match=r"images must be local files or in tar shards; img2dataset downloads"):
        open_source(path)


def test_an_answer_in_parts_is_joined_and_what_is_no_text_left_out(tmp_path):
    pictures(tmp_path)
    parts = [{"type": "text", "text": "a red"}, {"text": 3}, {"image": 1}, "stray", {"text": "square"}]
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": parts}]
    path = put(tmp_path / "chat.jsonl", lines({"image": "0.png", "messages": turns}))
    assert seen(open_source(path)) == FOUND[:1]


# --- paths --------------------------------------------------------------------------------------------------------


def test_paths_as_people_write_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    composed, decomposed = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    names = ("in/0.png", decomposed, "a [1].png")
    pictures(tmp_path, names)
    given = ("in\\0.png", composed, f"file://{tmp_path}/a%20[1].png")
    entries = [{"path": name, "prompt": text} for name, text in zip(given, CAPTIONS, strict=True)]
    manifest = put(tmp_path / "m [x].jsonl", lines(*entries))
    for path in (manifest, str(manifest), "~/m [x].jsonl", f"file://{manifest}".replace(" ", "%20")):
        assert seen(open_source(path)) == FOUND
    home = put(tmp_path / "h.jsonl", lines({"path": "~/in/0.png", "prompt": CAPTIONS[0]}))
    assert seen(open_source(home)) == FOUND[:1]


def test_loops_of_links_are_visited_once(tmp_path):
    pictures(tmp_path / "a")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert len(ImageFolder(tmp_path)) == 3


@pytest.mark.parametrize("layout", [unsorted_tar, gzip_lines], ids=lambda layout: layout.__name__)
def test_an_index_that_cannot_be_written_is_kept_for_the_run(layout, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tar_shards, "write_index", refuse)
    monkeypatch.setattr(tables, "_check_space", refuse)
    caplog.set_level(logging.WARNING)
    assert seen(open_source(layout(tmp_path / "data"))) == FOUND
    assert "Permission denied); every start" in caplog.text


# --- what is nothing of all this ----------------------------------------------------------------------------------


def test_refusals(tmp_path):
    pictures(tmp_path)
    compressed = tar(tmp_path / "s.tar.gz", [("0.png", png(COLOURS[0]))], "w:gz")
    cut = put(tmp_path / "cut.jsonl.gz", gzip.compress(os.urandom(4000).hex().encode())[:2000])
    for path, message in {
        compressed: "cannot be found in a compressed shard; unpack it to a plain .tar",
        shutil.copy(compressed, tmp_path / "renamed"): "compressed shard",
        tmp_path / "0.png": "0.png is an image; give a folder of images, a manifest",
        put(tmp_path / "z.zip", b"PK\x03\x04" + bytes(40)): "is a zip archive; unpack it",
        put(tmp_path / "p.parquet", b"PAR1" + bytes(40)): "is not a readable Parquet file",
        put(tmp_path / "prose", "Once there was a manifest.\n"): "prose is neither JSON nor a table",
        put(tmp_path / "noise", bytes(range(256))): "noise is neither text nor Parquet nor a tar",
        cut: "damaged",
        tmp_path / "nowhere": "nowhere cannot be read: No such file or directory; give a folder of images",
        "https://host/list.jsonl": "only tar shards are read over the network",
        "hf://models/x": "is no data set of the Hub; give hf://datasets/owner/name",
    }.items():
        with pytest.raises(UserError, match=message):
            pytest.fail(f"{path}: {open_source(path)}")


def test_the_hub_is_read_through_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the Hub needs the datasets library")
    asked = []

    def load_dataset(name, config, **settings):
        asked.append((name, config, settings))
        images = [{"bytes": png(colour), "path": None} for colour in COLOURS]
        rows = datasets.Dataset.from_dict({"image": images, "text": list(CAPTIONS)})
        return datasets.DatasetDict(train=rows.cast_column("image", datasets.Image()), test=rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("hf://datasets/owner/name@v2?config=small")
    assert seen(source) == FOUND
    assert asked == [("owner/name", "small", {"split": None, "revision": "v2"})]
    assert source.hint(1) == (None, (len(CAPTIONS[1]),))
    assert np.asarray(source.load(2).image).shape == (6, 10, 3)
    with pytest.raises(UserError, match=r"'part' is not one of \['config', 'revision', 'split'\]"):
        open_source("hf://datasets/owner/name?part=1")
    assert Path(source[0].path).parent.name == "name@v2"
