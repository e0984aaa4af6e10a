"""Training data: manifest → micro-batches of cropped images and captions, in an order that resumes exactly.

What is unusual here: every random choice about a sample (caption, dropout, crop) is a function of the seed and of
the sample's position in the training stream. It does not depend on the number of workers, on the micro-batch size or
on where a run was interrupted; the flow-matching noise is keyed by the same positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, Sampler

from autoencoder.config import UserError
from autoencoder.data import TrainLoader
from autoencoder.images import aspect_buckets, crop_to_size, nearest_bucket, to_uint8_tensor
from autoencoder.manifest import ImageSource, ResumableSampler, sample_rng
from svg_t2i.text import build_prompt


@dataclass(frozen=True)
class TrainItem:
    """One training sample."""

    image: Tensor  # (3, H, W) uint8
    caption: str  # with its system prompt; "" where the caption was dropped
    position: int  # in the training stream of all ranks


@dataclass(frozen=True)
class TrainBatch:
    """One micro-batch, ordered by image size: sample i is row i of the concatenated groups.

    Attributes:
        images: groups (n_i, 3, H_i, W_i) uint8 of equally sized images, in order of first appearance.
        captions: the B texts, system prompts applied, "" for dropped ones.
        positions: (B,) int64, position of each sample in the training stream of all ranks.
    """

    images: tuple[Tensor, ...]
    captions: tuple[str, ...]
    positions: Tensor

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(H, W) in pixels of each sample."""
        return tuple((group.shape[2], group.shape[3]) for group in self.images for _ in range(group.shape[0]))

    def to(self, device: torch.device | str) -> TrainBatch:
        """Move the tensors; from pinned memory the copy overlaps with computation."""
        images = tuple(group.to(device, non_blocking=True) for group in self.images)
        return replace(self, images=images, positions=self.positions.to(device, non_blocking=True))

    def pin_memory(self) -> TrainBatch:
        """Called by DataLoader's pinning thread."""
        images = tuple(group.pin_memory() for group in self.images)
        return replace(self, images=images, positions=self.positions.pin_memory())


class T2IDataset(Dataset[TrainItem]):
    """Images and captions of a manifest, cropped to aspect buckets.

    Args:
        manifest: where the images come from; it replaces a bounded number of unreadable ones.
        resolution: crops have about resolution² pixels; a multiple of 16.
        max_aspect: largest ratio of the sides; 1 gives squares only.
        caption_dropout_prob: how often the whole text is replaced by "", in [0, 1].
        system_prompt: key of `SYSTEM_PROMPTS` for all captions; None takes the one of the manifest's convention
            ("base" for path/prompt, "align" for image_path/super_high_quality_caption).
        seed: of all random choices.

    Raises:
        UserError: if an argument is out of its range.
    """

    def __init__(
        self,
        manifest: ImageSource,
        resolution: int,
        max_aspect: float = 4.0,
        caption_dropout_prob: float = 0.1,
        system_prompt: str | None = None,
        seed: int = 0,
    ):
        if not 0 <= caption_dropout_prob <= 1:
            raise UserError(f"caption_dropout_prob={caption_dropout_prob} must lie between 0 and 1")
        if system_prompt is not None:
            build_prompt("", system_prompt)  # an unknown name fails now, not in a worker
        self.manifest = manifest
        self.buckets = aspect_buckets(resolution, max_aspect)
        self.caption_dropout_prob = caption_dropout_prob
        self.system_prompt = system_prompt
        self.seed = seed

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, key: tuple[int, int]) -> TrainItem:
        """The sample at `key` = (position in the training stream, index in the manifest)."""
        position, index = key
        image, sample = self.manifest.load(index)
        if not sample.captions:
            raise UserError(f"{sample.path} has no caption; text-to-image training needs one for every image")
        rng = sample_rng(self.seed, position)
        dropped = rng.random() < self.caption_dropout_prob  # always drawn, so that the rate changes no crop
        caption = sample.captions[int(rng.random() * len(sample.captions))]
        text = "" if dropped else build_prompt(caption, self.system_prompt or sample.caption_kind)
        size = nearest_bucket(image.size, self.buckets)
        return TrainItem(to_uint8_tensor(crop_to_size(image, size, rng)), text, position)


def collate(items: Sequence[TrainItem]) -> TrainBatch:
    """Group items by image size, sizes in order of first appearance, items of a size in their order."""
    groups: dict[torch.Size, list[TrainItem]] = {}
    for item in items:
        groups.setdefault(item.image.shape, []).append(item)
    ordered = [item for group in groups.values() for item in group]
    return TrainBatch(
        images=tuple(torch.stack([item.image for item in group]) for group in groups.values()),
        captions=tuple(item.caption for item in ordered),
        positions=torch.tensor([item.position for item in ordered]),
    )


class _Positions(Sampler[tuple[int, int]]):
    """The (position, index) pairs of a ResumableSampler."""

    def __init__(self, sampler: ResumableSampler):
        super().__init__()
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self.sampler.iter_positions()


def build_loader(
    dataset: T2IDataset,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    total_steps: int,
    resume_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> TrainLoader[TrainBatch]:
    """This rank's micro-batches of steps `resume_step` … `total_steps` − 1, in order, on the host.

    A step is global_batch_size / (world_size · micro_batch_size) consecutive micro-batches on every rank. The
    micro-batches of a step are the same whether the run was resumed or not and whatever `num_workers`.

    Raises:
        UserError: if the batch sizes do not divide; from the iterator, if too many images are unreadable.
    """
    if micro_batch_size < 1 or global_batch_size % (world_size * micro_batch_size):
        raise UserError(
            f"train.global_batch_size={global_batch_size} must be a multiple of train.micro_batch_size="
            f"{micro_batch_size} times {world_size} processes"
        )
    sampler = ResumableSampler(
        len(dataset), rank, world_size, global_batch_size, total_steps, resume_step, seed=dataset.seed
    )
    return TrainLoader(
        dataset,
        batch_sampler=BatchSampler(_Positions(sampler), micro_batch_size, drop_last=True),
        collate_fn=collate,
        num_workers=num_workers,  # torch limits each to one thread
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(dataset.seed),  # else starting to iterate advances the global one
    )
