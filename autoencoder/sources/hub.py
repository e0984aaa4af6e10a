"""Data sets of the Hugging Face Hub, read through the `datasets` library.

    hf://datasets/owner/name                          its split "train", or the only one
    hf://datasets/owner/name?split=test&config=large  another split or configuration
    hf://datasets/owner/name@revision                 a branch, tag or commit
    hf://datasets/owner/name/data/train-*.parquet     some files of its repository

The library downloads the data set once and maps it into memory from its cache ($HF_HOME): training visits samples in a
seeded order and resumes at any of them, for which a stream would not do. Folders that `Dataset.save_to_disk` wrote are
read in the same way. Images come as the files that they were made from; their columns are those of `sources.entries`,
and a column of the type Image is the image whatever its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

from autoencoder.common.config import UserError
from autoencoder.common.hub import announce
from autoencoder.images.files import Size
from autoencoder.sources.entries import (
    CAPTION_COLUMNS,
    Entry,
    caption_column,
    find_file,
    image_column,
    missing_caption,
    missing_image,
    parse_fields,
    usual_columns,
)
from autoencoder.sources.source import ImageSource, Reading, Sample

FORM = "hf://datasets/owner/name, with ?split=train&config=name where it has several"
SETTINGS = {"split", "config", "revision"}
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk writes


class HubDataset(ImageSource):
    """The rows of a data set that the `datasets` library maps into memory.

    rows: a `datasets.Dataset`. name: what messages call it. folder: what paths of images are relative to.

    Raises:
        UserError: no column is the image or (where required) the caption, or there are no rows.
    """

    def __init__(self, rows: Any, name: str, reading: Reading, folder: Path = Path()):
        if not len(rows):
            raise UserError(f"{name} has no rows")
        self.version = rows._fingerprint  # of the library: changes with the rows
        image, caption = _chosen(rows, name, reading)
        usual = usual_columns(rows.column_names, CAPTION_COLUMNS)
        texts = [column for column in rows.column_names if column in {caption, "width", "height", *usual} - {image}]
        if "Image" in type(rows.features[image]).__name__:
            rows = rows.cast_column(image, type(rows.features[image])(decode=False))
        super().__init__(name, replace(reading, image_column=image))
        self.folder = folder
        self.rows, self.texts = rows.select_columns([image, *texts]), rows.select_columns(texts)
        self.failures.expect(name, len(self))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self._entry(index).sample

    def read(self, index: int) -> tuple[Path | bytes, Sample]:
        sample, content = self._entry(index)
        return sample.path if content is None else content, sample

    def hint(self, index: int) -> tuple[Size | None, tuple[int, ...]]:
        index = range(len(self))[index]
        fields = dict(self.texts[index]) if self.texts.column_names else {}
        sample = self._parse(fields | {self.reading.image_column: "not read"}, index).sample
        return sample.size, tuple(len(caption.encode(errors="replace")) for caption in sample.captions)

    def stamp(self, index: int) -> bytes:
        return f"{self.version} {index}".encode()

    def _entry(self, index: int) -> Entry:
        index = range(len(self))[index]  # IndexError, negative indices
        entry = self._parse(dict(self.rows[index]), index)
        if entry.content is not None:
            return entry
        return entry._replace(sample=replace(entry.sample, path=find_file(entry.sample.path)))

    def _parse(self, fields: dict[str, Any], index: int) -> Entry:
        try:
            return parse_fields(fields, self.folder, self.reading, f"{self.name.partition('?')[0]}/{index:08d}")
        except ValueError as error:
            raise UserError(f"{self.name}:row {index + 1}: {error}") from None

    def _identity(self, index: int) -> bytes:
        sample = self[index]
        return json.dumps([sample.path.name, sample.captions]).encode()


def _chosen(rows: Any, name: str, reading: Reading) -> tuple[str, str | None]:
    """The columns of images and of captions."""
    fields = dict.fromkeys(rows.column_names, "?")
    typed = [column for column in fields if type(rows.features[column]).__name__ == "Image"]
    image = typed[0] if typed and reading.image_column is None else image_column(fields, reading)
    if image is None:
        raise UserError(f"{name}: {missing_image(fields, reading)}")
    caption = caption_column(fields, image, reading)
    if caption is None and reading.require_captions:
        raise UserError(f"{name}: {missing_caption(fields, image, reading)}")
    return image, caption


# --- loading ----------------------------------------------------------------------------------------------------


def open_hub(url: str, reading: Reading) -> HubDataset:
    """A data set of the Hub, see the top.

    Raises:
        UserError: the address is not of that form, the library is missing, or it cannot load the data set.
    """
    found = re.fullmatch(r"hf://datasets/([^/?@]+(?:/[^/?@]+)?)(?:@([^/?]+))?(?:/([^?]+))?(?:\?(.*))?", url)
    if found is None:
        raise UserError(f"{url} is no data set of the Hub; give {FORM}")
    name, revision, files, query = found.groups()
    given = dict(parse_qsl(query or ""))
    if not given.keys() <= SETTINGS:
        raise UserError(f"{url}: {sorted(given.keys() - SETTINGS)[0]!r} is not one of {sorted(SETTINGS)}; give {FORM}")
    split, revision = given.get("split"), given.get("revision", revision)
    settings = {"split": split, "revision": revision} | ({"data_files": files} if files else {})
    announce(url)
    return _load(url, reading, lambda library: library.load_dataset(name, given.get("config"), **settings), Path())


def open_saved(folder: Path, reading: Reading) -> HubDataset | None:
    """The data set that `save_to_disk` wrote to a folder; None if it is no such folder."""
    if not any((folder / name).is_file() for name in SAVED):
        return None
    return _load(str(folder), reading, lambda library: library.load_from_disk(str(folder)), folder)


def _load(name: str, reading: Reading, load: Callable[[ModuleType], Any], folder: Path) -> HubDataset:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name} needs the datasets library: pip install datasets") from None
    try:
        rows = load(datasets)
    except Exception as error:  # network, names, scripts, damaged files: it has many
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name} cannot be loaded: {type(error).__name__}: {reason}; give {FORM}") from error
    if isinstance(rows, dict):  # a data set for each split
        split = "train" if "train" in rows else next(iter(rows)) if len(rows) == 1 else None
        if split is None:
            raise UserError(f"{name} has the splits {sorted(rows)}; choose one: ?split={sorted(rows)[0]}")
        rows = rows[split]
    return HubDataset(rows, name, reading, folder)
