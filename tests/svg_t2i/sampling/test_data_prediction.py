"""A network that predicts the clean latents: its velocity, where solvers end, and what its checkpoints are good for."""

import pytest
import torch

import svg_t2i.train
from autoencoder.common.config import UserError
from svg_t2i.checkpoints.weights import export, export_as_published, load_transformer
from svg_t2i.flow.paths import interpolate
from svg_t2i.flow.solvers import SOLVERS
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.sampling import denoising
from svg_t2i.sampling.denoising import count_steps
from svg_t2i.sampling.options import SamplingOptions
from svg_t2i.train import main
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.transformer.packing import TextFeatures

SIZES = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "axes_dims": (4, 6, 6), "multiple_of": 32}


def oracle(in_channels: int, patch_size: int = 1) -> tuple[SVGDiT, torch.Tensor]:
    """A model that gives the same clean token whatever it sees, and that token."""
    sizes = DiTConfig(**SIZES, in_channels=in_channels, cap_feat_dim=32, patch_size=patch_size, prediction="data")
    model = SVGDiT(sizes)
    clean = torch.randn(patch_size**2 * in_channels)
    model.final_layer.linear.bias.data = clean.clone()
    return model.eval(), clean


@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_velocity_of_an_oracle_is_the_target(patch_size):
    model, clean = oracle(3, patch_size)
    sizes, lengths = ((4, 6), (2, 2), (8, 4)), tuple(n // patch_size**2 for n in (24, 4, 32))
    timesteps, text = torch.tensor([0.0, 0.4, 0.95]), TextFeatures(torch.randn(9, 32), (2, 3, 4))
    noise = torch.randn(sum(lengths), len(clean))
    tokens, target = interpolate(clean.expand_as(noise), noise, timesteps, lengths)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_packed(tokens, sizes, timesteps, text), target)
        for one in (0.3, 1.0):  # one time for all; beyond 0.95 the divisor stays 0.05
            tokens, target = interpolate(clean.expand_as(noise), noise, torch.full((3,), one), lengths)
            velocity = model.forward_packed(tokens, sizes, torch.tensor([one]), text)
            torch.testing.assert_close(velocity, target * (1 - one) / max(1 - one, 0.05))


def test_it_is_the_same_network_behind_another_last_line():
    model = SVGDiT(DiTConfig(**SIZES, in_channels=4, cap_feat_dim=32, prediction="data"))
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    plain = SVGDiT(DiTConfig(**SIZES, in_channels=4, cap_feat_dim=32))
    plain.load_state_dict(model.state_dict())
    latents, timesteps = torch.randn(2, 4, 3, 5), torch.tensor([0.2, 0.98])
    text, divisor = TextFeatures(torch.randn(5, 32), (2, 3)), torch.tensor([0.8, 0.05])[:, None, None, None]
    velocity, expected = model(latents, timesteps, text), (plain(latents, timesteps, text) - latents) / divisor
    torch.testing.assert_close(velocity, expected)
    ours = torch.autograd.grad(velocity.square().mean(), model.parameters())
    torch.testing.assert_close(ours, torch.autograd.grad(expected.square().mean(), plain.parameters()))


@pytest.fixture
def pipeline(toy_pipeline, toy_parts):
    """`toy_pipeline` with an oracle of every cell; and the latent cell that it knows."""
    model, clean = oracle(32)
    parts = {name: toy_pipeline.components[name] for name in ("text_encoder", "tokenizer", "autoencoder")}
    made = SVGT2IPipeline(parts["autoencoder"], model, parts["text_encoder"], parts["tokenizer"])
    made.set_progress_bar_config(disable=True)
    return made, clean


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [2, 3, 60])
def test_every_solver_ends_at_the_predicted_latents(pipeline, solver, steps, monkeypatch):
    """With many steps the grid would have times beyond 0.95, where the divisor is not 1 - t."""
    pipe, clean = pipeline
    times, original = [], denoising.Denoiser._run

    def watched(self, model, tokens, t, text, copies):
        times.append(t)
        return original(self, model, tokens, t, text, copies)

    monkeypatch.setattr(denoising.Denoiser, "_run", watched)
    seen = []
    settings = {"height": 32, "width": 48, "num_inference_steps": steps, "solver": solver, "guidance_scale": 2.0}
    made = pipe(
        "noise", **settings, time_shift=1.0, seed=0, output_type="latent",
        callback_on_step_end=lambda pipe, step, t, values: seen.append(step) or values,
    ).images  # fmt: skip
    torch.testing.assert_close(made, clean[:, None, None].expand(1, -1, 2, 3), atol=1e-5, rtol=1e-5)
    assert max(times) <= 0.95 + 1e-9
    assert seen == list(range(steps if solver == "dpm" else steps - 1))
    options = SamplingOptions(**settings, time_shift=1.0)
    assert len(seen) == count_steps(options, ((2, 3),), "data") == count_steps(options, ((2, 3),), "velocity")


