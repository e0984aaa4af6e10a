"""Solver runs against the published samplers: on a toy field, and on the small network under guidance.

Limits are the recommended ones, raised where the vectors' README and notes say that more is safe. For dpm the release
recovers clean latents by way of the noise, (x - sigma noise) / alpha, which in float32 leaves three digits where alpha
is 1e-4; our solver takes x + sigma v. Each dpm run is therefore made twice: with the release's rounding put into the
velocity, compared tightly, and as users get it, compared at what that rounding amounts to.
"""

import torch
from torch import Tensor

from harness import Vectors
from svg_t2i.flow.guidance import guided_velocity
from svg_t2i.flow.paths import shift_timesteps
from svg_t2i.flow.solvers import SOLVERS, Velocity, dpm, dpm_times, euler, sde, sde_times, time_grid
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.model import SVGDiT, TextFeatures, load_published_state_dict

# Limits relative to the largest published value, by solver, on the toy field and with the network.
LIMITS = {
    "toy": {"dpm": 1e-5, "dpm plain": 2e-4, "dopri5": 1e-4, "sde": 1e-5},
    "dit": {"dpm": 1e-4, "dpm plain": 2e-4, "dopri5": 4e-3},
}


def toy_velocity(x: Tensor, t: float) -> Tensor:
    return torch.sin(3 * x) + t * x


class Recorder:
    """A velocity that keeps the times of its calls, and a callback that keeps the states."""

    def __init__(self, velocity: Velocity, noise: Tensor):
        self.velocity, self.times, self.states = velocity, [], [noise]

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.times.append(t)
        return self.velocity(x, t)

    def keep(self, index: int, t: float, x: Tensor) -> None:
        self.states.append(x)


def check(vectors: Vectors) -> None:
    noise = vectors.tensors["in.toy.z"]
    config = vectors.config
    for num_points in config["steps"]:
        for factor in config["factors"]:
            vectors.compare(f"out.tgrid.n{num_points}.f{factor:g}", time_grid(num_points, factor))
            for method in config["methods"]:
                check_ode(vectors, "toy", toy_velocity, noise, method, num_points, factor)
    for steps in config["dpm_steps"]:
        for shift in config["dpm_shift"]:
            check_dpm(vectors, "toy", toy_velocity, noise, steps, shift)
    check_default_grid(vectors, noise)
    for index, settings in enumerate(config["sde"]):
        check_sde(vectors, index, settings, noise)
    if "dit" in config:
        velocity, noise = guided_network(vectors)
        for method, num_points, factor in config["dit"]["ode"]:
            check_ode(vectors, "dit", velocity, noise, method, num_points, factor)
        for steps, shift in config["dit"]["dpm"]:
            check_dpm(vectors, "dit", velocity, noise, steps, shift)


def limit(vectors: Vectors, key: str, relative: float) -> float:
    """The recommended tolerance, or `relative` times the largest published value where that is wider."""
    recommended = vectors.meta["tolerance"]["per_tensor"][key]["recommended_atol"]
    return max(recommended, relative * vectors.tensors[key].abs().max().item())


def compare_run(vectors: Vectors, key: str, recorder: Recorder, final: Tensor, relative: float = 0.0) -> None:
    """Compare whatever of this run was published: final state, times of the calls, states along the way."""
    vectors.compare(f"{key}.final", final, limit(vectors, f"{key}.final", relative))
    if f"{key}.model_times" in vectors.tensors:
        vectors.compare(f"{key}.model_times", recorder.times)
    for states in (f"{key}.all", f"{key}.intermediates"):
        if states in vectors.tensors:
            vectors.compare(states, torch.stack(recorder.states), limit(vectors, states, relative))
    if f"{key}.model_times_info" in vectors.tensors:
        vectors.exempt(f"{key}.model_times_info", "for information only, says the file")


def check_ode(vectors, run: str, velocity: Velocity, noise: Tensor, method: str, points: int, factor: float) -> None:
    recorder = Recorder(velocity, noise)
    final = SOLVERS[method].solve(recorder, noise, time_grid(points, factor), recorder.keep)
    compare_run(vectors, f"out.{run}.ode.{method}.n{points}.f{factor:g}", recorder, final, LIMITS[run].get(method, 0.0))


