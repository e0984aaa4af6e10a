"""Feature cache, read instead of images: latents of fixed crops, text features of all captions.

    FOLDER/
      cache.json                     what the features depend on, how many samples and shards there are
      unconditional.safetensors      text (L, D): the features of ""
      00000.safetensors …            one shard per `shard_size` samples, in the order of the source:
          latents (T, C)             normalised; the h·w cells of crop 0 of the first sample, of its crop 1, …
          sizes (samples, crops, 2)  h and w of each crop's latent
          text (L, D)                the tokens of the first caption of the first sample, of its second, …
          text_lengths (captions,)   tokens of each caption
          caption_lengths (captions,)  letters of each, by which short and long ones are told apart
          captions (samples,)        how many captions each sample has
          replaced (samples,)        1 where the features are those of another sample, because this one is unusable
                                     (its metadata: "samples", what changes with the captions and image files)

Shards are memory-mapped; a sample is a few contiguous reads. What is random in training stays so: dropout, the choice
among captions and among crops, timesteps and noise are drawn at every visit, as from images with as many fixed crops.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoencoder.common.config import UserError
from autoencoder.common.weights import replacing
from svg_t2i.data.draws import Augmentation
from svg_t2i.transformer.packing import Sizes, TextFeatures

FORMAT_VERSION = 1
META_FILE, UNCONDITIONAL_FILE = "cache.json", "unconditional.safetensors"
OPEN_SHARDS = 256  # per process; the tables of each are some 40 bytes a sample


@dataclass(frozen=True)
class CachedItem:
    """One training sample, encoded."""

    latents: Tensor  # (h·w, C) normalised, as stored
    size: tuple[int, int]  # (h, w)
    text: Tensor  # (L, D)
    replaced: bool  # by another sample, because it was unusable
    position: int
    resolution: int


@dataclass(frozen=True)
class FeatureBatch:
    """One micro-batch of encoded samples: what a TrainBatch becomes behind the frozen networks.

    Attributes:
        latents: (sum of h·w, C) normalised cells, row by row, sample by sample.
        sizes: (h, w) of each latent.
        text: features of the captions.
        positions: (B,) int64, position of each sample in the training stream of all ranks.
        resolutions: (B,) int64, nominal side of each image in pixels.
        replaced: how many of the samples stand in for ones that were unusable when the cache was made.
        counted: as of a TrainBatch.
    """

    latents: Tensor
    sizes: Sizes
    text: TextFeatures
    positions: Tensor
    resolutions: Tensor
    replaced: int = 0
    counted: bool = True

    def __len__(self) -> int:
        return len(self.sizes)

    def unpacked(self) -> list[Tensor]:
        """A (C, h, w) fp32 latent per sample."""
        cells = self.latents.float().split([h * w for h, w in self.sizes])
        return [x.T.unflatten(1, size) for x, size in zip(cells, self.sizes, strict=True)]

    def to(self, device: torch.device | str) -> FeatureBatch:
        """Move the tensors; from pinned memory the copy overlaps with computation."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> FeatureBatch:
        """Called by DataLoader's pinning thread."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> FeatureBatch:
        text = replace(self.text, features=function(self.text.features))
        moved = {name: function(getattr(self, name)) for name in ("latents", "positions", "resolutions")}
        return replace(self, text=text, **moved)


# --- reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureCache:
    """A finished cache. Make one with `open`."""

    folder: Path
    num_samples: int
    shard_size: int

    @classmethod
    def open(
        cls,
        folder: Path,
        fingerprint: Mapping[str, Any],
        digest: Callable[[Sequence[int]], str] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> FeatureCache:
        """The cache in `folder`, if it is whole and was made for `fingerprint`.

        digest: of samples as they are now, see `sources.samples_digest`. Shards of up to 100,000 samples, evenly
            spread, are compared with it, each by one of the ranks.

        Raises:
            UserError: otherwise; names what differs and the remedy.
        """
        meta = read_meta(folder)
        if meta is None:
            raise UserError(f"data.feature_cache={folder} holds no features; {REMEDY}")
        check_fingerprint(folder, meta, fingerprint)
        missing = [path.name for path in cache_files(folder, meta) if not path.is_file()]
        if missing:
            raise UserError(
                f"data.feature_cache={folder} is incomplete: {len(missing)} files such as {missing[0]}; {REMEDY}"
            )
        if digest is not None:
            shards = cache_files(folder, meta)[1:]
            checked = min(len(shards), max(1, CHECKED_SAMPLES // meta["shard_size"]))
            numbers = np.unique(np.linspace(0, len(shards) - 1, checked).astype(int)).tolist()[rank::ranks]
            stale = [number for number in numbers if not is_current(shards[number], digest(shard_range(meta, number)))]
            if stale:
                raise UserError(
                    f"data.feature_cache={folder}: {len(stale)} of {len(numbers)} shards looked at, such as "
                    f"{shards[stale[0]].name}, were made from other captions or image files than are there now; "
                    f"{REMEDY}, which makes anew what has changed"
                )
        return cls(folder, fingerprint["samples"], meta["shard_size"])

    def tokens(self, index: int, crop: int, caption: int | None) -> int:
        """Tokens of image and caption together; None is the unconditional one."""
        shard, row = self._find(index)
        first = shard.first_caption[row]
        text = len(_unconditional(self.folder)) if caption is None else int(np.diff(shard.text_rows)[first + caption])
        return int(shard.sizes[row, crop].prod()) + text

    def caption_lengths(self, index: int) -> list[int]:
        """Letters of each caption of a sample."""
        shard, row = self._find(index)
        return shard.caption_lengths[shard.first_caption[row] : shard.first_caption[row + 1]].tolist()

    def read(self, index: int, crop: int, caption: int | None) -> tuple[Tensor, tuple[int, int], Tensor, bool]:
        """Latents (h·w, C), their (h, w), and text features (L, D) of a crop and a caption; None: of no caption.

        The last value says whether they are those of another sample.
        """
        shard, row = self._find(index)
        latents = shard.rows("latents", shard.latent_rows, row * shard.sizes.shape[1] + crop)
        if caption is None:
            text = _unconditional(self.folder)
        else:
            text = shard.rows("text", shard.text_rows, shard.first_caption[row] + caption)
        height, width = shard.sizes[row, crop].tolist()
        return latents, (height, width), text, bool(shard.replaced[row])

    @property
    def item_bytes(self) -> int:
        """Size of the first sample, with its first caption."""
        latents, _, text, _ = self.read(0, 0, 0)
        return latents.nbytes + text.nbytes

    def _find(self, index: int) -> tuple[_Shard, int]:
        number, row = divmod(index, self.shard_size)
        return _open_shard(shard_path(self.folder, number)), row


class _Shard:
    """An open shard: its tables in memory, its features mapped."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = safe_open(path, framework="pt")
            self.sizes = self.file.get_tensor("sizes").numpy()
            self.caption_lengths = self.file.get_tensor("caption_lengths").numpy()
            self.latent_rows = _offsets(self.sizes.prod(axis=2).reshape(-1))
            self.text_rows = _offsets(self.file.get_tensor("text_lengths").numpy())
            captions = self.file.get_tensor("captions").numpy()
            self.first_caption = _offsets(captions)
            older = "replaced" not in self.file.keys()  # noqa: SIM118 - not a mapping
            self.replaced = np.zeros(len(captions), bool) if older else self.file.get_tensor("replaced").numpy()
        except (OSError, SafetensorError) as error:
            raise UserError(f"feature cache: {path} cannot be read ({error}); delete it and make it again") from error

    def rows(self, name: str, offsets: np.ndarray, number: int) -> Tensor:
        return self.file.get_slice(name)[int(offsets[number]) : int(offsets[number + 1])]


