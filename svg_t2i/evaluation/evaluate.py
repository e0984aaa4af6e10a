"""Metrics of a pipeline: its images compared with real images, with their captions, and with shapes.

    values = evaluate(pipeline, EvaluationConfig(manifest="val.jsonl", metrics=("mmd", "clip_score")))

Everything is made of `rows`: a network maps a batch of items to a row each, batches are split over the processes, and
adding up the matrices of all processes gives each of them all rows. A batch is the same on any number of processes, and
so is every number that comes out.

    mmd          1000 × squared maximum mean discrepancy to the real images in the space of the autoencoder's frozen
                 encoder (patch features averaged over the image, unit length): `evaluation.distances.mmd`. Lower is
                 better; comparable between runs with the same encoder and the same real images.
    precision    share of the images that lie among the real ones, by their third nearest neighbours in the same space
    recall       share of the real images that lie among them
    fid          Fréchet distance in InceptionV3 features; with fewer than some 10,000 images only a trend
    kid          1000 × squared discrepancy under the cubic kernel in the same features; unbiased, also of few images
    cmmd         1000 × squared discrepancy of CLIP features under the Gaussian kernel of width 10 (arXiv 2401.09603)
    clip_score   100 · cos between image and caption, mean
    psnr, ssim   where every image has a real counterpart of the same name
    shapes/*     `svg_t2i.evaluation.shapes`

A metric whose network cannot be had has a reason instead of a number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from autoencoder.common.config import UserError
from autoencoder.common.processes import World
from autoencoder.evaluation.metrics import ImageMetrics, Unavailable, build_inception
from autoencoder.images.files import Size, crop_to_size, to_float, to_uint8_tensor
from autoencoder.model import SVGAutoencoder
from autoencoder.sources.failures import Failures
from autoencoder.sources.opening import open_source
from autoencoder.sources.source import ImageSource, Reading
from svg_t2i.evaluation.clip_score import CLIPScorer, clip_score
from svg_t2i.evaluation.distances import frechet_distance, median_distance, mmd, polynomial_mmd, precision_recall
from svg_t2i.evaluation.settings import EvaluationConfig
from svg_t2i.evaluation.shapes import benchmark_scenes, score_scenes
from svg_t2i.sampling.options import SamplingOptions

if TYPE_CHECKING:
    from svg_t2i.pipeline import SVGT2IPipeline

log = logging.getLogger(__name__)

NEIGHBOURS = 3  # of precision and recall
CLIP_BANDWIDTH = 10.0  # of cmmd, as published


@dataclass
class Report:
    """Metric → its value, or the reason why it has none."""

    values: dict[str, float] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


class ImageFiles(Sequence[Tensor]):
    """Images of a source as uint8 (3, H, W), read on access, scaled and cropped from the middle to `size`.

    An unusable image is replaced by its neighbour, unless the source's limit of failures is 0.

    places: of the images in the source, in the order wanted; None takes all.
    """

    def __init__(self, source: ImageSource, size: Size, places: Sequence[int] | None = None):
        self.source, self.size = source, size
        self.places = range(len(source)) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        return to_uint8_tensor(crop_to_size(self.source.load(self.places[index]).image, self.size))


def evaluate(pipeline: SVGT2IPipeline, settings: EvaluationConfig, world: World | None = None) -> dict[str, float]:
    """Sample as `settings` say and measure; all processes of `world` call it and get the same.

    Metrics that cannot be had here are logged with the reason and left out.

    Raises:
        UserError: the manifest or an image cannot be read.
    """
    world = world or World(device=pipeline.device)
    report = Report()
    if set(settings.metrics) != {"shapes"}:
        captions, references = load_references(settings)
        images = render(pipeline, captions, settings, world)
        metrics = [name for name in settings.metrics if name != "shapes"]
        report = measure(
            images, metrics, references=references, own=range(len(captions)), captions=captions,
            autoencoder=pipeline.autoencoder, clip=settings.clip, batch_size=settings.batch_size, world=world,
        )  # fmt: skip
    if "shapes" in settings.metrics:
        scores = evaluate_shapes(pipeline, settings, world)
        report.values |= {f"shapes/{task}": value for task, value in scores.items()}
    if world.is_main:
        for name, reason in report.unavailable.items():
            log.warning("%s is not measured: %s", name, reason)
    return report.values


def evaluate_shapes(pipeline: SVGT2IPipeline, settings: EvaluationConfig, world: World) -> dict[str, float]:
    """Task of the shape benchmark → fraction right."""
    scenes = [scene for scene in benchmark_scenes() for _ in range(settings.images_per_scene)]
    images = render(pipeline, [scene.caption for scene in scenes], settings, world)
    return score_scenes([to_image(image) for image in images], scenes)


def load_references(settings: EvaluationConfig) -> tuple[list[str], ImageFiles]:
    """`num_images` captions spread evenly over the data, and their images in the size that is sampled."""
    reading = Reading(exif_orientation=settings.exif_orientation, failures=Failures(settings.max_errors))
    source = open_source(settings.manifest, reading)
    captions: dict[int, str] = {}
    for place in np.linspace(0, len(source) - 1, min(settings.num_images, len(source))).round().astype(int).tolist():
        try:
            captions[place] = source[place].captions[0]
        except UserError as error:
            source.fail(place, str(error))
    if len(captions) < 2:
        raise UserError(f"evaluation.manifest={settings.manifest} has one sample; distances need two or more")
    return list(captions.values()), ImageFiles(source, settings.sampling.size, list(captions))


# --- sampling ---------------------------------------------------------------------------------------------------


def sample_batch(
    pipeline: SVGT2IPipeline, prompts: Sequence[str], batch: range, seed: int, sampling: SamplingOptions
) -> list[Image.Image]:
    """The images number `batch` of a run over `prompts`, made together. Image i has seed + i."""
    return pipeline([prompts[i] for i in batch], seed=[seed + i for i in batch], packed=True, **asdict(sampling)).images


def render(pipeline: SVGT2IPipeline, prompts: Sequence[str], settings: EvaluationConfig, world: World) -> Tensor:
    """The images of all prompts on every process, (N, 3, H, W) uint8 on the CPU."""

    def run(numbers: Sequence[int]) -> Tensor:
        batch = range(numbers[0], numbers[-1] + 1)
        images = sample_batch(pipeline, prompts, batch, settings.seed, settings.sampling)
        return torch.stack([to_uint8_tensor(image) for image in images])

    return rows(run, range(len(prompts)), settings.batch_size, world)


# --- measuring --------------------------------------------------------------------------------------------------


def own_batches(items: int, batch_size: int, world: World) -> Iterator[range]:
    """This process's share of range(items), cut into batches that are the same whatever the number of processes."""
    for start in range(world.rank * batch_size, items, world.size * batch_size):
        yield range(start, min(start + batch_size, items))


