"""The loss on held-out samples: what it is, what it depends on, and that it changes nothing."""

import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from autoencoder.common.config import UserError, load_config
from autoencoder.common.processes import World
from svg_t2i.checkpoints.weights import load_transformer, read_transformer
from svg_t2i.features.frozen import load_frozen
from svg_t2i.flow.paths import flow_loss, interpolate, random_keys, random_normal
from svg_t2i.train import main
from svg_t2i.training.settings import TrainConfig
from svg_t2i.training.step import FlowObjective
from svg_t2i.training.validation import TIMES, Validation

FAST = ("optim.lr=0.05", "optim.warmup_steps=0", "optim.eps=1e-8")


@pytest.fixture
def train(toy_parts, tmp_path):
    def run(name, *overrides):
        settings = [f"results_dir={tmp_path / name}", f"validation.path={toy_parts / 'manifest.jsonl'}", *FAST]
        settings += ["validation.every=2", "validation.num_samples=5"]
        main(["--config", str(toy_parts / "train.yaml"), *settings, *overrides])
        return tmp_path / name

    return run


def logged(run, name):
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return [event.value for event in board.Scalars(f"validation/{name}")]


def test_it_is_the_loss_of_the_weights_at_fixed_noise_and_times(train, toy_parts, capsys):
    """Sample by sample, written out again, from the checkpoint of the run."""
    folder = train("run", "train.max_steps=2")
    printed = re.search(r"step 2/2  validation loss (\d\.\d+)", capsys.readouterr().out)[1]
    config, world = load_config(TrainConfig, folder / "config.yaml"), World()
    frozen = load_frozen(config.autoencoder, config.text_encoder, "fp32", world)
    model, held_out = load_transformer(folder, ema=False), Validation(config, config.validation, world)
    assert held_out.places == [0, 2, 3, 4, 6]
    losses = []
    for position, place in enumerate(held_out.places):
        item = held_out.dataset[position, place]
        assert item.caption.endswith(f"noise number {place}")  # never dropped
        (batch,) = frozen.prepare([held_out.dataset.collate([item])], model, world.device)
        keys, lengths = random_keys(config.train.seed, batch.positions), (len(batch.tokens),)
        noise = random_normal(keys, batch.tokens.shape[1:], lengths)
        for t in TIMES:
            noisy, target = interpolate(batch.tokens, noise, torch.tensor([t]), lengths)
            with torch.no_grad():
                velocity = model.forward_packed(noisy, batch.sizes, torch.tensor([t]), batch.text)
            losses.append(flow_loss(velocity, target, lengths).item())
    assert float(printed) == pytest.approx(sum(losses) / len(losses), abs=2e-5)
    assert logged(folder, "loss") == pytest.approx([sum(losses) / len(losses)], rel=1e-5)
    assert logged(folder, "loss_at_t/0.00-0.12") == pytest.approx([sum(losses[::8]) / 5], rel=1e-5)


def test_it_does_not_change_the_training_nor_depend_on_batches(train):
    plain, measured = train("plain", "validation=null"), train("measured")
    one, two = (read_transformer(run, ema=False).state for run in (plain, measured))
    assert all(torch.equal(one[name], two[name]) for name in one)
    single = train("single", "train.micro_batch_size=1")
    assert len(logged(measured, "loss")) == 2  # after steps 2 and 4
    assert logged(single, "loss") == pytest.approx(logged(measured, "loss"), rel=1e-4)


def test_training_on_the_samples_lowers_it(train):
    first, *_, last = logged(train("run", "train.max_steps=40", "optim.lr=5e-3", "validation.every=10"), "loss")
    assert last < first


def test_shares_of_processes_are_the_whole(toy_parts):
    """Three processes, two batches: each sample counts once, and all take part in one pass."""
    settings = [f"validation={{path: {toy_parts / 'manifest.jsonl'}}}", "train.micro_batch_size=4"]
    config = load_config(TrainConfig, toy_parts / "train.yaml", settings)
    shares = [list(Validation(config, config.validation, World(rank=r, size=3)).batches()) for r in range(3)]
    assert [len(share) for share in shares] == [1, 1, 1]
    counted = [batch.positions.tolist() for ((batch, counts),) in shares if counts]
    assert sorted(sum(counted, [])) == list(range(7))
    frozen = load_frozen(config.autoencoder, config.text_encoder, "fp32", World())
    model = load_transformer_of(config, frozen)
    whole = Validation(config, config.validation, World()).measure(FlowObjective(model, config), model, frozen)
    assert len(whole) == len(TIMES)


def load_transformer_of(config, frozen):
    from svg_t2i.training.networks import make_transformer

    return make_transformer(config, frozen, None, World())[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["validation.every=0"], "validation: every=0 must be at least 1"),
        (["validation.num_samples=0"], "validation: num_samples=0 must be at least 1"),
        (["validation.path=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_mistakes_are_told(train, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        train("run", *settings)
