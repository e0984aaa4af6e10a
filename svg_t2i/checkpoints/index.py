"""The index of a checkpoint (`.metadata`), read without trusting it: it may come from a stranger.

torch pickles the index and unpickles it freely. Here a pickle can make nothing but plain values: every class that it
names becomes an empty one of this load alone, and what was put into that is copied to torch's classes after a check.
An index may name files of its own folder only, and no more of them than is there.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

FILE = ".metadata"
SHARDS = re.compile(r"__\d+_\d+\.distcp")


class SafeReader(dcp.FileSystemReader):
    """Reads shards like its parent (tensors, weights-only), and the index of an untrusted checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            pickle.UnpicklingError: it names other classes than an index does, entries that are no tensors, files
                outside of the folder, or more bytes than these have.
        """
        metadata = read_index(Path(self.path))
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_index(folder: Path) -> Metadata:
    """The index of a checkpoint folder, checked. Raises as `SafeReader.read_metadata`."""
    with (folder / FILE).open("rb") as file:
        try:
            index = _Unpickler(file).load()
        except (AttributeError, EOFError, LookupError, TypeError, ValueError) as error:
            raise _refused(f"it is damaged, or no index ({error})") from error
    shards = (path for path in folder.iterdir() if SHARDS.fullmatch(path.name) and not path.is_symlink())
    sizes = {path.name: path.stat().st_size for path in shards}
    stored = _field(index, "Metadata", "storage_data")
    places = {_place(key): _checked_storage(sizes, info) for key, info in stored.items()}
    tensors: dict[str, TensorStorageMetadata] = {}
    for name, entry in _field(index, "Metadata", "state_dict_metadata").items():
        tensors[name] = _checked_tensor(name, entry, places)
    storage = {MetadataIndex(name, offset): info for (name, offset), info in places.items()}
    version = index.fields.get("version")
    return Metadata(
        tensors,
        storage_data=storage,
        storage_meta=StorageMeta(),
        version=version if isinstance(version, str) else None,
    )


def _place(key: Any) -> tuple[str, tuple[int, ...] | None]:
    """Name of a tensor, and where in it a chunk begins."""
    name, offset = _field(key, "MetadataIndex", "fqn"), key.fields.get("offset")
    if not isinstance(name, str):
        raise _refused(f"{name!r} is no name")
    return name, None if offset is None else _numbers(offset)


def _checked_storage(sizes: Mapping[str, int], entry: Any) -> _StorageInfo:
    """Where the bytes of a chunk are. sizes: of all shards."""
    name, start, length = (_field(entry, "_StorageInfo", field) for field in ("relative_path", "offset", "length"))
    if not isinstance(name, str) or name not in sizes:
        raise _refused(f"it names the file {name!r}, which is no shard of this folder")
    start, length = _numbers((start, length))
    if start + length > sizes[name]:
        raise _refused(f"it names bytes {start} to {start + length} of {name}, which has {sizes[name]}")
    if entry.fields.get("transform_descriptors"):
        raise _refused(f"{name} is compressed")
    return _StorageInfo(name, start, length)


def _checked_tensor(
    name: Any, entry: Any, places: Mapping[tuple[str, tuple[int, ...] | None], _StorageInfo]
) -> TensorStorageMetadata:
    """A tensor: its chunks fill it, and the bytes of each are there."""
    if not isinstance(name, str) or not isinstance(entry, _Record) or entry.kind != "TensorStorageMetadata":
        raise _refused(f"{name!r} is no tensor")
    size = _numbers(_field(entry, entry.kind, "size"))
    properties = _field(entry, entry.kind, "properties")
    dtype = properties.fields[0] if isinstance(properties, _Record) and isinstance(properties.fields, tuple) else None
    if not isinstance(dtype, torch.dtype):
        raise _refused(f"{name!r} has no dtype")
    chunks = []
    for chunk in _field(entry, entry.kind, "chunks"):
        offsets, sizes = (_numbers(_field(chunk, "ChunkStorageMetadata", field)) for field in ("offsets", "sizes"))
        if len(offsets) != len(size) or any(at + n > whole for at, n, whole in zip(offsets, sizes, size, strict=True)):
            raise _refused(f"a chunk of {name!r} lies outside of it")
        info, needed = places.get((name, offsets)), prod(sizes) * dtype.itemsize
        if info is None or needed > info.length:
            raise _refused(f"{name!r} asks for {needed} bytes, and {0 if info is None else info.length} are there")
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    if sum(prod(chunk.sizes) for chunk in chunks) != prod(size):
        raise _refused(f"the chunks of {name!r} do not fill its shape {size}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), chunks)


def _field(record: Any, kind: str, name: str) -> Any:
    if not isinstance(record, _Record) or record.kind != kind or not isinstance(record.fields, dict):
        raise _refused(f"there is no {kind} where one should be")
    if name not in record.fields:
        raise _refused(f"a {kind} has no {name}")
    return record.fields[name]


def _numbers(values: Any) -> tuple[int, ...]:
    """Whole numbers of at least 0, given as a tuple or as a torch.Size."""
    if isinstance(values, _Record) and values.kind == "Size":
        values = values.arguments[0] if values.arguments else ()
    if not isinstance(values, (tuple, list)) or any(type(value) is not int or value < 0 for value in values):
        raise _refused(f"{values!r} are no sizes")
    return tuple(values)


def _refused(reason: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f"refused: {reason}")


class _Record:
    """What a pickle made of a class: the arguments of its call, and the state that it was given.

    fields: the attributes by name, or whatever else the state is.
    """

    kind = ""

    def __new__(cls, *arguments: Any) -> _Record:
        record = super().__new__(cls)
        record.arguments, record.fields = arguments, {}
        return record

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.fields = state


class _Unpickler(pickle.Unpickler):
    CLASSES = {
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in self.CLASSES.get(module, ()):
            return type(name, (_Record,), {"kind": name})  # a new one each time: a pickle can change classes
        raise _refused(f"it names {module}.{name}, and unpickling that can run code")
