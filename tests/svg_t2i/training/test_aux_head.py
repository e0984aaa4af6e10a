"""The auxiliary head: its two losses, guidance by it, and models with and without it."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from autoencoder.common.config import UserError, load_config
from svg_t2i import export
from svg_t2i.checkpoints.weights import load_transformer, read_transformer
from svg_t2i.features.frozen import MicroBatch
from svg_t2i.flow.paths import flow_loss, interpolate, random_keys, random_normal
from svg_t2i.loading.adapters import load_adapters, parse_adapter
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.train import main
from svg_t2i.training.settings import TrainConfig
from svg_t2i.training.step import FlowObjective
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.transformer.packing import TextFeatures

SIZES = {"dim": 32, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1, "axes_dims": (4, 6, 6), "multiple_of": 32}
HEAD = ("model_overrides.n_layers=2", "aux={loss: flow, block: 1}")


def model_with(loss, block=1, **sizes):
    model = SVGDiT(DiTConfig(**SIZES, **{"in_channels": 4, "cap_feat_dim": 8, **sizes}, aux_loss=loss, aux_block=block))
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model


@pytest.fixture
def inputs():
    """Tokens of two samples, their sizes, times and captions."""
    return torch.randn(10, 4), ((2, 3), (2, 2)), torch.tensor([0.3, 0.6]), TextFeatures(torch.randn(5, 8), (2, 3))


@pytest.mark.parametrize("prediction", ["velocity", "data"])
@pytest.mark.parametrize("block", [1, 2])
def test_the_head_reads_what_the_first_blocks_wrote(inputs, block, prediction):
    """A model of the first blocks alone, with the head as its last layer, gives the same."""
    model = model_with("flow", block, prediction=prediction)
    short = SVGDiT(DiTConfig(**SIZES | {"n_layers": block}, in_channels=4, cap_feat_dim=8, prediction=prediction))
    state = model.state_dict()
    state |= {name.replace("aux_head", "final_layer"): state[name] for name in state if name.startswith("aux_head.")}
    short.load_state_dict({name: value for name, value in state.items() if name in short.state_dict()})
    with torch.no_grad():
        last, early = model.forward_packed(*inputs, aux=True)
        assert torch.equal(last, model.forward_packed(*inputs))
        torch.testing.assert_close(early, short.forward_packed(*inputs))
    assert (last - early).abs().mean() > 0.01


@pytest.mark.parametrize(
    "wrong", [{"aux_loss": "flow"}, {"aux_block": 1}, {"aux_loss": "flow", "aux_block": 3}, {"aux_loss": "no"}]
)
def test_a_head_that_cannot_be_is_refused(wrong):
    with pytest.raises(UserError, match=r"DiTConfig\.aux_(block|loss) = "):
        DiTConfig(**SIZES, **wrong)


@pytest.mark.parametrize("loss", ["flow", "features"])
def test_the_loss_of_the_head_is_this_formula(toy_parts, loss):
    config = load_config(TrainConfig, toy_parts / "train.yaml", [f"aux={{loss: {loss}, block: 1}}"])
    objective = FlowObjective(model_with(loss), config)
    tokens, sizes, _, text = torch.randn(10, 4), ((2, 3), (2, 2)), None, TextFeatures(torch.randn(5, 8), (2, 3))
    positions = torch.tensor([3, 8])
    losses, timesteps, aux = objective(MicroBatch(tokens, sizes, positions, torch.tensor([64, 64]), text))
    noise = random_normal(random_keys(0, positions), (4,), (6, 4))
    noisy, target = interpolate(tokens, noise, timesteps, (6, 4))
    last, early = objective.transformer.forward_packed(noisy, sizes, timesteps, text, aux=True)
    torch.testing.assert_close(losses, flow_loss(last, target, (6, 4)))
    for i, rows in enumerate((slice(0, 6), slice(6, 10))):
        expected = (early[rows] - target[rows]).square().mean()
        if loss == "features":
            a, b = F.normalize(early[rows], dim=1), F.normalize(tokens[rows], dim=1)
            expected = (1 - (a * b).sum(dim=1)).mean()
        torch.testing.assert_close(aux[i], expected)
    objective.eval()  # as validation has it
    assert objective(MicroBatch(tokens, sizes, positions, torch.tensor([64, 64]), text))[2] is None


def test_a_fresh_head_has_gradients_that_are_finite(inputs):
    for loss in ("flow", "features"):
        model = SVGDiT(DiTConfig(**SIZES, in_channels=4, cap_feat_dim=8, aux_loss=loss, aux_block=1))
        _, early = model.forward_packed(*inputs, aux=True)
        assert bool(early.any()) == (loss == "features")
        (1 - F.cosine_similarity(early, inputs[0], dim=-1)).sum().backward()
        assert model.aux_head.linear.weight.grad.abs().max() < 1e3 or loss == "flow"


# --------------------------------------------------------------------------------------------------------- guidance


@pytest.fixture
def pipeline(toy_pipeline):
    """`toy_pipeline` with a transformer that has a head."""
    parts = {name: toy_pipeline.components[name] for name in ("text_encoder", "tokenizer", "autoencoder")}
    model = model_with("flow", 2, in_channels=32, cap_feat_dim=32).eval()
    made = SVGT2IPipeline(parts["autoencoder"], model, parts["text_encoder"], parts["tokenizer"])
    made.set_progress_bar_config(disable=True)
    return made


def one_step(pipeline, noise, **settings):
    settings = {"solver": "euler", "num_inference_steps": 2, "renorm_cfg": 0, "system_prompt": "empty"} | settings
    return pipeline("noise", latents=noise, output_type="latent", height=32, width=48, **settings).images


def test_internal_guidance_is_this_formula(pipeline):
    noise, encoder = torch.randn(1, 32, 2, 3), pipeline.networks.text_encoder
    tokens, sizes = pipeline.transformer.pack(noise)

    def both(text):
        features = encoder.encode([text])
        with torch.no_grad():
            pair = pipeline.transformer.forward_packed(tokens, sizes, torch.zeros(1), features, aux=True)
        return [pipeline.transformer.unpack(x, sizes)[0][None] for x in pair]

    (last, early), (negative, _) = both("noise"), both("")
    inner = early + 1.7 * (last - early)
    near = {"atol": 2e-5, "rtol": 1e-4}
    alone = one_step(pipeline, noise, guidance_scale=1.0, internal_guidance=1.7)
    torch.testing.assert_close(alone, noise + inner, **near)
    head = one_step(pipeline, noise, guidance_scale=1.0, internal_guidance=0.0)
    torch.testing.assert_close(head, noise + early, **near)
    two = one_step(pipeline, noise, guidance_scale=3.0, internal_guidance=1.7)
    torch.testing.assert_close(two, noise + negative + 3 * (inner - negative), **near)
    off = one_step(pipeline, noise, guidance_scale=1.0)
    torch.testing.assert_close(off, noise + last, **near)
    for outside in ({"guidance_interval": (0.1, 1.0)}, {"cfg_trunc": 0.0}):
        plain = one_step(pipeline, noise, guidance_scale=1.0, internal_guidance=1.7, **outside)
        assert torch.equal(plain, off)


def test_internal_guidance_needs_the_head(pipeline, toy_pipeline, toy_parts):
    with pytest.raises(UserError, match=r"internal_guidance = 2.0 needs a model with a head for it, trained with aux"):
        toy_pipeline("noise", internal_guidance=2.0)
    with pytest.raises(UserError, match="internal_guidance = nan"):
        pipeline("noise", internal_guidance=float("nan"))
    with pytest.raises(UserError, match=r"samples.internal_guidance=2.0 must be 1 unless aux.loss=flow"):
        load_config(TrainConfig, toy_parts / "train.yaml", ["samples.internal_guidance=2.0"])


# --------------------------------------------------------------------------------------------------- runs and folders


@pytest.fixture
def train(toy_parts, tmp_path):
    def run(name, *overrides):
        settings = [f"results_dir={tmp_path / name}", "train.max_steps=4", "optim.lr=0.02", *overrides]
        main(["--config", str(toy_parts / "train.yaml"), *settings])
        return tmp_path / name

    return run


def test_a_run_with_a_head_resumes_exactly_and_is_used_without_it(train, tmp_path, capsys):
    whole = train("whole", *HEAD)
    assert "aux" in capsys.readouterr().out
    train("halves", *HEAD, "train.max_steps=2")
    halves = train("halves", *HEAD)
    one, two = (read_transformer(run, ema=False).state for run in (whole, halves))
    assert one["aux_head.linear.weight"].any()
    assert all(torch.equal(one[name], two[name]) for name in one)

    settings = {"seed": 0, "output_type": "latent", "num_inference_steps": 3}
    run = SVGT2IPipeline.from_pretrained(whole)
    run.save_pretrained(tmp_path / "pipeline")
    saved = SVGT2IPipeline.from_pretrained(tmp_path / "pipeline")
    images = [pipe("noise", internal_guidance=1.5, **settings).images for pipe in (run, saved)]
    assert torch.equal(*images)

    export.main([str(whole), str(tmp_path / "small"), "--no_aux_head"])
    small = load_transformer(tmp_path / "small")
    assert small.config.aux_loss is None
    full = load_transformer(whole)
    tokens, sizes, text = torch.randn(6, 32), ((2, 3),), TextFeatures(torch.randn(2, 32), (2,))
    with torch.no_grad():
        velocities = [one.forward_packed(tokens, sizes, torch.tensor([0.4]), text) for one in (full, small)]
    assert torch.equal(*velocities)
    files = [load_file(path) for path in (tmp_path / "small").glob("*.safetensors")]
    assert not any("aux_head" in name for file in files for name in file)
    export.main([str(whole), str(tmp_path / "with")])
    assert load_transformer(tmp_path / "with").config.aux_loss == "flow"


def test_an_adapter_needs_no_head(train, toy_parts, tmp_path):
    base = train("base", *HEAD)
    adapter = train("adapter", HEAD[0], f"init_from={base}", "lora.rank=2")
    merged = load_transformer(adapter)
    assert merged.config.aux_loss is None
    pipeline = SVGT2IPipeline.from_pretrained(base)  # which has the head
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        load_adapters(pipeline, [parse_adapter(str(adapter))])
    settings = {"seed": 0, "output_type": "latent", "num_inference_steps": 2}
    ours = SVGT2IPipeline.from_pretrained(adapter)
    ours.set_progress_bar_config(disable=True)
    torch.testing.assert_close(
        ours("noise", **settings).images, pipeline("noise", **settings).images, atol=1e-4, rtol=0
    )


def test_features_are_learnt(train, capsys):
    train("run", "model_overrides.n_layers=2", "aux={loss: features, block: 1}", "train.max_steps=30")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    losses = [float(line.split("aux ")[1].split()[0]) for line in lines]
    assert 0 < losses[-1] < losses[0] - 0.1


def test_a_head_is_refused_or_left_out_where_it_does_not_fit(train, capsys):
    plain = train("plain", "model_overrides.n_layers=2")
    with pytest.raises(UserError, match="another model: aux_loss was None and is flow, aux_block was None and is 1"):
        train("plain", *HEAD, "train.max_steps=5")
    with pytest.raises(UserError, match="the sections aux and distill set them"):
        train("other", "model_overrides.aux_loss=flow", "model_overrides.aux_block=1")
    with pytest.raises(UserError, match=r"DiTConfig\.aux_block = 1: give it with aux_loss, from 1 to n_layers - 1 = 0"):
        train("short", HEAD[1])
    train("new", *HEAD, f"init_from={plain}")
    assert "left as initialised: aux_head" in capsys.readouterr().out