def rows(function: Callable[[list], Tensor], items: Sequence, batch_size: int, world: World) -> Tensor:
    """`function` maps a list of n items to (n, …); all N rows on every process, on the CPU."""
    results = {}
    for batch in own_batches(len(items), batch_size, world):
        results[batch] = function([items[i] for i in batch]).detach()
    first = next(iter(results.values()), None)
    shape, dtype = world.broadcast(None if first is None else (first.shape[1:], first.dtype))
    matrix = torch.zeros((len(items), *shape), dtype=dtype, device=world.device)
    for batch, values in results.items():
        matrix[batch.start : batch.stop] = values
    return world.reduce_sum(matrix).cpu()


def measure(
    images: Sequence[Tensor],
    metrics: Sequence[str],
    *,
    references: Sequence[Tensor] | None = None,
    own: Sequence[int] | None = None,
    captions: Sequence[str] | None = None,
    autoencoder: SVGAutoencoder | None = None,
    clip: str | None = None,
    counterparts: Sequence[Tensor] | None = None,
    batch_size: int = 16,
    world: World,
) -> Report:
    """Metrics of images, uint8 (3, H, W) each and all of one size.

    Args:
        metrics: of `settings.OF_IMAGES`. "mmd", "precision" and "recall" need references and an autoencoder, "fid" and
            "kid" references, "cmmd" references and clip, "clip_score" captions and clip.
        references: real images of the same size.
        own: which reference has the caption of each image, if they share captions; see `distances.mmd`.
        captions: one per image.
        counterparts: real image i is what image i should look like; adds psnr and ssim.
    """

    features = Features(images, references, autoencoder, clip, batch_size, world)

    def distance_in_encoder() -> float:
        made, real = features.encoder
        bandwidth = median_distance(real)
        if not bandwidth > 0:
            raise Unavailable("the encoder gives most real images the same features")
        return 1000 * mmd(made, real, bandwidth, own)

    def share_in_encoder(which: int) -> float:
        if min(len(images), len(references)) <= NEIGHBOURS:
            raise Unavailable(f"it needs more than {NEIGHBOURS} images, made and real")
        return precision_recall(*features.encoder, NEIGHBOURS)[which]

    known: dict[str, Callable[[], float]] = {
        "mmd": distance_in_encoder,
        "precision": partial(share_in_encoder, 0),
        "recall": partial(share_in_encoder, 1),
        "fid": lambda: frechet_distance(*features.inception),
        "kid": lambda: 1000 * polynomial_mmd(*features.inception, own),
        "cmmd": lambda: 1000 * mmd(features.clip_made, features.clip_real, CLIP_BANDWIDTH, own),
        "clip_score": lambda: clip_score(features.clip_made, features.clip_texts(captions)),
    }
    report = Report()
    for name in metrics:
        try:
            with torch.inference_mode():
                report.values[name] = known[name]()
        except Unavailable as reason:
            report.unavailable[name] = str(reason)
    if counterparts is not None:
        psnr, report.values["ssim"] = compare_pairs(images, counterparts, batch_size, world)
        if psnr is None:
            report.unavailable["psnr"] = "every image equals its counterpart"
        else:
            report.values["psnr"] = psnr
    return report


