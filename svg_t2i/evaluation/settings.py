"""Settings of an evaluation: a section of the YAML file, or options of a command."""

from __future__ import annotations

from dataclasses import dataclass, field

from autoencoder.common.config import UserError, require
from autoencoder.sources.failures import MAX_ERRORS
from svg_t2i.sampling.options import SamplingOptions

METRICS = ("mmd", "precision", "recall", "fid", "kid", "cmmd", "clip_score", "shapes")
OF_IMAGES = METRICS[:-1]  # all but shapes, which has prompts of its own
WITH_REFERENCES = ("mmd", "precision", "recall", "fid", "kid", "cmmd")
WITH_ENCODER = ("mmd", "precision", "recall")


@dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation of a pipeline: see `svg_t2i.evaluation.evaluate.evaluate`."""

    metrics: tuple[str, ...] = ("mmd",)  # of METRICS
    every: int = 0  # training steps between two evaluations; 0 is never
    manifest: str | None = None  # captions to sample from and images to compare with; all metrics but shapes need it
    num_images: int = 64  # spread evenly over the manifest
    images_per_scene: int = 1  # of each of the shape benchmark's prompts
    clip: str = "openai/clip-vit-large-patch14"  # Hugging Face folder or id
    seed: int = 0  # image i has seed + i
    batch_size: int = 16
    max_errors: float = MAX_ERRORS  # unusable samples of the manifest, as in `data`
    exif_orientation: str = "apply"
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(height=256, width=256))

    def __post_init__(self) -> None:
        require(len(self.metrics) > 0, "evaluation.metrics", self.metrics, f"some of {', '.join(METRICS)}")
        for name in self.metrics:
            require(name in METRICS, "evaluation.metrics", name, f"some of {', '.join(METRICS)}")
        for name, least in (("every", 0), ("num_images", 2), ("images_per_scene", 1), ("batch_size", 1)):
            require(getattr(self, name) >= least, f"evaluation.{name}", getattr(self, name), f"at least {least}")
        check_for_all_images(self.sampling)
        if self.manifest is None and set(self.metrics) != {"shapes"}:
            wanted = ", ".join(name for name in self.metrics if name != "shapes")
            raise UserError(f"evaluation.manifest is not set; {wanted} need its captions and images")


def check_for_all_images(options: SamplingOptions) -> None:
    """UserError if a setting has several values: an evaluation takes one for all images."""
    for name in ("guidance_scale", "negative_prompt"):
        if isinstance(getattr(options, name), tuple):
            raise UserError(f"{name} = {getattr(options, name)}: an evaluation takes one for all images")
