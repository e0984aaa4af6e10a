"""Samples in tar shards, as WebDataset writes them: members that share a name up to its first dot.

    000017.jpg      the image, any of `IMAGE_SUFFIXES`
    000017.json     captions under one of the usual names (a text or a list of texts), optionally width and height
    000017.txt      one caption, where the JSON has none; or 000017.caption
    000017.seg.png  left alone, as all else

Names with dots of their own, such as photo.0.jpg and photo.0.txt, share all up to the last dot (`sources.tar_members`).
The members of a sample need not follow one another.

Shards are local files or anything fsspec opens (https://, s3://, gs://, filecache::https://, …). Each is read through
once to note where its samples lie; from then on a sample is one seek, or one ranged request, so that any order can be
followed and resumed on any number of machines without reading more than what is used. The notes are kept as indexes
(`autoencoder.sources.spans`): a thousand shards open in seconds.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import logging
import os
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import fsspec
import numpy as np

from autoencoder.common.config import UserError
from autoencoder.images.files import Size
from autoencoder.sources.captions import read_caption
from autoencoder.sources.entries import captions_beside, size_of, tags_of
from autoencoder.sources.source import (
    ImageSource,
    Reading,
    Sample,
    find_part,
    is_companion,
)
from autoencoder.sources.spans import THREADS, FileChanged, Spans, file_version, index_path, version_of, write_index
from autoencoder.sources.tar_members import caption_member, image_of, key_of, split_group

logger = logging.getLogger(__name__)

INDEX_FORMAT = 2  # of the rows; indexes without a format have rows of three numbers for samples in one piece
READ_AHEAD = 1 << 23  # bytes, while a remote shard is read through


class TarShards(ImageSource):
    """The samples of tar shards, in the order of the shards and of their members. Make one with `open`."""

    def __init__(self, name: str, shards: Sequence[str], tables: Sequence[Spans], reading: Reading):
        super().__init__(name, reading)
        self.shards, self.tables = tuple(shards), tuple(tables)  # of a table: rows as `_scan` makes them
        self.ends = list(itertools.accumulate(map(len, tables)))
        self.versions = {shard: file_version(Path(shard)) for shard in shards if "://" not in shard}
        self.failures.expect(name, len(self))

    @classmethod
    def open(cls, pattern: str, reading: Reading | None = None, shards: Sequence[str] | None = None) -> TarShards:
        """Find the shards and the positions of their members, several at a time; missing indexes are made.

        shards: what `pattern` stands for, if that is known.

        A shard that is damaged at some byte serves the samples before it, with a warning; each counts as an error.

        Raises:
            UserError: no shard, no sample in them, too many damaged, or a shard that cannot be read.
        """
        shards, reading = shards or expand(pattern), reading or Reading()
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(lambda shard: _table(shard, reading.index_folder), shards))
        if not sum(len(table) for table, _ in found):
            raise UserError(
                f"{pattern}: no image in {len(shards)} tar shard(s); samples need a member such as 0001.jpg"
            )
        source = cls(pattern, shards, [table for table, _ in found], reading)
        for shard, (_, damage) in zip(shards, found, strict=True):
            if damage:
                reading.failures.add(pattern, shard, damage)
        return source

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        return self.read(index)[1]

    def read(self, index: int) -> tuple[bytes, Sample]:
        shard, (start, end, _, *others) = self._find(index)
        try:
            pieces = [(start, end), *zip(others[::2], others[1::2])]
            record = b"".join(_fetch(shard, *piece, self.versions.get(shard)) for piece in pieces if piece[1])
            return parse_record(record, shard, self.reading)
        except UserError:
            raise
        except Exception as error:  # tarfile has many for damaged members, json a few
            raise UserError(f"{shard}, sample at byte {start}: {str(error) or type(error).__name__}") from None

    def hint(self, index: int) -> tuple[Size | None, tuple[int, ...]]:
        _, (_, _, caption_bytes, *_) = self._find(index)
        return None, (caption_bytes,)

    def stamp(self, index: int) -> bytes:
        shard, span = self._find(index)
        return f"{PurePosixPath(shard).name}:{span}:{self.versions.get(shard)}".encode()

    def _identity(self, index: int) -> bytes:
        shard, span = self._find(index)
        return f"{PurePosixPath(shard).name}:{span}".encode()

    def _listing(self) -> Iterator[bytes | np.ndarray]:
        for shard, table in zip(self.shards, self.tables, strict=True):
            yield PurePosixPath(shard).name.encode()
            yield np.ascontiguousarray(table.rows)

    def _find(self, index: int) -> tuple[str, tuple[int, ...]]:
        number, index = find_part(self.ends, index)
        return self.shards[number], self.tables[number][index]


def parse_record(record: bytes, shard: str, reading: Reading) -> tuple[bytes, Sample]:
    """The members of one sample → its image file's content and the sample.

    Raises:
        ValueError, tarfile.TarError: says what is wrong with it.
    """
    with tarfile.open(fileobj=io.BytesIO(record), mode="r:") as tar:
        members = {member.name: member for member in tar if member.isfile() and not is_companion(member.name)}
        name = image_of(members)
        if name is None:
            raise ValueError("its image is missing; was the shard changed after it was indexed?")

        def content(suffix: str) -> bytes | None:
            found = caption_member(members, name, suffix)
            return None if found is None else tar.extractfile(members[found]).read()

        image = tar.extractfile(members[name]).read()
        fields, texts = json.loads(content(".json") or b"{}"), [content(".txt"), content(".caption")]
    text = next((read_caption(text) for text in texts if text is not None), None)
    captions, kind = captions_beside(fields, text, name, reading)
    return image, Sample(Path(shard, name), captions, kind, size_of(fields), tags_of(fields))


# --- finding ----------------------------------------------------------------------------------------------------


def matching(pattern: str) -> list[str]:
    """The files that a pattern stands for: {000..127} and {a,b} written out, then *, ? and [ab] matched."""
    if os.path.lexists(os.path.expanduser(pattern)):
        return [os.path.expanduser(pattern)]
    return list(itertools.chain.from_iterable(map(_matching, _braces(pattern))))


def expand(pattern: str) -> list[str]:
    """The shards that a pattern stands for.

    Raises:
        UserError: there is none, or one is compressed.
    """
    shards = matching(pattern)
    if not shards:
        raise UserError(f"{pattern}: there is no tar shard of this name")
    compressed = [shard for shard in shards if re.search(r"\.(tgz|tar\.\w+)$", shard)]
    if compressed:
        raise UserError(f"{compressed[0]}: samples cannot be found in a compressed shard; unpack it to a plain .tar")
    return shards


def _braces(pattern: str) -> list[str]:
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if found is None:
        return [pattern]
    first, last, names = found.groups()
    if names is None:
        values = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        values = names.split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [before + value + rest for value in values for rest in _braces(after)]


def _matching(pattern: str) -> list[str]:
    if "://" in pattern:
        if "*" not in pattern:
            return [pattern]
        files, path = fsspec.core.url_to_fs(pattern)
        return [files.unstrip_protocol(name) for name in sorted(files.glob(path))]
    pattern = os.path.expanduser(pattern)
    if os.path.lexists(pattern) or not glob.has_magic(pattern):
        return [pattern]
    # brackets may be part of a name rather than of a pattern
    return sorted(glob.glob(pattern)) or sorted(glob.glob(pattern.replace("[", "[[]")))


def _table(shard: str, folder: Path | None) -> tuple[Spans, str | None]:
    """Where the samples of a shard lie, and what is wrong with it; only a whole shard's index is kept."""
    try:
        name, version, beside = _version(shard)
        path = index_path(name, (INDEX_FORMAT, version), folder, beside)
        if not path.is_file():
            rows, damage = _scan(shard)
            if damage:
                return Spans(rows), damage
            try:
                write_index(path, rows)
            except OSError as error:
                logger.warning("%s: no index was kept (%s); every start reads the shard through", shard, error)
                return Spans(rows), None
        return Spans(path), None
    except UserError:
        raise
    except Exception as error:  # every protocol has its own
        raise UserError(f"{shard} cannot be read: {type(error).__name__}: {error}") from error


