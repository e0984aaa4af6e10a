"""The index of a checkpoint from a stranger: plain values, files of its own folder, no more bytes than there are."""

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

from svg_t2i.checkpoints.index import SafeReader, read_index

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "b": torch.tensor(5),
    "c": torch.zeros(0, 4),
    "d": torch.ones(2).bfloat16(),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    dcp.save({"model": TENSORS}, checkpoint_id=tmp_path / "c", no_dist=True)
    return tmp_path / "c"


def test_the_index_is_what_torch_reads(folder):
    theirs, ours = dcp.FileSystemReader(folder).read_metadata(), read_index(folder)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.version == theirs.version
    state = {"model": {name: torch.empty_like(tensor) for name, tensor in TENSORS.items()}}
    dcp.load(state, storage_reader=SafeReader(folder), no_dist=True)
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in TENSORS.items())


def change(folder, function):
    """Write the index anew after `function(index)`."""
    path = folder / ".metadata"
    index = pickle.loads(path.read_bytes())
    function(index)
    path.write_bytes(pickle.dumps(index))


def storage(**fields):
    def function(index):
        key = next(key for key in index.storage_data if key.fqn == "model.a")
        index.storage_data[key] = dataclasses.replace(index.storage_data[key], **fields)

    return function


def tensor(size, chunk):
    def function(index):
        entry = index.state_dict_metadata["model.a"]
        chunks = [ChunkStorageMetadata(torch.Size([0] * len(chunk)), torch.Size(chunk))]
        index.state_dict_metadata["model.a"] = TensorStorageMetadata(entry.properties, torch.Size(size), chunks)

    return function


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (storage(relative_path="../other/__0_0.distcp"), "which is no shard of this folder"),
        (storage(relative_path="/etc/passwd"), "which is no shard of this folder"),
        (storage(relative_path="meta.json"), "which is no shard of this folder"),
        (storage(relative_path="__9_0.distcp"), "which is no shard of this folder"),
        (storage(offset=10**12), "it names bytes 1000000000000 to"),
        (storage(length=10**13), "it names bytes"),
        (storage(offset=-1), "are no sizes"),
        (storage(length=8), "'model.a' asks for 48 bytes, and 8 are there"),
        (storage(transform_descriptors=["zstd"]), "is compressed"),
        (tensor((10**7, 10**6), (10**7, 10**6)), "asks for 40000000000000 bytes"),
        (tensor((10**7, 10**6), (3, 4)), "do not fill its shape"),
        (tensor((3, 4), (4, 4)), "lies outside"),
        (tensor((3, 4), (3, 4, 1)), "lies outside"),
        (tensor((-3, -4), (3, 4)), "are no sizes"),
        (lambda index: index.storage_data.clear(), "and 0 are there"),
    ],
)
def test_refused(folder, function, message):
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "__0_0.distcp").write_bytes(bytes(10_000))
    change(folder, function)
    with pytest.raises(pickle.UnpicklingError, match=message):
        read_index(folder)


def test_a_linked_shard_is_refused(folder, tmp_path):
    secret = tmp_path / "secret"
    shard = folder / "__0_0.distcp"
    secret.write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(secret)
    with pytest.raises(pickle.UnpicklingError, match="no shard of this folder"):
        read_index(folder)


@pytest.mark.parametrize("name", ["Metadata", "MetadataIndex", "_MEM_FORMAT_ENCODING"])
def test_attributes_of_classes_stay_as_they_are(folder, name):
    """BUILD with a pair as state sets attributes of whatever object it is given, a class included."""
    module = torch_metadata.__name__
    attack = f"c{module}\n{name}\n".encode() + b"(N(dS'planted'\nI1\nsS'__init__'\nNstb."
    (folder / ".metadata").write_bytes(attack)
    before = dict(vars(getattr(torch_metadata, name)))
    with pytest.raises(pickle.UnpicklingError):
        read_index(folder)
    assert dict(vars(getattr(torch_metadata, name))) == before


def test_functions_are_not_changed_either(folder):
    attack = b"ctorch.serialization\n_get_layout\n(N(dS'planted'\nI1\nstb."
    (folder / ".metadata").write_bytes(attack)
    with pytest.raises(pickle.UnpicklingError):
        read_index(folder)
    assert not hasattr(torch.serialization._get_layout, "planted")


@pytest.mark.parametrize("target", ["os\nsystem", "builtins\neval", "torch\nload", "torch.serialization\nload"])
def test_nothing_else_is_named(folder, target):
    (folder / ".metadata").write_bytes(f"c{target}\n(S'true'\ntR.".encode())
    with pytest.raises(pickle.UnpicklingError, match="unpickling that can run code"):
        read_index(folder)