@pytest.mark.parametrize("solver", ["dpm", "heun", "dopri5"])
@pytest.mark.parametrize("strength", [1 / 30, 0.5, 1.0])
def test_changing_an_image_ends_there_too(pipeline, solver, strength):
    pipe, clean = pipeline
    image = torch.rand(3, 32, 48).numpy().transpose(1, 2, 0)
    bar = []
    made = pipe.image_to_image(
        "noise", image, strength=strength, num_inference_steps=31, solver=solver, time_shift=1.0, seed=0,
        output_type="latent", callback_on_step_end=lambda pipe, step, t, values: bar.append(step) or values,
    ).images  # fmt: skip
    torch.testing.assert_close(made[0], clean[:, None, None].expand(-1, 2, 3), atol=1e-5, rtol=1e-5)
    steps = 31 if solver == "dpm" else 30
    assert bar == list(range(round(strength * steps)))


def test_a_guide_must_predict_the_same(pipeline):
    with pytest.raises(UserError, match="guide's prediction is velocity, the transformer's is data"):
        pipeline[0].set_guide(SVGDiT(DiTConfig(**SIZES, in_channels=32, cap_feat_dim=32)))


# --------------------------------------------------------------------------------------------------- runs and folders


@pytest.fixture
def train(toy_parts, tmp_path):
    def run(name, *overrides):
        settings = [f"results_dir={tmp_path / name}", "train.max_steps=2", "samples.every=0", *overrides]
        main(["--config", str(toy_parts / "train.yaml"), *settings])
        return tmp_path / name

    return run


DATA = "model_overrides.prediction=data"


def test_a_run_records_what_it_predicts(train, tmp_path, toy_parts):
    run = train("data", DATA)
    assert load_transformer(run).config.prediction == "data"
    exported = load_transformer(export(run, tmp_path / "exported"))
    assert exported.config.prediction == "data"
    assert torch.equal(exported.x_embedder.weight, load_transformer(run).x_embedder.weight)
    pipe = SVGT2IPipeline.from_pretrained(run)
    pipe.save_pretrained(tmp_path / "pipeline")
    again = SVGT2IPipeline.from_pretrained(tmp_path / "pipeline")
    settings = {"seed": 0, "output_type": "latent", "num_inference_steps": 2}
    assert again.transformer.config.prediction == "data"
    assert torch.equal(pipe("noise", **settings).images, again("noise", **settings).images)
    with pytest.raises(UserError, match="cannot say .*'prediction': 'data'"):
        export_as_published(run, tmp_path / "published")


def test_it_is_refused_where_it_does_not_fit(train):
    velocity = train("velocity")
    with pytest.raises(UserError, match="another model: prediction was velocity and is data"):
        train("velocity", DATA, "train.max_steps=3")
    with pytest.raises(UserError, match=r"that model predicts velocity, this one data; set model_overrides.prediction"):
        train("other", DATA, f"init_from={velocity}")
    with pytest.raises(UserError, match="prediction"):
        train("wrong", "model_overrides.prediction=noise")


def test_a_checkpoint_from_before_the_setting_predicts_the_velocity(train, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        written = svg_t2i.train.checkpoint_meta

        def as_before(*args):
            meta = written(*args)
            assert meta["model_args"].pop("prediction") == "velocity"
            return meta

        patched.setattr(svg_t2i.train, "checkpoint_meta", as_before)
        run = train("run")
    assert load_transformer(run).config.prediction == "velocity"
    train("run", "train.max_steps=3")
    assert "resumed from" in capsys.readouterr().out
    with pytest.raises(UserError, match="prediction was velocity and is data"):
        train("run", "train.max_steps=4", DATA)