def _version(shard: str) -> tuple[str, object, Path | None]:
    """A shard's full name, something that changes when it does, and the folder it lies in if that is local."""
    if "://" not in shard:
        status = os.stat(shard)
        return os.path.abspath(shard), (status.st_size, status.st_mtime_ns), Path(shard).absolute().parent
    files, path = fsspec.core.url_to_fs(shard.rpartition("::")[2])  # of filecache::…, what is behind it
    info = files.info(path)
    return shard, [info.get(key) for key in ("size", "ETag", "mtime", "LastModified")], None


def _scan(shard: str) -> tuple[np.ndarray, str | None]:
    """(N, 3 + 2 k) of each sample with an image: first byte, end and caption bytes, in the order of the first members.

    Samples whose members do not follow one another go on in further pieces of (first byte, end), filled up with zeros.
    The other result says where the shard turned out damaged.
    """
    groups: list[dict[str, Member]] = []  # by name; of equal ones the later counts
    newest: dict[str, int] = {}  # name up to the first dot → its newest group
    key, end, damage = None, 0, None
    try:
        for member in _members(shard):
            if key_of(member.name) != key:
                end = member.first if groups else 0
                key = key_of(member.name)
                # a name that comes again elsewhere begins another sample, as WebDataset has it
                if key not in newest or member.name in groups[newest[key]]:
                    newest[key] = len(groups)
                    groups.append({})
            groups[newest[key]][member.name] = member
    except tarfile.TarError as error:  # what it broke off in may have had more members
        groups = [{name: member for name, member in group.items() if member.end <= end} for group in groups]
        damage = f"{shard} is damaged behind byte {end} ({error})"
    rows = [row for group in groups for row in _rows(group)]
    if damage:
        damage += f"; it serves the {len(rows)} samples before"
    table = np.zeros((len(rows), max(map(len, rows), default=3)), dtype=np.int64)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table, damage


