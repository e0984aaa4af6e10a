"""Guidance distillation: what the student learns, that it can, and that sampling needs no second branch of it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autoencoder.common.config import UserError, load_config
from svg_t2i import export
from svg_t2i.checkpoints.weights import load_transformer, read_meta, read_transformer
from svg_t2i.features.frozen import MicroBatch
from svg_t2i.flow.guidance import combine
from svg_t2i.flow.paths import GUIDANCE, random_keys, random_normal, random_uniform
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.train import main
from svg_t2i.training.distill import Teacher
from svg_t2i.training.settings import DistillConfig, TrainConfig
from svg_t2i.training.step import FlowObjective
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.transformer.packing import TextFeatures

SIZES = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "axes_dims": (4, 6, 6), "multiple_of": 32}


def random_model(**sizes):
    model = SVGDiT(DiTConfig(**SIZES, in_channels=4, cap_feat_dim=8, **sizes))
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model


def batch_of_two():
    text = TextFeatures(torch.randn(5, 8), (2, 3))
    return MicroBatch(torch.randn(10, 4), ((2, 3), (2, 2)), torch.tensor([3, 8]), torch.tensor([64, 64]), text)


@pytest.mark.parametrize("renorm", [0.0, 1.0])
def test_the_target_is_the_guided_velocity_of_two_passes(toy_parts, renorm):
    settings = DistillConfig(teacher="unused", scales=(2.0, 6.0), renorm_cfg=renorm)
    config = load_config(TrainConfig, toy_parts / "train.yaml")
    model, unguided = random_model(), TextFeatures(torch.randn(1, 8), (1,))
    student, batch = random_model(guidance_embed=True), batch_of_two()
    losses, timesteps, aux = FlowObjective(student, config, Teacher(model, unguided, settings))(batch)
    assert aux is None
    keys = random_keys(0, batch.positions)
    scales = 2 + 4 * random_uniform(keys, stream=GUIDANCE)
    assert 2 < scales.min() < scales.max() < 6
    noise = random_normal(keys, (4,), (6, 4))
    for i, rows in enumerate((slice(0, 6), slice(6, 10))):
        t, size = timesteps[i : i + 1], (batch.sizes[i],)
        noisy = t * batch.tokens[rows] + (1 - t) * noise[rows]
        with torch.no_grad():
            cond = model.forward_packed(noisy, size, t, batch.text.select([i]))
            target = combine(
                cond, model.forward_packed(noisy, size, t, unguided), float(scales[i]), renorm, [len(noisy)]
            )
            given = student.forward_packed(noisy, size, t, batch.text.select([i]), guidance=scales[i : i + 1])
        torch.testing.assert_close(losses[i], (given - target).square().mean(), rtol=1e-4, atol=1e-5)


class Linear(nn.Module):
    """Velocities A x with a text of more than one token and B x with a single one; a student knows its scale."""

    def __init__(self, student):
        super().__init__()
        self.config = SimpleNamespace(patch_size=1, in_channels=4)
        self.cond, self.uncond = (nn.Parameter(torch.randn(4, 4, dtype=torch.float64) / 2) for _ in range(2))
        self.student = student

    def forward_packed(self, tokens, sizes, timesteps, text, guidance=None):
        lengths = torch.tensor([h * w for h, w in sizes])
        if self.student:
            scale = guidance.repeat_interleave(lengths)[:, None]
            return tokens @ self.uncond + scale * (tokens @ (self.cond - self.uncond))
        prompted = (torch.tensor(text.lengths) > 1).repeat_interleave(lengths)[:, None]
        return torch.where(prompted, tokens @ self.cond, tokens @ self.uncond)


def test_a_linear_student_becomes_its_linear_teacher(toy_parts):
    config = load_config(TrainConfig, toy_parts / "train.yaml")
    teacher, student = Linear(student=False), Linear(student=True)
    settings = DistillConfig(teacher="unused", scales=(1.0, 5.0), renorm_cfg=0.0)
    unguided = TextFeatures(torch.zeros(1, 8), (1,))
    objective, batch = FlowObjective(student, config, Teacher(teacher, unguided, settings)), batch_of_two()
    positions = torch.arange(2)
    batch = MicroBatch(batch.tokens.double(), batch.sizes, positions, batch.resolutions, batch.text)
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        loss = sum(
            objective(MicroBatch(batch.tokens, batch.sizes, positions + 2 * i, batch.resolutions, batch.text))[0].mean()
            for i in range(4)
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(student.cond, teacher.cond, atol=2e-3, rtol=0)
    torch.testing.assert_close(student.uncond, teacher.uncond, atol=2e-3, rtol=0)


def test_a_scale_is_given_where_it_is_wanted_and_only_there():
    tokens, sizes, text = torch.randn(6, 4), ((2, 3),), TextFeatures(torch.randn(2, 8), (2,))
    student, plain = random_model(guidance_embed=True), random_model()
    with pytest.raises(ValueError, match="guidance is None, and the model's guidance_embed True"):
        student.forward_packed(tokens, sizes, torch.rand(1), text)
    with pytest.raises(ValueError, match="guidance_embed False"):
        plain.forward_packed(tokens, sizes, torch.rand(1), text, guidance=torch.ones(1))


# --------------------------------------------------------------------------------------------------- runs and folders


@pytest.fixture
def distil(toy_parts, tmp_path, base):
    """Distil `base` into tmp_path/NAME; returns that folder."""

    def run(name, *overrides):
        settings = [f"distill.teacher={base}", f"results_dir={tmp_path / name}", "optim.lr=2e-3"]
        settings += ["train.ema_decay=0.5", *overrides]
        main(["--config", str(toy_parts / "train.yaml"), "train.max_steps=4", *settings])
        return tmp_path / name

    return run


def images(pipeline, **settings):
    return pipeline("noise", seed=0, output_type="latent", num_inference_steps=3, **settings).images


def test_a_student_starts_as_its_teacher_and_nears_its_guided_velocity(distil, base, capsys):
    student = distil("run", "train.max_steps=100", "train.ckpt_every=100")
    output = capsys.readouterr().out
    assert "left as initialised: guidance_embedder" in output
    losses = [float(line.split("loss ")[1].split()[0]) for line in output.splitlines() if line.startswith("step ")]
    assert sum(losses[-8:]) < 0.85 * sum(losses[:8])
    assert read_meta(student)["teacher"]["folder"].startswith(str(base.resolve()))
    ours, theirs = (SVGT2IPipeline.from_pretrained(folder) for folder in (student, base))
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
    wanted, plain = images(theirs, guidance_scale=6.0), images(theirs, guidance_scale=1.0)
    assert (images(ours, guidance_scale=6.0) - wanted).norm() < 0.8 * (plain - wanted).norm()


def test_sampling_takes_one_pass_an_image(distil, tmp_path, monkeypatch):
    run = distil("run")
    pipeline = SVGT2IPipeline.from_pretrained(run)
    pipeline.set_progress_bar_config(disable=True)
    rows, scales, forward = [], [], pipeline.transformer.forward_packed

    def watched(tokens, sizes, timesteps, text, guidance=None):
        rows.append(len(sizes))
        scales.append(guidance.tolist())
        return forward(tokens, sizes, timesteps, text, guidance=guidance)

    monkeypatch.setattr(pipeline.transformer, "forward_packed", watched)
    images(pipeline, guidance_scale=5.0)
    assert rows == [1] * 3
    assert scales == [[5.0]] * 3
    scales.clear()
    settings = {"solver": "euler", "time_shift": 1.0, "guidance_interval": (0.4, 1.0)}
    images(pipeline, guidance_scale=5.0, **settings)  # t = 0, 0.5
    assert scales == [[1.0], [5.0]]
    scales.clear()
    pipeline(
        ["noise", "noise 2"],
        seed=0,
        guidance_scale=(2.0, 3.0),
        num_inference_steps=1,
        output_type="latent",
        packed=True,
    )
    assert scales == [[2.0, 3.0]]
    monkeypatch.undo()
    with pytest.raises(UserError, match="negative_prompt does nothing with a distilled model"):
        images(pipeline, negative_prompt="noise")
    export.main([str(run), str(tmp_path / "out")])
    assert load_transformer(tmp_path / "out").config.guidance_embed
    with pytest.raises(UserError, match="'guidance_embed': True"):
        export.main([str(run), str(tmp_path / "published"), "--published"])
    pipeline.save_pretrained(tmp_path / "saved")
    again = SVGT2IPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(images(again, guidance_scale=4.0), images(pipeline, guidance_scale=4.0))


def test_a_run_goes_on_exactly_with_the_same_teacher_alone(distil, toy_parts, base, tmp_path):
    whole = distil("whole")
    distil("halves", "train.max_steps=2")
    halves = distil("halves")
    one, two = (read_transformer(run, ema=False).state for run in (whole, halves))
    assert all(torch.equal(one[name], two[name]) for name in one)
    settings = ["--config", str(toy_parts / "train.yaml"), f"results_dir={tmp_path / 'other'}", f"init_from={base}"]
    main([*settings, "optim.lr=0.01"])
    with pytest.raises(UserError, match="holds other weights than then"):
        distil("halves", "train.max_steps=6", f"distill.teacher={tmp_path / 'other'}")
    with pytest.raises(UserError, match="another model: guidance_embed was True and is False"):
        main([*settings[:2], f"results_dir={halves}", "train.max_steps=6"])
    with pytest.raises(UserError, match="it is distilled already, and has no second branch"):
        distil("again", f"distill.teacher={whole}")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("distill.scales=[3,2]", r"scales=\(3.0, 2.0\) must be two numbers, the larger last"),
        ("distill.renorm_cfg=-1", "renorm_cfg=-1.0 must be 0"),
        ("lora.rank=2", "null with distill"),
        ("model_overrides.guidance_embed=true", "the sections aux and distill set them"),
    ],
)
def test_settings_that_do_not_fit_are_refused(toy_parts, wrong, message):
    with pytest.raises(UserError, match=message):
        load_config(TrainConfig, toy_parts / "train.yaml", ["distill.teacher=x", "init_from=x", wrong])
