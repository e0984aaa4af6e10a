"""Preparation of the frozen networks: latent statistics measured on the run's images, a random text encoder.

Also the warning about statistics that do not fit the images.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from autoencoder.common.config import UserError
from autoencoder.common.processes import World
from autoencoder.evaluation.crops import Crops
from autoencoder.evaluation.latent_statistics import measure
from autoencoder.latents.drift import drift
from autoencoder.latents.statistics import pooled
from autoencoder.sources.source import ImageSource
from svg_t2i.data.settings import DataConfig
from svg_t2i.features.frozen import FrozenNetworks
from svg_t2i.features.settings import AutoencoderSource, TextSource
from svg_t2i.text.toy import make_toy_text_encoder

log = logging.getLogger(__name__)

MEASURED_IMAGES = 1024
COMPARED_IMAGES = 8
FAR_OFF = 0.5  # drift that so few images show only if the statistics are wrong for them
VOCABULARY_SAMPLES = 10_000


def measure_statistics(
    source: AutoencoderSource, data: DataConfig, manifest: ImageSource, folder: Path, world: World
) -> AutoencoderSource:
    """`source`, where it says `stats: measure` with the file of statistics that are measured once per `folder`.

    They are taken from up to `MEASURED_IMAGES` training images, at all resolutions of the run.
    """
    if source.stats != "measure":
        return source
    path = folder / "latent_stats.safetensors"
    with world.main_first():
        if not path.exists():
            log.info("measuring latent statistics over the training images")
            autoencoder = replace(source, stats=None).load().to(world.device)
            images = Crops(manifest, data.resolutions, data.widest, MEASURED_IMAGES)
            moments = pooled(measure(autoencoder, images))
            moments.result(autoencoder.latent_fingerprint(), images.resolutions).save(path)
    return replace(source, stats=str(path))


def make_text_encoder(source: TextSource, manifest: ImageSource, folder: Path, world: World) -> TextSource:
    """`source`, where it says `path: random` with a small random text encoder that is made once per `folder`.

    Its tokenizer has the words of the manifest's captions. It is for trials without weights.
    """
    if source.path != "random":
        return source
    path = folder / "text_encoder"
    with world.main_first():
        log.warning("text_encoder.path=random: a small random text encoder with a word tokenizer, for trials only")
        if not path.exists():
            captions: list[str] = []
            for index in range(min(len(manifest), VOCABULARY_SAMPLES)):
                with suppress(UserError):  # training will count it
                    captions += manifest[index].captions
            make_toy_text_encoder(captions, path)
    return replace(source, path=str(path))


def warn_of_statistics(
    name: str, data: DataConfig, frozen: FrozenNetworks, manifest: ImageSource, world: World
) -> None:
    """Warn of latent statistics that were measured at other resolutions than the run's, and say how they fit.

    The numbers come from up to `COMPARED_IMAGES` training images. Statistics that do not record their resolutions
    (published ones) are warned of if they are far off. All ranks call this: they may have to share the weights.

    name: what the warning calls the statistics, such as their file.
    """
    stats = frozen.autoencoder.stats
    others = [resolution for resolution in data.resolutions if resolution not in stats.resolutions]
    if not others:
        return
    with frozen.whole():
        seen = measure(frozen.autoencoder, Crops(manifest, others, data.widest, COMPARED_IMAGES))
    measured_at = f"were measured at {', '.join(map(str, stats.resolutions))} px"
    for resolution, accumulator in zip(others, seen):
        try:
            found = drift(stats, accumulator.result())
        except UserError as error:  # no readable image, which stops training itself, or nothing but plain ones
            if world.is_main:
                log.info("the latent statistics were not compared with training at %d px: %s", resolution, error)
            continue
        if world.is_main and (stats.resolutions or found.size > FAR_OFF):
            log.warning(
                "the latent statistics %s %s, training is at %d px: on a few training images, %s. Measure them at this "
                "resolution (autoencoder.stats=measure, or python -m autoencoder.measure_latents), unless the weights "
                "you start from were trained with them",
                name, measured_at if stats.resolutions else "do not fit the images", resolution, found,
            )  # fmt: skip
