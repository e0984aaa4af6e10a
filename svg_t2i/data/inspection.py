"""What a source holds: every sample read as training reads it, and sums, figures and settings made of that."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from torch.utils.data import Dataset

from autoencoder.common.config import UserError
from autoencoder.images.files import Size, image_grid, load_image, nearest_bucket, save_png, to_float, to_pil
from autoencoder.images.order import sample_rng
from autoencoder.sources.failures import FEWEST_ERRORS, MAX_ERRORS, kind_of_failure
from autoencoder.sources.spans import FileChanged
from svg_t2i.data.sources import BYTES_PER_TOKEN, T2IDataset

EXAMPLES = 5  # of each kind of finding
RESOLUTIONS = (256, 512, 1024)  # of the stages of training
ASPECTS = (1.0, 1.5, 2.0, 3.0, 4.0)
ENOUGH = 0.9  # share of images that are to reach a resolution
ALMOST_ALL = 0.99  # share of images whose aspect, and of captions whose length, are to be covered

TokenCounter = Callable[[Sequence[str]], Sequence[int]]


def estimated_tokens(texts: Sequence[str]) -> list[int]:
    """About how many tokens texts have, without a tokenizer."""
    return [1 + ceil(len(text.encode(errors="replace")) / BYTES_PER_TOKEN) for text in texts]


@dataclass(frozen=True)
class Finding:
    """What reading one sample gave; `reason` says why it is unusable."""

    index: int
    reason: str = ""
    size: Size = (0, 0)  # (width, height), after orientation
    digest: int = 0  # of the image file, 63 bits
    tokens: tuple[int, ...] = ()  # of each caption with its system prompt


class ImagesOnly(T2IDataset):
    """Images that need no captions, as the training of the autoencoder takes them."""

    def load(self, index: int) -> tuple[Image, list[str], bool]:
        """As that of captioned images, with "" where there is no caption."""
        image, sample, found = self.manifest.load(index)
        return image, self.texts(sample) or [""], found != index


class SampleReader(Dataset[Finding]):
    """Samples by index: read and decoded as for training, in whatever process asks."""

    def __init__(self, dataset: T2IDataset, count_tokens: TokenCounter = estimated_tokens):
        self.dataset, self.count_tokens = dataset, count_tokens

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Finding:
        source = self.dataset.manifest
        try:
            content, sample = source.read(index)
            content = content if isinstance(content, bytes) else content.read_bytes()
            image = load_image(content, name=str(sample.path), turn=source.reading.turn)
        except FileChanged:
            raise
        except UserError as error:
            return Finding(index, reason=str(error))
        except OSError as error:
            return Finding(index, reason=f"{sample.path}: not a readable image: {error.strerror}")
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1
        tokens = tuple(self.count_tokens(self.dataset.texts(sample))) if sample.captions else ()
        return Finding(index, size=image.size, digest=digest, tokens=tokens)


@dataclass
class Inspection:
    """The sum of findings. A sample takes some 40 bytes, and 8 more for each caption."""

    dataset: T2IDataset
    reasons: dict[int | str, str] = field(default_factory=dict)  # by sample
    _numbers: array = field(default_factory=lambda: array("q"))  # index, width, height, digest, captions of each sample
    _tokens: array = field(default_factory=lambda: array("q"))

    def add(self, finding: Finding) -> None:
        if finding.reason:
            self.reasons[finding.index] = finding.reason
            return
        self._numbers.extend((finding.index, *finding.size, finding.digest, len(finding.tokens)))
        self._tokens.extend(finding.tokens)

    @property
    def table(self) -> np.ndarray:
        """(usable samples, 5) int64: index, width, height, digest, number of captions."""
        return np.frombuffer(self._numbers, dtype=np.int64).reshape(-1, 5)

    @property
    def tokens(self) -> np.ndarray:
        """(captions,) int64."""
        return np.frombuffer(self._tokens, dtype=np.int64)

    def report(self) -> dict[str, Any]:
        """Everything as plain values, as it is written to report.json."""
        table, tokens, limit = self.table, self.tokens, self.dataset.max_caption_tokens
        read = len(table) + sum(isinstance(sample, int) for sample in self.reasons)
        width, height = table[:, 1], table[:, 2]
        cut = tokens > limit
        return {
            "path": self.dataset.manifest.name,
            "samples": len(self.dataset),
            "read": read,
            "usable": len(table),
            "unusable": self._unusable(),
            "images": {
                "width": spread(width),
                "height": spread(height),
                "aspect": spread(np.maximum(width, height) / np.maximum(1, np.minimum(width, height))),
                "enlarged_at": {str(side): share(width * height < side**2) for side in RESOLUTIONS},
            },
            "aspect_buckets": self._buckets(),
            "captions": {
                "per_image": spread(table[:, 4]),
                "tokens": spread(tokens),
                "max_length": limit,
                "cut": int(cut.sum()),
                "cut_share": share(cut),
                "tokens_lost": int((tokens[cut] - limit).sum()),
            },
            "duplicates": self._duplicates(),
        }

    def _unusable(self) -> dict[str, Any]:
        kinds: dict[str, list[str]] = {}
        for reason in self.reasons.values():
            kinds.setdefault(kind_of_failure(reason), []).append(reason)
        ordered = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
        kinds_found = {kind: {"count": len(all_), "examples": all_[:EXAMPLES]} for kind, all_ in ordered}
        return {"count": len(self.reasons), "reasons": kinds_found}

    def _buckets(self) -> dict[str, int]:
        """How many images are cut to each size, the most frequent first."""
        sizes, counts = np.unique(self.table[:, 1:3], axis=0, return_counts=True)
        buckets: Counter[Size] = Counter()
        for size, count in zip(sizes.tolist(), counts.tolist()):
            buckets[nearest_bucket(tuple(size), self.dataset.buckets)] += count
        return {f"{width}x{height}": count for (width, height), count in buckets.most_common()}

    def _duplicates(self) -> dict[str, Any]:
        """Images whose files are the same, byte for byte."""
        _, group, counts = np.unique(self.table[:, 3], return_inverse=True, return_counts=True)
        copies = int((counts - 1).sum())
        repeated = np.flatnonzero(counts > 1)
        by_size = repeated[np.argsort(-counts[repeated], kind="stable")][:EXAMPLES]
        examples = [self.table[group == number, 0][:EXAMPLES].tolist() for number in by_size]
        return {"images": copies, "groups": len(repeated), "examples": examples}


def share(chosen: np.ndarray) -> float:
    """Share of true ones, to four digits; 0 of none."""
    return round(float(chosen.mean()), 4) if len(chosen) else 0.0


def spread(values: np.ndarray) -> dict[str, float]:
    """Least, median, 95th percentile, largest and mean value; empty for none."""
    if not len(values):
        return {}
    numbers = {"min": values.min(), "median": np.median(values), "p95": np.percentile(values, 95)}
    numbers |= {"max": values.max(), "mean": values.mean()}
    return {name: round(float(value), 2) for name, value in numbers.items()}


def settings(inspection: Inspection, path: str, columns: dict[str, str | None]) -> dict[str, Any]:
    """Entries of a training's YAML file that suit the data, where they are worth a thought."""
    table, tokens, reading = inspection.table, inspection.tokens, inspection.dataset.manifest.reading
    width, height = table[:, 1], table[:, 2]
    reached = [side for side in RESOLUTIONS if share(width * height >= side**2) >= ENOUGH]
    resolution = max(reached, default=RESOLUTIONS[0])
    aspect = np.maximum(width, height) / np.maximum(1, np.minimum(width, height))
    covering = [limit for limit in ASPECTS if share(aspect <= limit) >= ALMOST_ALL]
    data: dict[str, Any] = {"path": path, "resolution": resolution, "max_aspect": min(covering, default=ASPECTS[-1])}
    data |= {name: value for name, value in columns.items() if value is not None}
    if np.median(np.minimum(width, height)) >= 2 * resolution:
        data["jpeg_draft"] = True
    if reading.exif_orientation != "apply":
        data["exif_orientation"] = reading.exif_orientation
    found = len(inspection.reasons)
    if found > max(FEWEST_ERRORS, MAX_ERRORS * len(inspection.dataset)):
        data["max_errors"] = ceil(found * len(inspection.dataset) / max(1, found + len(table)))
    if table[:, 4].mean() >= 3:
        data["caption_mix"] = {"short": 0.1, "middle": 0.35, "long": 0.55}
    if not len(tokens):
        return {"data": data}
    longest = int(np.percentile(tokens, 100 * ALMOST_ALL))
    return {"data": data, "text_encoder": {"max_length": min(512, max(64, 64 * ceil(longest / 64)))}}