def check_dpm(vectors, run: str, velocity: Velocity, noise: Tensor, steps: int, shift: float) -> None:
    key = f"out.{run}.dpm.n{steps}.f{shift:g}"
    times = dpm_times(steps, shift)
    if f"{key}.sigma_grid" in vectors.tensors:
        vectors.compare(f"{key}.sigma_grid", [1 - t for t in times])
    recorder = Recorder(velocity, noise)
    compare_run(vectors, key, recorder, dpm(recorder, noise, times, recorder.keep), LIMITS[run]["dpm plain"])
    rounded = [1 - sigma for sigma in released_sigmas(steps, shift).tolist()]
    recorder = Recorder(through_noise(velocity), noise)
    compare_run(vectors, key, recorder, dpm(recorder, noise, rounded, recorder.keep), LIMITS[run]["dpm"])


def released_sigmas(steps: int, shift: float) -> Tensor:
    """The grid of the vectors' notes, in float32."""
    s = 1 - torch.linspace(1, 0.001, steps + 1)
    return (shift * s / (1 + (shift - 1) * s)).flip(0)


def through_noise(velocity: Velocity) -> Velocity:
    """The same velocity in exact arithmetic; in float32, with the rounding of the release's data prediction."""

    def rounded(x: Tensor, t: float) -> Tensor:
        sigma = torch.tensor(1 - t)
        alpha = 1 - sigma
        noise = x - alpha * velocity(x, t)
        return ((x - sigma * noise) / alpha - x) / sigma

    return rounded


def check_default_grid(vectors, noise: Tensor) -> None:
    """Runs without a shift factor; the published resolution shift then takes the channel count for the token count."""
    prefix = "out.toy.ode_default.do_shift_"
    for flag in (0, 1):
        times = torch.tensor(time_grid(len(vectors.tensors[f"{prefix}{flag}.model_times"]) + 1))
        times = shift_timesteps(times, num_tokens=noise.shape[1]) if flag else times
        recorder = Recorder(toy_velocity, noise)
        final = euler(recorder, noise, times.tolist(), recorder.keep)
        compare_run(vectors, f"{prefix}{flag}", recorder, final)


def check_sde(vectors, index: int, settings: dict, noise: Tensor) -> None:
    recorder = Recorder(toy_velocity, noise)
    last_step = settings["last_step"] and settings["last_step"].lower()
    times = sde_times(settings["num_steps"], settings["last_step_size"] if last_step else 0.0)
    final = sde(
        recorder,
        noise,
        times,
        vectors.tensors[f"in.sde.{index}.noise"].__getitem__,
        method=settings["sampling_method"].lower(),
        form=settings["diffusion_form"].replace("inccreasing", "increasing"),  # published misspelling
        norm=settings["diffusion_norm"],
        last_step=last_step,
        callback=recorder.keep,
    )
    key = f"out.toy.sde.{index}.states"
    vectors.compare(key, torch.stack([*recorder.states[1:], final]), limit(vectors, key, LIMITS["toy"]["sde"]))
    # The release calls the model once for the velocity and once more for the score of the same state.
    single = 1 if last_step in ("euler", "tweedie") else 0
    doubled = recorder.times[: len(recorder.times) - single]
    calls = [t for t in doubled for _ in range(2)] + recorder.times[len(doubled) :]
    vectors.compare(f"out.toy.sde.{index}.model_times", calls)


def guided_network(vectors) -> tuple[Velocity, Tensor]:
    """The network of the sibling vector file as a guided velocity, and the starting noise (1, C, h, w)."""
    settings = vectors.config["dit"]
    sibling = Vectors.load(vectors.directory / f"{settings['file']}.json")
    constructor = dict(sibling.config["ctor"])
    constructor.update({key: tuple(constructor[key]) for key in ("axes_dims", "axes_lens")})
    model = SVGDiT(DiTConfig(**constructor)).eval()
    load_published_state_dict(model, sibling.state_dict())
    both = TextFeatures.from_padded(vectors.tensors["in.dit.cap_feats"], vectors.tensors["in.dit.cap_mask"])

    @torch.no_grad()
    def run(latents: Tensor, t: float, text: TextFeatures) -> Tensor:
        return model(latents, torch.full((len(latents),), t), text)

    def pair(latents: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return run(torch.cat([latents, latents]), t, both).chunk(2)

    def conditional(latents: Tensor, t: float) -> Tensor:
        return run(latents, t, both.select([0]))

    options = {key: settings["kw"][key] for key in ("renorm_cfg", "cfg_trunc") if key in settings["kw"]}
    return guided_velocity(pair, conditional, settings["cfg_scale"], **options), vectors.tensors["in.dit.z"][:1]