@dataclass
class Features:
    """What the networks of the metrics say of images and references, each asked once and when it is wanted.

    Raises:
        Unavailable: a network cannot be had.
    """

    images: Sequence[Tensor]
    references: Sequence[Tensor] | None
    autoencoder: SVGAutoencoder | None
    clip: str | None
    batch_size: int
    world: World

    def _both(self, network: Callable[[list], Tensor]) -> tuple[Tensor, Tensor]:
        made, real = (rows(network, some, self.batch_size, self.world) for some in (self.images, self.references))
        return made, real

    @cached_property
    def encoder(self) -> tuple[Tensor, Tensor]:
        """(N, D) and (M, D): of the autoencoder's frozen encoder, see `pooled_features`."""
        return self._both(pooled_features(self.autoencoder.encoder))

    @cached_property
    def inception(self) -> tuple[Tensor, Tensor]:
        """(N, 2048) and (M, 2048): the last pooled features of InceptionV3."""
        with self.world.main_first():
            network = build_inception().to(self.world.device)
        return self._both(lambda batch: network(torch.stack(batch).to(self.world.device)))

    @cached_property
    def scorer(self) -> CLIPScorer:
        with self.world.main_first():  # one process downloads, the others find the files
            return CLIPScorer(self.clip, self.world.device)

    def _clip_rows(self, images: Sequence[Tensor]) -> Tensor:
        network = self.scorer.image_features
        return rows(lambda batch: network([to_image(i) for i in batch]), images, self.batch_size, self.world)

    @cached_property
    def clip_made(self) -> Tensor:
        """(N, D), of unit length."""
        return self._clip_rows(self.images)

    @cached_property
    def clip_real(self) -> Tensor:
        """(M, D), of unit length."""
        return self._clip_rows(self.references)

    def clip_texts(self, captions: Sequence[str]) -> Tensor:
        """(N, D), of unit length."""
        return rows(self.scorer.text_features, captions, self.batch_size, self.world)


def pooled_features(encoder: nn.Module) -> Callable[[list[Tensor]], Tensor]:
    """Images (3, H, W) uint8 → (n, D): patch features of the frozen encoder, averaged, of unit length."""

    def features(batch: list[Tensor]) -> Tensor:
        weight = next(encoder.parameters())
        images = to_float(torch.stack(batch).to(weight.device)).to(weight.dtype)
        return normalize(encoder(images).float().mean(dim=(2, 3)), dim=-1)  # (n, D, h, w) → (n, D)

    return features


def compare_pairs(
    images: Sequence[Tensor], references: Sequence[Tensor], batch_size: int, world: World
) -> tuple[float | None, float]:
    """PSNR and SSIM, means over the pairs. PSNR is infinite for equal images: its mean is over those that differ."""
    compare = ImageMetrics(lpips=None)

    def run(batch: list[int]) -> Tensor:
        pairs = (torch.stack([some[i] for i in batch]).to(world.device) for some in (references, images))
        return compare(*pairs)[:, :2]

    psnr, ssim = rows(run, range(len(images)), batch_size, world).T
    finite = psnr[psnr.isfinite()]
    return finite.mean().item() if len(finite) else None, ssim.mean().item()


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 → RGB image."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def describe_report(report: Report) -> dict[str, Any]:
    """JSON: numbers, and {"unavailable": reason}."""
    return {**report.values, **{name: {"unavailable": reason} for name, reason in report.unavailable.items()}}