@lru_cache(maxsize=OPEN_SHARDS)
def _open_shard(path: Path) -> _Shard:
    return _Shard(path)


@lru_cache(maxsize=16)
def _unconditional(folder: Path) -> Tensor:
    with safe_open(folder / UNCONDITIONAL_FILE, framework="pt") as file:
        return file.get_tensor("text")


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


class CachedDataset:
    """The samples of a feature cache, varied from visit to visit as `T2IDataset` varies images."""

    def __init__(self, cache: FeatureCache, augmentation: Augmentation, resolution: int):
        self.cache, self.augmentation, self.resolution = cache, augmentation, resolution

    def __len__(self) -> int:
        return self.cache.num_samples

    @property
    def item_bytes(self) -> int:
        """Size of a sample, about."""
        return self.cache.item_bytes

    def __getitem__(self, key: tuple[int, int]) -> CachedItem:
        """The sample at `key` = (position in the training stream, index in the source)."""
        position, index = key
        return CachedItem(*self.cache.read(index, *self._choose(position, index)), position, self.resolution)

    def tokens(self, position: int, index: int) -> int:
        """How many tokens image and caption of a visit have."""
        return self.cache.tokens(index, *self._choose(position, index))

    def _choose(self, position: int, index: int) -> tuple[int, int | None]:
        """Crop and caption; None if that is dropped."""
        draw = self.augmentation.draw(position)
        caption = None if draw.dropped else draw.choose_caption(self.cache.caption_lengths(index))
        return self.augmentation.choose_crop(draw), caption

    @staticmethod
    def collate(items: Sequence[CachedItem]) -> FeatureBatch:
        """Pack items in their order."""
        return FeatureBatch(
            latents=torch.cat([item.latents for item in items]),
            sizes=tuple(item.size for item in items),
            text=TextFeatures(torch.cat([item.text for item in items]), tuple(len(item.text) for item in items)),
            positions=torch.tensor([item.position for item in items]),
            resolutions=torch.tensor([item.resolution for item in items]),
            replaced=sum(item.replaced for item in items),
        )