def _rows(members: dict[str, Member]) -> Iterator[list[int]]:
    """The rows of the samples that members with one name up to the first dot make."""
    for names in split_group(list(members)):
        image = image_of(names)
        texts = (caption_member(names, image, suffix) for suffix in (".txt", ".caption", ".json"))
        caption = next((members[name].size for name in texts if name is not None), 0)
        pieces: list[list[int]] = []
        for member in sorted((members[name] for name in names), key=lambda member: member.first):
            if pieces and member.previous == pieces[-1][1]:
                pieces[-1][1] = member.end
            else:
                pieces.append([member.first, member.end])
        first, *others = pieces
        yield [*first, caption, *itertools.chain.from_iterable(others)]


class Member(NamedTuple):
    """A file in a tar: where its header begins, its padded data end and the file before it ended; and its size."""

    name: str
    first: int
    end: int
    previous: int
    size: int


def _members(shard: str) -> Iterator[Member]:
    """The files in a tar, without those that systems put there, reading it once through.

    Raises:
        tarfile.TarError: it breaks off, or goes on with something that is no header (which tarfile takes for the end).
    """
    files, path = fsspec.core.url_to_fs(shard)
    opened = files.open(path, "rb", block_size=READ_AHEAD, cache_type="readahead")
    with opened as file, tarfile.open(fileobj=file, mode="r|" if "://" in shard else "r:") as tar:
        empty, previous = tar.firstmember is None, 0  # Python 3.10 fails to look for a next one
        while not empty and (member := tar.next()) is not None:
            if member.isfile() and not is_companion(member.name):
                yield Member(member.name, member.offset, tar.offset, previous, member.size)
                previous = tar.offset
            tar.members.clear()  # it would remember them all
        end = tar.offset
    before = max(end - 1, 0)  # a range must not begin behind the end
    if any(_fetch(shard, before, end + tarfile.BLOCKSIZE)[end - before :]):
        raise tarfile.ReadError("no valid header")


# --- reading ----------------------------------------------------------------------------------------------------


def _fetch(shard: str, start: int, end: int, version: tuple[int, int] | None = None) -> bytes:
    """Some bytes of a shard, less where it ends. A remote read that fails is tried again.

    Raises:
        UserError: they cannot be had.
        FileChanged: the local shard is not of this version.
    """
    if "://" in shard:
        return _fetch_remote(shard, start, end)
    try:
        with Path(shard).open("rb") as file:
            if version is not None and version_of(os.fstat(file.fileno())) != version:
                raise FileChanged.of(Path(shard))
            file.seek(start)
            return file.read(end - start)
    except FileNotFoundError:
        raise FileChanged.of(Path(shard)) from None
    except OSError as error:
        raise UserError(f"{shard} cannot be read: {error.strerror}") from error


def _fetch_remote(shard: str, start: int, end: int) -> bytes:
    for pause in (1, 2, 4, None):  # seconds
        try:
            files, path = fsspec.core.url_to_fs(shard)  # from a cache, which a forked process does not share
            content = files.cat_file(path, start=start, end=end)
            break
        except Exception as error:  # every protocol has its own
            if pause is None or isinstance(error, FileNotFoundError):
                raise UserError(f"{shard} cannot be read: {type(error).__name__}: {error}") from error
            logger.warning("%s: %s: %s; trying again", shard, type(error).__name__, error)
            time.sleep(pause)
    if len(content) > end - start:
        raise UserError(f"{shard}: its server ignores ranges; copy the shard, or give it as filecache::{shard}")
    return content
