"""The settings of the training data: the `data` section of a run's YAML file."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoencoder.common.config import require
from autoencoder.sources.failures import MAX_ERRORS


@dataclass(frozen=True)
class DataSource:
    """One of several sources. What is None is as in the whole `data` section.

    The same images may be listed twice with different resolutions: that is how a run trains on several of them.
    """

    path: str  # whatever holds images and captions, see sources.opening
    weight: float | None = None  # share of the samples seen; None for all sources: by their number of samples
    resolution: int | None = None
    system_prompt: str | None = None
    feature_cache: str | None = None
    image_column: str | None = None
    caption_column: str | None = None


@dataclass(frozen=True)
class CaptionMix:
    """How often the shortest, the longest and the other captions of a sample are chosen, where it has several."""

    short: float
    middle: float
    long: float

    def __post_init__(self) -> None:
        shares = (self.short, self.middle, self.long)
        require(min(shares) >= 0 and sum(shares) > 0, "caption_mix", shares, "three shares, not all of them 0")


@dataclass(frozen=True)
class DataConfig:
    """Images and captions: see `svg_t2i.data.sources`."""

    path: str | None = None  # as in DataSource; or `sources` instead
    sources: tuple[DataSource, ...] = ()
    resolution: int = 256  # px: images have about the area of this square; a multiple of 16
    max_aspect: float = 4.0  # of the longest shape that images are cropped to
    single_shape: bool = False  # squares only, whatever max_aspect
    caption_dropout_prob: float = 0.1  # share of samples that train without their caption, for guidance
    caption_mix: CaptionMix | None = None  # None, as published: all captions of a sample alike
    system_prompt: str | None = None  # None: the one of the manifest's convention
    crops_per_image: int | None = None  # fixed crops of each image, 1 is its centre; None: a new one at every visit
    feature_cache: str | None = None  # folder that svg_t2i.cache_features fills and training reads
    micro_batch_tokens: int | None = None  # fill micro-batches up to this, instead of train.micro_batch_size samples
    num_workers: int = 4  # processes that read data, of each rank
    prefetch: int = 2  # micro-batches that each worker prepares ahead
    jpeg_draft: bool = False  # decode large JPEGs at 1/2, 1/4 or 1/8: several times faster, almost the same pixels
    max_errors: float = MAX_ERRORS  # unusable samples that are replaced: a share of all (16 at least), or a number
    exif_orientation: str = "apply"  # turn images upright; "ignore" reads them as the published data was read
    image_column: str | None = None  # of manifests and tables; None: found by the usual names, see sources.entries
    caption_column: str | None = None
    index_folder: str | None = None  # where indexes of large sources are kept; None: beside them, see sources.spans

    def __post_init__(self) -> None:
        require((self.path is None) != (not self.sources), "path", self.path, "given, or sources, and not both")
        for name in ("crops_per_image", "micro_batch_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1, or null")
        require(self.prefetch >= 1, "prefetch", self.prefetch, "at least 1")
        caches = {source.feature_cache is None for source in self.all_sources}
        require(len(caches) == 1, "feature_cache", self.feature_cache, "given for all sources or for none")

    @property
    def all_sources(self) -> tuple[DataSource, ...]:
        """The sources, one or several, with what they leave to the section filled in."""
        alone = DataSource(self.path or "", feature_cache=self.feature_cache)
        return tuple(
            replace(
                source,
                resolution=source.resolution or self.resolution,
                system_prompt=source.system_prompt or self.system_prompt,
                image_column=source.image_column or self.image_column,
                caption_column=source.caption_column or self.caption_column,
            )
            for source in self.sources or (alone,)
        )

    @property
    def widest(self) -> float:
        """Largest ratio of the sides of a crop."""
        return 1.0 if self.single_shape else self.max_aspect

    @property
    def resolutions(self) -> list[int]:
        """Nominal image sides of all sources in pixels, ascending."""
        return sorted({source.resolution for source in self.all_sources})