# --- files ------------------------------------------------------------------------------------------------------

CHECKED_SAMPLES = 100_000  # compared with the data when a training begins
OF_THE_DATA = ("source", "content", "samples")  # keys of the fingerprint that change with the data alone
RECORDED_LATER = ("content", "EXIF orientation")  # keys of the fingerprint that older caches do not have
REMEDY = "fill it with: python -m svg_t2i.cache_features --config THE_SAME_YAML"


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def cache_files(folder: Path, meta: Mapping[str, Any]) -> list[Path]:
    """The files that a finished cache has, besides its `cache.json`."""
    shards = -(-meta["fingerprint"]["samples"] // meta["shard_size"])
    return [folder / UNCONDITIONAL_FILE, *(shard_path(folder, number) for number in range(shards))]


def shard_range(meta: Mapping[str, Any], number: int) -> range:
    """The samples of a shard."""
    size = meta["shard_size"]
    return range(number * size, min((number + 1) * size, meta["fingerprint"]["samples"]))


def is_current(path: Path, digest: str, otherwise: bool = True) -> bool:
    """Whether a shard was made from samples of this digest. Those of older versions do not tell: then `otherwise`."""
    try:
        with safe_open(path, framework="pt") as file:
            made = (file.metadata() or {}).get("samples")
    except (OSError, SafetensorError):
        return True  # reading it will say what is wrong with it
    return otherwise if made is None else made == digest


def read_meta(folder: Path) -> dict[str, Any] | None:
    """The content of `cache.json`, None where there is none.

    Raises:
        UserError: it is broken, or of another version of this program.
    """
    path = folder / META_FILE
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text())
        version = meta["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is broken ({error!r}); choose another folder or delete this one") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version}, this program reads {FORMAT_VERSION}; make the cache again")
    return meta


def differences(meta: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """What a cache was made for and what it is needed for, "old ≠ new", by the keys in which they differ."""
    made = {key: fingerprint.get(key) for key in RECORDED_LATER} | meta["fingerprint"]
    return {key: f"{made.get(key)} ≠ {value}" for key, value in fingerprint.items() if made.get(key) != value}


def check_fingerprint(folder: Path, meta: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """UserError naming each difference between what a cache was made for and what it is needed for."""
    differing = differences(meta, fingerprint)
    if not differing:
        return
    remedy = "go back to those images, settings and networks, or make another cache"
    if differing.keys() <= set(OF_THE_DATA):
        remedy = "make anew what has changed"
    listed = "; ".join(f"{key}: {difference}" for key, difference in differing.items())
    raise UserError(
        f"feature cache {folder} was made for something else ({listed}); {remedy} with python -m svg_t2i.cache_features"
    )


def write_meta(folder: Path, fingerprint: Mapping[str, Any], shard_size: int) -> None:
    """Write `cache.json`, before the first shard."""
    meta = {"format_version": FORMAT_VERSION, "shard_size": shard_size, "fingerprint": dict(fingerprint)}
    with replacing(folder / META_FILE) as path:
        path.write_text(json.dumps(meta, indent=2) + "\n")


def write_shard(
    path: Path,
    latents: Sequence[Sequence[Tensor]],
    text: Sequence[TextFeatures],
    caption_lengths: Sequence[Sequence[int]],
    replaced: Sequence[bool],
    digest: str,
) -> None:
    """Write a shard, whole or not at all: of each sample its crops (C, h, w), its captions' features and letters, and
    whether it is replaced by another. digest: of the samples."""
    tensors = {
        "latents": torch.cat([x.flatten(1).T for crops in latents for x in crops]),  # (T, C)
        "sizes": torch.tensor([[x.shape[1:] for x in crops] for crops in latents], dtype=torch.int32),
        "text": torch.cat([features.features for features in text]),  # (L, D)
        "text_lengths": torch.tensor([n for features in text for n in features.lengths], dtype=torch.int32),
        "caption_lengths": torch.tensor([n for lengths in caption_lengths for n in lengths], dtype=torch.int32),
        "captions": torch.tensor([len(features.lengths) for features in text], dtype=torch.int32),
        "replaced": torch.tensor(replaced, dtype=torch.uint8),
    }
    with replacing(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {"samples": digest})


def write_unconditional(folder: Path, features: Tensor) -> None:
    """Write the features (L, D) of the empty caption."""
    with replacing(folder / UNCONDITIONAL_FILE) as partial:
        save_file({"text": features.contiguous()}, partial)
