"""From noise to latents: the guided transformer as a velocity on packed tokens, and the solvers run on it.

Conditional and unconditional branch of an image are one packed forward pass. By default every image has its own, so
that it does not depend on the others to the last bit; with `packed`, images of all sizes with captions of all lengths
share one. What does not depend on time, the captions behind the context refiner, is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autoencoder.common.config import UserError
from svg_t2i.flow.caching import forecast
from svg_t2i.flow.guidance import combine, guided_velocity, is_guided_at
from svg_t2i.flow.paths import expand_samples
from svg_t2i.flow.solvers import SOLVERS, sample, solver_times
from svg_t2i.sampling import schedulers
from svg_t2i.sampling.options import SamplingOptions
from svg_t2i.transformer.config import Prediction
from svg_t2i.transformer.model import MIN_NOISE, SVGDiT
from svg_t2i.transformer.packing import RefinedText, Sizes, TextFeatures

# Latent cells times the model's width in one forward pass: beyond, what a CPU writes does not stay in its caches, and
# an image takes longer the more of them there are (benchmarks/sampling.py).
CPU_NUMBERS = 100_000

StepCallback = Callable[[int, float, list[Tensor], list[int]], "list[Tensor] | None"]


@dataclass(frozen=True)
class Conditions:
    """What B images are made from.

    texts: packed features of the distinct texts, on the transformer's device.
    prompts: which text each image follows; with a second row of B, their velocities are mixed with `weights`.
    negative: which text the guiding branch has; None without guidance, or when `guide` leads.
    guide: a weaker model that takes the place of the unconditional branch.
    scales: guidance scale of each image.
    captions: the prompt of each image in words, for messages; or none.
    """

    texts: TextFeatures
    prompts: tuple[tuple[int, ...], ...]
    negative: tuple[int, ...] | None
    guide: SVGDiT | None
    scales: Sequence[float]
    weights: tuple[tuple[float, ...], ...] = ()
    captions: tuple[str, ...] = ()

    def select(self, rows: Sequence[int]) -> Conditions:
        """The images `rows` alone."""

        def pick(values: Sequence) -> tuple:
            return tuple(values[row] for row in rows)

        return replace(
            self,
            prompts=tuple(map(pick, self.prompts)),
            negative=None if self.negative is None else pick(self.negative),
            scales=pick(self.scales),
            weights=tuple(map(pick, self.weights)),
            captions=pick(self.captions) if self.captions else (),
        )

    def refined_for(self, model: SVGDiT, packed: bool) -> Conditions:
        """With the texts behind the model's context refiner, each of them once."""
        return replace(self, texts=refine(model, self.texts, packed))


def refine(model: SVGDiT, texts: TextFeatures, packed: bool) -> RefinedText:
    """All texts behind the context refiner, in one pass, or in one each where they must not depend on the others."""
    if packed:
        return model.refine(texts)
    return TextFeatures.cat([model.refine(texts.select([i])) for i in range(len(texts.lengths))])


