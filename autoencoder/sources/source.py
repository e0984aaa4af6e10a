"""What every source of images and captions offers: samples by index, and images in place of those that are unusable.

The kinds of source are manifests and tables (`sources.manifest`), folders (`sources.folders`), tar shards
(`sources.tar_shards`) and data sets of the Hugging Face Hub (`sources.hub`); `sources.opening` finds out which one a
path is. In which order samples are visited is decided in `images.order`.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from autoencoder.common.config import UserError, require
from autoencoder.images.files import Size, load_image
from autoencoder.sources.failures import Failures
from autoencoder.sources.spans import FileChanged, file_version

IMAGE_SUFFIXES = {".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".dib"}
IMAGE_SUFFIXES |= {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga"}
# Folders that systems and tools put beside the data.
NOT_DATA = {"__MACOSX", ".ipynb_checkpoints", ".index", "@eaDir", "$RECYCLE.BIN", ".thumbnails"}

ORIENTATIONS = ("apply", "ignore")  # of the EXIF tag
CaptionKind = Literal["base", "align"]


@dataclass(frozen=True)
class Sample:
    """An image file and its alternative captions: at least one, unless the source was opened without requiring any."""

    path: Path
    captions: tuple[str, ...]
    caption_kind: CaptionKind
    size: Size | None = None  # (width, height) in pixels, if the source tells without opening the image
    tags: tuple[str, ...] = ()  # what kind of image it is, if the source says: "faces", "text"


class Loaded(NamedTuple):
    """The image and sample that an index led to; `index` is another one where that sample was unusable."""

    image: Image.Image  # RGB
    sample: Sample
    index: int


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Attributes:
        require_captions: a sample without a caption is unusable.
        exif_orientation: "apply" turns images upright; "ignore" reads them as the published training data was read.
        index_folder: where the indexes of large sources are kept, see `sources.spans`.
        image_column, caption_column: of manifests and tables; None finds them by the usual names.
        failures: the count of unusable samples, one for all sources of a run.
    """

    require_captions: bool = True
    exif_orientation: str = "apply"
    index_folder: Path | None = None
    image_column: str | None = None
    caption_column: str | None = None
    failures: Failures = field(default_factory=Failures)

    def __post_init__(self) -> None:
        require(self.exif_orientation in ORIENTATIONS, "exif_orientation", self.exif_orientation, "apply or ignore")

    @property
    def turn(self) -> bool:
        """Whether `load_image` applies the orientation."""
        return self.exif_orientation == "apply"


