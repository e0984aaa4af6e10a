"""Training times, time shifts, losses and path tables against the published transport code."""

import torch
from torch import Tensor

from svg_t2i.flow.paths import PATHS, Path, flow_loss, interpolate, sample_timesteps, shift_time, shift_timesteps


def check(vectors) -> None:
    t = vectors.tensors
    for case in vectors.config["tcases"]:
        shift = "shift" if case["do_shift"] else "noshift"
        key = f"out.t.{case['snr_type']}.{shift}.seq{case['seq_len']}.mu{case['mu']}"
        vectors.compare(key, training_times(case, t["in.base_u"], t["in.base_z"]))
    for num_tokens in vectors.config["seqs"]:
        vectors.compare(f"out.time_shift.seq{num_tokens}", shift_timesteps(t["in.grid"], num_tokens))
        vectors.compare(f"out.time_shift_sigma0p5.seq{num_tokens}", shift_timesteps(t["in.grid"], num_tokens, 0.5))
    for factor in vectors.config["shiftf"]:
        vectors.compare(f"out.ode_shift.f{factor}", shift_time(t["in.grid"], factor))
    for case in vectors.config["losses"]:
        check_loss(vectors, case)
    for path in PATHS.values():
        check_path(vectors, path)


def training_times(case: dict, uniform: Tensor, normal: Tensor) -> Tensor:
    draws = normal if case["snr_type"] == "lognorm" else uniform
    num_tokens = case["seq_len"] if case["do_shift"] else None
    path = PATHS[case.get("path", "Linear")]
    return sample_timesteps(draws, case["snr_type"], case["mu"], num_tokens, path)


def check_loss(vectors, case: dict) -> None:
    """One batch, then for channels-first samples the same loss again from packed tokens."""
    name, path, tensors = case["name"], PATHS[case["path"]], vectors.tensors
    timesteps = training_times(case, tensors[f"in.{name}.base_u"], tensors[f"in.{name}.base_z"])
    vectors.compare(f"out.{name}.t", timesteps)
    if case["kind"] == "tensor":
        noise, clean = tensors[f"in.{name}.x0"], tensors[f"in.{name}.x1"]
        x_t, target = interpolate(clean, noise, timesteps, path=path)
        vectors.compare(f"out.{name}.xt", x_t)
        vectors.compare(f"out.{name}.ut", target)
        prediction = toy_model(x_t, timesteps[:, None, None, None])
        vectors.compare(f"out.{name}.loss", flow_loss(prediction, target))
        packed = [torch.cat([tokens(x) for x in batch]) for batch in (clean, noise)]
        lengths = [clean[0, 0].numel()] * len(clean)
    else:
        count = len(timesteps)
        noise, clean = ([tensors[f"in.{name}.{x}.{i}"] for i in range(count)] for x in ("x0", "x1"))
        x_t, target = interpolate(clean, noise, timesteps, path=path)
        for i in range(count):
            vectors.compare(f"out.{name}.xt.{i}", x_t[i])
            vectors.compare(f"out.{name}.ut.{i}", target[i])
        conditions = [tensors.get(f"in.{name}.cond.{i}") for i in range(count)]
        prediction = [toy_model(x, time, cond) for x, time, cond in zip(x_t, timesteps, conditions)]
        vectors.compare(f"out.{name}.loss", flow_loss(prediction, target))
        packed = [torch.cat([tokens(x) for x in batch]) for batch in (clean, noise)]
        lengths = [x[0].numel() for x in clean]
    if case["kind"] != "list_cond":
        x_t, target = interpolate(*packed, timesteps, lengths, path)
        prediction = toy_model(x_t, timesteps.repeat_interleave(torch.tensor(lengths))[:, None])
        vectors.compare(f"out.{name}.loss", flow_loss(prediction, target, lengths))


def tokens(latents: Tensor) -> Tensor:
    return latents.flatten(1).T  # (C, h, w) -> (h w, C)


def toy_model(x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
    """The stand-in network that the vectors' notes describe."""
    if condition is not None:
        return torch.tanh(x + 0.5 * condition) * (1 + t)
    return torch.tanh(x) * (1 + t) + 0.25 * t * x


def check_path(vectors, path: Path) -> None:
    t, noise, clean, velocity = (vectors.tensors[f"in.path.{k}"] for k in ("t", "x0", "x1", "v"))
    prefix = f"out.path.{path.name}."
    for name, value in path.coefficients(t)._asdict().items():
        vectors.compare(prefix + name, value)
    x_t, target = interpolate(clean, noise, t, path=path)
    vectors.compare(prefix + "xt", x_t)
    vectors.compare(prefix + "ut", target)
    vectors.compare(prefix + "d_alpha_over_alpha", path.log_alpha_slope(t))
    vectors.compare(prefix + "drift", path.drift(x_t, t))
    vectors.compare(prefix + "drift_var", path.drift_variance(t))
    vectors.compare(prefix + "score_from_velocity", path.score_from_velocity(velocity, x_t, t))
    vectors.compare(prefix + "noise_from_velocity", path.noise_from_velocity(velocity, x_t, t))
    vectors.compare(prefix + "velocity_from_score", path.velocity_from_score(velocity, x_t, t))
    for key in [k for k in vectors.tensors if k.startswith(prefix + "diffusion.")]:
        form = key.removeprefix(prefix + "diffusion.").replace("inccreasing", "increasing")  # published misspelling
        vectors.compare(key, path.diffusion(t, form, norm=0.8))
