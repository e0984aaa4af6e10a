"""Sampling options: every setting between the prompt and the image, checked before any weight is loaded.

    SamplingOptions(num_inference_steps=30, guidance_interval=(0.05, 0.9))
    preset_options("stage1")                               the settings that suit a published training stage
    changed(preset_options("stage4"), {"solver": "heun"})  the same with changes

docs/sampling.md says where the presets come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoencoder.common.config import UserError, build, to_dict
from autoencoder.images.files import LATENT_PIXELS
from svg_t2i.flow.paths import flux_shift_factor
from svg_t2i.flow.solvers import SOLVERS
from svg_t2i.text.encoder import build_prompt

ONE_EVALUATION = ("dpm", "euler")  # the solvers that ask for one velocity a step
REFERENCE_CELLS = 4096  # latent cells of a 1024 px square, where the solvers' default time shifts belong


@dataclass(frozen=True)
class SamplingOptions:
    """Settings of a sampling run.

    height, width: pixels, positive multiples of 16, where a call names no size.
    num_inference_steps: model calls of `dpm`; grid points (both ends included) of the other solvers.
    guidance_scale: s in v_u + s·(v_c − v_u), or one per prompt; 1 runs the conditional branch only.
    negative_prompt: what guidance leads away from, or one per prompt; "" is the unconditional text of training.
    renorm_cfg: bound on ‖v‖/‖v_c‖ per image; 0 is off.
    cfg_trunc: no guidance for t ≥ this; from 1 on, guidance to the end.
    internal_guidance: scale of guidance away from what the model's own head behind its first layers predicts, without
        a second pass; 1 is off. For models trained with `aux.loss: flow`, where and when there is other guidance too.
    guidance_interval: guidance for lo ≤ t < hi only, in [0, 1] from noise to image.
    time_shift: more steps near noise for larger values; None is the solver's default, "dynamic" adapts that to the
        number of latent cells as training does (`dynamic_shift`).
    system_prompt: which system prompt of training goes before each prompt.
    step_cache: at every other step the velocity is forecast from the last two evaluations, at most so many of their
        distances ahead, 1.5 say; 0 evaluates at every step. For `dpm` and `euler`.
    """

    height: int = 1024
    width: int = 1024
    num_inference_steps: int = 50
    guidance_scale: float | tuple[float, ...] = 4.0
    negative_prompt: str | tuple[str, ...] = ""
    renorm_cfg: float = 1.0
    cfg_trunc: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    solver: str = "dpm"
    time_shift: float | str | None = None  # a number or "dynamic"
    system_prompt: str = "base"
    step_cache: float = 0.0
    internal_guidance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            check_side(name, getattr(self, name))
        if self.solver not in SOLVERS:
            raise UserError(f"solver = {self.solver!r}; choose one of {', '.join(SOLVERS)}")
        least = 1 if self.solver == "dpm" else 2
        reason = "" if least == 1 else f": {self.solver} needs both ends of [0, 1], so"
        if self.num_inference_steps < least:
            raise UserError(f"num_inference_steps = {self.num_inference_steps}{reason} must be at least {least}")
        for scale in self.guidance_scales(None):
            if not math.isfinite(scale):
                raise UserError(f"guidance_scale = {scale}: must be a finite number")
        if not math.isfinite(self.internal_guidance):
            raise UserError(f"internal_guidance = {self.internal_guidance}: must be a finite number; 1 is off")
        if not self.renorm_cfg >= 0:
            raise UserError(f"renorm_cfg = {self.renorm_cfg}: must be 0 (off) or positive")
        lo, hi = self.guidance_interval
        if not 0 <= lo <= hi <= 1:
            raise UserError(f"guidance_interval = {lo}, {hi}: needs 0 ≤ lo ≤ hi ≤ 1 (0 is noise, 1 the image)")
        if isinstance(self.time_shift, str) and self.time_shift != "dynamic":
            raise UserError(f"time_shift = {self.time_shift!r}: give a positive number or 'dynamic'")
        if isinstance(self.time_shift, (int, float)) and not self.time_shift > 0:
            raise UserError(f"time_shift = {self.time_shift}: must be positive; 1 spaces the steps evenly")
        if not 0 <= self.step_cache < math.inf:
            raise UserError(f"step_cache = {self.step_cache}: must be 0 (off) or positive")
        if self.step_cache and self.solver not in ONE_EVALUATION:
            raise UserError(
                f"step_cache = {self.step_cache} goes with {' and '.join(ONE_EVALUATION)}, which evaluate once a step, "
                f"not with {self.solver}"
            )
        build_prompt("", self.system_prompt)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width, self.height

    def guidance_scales(self, count: int | None) -> list[float]:
        """One scale per prompt. UserError if there are several, but not `count`."""
        return _per_prompt(self.guidance_scale, "guidance_scale", count)

    def negative_prompts(self, count: int | None) -> list[str]:
        """One negative prompt per prompt. UserError if there are several, but not `count`."""
        return _per_prompt(self.negative_prompt, "negative_prompt", count)

    def repeated(self, prompts: int, times: int) -> SamplingOptions:
        """With the values of each prompt `times` over: one an image. UserError if there are not `prompts` of them."""
        changes = {}
        for name in ("guidance_scale", "negative_prompt"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                each = _per_prompt(value, name, prompts)
                changes[name] = tuple(one for one in each for _ in range(times))
        return replace(self, **changes) if changes else self

    @property
    def is_guided(self) -> bool:
        """Whether any step needs a second branch."""
        lo, hi = self.guidance_interval
        scales = self.guidance_scales(None)
        return lo < min(hi, self.cfg_trunc) and (any(s != 1 for s in scales) or 0 < self.renorm_cfg < 1)

    def shift_for(self, cells: int) -> float | None:
        """The time shift of an image of `cells` latent cells; None for the solver's default."""
        return dynamic_shift(self.solver, cells) if self.time_shift == "dynamic" else self.time_shift


