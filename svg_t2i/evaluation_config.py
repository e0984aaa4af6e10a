"""What an evaluation samples and measures, as a YAML section or a command line spells it."""

from __future__ import annotations

from dataclasses import dataclass, field

from autoencoder.config import UserError
from svg_t2i.solvers import SOLVERS

METRICS = ("mmd", "fid", "clip_score", "shapes")


@dataclass(frozen=True)
class SamplingConfig:
    """How every image is made; the fields are arguments of `SVGT2IPipeline.__call__`."""

    width: int = 256  # pixels, multiples of 16
    height: int = 256
    solver: str = "dpm"
    num_inference_steps: int = 50
    guidance_scale: float = 4.0
    time_shift: float | None = None  # None: the solver's default
    renorm_cfg: float = 1.0
    cfg_trunc: float = 1.0
    negative_prompt: str = ""
    system_prompt: str = "base"

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            side = getattr(self, name)
            _require(side >= 16 and side % 16 == 0, f"sampling.{name}", side, "a positive multiple of 16")
        _require(self.solver in SOLVERS, "sampling.solver", self.solver, f"one of {', '.join(SOLVERS)}")
        fewest = 1 if self.solver == "dpm" else 2
        _require(self.num_inference_steps >= fewest, "sampling.num_inference_steps", self.num_inference_steps,
                 f"at least {fewest} with {self.solver}")  # fmt: skip
        _require(self.time_shift is None or self.time_shift > 0, "sampling.time_shift", self.time_shift, "positive")
        _require(self.guidance_scale >= 0, "sampling.guidance_scale", self.guidance_scale, "0 or more")

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.width, self.height


@dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation of a pipeline: see `svg_t2i.evaluation.evaluate`."""

    metrics: tuple[str, ...] = ("mmd",)  # of METRICS
    every: int = 0  # training steps between two evaluations; 0 is never
    manifest: str | None = None  # captions to sample from and images to compare with; all metrics but shapes need it
    num_images: int = 64  # spread evenly over the manifest
    images_per_scene: int = 1  # of each of the shape benchmark's prompts
    clip: str = "openai/clip-vit-large-patch14"  # Hugging Face folder or id
    seed: int = 0  # image i has seed + i
    batch_size: int = 16
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        _require(len(self.metrics) > 0, "evaluation.metrics", self.metrics, f"some of {', '.join(METRICS)}")
        for name in self.metrics:
            _require(name in METRICS, "evaluation.metrics", name, f"some of {', '.join(METRICS)}")
        for name, least in (("every", 0), ("num_images", 2), ("images_per_scene", 1), ("batch_size", 1)):
            _require(getattr(self, name) >= least, f"evaluation.{name}", getattr(self, name), f"at least {least}")
        if self.manifest is None and set(self.metrics) != {"shapes"}:
            wanted = ", ".join(name for name in self.metrics if name != "shapes")
            raise UserError(f"evaluation.manifest is not set; {wanted} need its captions and images")


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise UserError(f"{name}={value!r} must be {rule}")