class Denoiser:
    """Velocities of a packed batch: `conditional` alone, or both branches as guidance wants them (`pair`)."""

    def __init__(
        self,
        transformer: SVGDiT,
        sizes: Sizes,
        conditions: Conditions,
        guide_texts: RefinedText | None,
        options: SamplingOptions,
    ):
        self.transformer, self.guide, self.sizes = transformer, conditions.guide, tuple(sizes)
        self.options = options
        device, patch = conditions.texts.features.device, transformer.config.patch_size**2
        self.lengths = tuple(h * w // patch for h, w in sizes)
        self.prompts = conditions.texts.select([row for column in conditions.prompts for row in column])
        self.branches = len(conditions.prompts)
        self.weights = [torch.tensor(weights, device=device) for weights in conditions.weights]
        self.both = self.guide_texts = None
        if conditions.negative is not None:
            self.both = TextFeatures.cat([self.prompts, conditions.texts.select(conditions.negative)])
        if guide_texts is not None:
            self.guide_texts = guide_texts.select(conditions.prompts[0])
        same = len(set(conditions.scales)) == 1
        self.scale = conditions.scales[0] if same else torch.tensor(conditions.scales, device=device)

    def velocity(self) -> Callable[[Tensor, float], Tensor]:
        """The guided velocity that a solver integrates, of packed tokens (T, C)."""
        if self.both is None and self.guide is None:
            return self.conditional
        options = self.options
        return guided_velocity(
            self.pair,
            self.conditional,
            self.scale,
            options.renorm_cfg,
            options.cfg_trunc,
            self.lengths,
            options.guidance_interval,
        )

    def conditional(self, tokens: Tensor, t: float) -> Tensor:
        return self._mix(self._run(self.transformer, tokens, t, self.prompts, self.branches))

    def pair(self, tokens: Tensor, t: float) -> tuple[Tensor, Tensor]:
        if self.guide is not None:
            (weaker,) = self._run(self.guide, tokens, t, self.guide_texts, 1)
            return self.conditional(tokens, t), weaker
        *prompted, negative = self._run(self.transformer, tokens, t, self.both, self.branches + 1)
        return self._mix(prompted), negative

    def _run(self, model: SVGDiT, tokens: Tensor, t: float, text: TextFeatures, copies: int) -> tuple[Tensor, ...]:
        """Velocities (T, C) of the same tokens under each of `copies` blocks of text, in one forward pass.

        With internal guidance, those of the prompts are guided already.
        """
        options, timesteps = self.options, torch.full((1,), t, device=tokens.device)
        repeated = tokens if copies == 1 else tokens.repeat(copies, 1)
        inner = options.internal_guidance != 1 and is_guided_at(t, options.guidance_interval, options.cfg_trunc)
        inputs, further = (repeated, self.sizes * copies, timesteps, text), self._guidance(model, t, copies)
        if not inner or model is self.guide:
            return model.forward_packed(*inputs, **further).chunk(copies)
        last, early = model.forward_packed(*inputs, aux=True, **further)
        guided = combine(last, early, options.internal_guidance, renorm_cfg=0)
        return guided.chunk(copies)[: self.branches] + last.chunk(copies)[self.branches :]

    def _guidance(self, model: SVGDiT, t: float, copies: int) -> dict[str, Tensor]:
        """The scales that a distilled model is told, of every copy; 1 where there is no guidance, or another one."""
        if not model.config.guidance_embed:
            return {}
        guided = self.guide is None and is_guided_at(t, self.options.guidance_interval, self.options.cfg_trunc)
        scale = self.scale if guided else 1.0
        device = self.prompts.features.device
        several = isinstance(scale, Tensor)
        return {"guidance": scale.repeat(copies) if several else torch.full((1,), scale, device=device)}

    def _mix(self, velocities: Sequence[Tensor]) -> Tensor:
        if len(velocities) == 1:
            return velocities[0]
        return sum(
            expand_samples(weights, velocity, self.lengths) * velocity
            for weights, velocity in zip(self.weights, velocities, strict=True)
        )


def same_grid_groups(options: SamplingOptions, sizes: Sizes, scheduler: Any = None) -> list[list[int]]:
    """Which images can be solved together: equal time shift; one by one where the solver adapts its step to them."""
    if scheduler is None and SOLVERS[options.solver].adaptive:
        return [[i] for i in range(len(sizes))]
    groups: dict[float | None, list[int]] = {}
    for i, (h, w) in enumerate(sizes):
        groups.setdefault(options.shift_for(h * w), []).append(i)
    return list(groups.values())


def count_steps(
    options: SamplingOptions, sizes: Sizes, prediction: Prediction, start: float = 0.0, scheduler: Any = None
) -> int:
    """How often a step callback will be called for images of these latent sizes."""
    groups = same_grid_groups(options, sizes, scheduler)
    grids = (_times(options, sizes[rows[0]], prediction, scheduler) for rows in groups)
    return sum(t > max(start, times[0]) for times in grids for t in times)


def last_time(prediction: Prediction) -> float:
    """When a solver should ask for the last velocity at the latest."""
    return 1 - MIN_NOISE if prediction == "data" else 1.0


def _times(
    options: SamplingOptions, size: tuple[int, int], prediction: Prediction, scheduler: Any = None
) -> list[float]:
    shift = options.shift_for(size[0] * size[1])
    if scheduler is not None:
        return schedulers.prepare(scheduler, options.num_inference_steps, shift)[1]
    return solver_times(options.solver, options.num_inference_steps, shift, last=last_time(prediction))


def strength_start(
    options: SamplingOptions,
    size: tuple[int, int],
    strength: float,
    prediction: Prediction = "velocity",
    scheduler: Any = None,
) -> float:
    """The time where the last `strength` of the steps begins, as in diffusers' image-to-image; size (h, w) cells.

    Raises:
        UserError: that is less than one step.
    """
    times = _times(options, size, prediction, scheduler)
    steps = len(times) - 1
    if strength * steps < 1:
        raise UserError(f"strength = {strength}: of {steps} steps that is less than one; at least {1 / steps:.3g}")
    return times[steps - round(strength * steps)]


class Interrupted(Exception):
    """Ends a solution before its time; carries the packed latents at hand."""

    def __init__(self, tokens: Tensor):
        super().__init__()
        self.tokens = tokens


@torch.inference_mode()
def denoise(
    transformer: SVGDiT,
    latents: Sequence[Tensor],
    conditions: Conditions,
    options: SamplingOptions,
    *,
    start: float = 0.0,
    known: Sequence[Tensor] | None = None,
    repaint: Sequence[Tensor] | None = None,
    on_step: StepCallback | None = None,
    interrupted: Callable[[], bool] = bool,
    scheduler: Any = None,
    packed: bool = False,
) -> list[Tensor]:
    """Solve dx/dt = v(x, t) from `start` to t = 1 for every image.

    Args:
        latents: x at `start`, a (C, h, w) fp32 tensor an image, on the transformer's device. Noise if `start` is 0.
        known, repaint: for inpainting. Clean latents (C, h, w) and a mask (h, w) an image: where the mask is 0, the
            straight path from the given x to the known latents is followed instead of the model.
        on_step: (step, t, latents of this group, their indices) after each step; may return changed latents.
        interrupted: asked after each step; the first true answer ends the solution, with the latents as they are.
        scheduler: a scheduler of diffusers instead of the solver of `options` (`schedulers`).
        packed: whether images may share a forward pass, which small ones are faster in.

    Returns:
        Normalised latents (C, h, w) per image.
    """
    sizes = tuple((x.shape[1], x.shape[2]) for x in latents)
    finished, prediction = list(latents), transformer.config.prediction
    guide_texts = None if conditions.guide is None else refine(conditions.guide, conditions.texts, packed)
    conditions = conditions.refined_for(transformer, packed)
    for rows in same_grid_groups(options, sizes, scheduler):
        if interrupted():
            break
        group = tuple(sizes[row] for row in rows)
        x, _ = transformer.pack([latents[row] for row in rows])
        velocity = _velocity(transformer, sizes, conditions, guide_texts, rows, options, packed)
        if options.step_cache:
            times = _times(options, group[0], prediction, scheduler)
            velocity = forecast(velocity, options.step_cache, times[-2])
        if known is not None:
            target, _ = transformer.pack([known[row] for row in rows])
            mask, _ = transformer.pack([repaint[row].to(x.dtype).expand_as(known[row]) for row in rows])
            velocity = _inpainting(velocity, x, target, mask, start)

        def report(step: int, t: float, tokens: Tensor, rows=rows, group=group) -> Tensor | None:
            replaced = on_step(step, t, transformer.unpack(tokens, group), rows) if on_step else None
            tokens = tokens if replaced is None else transformer.pack(replaced)[0]
            if interrupted():
                raise Interrupted(tokens)
            return tokens

        shift, steps = options.shift_for(group[0][0] * group[0][1]), options.num_inference_steps
        try:
            if scheduler is not None:
                prepared, times = schedulers.prepare(scheduler, steps, shift)
                x = schedulers.integrate(prepared, times, velocity, x, report, start)
            else:
                x = sample(options.solver, velocity, x, steps, shift, report, start, last_time(prediction))
        except Interrupted as end:
            x = end.tokens
        if known is not None:
            x = torch.lerp(target, x, mask)
        for row, solved in zip(rows, transformer.unpack(x, group), strict=True):
            finished[row] = solved
    return finished


def _velocity(
    transformer: SVGDiT,
    sizes: Sizes,
    conditions: Conditions,
    guide_texts: RefinedText | None,
    rows: Sequence[int],
    options: SamplingOptions,
    packed: bool,
) -> Callable[[Tensor, float], Tensor]:
    """The guided velocity of packed tokens of the images `rows`: of one after another, or of all at once.

    What is `packed` is on a CPU a few at once.
    """
    few = [list(rows)] if packed else [[row] for row in rows]
    if packed and conditions.texts.features.device.type == "cpu":
        few = _few_at_once(sizes, rows, CPU_NUMBERS // transformer.config.dim)
    denoisers = [
        Denoiser(transformer, [sizes[row] for row in some], conditions.select(some), guide_texts, options)
        for some in few
    ]
    velocities = [denoiser.velocity() for denoiser in denoisers]
    if len(velocities) == 1:
        return velocities[0]
    counts = [sum(denoiser.lengths) for denoiser in denoisers]

    def one_after_another(tokens: Tensor, t: float) -> Tensor:
        return torch.cat([velocity(x, t) for velocity, x in zip(velocities, tokens.split(counts), strict=True)])

    return one_after_another


def _few_at_once(sizes: Sizes, rows: Sequence[int], limit: int) -> list[list[int]]:
    """`rows` in order, in lists of at most `limit` latent cells where an image has not more on its own."""
    lists: list[list[int]] = []
    room = 0
    for row in rows:
        cells = sizes[row][0] * sizes[row][1]
        if cells > room:
            lists.append([])
            room = limit
        lists[-1].append(row)
        room -= cells
    return lists


def _inpainting(
    velocity: Callable[[Tensor, float], Tensor], begin: Tensor, target: Tensor, mask: Tensor, start: float
) -> Callable[[Tensor, float], Tensor]:
    """Constant velocity toward the target where the mask is 0: every solver follows a straight line exactly."""
    straight = (target - begin) / (1 - start)

    def masked(tokens: Tensor, t: float) -> Tensor:
        return torch.lerp(straight, velocity(tokens, t), mask)

    return masked
