"""Layouts of data as people have them: each writes three squares with captions, and gives the path to open."""

import base64
import csv
import gzip
import io
import json
import tarfile

import pytest
from PIL import Image

COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))
CAPTIONS = ("a red square", "a green square", 'blue, "quoted"\nand on two lines')
FOUND = list(zip(COLOURS, CAPTIONS, strict=True))


def png(colour, size=(10, 6)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pictures(folder, names=("0.png", "1.png", "2.png")):
    for name, colour in zip(names, COLOURS, strict=True):
        put(folder / name, png(colour))
    return names


def lines(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def table(folder, image, caption, delimiter=","):
    file = io.StringIO()
    rows = csv.writer(file, delimiter=delimiter)
    rows.writerows([[image, caption, "score"], *zip(pictures(folder), CAPTIONS, "123", strict=True)])
    return file.getvalue()


def parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
        for name, content in members:
            content = content if isinstance(content, bytes) else content.encode()
            header = tarfile.TarInfo(name)
            header.size = len(content)
            file.addfile(header, io.BytesIO(content))
    return path


def seen(source):
    """(colour, first caption) of every sample."""
    loaded = [source.load(index) for index in range(len(source))]
    assert [found.index for found in loaded] == list(range(len(source)))
    assert not len(source.failures)
    return [(found.image.getpixel((0, 0)), *found.sample.captions) for found in loaded]


# --- layouts: each writes the three squares and returns the path to give -------------------------------------------


def sidecars(folder):
    for name, text in zip(pictures(folder), CAPTIONS, strict=True):
        put(folder / name.replace("png", "txt"), "\ufeff" + text + "\n")
    put(folder / ".DS_Store", b"\0")
    put(folder / "._0.png", b"\0")
    put(folder / ".ipynb_checkpoints" / "0-checkpoint.png", b"\0")
    return folder


def captions_beside(folder):
    for name, text in zip(pictures(folder / "deeper"), CAPTIONS, strict=True):
        put(folder / "deeper" / name.replace("png", "caption"), text)
    return folder


def objects_beside(folder):
    for name, text in zip(pictures(folder), CAPTIONS, strict=True):
        put(folder / name.replace("png", "json"), json.dumps({"caption": [text, ""], "width": 20, "height": 20}))
    put(folder / "@eaDir" / "0.png" / "SYNOPHOTO_THUMB.png", png(COLOURS[0]))
    return folder


def img2dataset_files(folder):
    for name, text in zip(pictures(folder / "00000"), CAPTIONS, strict=True):
        put(folder / "00000" / name.replace("png", "txt"), text)
        put(folder / "00000" / name.replace("png", "json"), json.dumps({"caption": text, "url": "https://x/y"}))
    put(folder / "00000_stats.json", "{}")
    return folder


def imagefolder_lines(folder):
    entries = zip(pictures(folder / "train"), CAPTIONS, strict=True)
    put(folder / "train" / "metadata.jsonl", lines(*({"file_name": name, "text": text} for name, text in entries)))
    return folder


def imagefolder_csv(folder):
    put(folder / "metadata.csv", table(folder, "file_name", "text"))
    return folder


def imagefolder_parquet(folder):
    parquet(folder / "metadata.parquet", file_name=list(pictures(folder)), caption=list(CAPTIONS))
    return folder


def json_list(folder):
    entries = zip(pictures(folder), CAPTIONS, strict=True)
    content = [{"img_path": name, "caption": [text]} for name, text in entries]
    return put(folder / "captions.txt", json.dumps(content))


def json_lines(folder):
    entries = zip(pictures(folder), CAPTIONS, strict=True)
    return put(folder / "data", "\ufeff" + lines(*({"Image Path": name, "Prompt": text} for name, text in entries)))


def gzip_lines(folder):
    entries = zip(pictures(folder), CAPTIONS, strict=True)
    return put(folder / "d.jsonl.gz", gzip.compress(lines(*({"path": n, "prompt": t} for n, t in entries)).encode()))


def llava(folder):
    entries = []
    for name, text in zip(pictures(folder), CAPTIONS, strict=True):
        question = {"from": "human", "value": "<image>\nDescribe it."}
        entries.append({"id": name, "image": name, "conversations": [question, {"from": "gpt", "value": text}]})
    return put(folder / "llava.json", json.dumps(entries))


def images_as_bytes(folder):
    return parquet(
        folder / "train-00000-of-00001.parquet",
        image=[{"bytes": png(colour), "path": f"{i}.png"} for i, colour in enumerate(COLOURS)],
        caption=list(CAPTIONS),
    )


def images_in_lines(folder):
    entries = [
        {"image": {"bytes": base64.b64encode(png(colour)).decode()}, "text": text}
        for colour, text in zip(COLOURS, CAPTIONS, strict=True)
    ]
    return put(folder / "held.jsonl", lines(*entries))


def parquet_folder(folder):
    for i, (colour, text) in enumerate(FOUND):
        parquet(folder / "data" / f"train-0000{i}.parquet", jpg=[png(colour)], txt=[text])
    return folder


def shards(folder):
    for i, (colour, text) in enumerate(FOUND):
        tar(folder / f"{i:05d}.tar", [(f"{i}.png", png(colour)), (f"{i}.txt", text), (f"{i}.json", '{"key": 1}')])
        put(folder / f"{i:05d}_stats.json", "{}")
    return folder


def unsorted_tar(folder):
    images = [(f"{i}.png", png(colour)) for i, colour in enumerate(COLOURS)]
    return tar(folder / "u.tar", [*images, *((f"{i}.txt", text) for i, text in reversed([*enumerate(CAPTIONS)]))])


def dotted_tar(folder):
    members = []
    for i, (colour, text) in enumerate(FOUND):
        members += [(f"./photo.{i}.png", png(colour)), (f"./photo.{i}.txt", text), (f"./._photo.{i}.png", b"\0")]
    return tar(folder / "d.tar", members)


def texts_in_utf16(folder):
    for name, text in zip(pictures(folder), CAPTIONS, strict=True):
        put(folder / name.replace("png", "txt"), text.encode("utf-16"))
    return folder


def tar_in_utf16(folder):
    members = zip(COLOURS, CAPTIONS, "012", strict=True)
    return tar(
        folder / "u.tar",
        [
            part
            for colour, text, i in members
            for part in ((f"{i}.png", png(colour)), (f"{i}.txt", text.encode("utf-16")))
        ],
    )


def saved_dataset(folder):
    datasets = pytest.importorskip("datasets", reason="saved data sets need the datasets library")
    images = [{"bytes": png(colour), "path": None} for colour in COLOURS]
    rows = datasets.Dataset.from_dict({"picture": images, "text": list(CAPTIONS)})
    rows.cast_column("picture", datasets.Image()).save_to_disk(folder / "saved")
    return folder / "saved"


LAYOUTS = (
    sidecars, captions_beside, objects_beside, img2dataset_files, imagefolder_lines, imagefolder_csv,
    imagefolder_parquet, json_list, json_lines, gzip_lines, llava, images_as_bytes, images_in_lines, parquet_folder,
    shards, unsorted_tar, dotted_tar, texts_in_utf16, tar_in_utf16, saved_dataset,
)  # fmt: skip