class ImageSource(Sequence[Sample]):
    """A sequence of samples whose images are loaded with a bounded number of failures.

    Attributes:
        name: what messages call this source, its file or folder.
        reading: how it is read; its `failures` are those of the whole run.
    """

    def __init__(self, name: str, reading: Reading):
        self.name, self.reading = name, reading

    @property
    def failures(self) -> Failures:
        """The unusable samples that the run has met, in this source and in the others."""
        return self.reading.failures

    def load(self, index: int, shrink: Callable[[Size], Size] | None = None) -> Loaded:
        """The RGB image and sample at `index`, or at the next index (cyclically) that is usable.

        shrink: as in `load_image`.

        Raises:
            UserError: more samples of the run are unusable than may be, or all of this source.
        """
        first = range(len(self))[index]  # IndexError, negative indices
        for candidate in itertools.chain(range(first, len(self)), range(first)):
            if (self.name, candidate) in self.failures:
                continue
            try:
                return Loaded(*self.load_exactly(candidate, shrink), candidate)
            except FileChanged:
                raise
            except UserError as error:
                self.fail(candidate, str(error))
        reason = self.failures.reasons[self.name, first]
        raise UserError(f"{self.name}: none of the {len(self)} images is usable; the first: {reason}")

    def load_exactly(self, index: int, shrink: Callable[[Size], Size] | None = None) -> tuple[Image.Image, Sample]:
        """The RGB image and sample at `index`; a `UserError` says why it is unusable."""
        source, sample = self.read(index)
        return load_image(source, shrink=shrink, name=str(sample.path), turn=self.reading.turn), sample

    def read(self, index: int) -> tuple[Path | bytes, Sample]:
        """The image at `index`, as a file or as the content of one, and its sample."""
        sample = self[index]
        return sample.path, sample

    def fail(self, index: int, reason: str) -> None:
        """Count the sample at `index` as unusable. UserError if more are than may be."""
        self.failures.add(self.name, index, reason)

    def hint(self, index: int) -> tuple[Size | None, tuple[int, ...]]:
        """What is known without reading the image: its size, and how many bytes of UTF-8 the captions have."""
        sample = self[index]
        return sample.size, tuple(len(caption.encode(errors="replace")) for caption in sample.captions)

    def fingerprint(self) -> str:
        """16 hex digits that change when samples are added, removed, reordered or described otherwise.

        A look at 64 entries from first to last, not at the images, nor at the folder's name.
        """
        digest = hashlib.sha256(str(len(self)).encode())
        for index in np.linspace(0, len(self) - 1, min(len(self), 64)).astype(int).tolist():
            digest.update(self._identity(index))
        return digest.hexdigest()[:16]

    @cached_property
    def content_fingerprint(self) -> str:
        """16 hex digits of all that the source lists, with the captions of a manifest or table, and a few thousand of
        those that lie beside their images.

        Images are not read. It takes a second per GB of a manifest.
        """
        digest = hashlib.sha256(self.fingerprint().encode())
        for part in self._listing():
            digest.update(part)
        return digest.hexdigest()[:16]

    def stamp(self, index: int) -> bytes:
        """Changes when a sample gets other captions, or its image another size or, as a file, another time.

        Raises:
            UserError: the entry is broken.
        """
        sample = self[index]
        return stamp_of(sample, file_version(sample.path))

    def _listing(self) -> Iterator[bytes | np.ndarray]:
        """All that the source lists, piece by piece."""
        return iter(())

    def _identity(self, index: int) -> bytes:
        """What names one sample among others."""
        return os.fsencode(self[index].path.name)


def stamp_of(sample: Sample, image: object) -> bytes:
    """The stamp of a sample, see `ImageSource.stamp`. image: what changes with its image."""
    return repr((sample.path.name, sample.captions, image)).encode(errors="surrogateescape")


def find_part(ends: Sequence[int], index: int) -> tuple[int, int]:
    """Index in several sequences as one, which end at `ends` → number of the sequence, index in it."""
    index = range(ends[-1])[operator.index(index)]  # IndexError, negative indices
    number = bisect_right(ends, index)
    return number, index - (ends[number - 1] if number else 0)


class JoinedSources(ImageSource):
    """Several sources as one, in their order. name: what messages call it, the sources' names by default."""

    def __init__(self, sources: Sequence[ImageSource], name: str | None = None):
        super().__init__(name or ", ".join(source.name for source in sources), sources[0].reading)
        self.sources = tuple(sources)
        self.ends = list(itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        source, index = self._find(index)
        return source[index]

    def load(self, index: int, shrink: Callable[[Size], Size] | None = None) -> Loaded:
        number, place = find_part(self.ends, index)
        found = self.sources[number].load(place, shrink)
        return found._replace(index=index + found.index - place)

    def read(self, index: int) -> tuple[Path | bytes, Sample]:
        source, index = self._find(index)
        return source.read(index)

    def hint(self, index: int) -> tuple[Size | None, tuple[int, ...]]:
        source, index = self._find(index)
        return source.hint(index)

    def stamp(self, index: int) -> bytes:
        source, index = self._find(index)
        return source.stamp(index)

    def fail(self, index: int, reason: str) -> None:
        source, index = self._find(index)
        source.fail(index, reason)

    def _listing(self) -> Iterator[bytes]:
        return (source.content_fingerprint.encode() for source in self.sources)

    def _find(self, index: int) -> tuple[ImageSource, int]:
        number, index = find_part(self.ends, index)
        return self.sources[number], index


def is_companion(name: str) -> bool:
    """Whether a file is one that systems put beside the data: `._photo.jpg`, `__MACOSX/…`, `.ipynb_checkpoints/…`."""
    *folders, base = name.split("/")
    return base.startswith("._") or not NOT_DATA.isdisjoint(folders)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is an image, by its ending."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