def _per_prompt(value: Any, name: str, count: int | None) -> list[Any]:
    if not isinstance(value, tuple):
        return [value] * (1 if count is None else count)
    if count is not None and len(value) != count:
        raise UserError(f"{name} = {list(value)}: give one value, or as many as prompts ({count})")
    return list(value)


def check_side(name: str, side: int) -> None:
    """UserError unless an image side is a positive multiple of 16."""
    if side < LATENT_PIXELS or side % LATENT_PIXELS:
        nearest = max(LATENT_PIXELS, round(side / LATENT_PIXELS) * LATENT_PIXELS)
        raise UserError(
            f"{name} = {side}: image sides must be positive multiples of {LATENT_PIXELS}, such as {nearest}"
        )


def dynamic_shift(solver: str, cells: int) -> float:
    """The solver's default shift, scaled with the image as training scales its own (`flux_shift_factor`).

    A 1024 px square gets the default, smaller images less: with `dpm` 10 at 1024 px, 5.9 at 512 and 5.2 at 256. One
    decimal, so that the crops of one resolution, whose areas differ a little, share a time grid.
    """
    return round(SOLVERS[solver].default_shift * flux_shift_factor(cells) / flux_shift_factor(REFERENCE_CELLS), 1)


# The published settings (dpm, 50 steps, guidance 4, shift 10) belong to 1024 px; earlier stages want less shift.
PRESETS: dict[str, SamplingOptions] = {
    "stage1": SamplingOptions(height=256, width=256, time_shift="dynamic"),
    "stage2": SamplingOptions(height=512, width=512, time_shift="dynamic"),
    "stage3": SamplingOptions(),
    "stage4": SamplingOptions(),
    "quickstart": SamplingOptions(
        height=64, width=64, num_inference_steps=16, guidance_scale=2.0, time_shift=8.0, system_prompt="empty"
    ),
}


# Changes of a model's own settings.
CHANGES = {"fast": {"step_cache": 1.5, "guidance_interval": (0.0, 0.9)}}
PRESET_NAMES = (*PRESETS, *CHANGES)


def preset_options(name: str, own: SamplingOptions | None = None) -> SamplingOptions:
    """The settings for a training stage, or `own` with the changes of "fast". UserError for an unknown name."""
    if name in CHANGES:
        return changed(own or SamplingOptions(), CHANGES[name])
    if name not in PRESETS:
        raise UserError(f"preset = {name!r}; choose one of {', '.join(PRESET_NAMES)}")
    return PRESETS[name]


def changed(options: SamplingOptions, changes: Mapping[str, Any]) -> SamplingOptions:
    """Options with some fields replaced, those that are None left alone. UserError names unknown or wrong ones."""
    given = {name: value for name, value in changes.items() if value is not None}
    return build(SamplingOptions, to_dict(options) | given, source="sampling options") if given else options


def trained_options(config: Mapping[str, Any]) -> SamplingOptions:
    """Defaults for a model from the configuration it was trained with: its resolution, system prompt and times.

    What its section `samples`, the pictures during training, sets otherwise than by default holds here as well.
    """
    data, flow, options = config.get("data", {}), config.get("flow", {}), SamplingOptions(time_shift="dynamic")
    if not isinstance(data.get("resolution"), int):
        return SamplingOptions()
    sizes = {"height": data["resolution"], "width": data["resolution"]}
    if not flow.get("shift", True):  # the median of the training times, sigmoid(mu), is where the middle step is
        sizes["time_shift"] = round(math.exp(-flow.get("mu", 0.0)), 1) if flow.get("snr_type") == "lognorm" else 1.0
    options = replace(options, **sizes, system_prompt=data.get("system_prompt") or options.system_prompt)
    usual, pictures = vars(SamplingOptions()), to_dict(config.get("samples") or {})
    own = {name: value for name, value in pictures.items() if name in usual and value != to_dict(usual[name])}
    return changed(options, own)