def draw_histograms(inspection: Inspection, path: Path) -> None:
    """Widths and heights, aspects, crop sizes and caption lengths, as one PNG."""
    from matplotlib.figure import Figure

    table, tokens = inspection.table, inspection.tokens
    width, height = np.maximum(table[:, 1], 1), np.maximum(table[:, 2], 1)
    figure = Figure(figsize=(11, 8), layout="constrained")
    sides, aspects, crops, captions = figure.subplots(2, 2).flat
    sides.hist([width, height], bins=40, label=["width", "height"])
    sides.set(title="image sides", xlabel="pixels", ylabel="images")
    sides.legend()
    aspects.hist(np.log2(width / height), bins=40)
    aspects.set(title="aspect", xlabel="log2(width / height)", ylabel="images")
    buckets = list(inspection.report()["aspect_buckets"].items())[:12]
    crops.barh([name for name, _ in reversed(buckets)], [count for _, count in reversed(buckets)])
    crops.set(title=f"crops at resolution {inspection.dataset.resolution}", xlabel="images")
    captions.hist(tokens, bins=40)
    captions.axvline(inspection.dataset.max_caption_tokens, color="black", linestyle="--", label="max_length")
    captions.set(title="captions with their system prompt", xlabel="tokens", ylabel="captions")
    captions.legend()
    figure.savefig(path)


def save_contact_sheet(dataset: T2IDataset, indices: Iterable[int], count: int, seed: int, path: Path) -> None:
    """`count` random ones of the samples `indices` as training sees them, with the captions that it gets."""
    indices = np.fromiter(indices, dtype=np.int64)
    chosen = np.sort(sample_rng(seed, 0).permutation(indices)[:count]).tolist()
    items = [dataset[position, index] for position, index in enumerate(chosen)]
    labels = [item.caption.rpartition("<Prompt Start> ")[2] or "(no caption)" for item in items]
    save_png(image_grid([to_pil(to_float(item.image)) for item in items], 6, [x[:200] for x in labels]), path)
