"""The networks that a run begins with and what it leaves: frozen ones, statistics, first weights, exports."""

import pytest
import torch

from autoencoder.common.config import UserError, load_config
from autoencoder.latents.statistics import LatentStats
from autoencoder.model import SVGAutoencoder
from svg_t2i import export
from svg_t2i.checkpoints.weights import read_transformer
from svg_t2i.training.settings import TrainConfig
from tests.svg_t2i.training.runs import largest_difference, weights


def test_resume_refuses_other_frozen_networks_and_other_models(train, toy_parts, tmp_path):
    train("run", "train.max_steps=1")
    stats = toy_parts / "autoencoder" / "latent_stats.safetensors"
    other = LatentStats.load(stats, 32)
    LatentStats(other.mean + 1, other.std, encoder=other.encoder).save(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"autoencoder's stats was \w{16} and is \w{16}"):
        train("run", "train.max_steps=2", f"autoencoder.stats={tmp_path / 'other.safetensors'}")
    with pytest.raises(UserError, match=r"another model: dim was 32 and is 64"):
        train("run", "train.max_steps=2", "model_overrides.dim=64", "model_overrides.axes_dims=[8,12,12]")


def test_init_from_takes_fitting_weights_and_names_the_others(train, capsys):
    source = train("source")
    capsys.readouterr()
    folder = train("next", f"init_from={source}", "train.max_steps=1", "optim.lr=1e-12")
    assert largest_difference(weights(source, 4), weights(folder, 1)) < 1e-9
    wider = "model_overrides.multiple_of=96"
    train("wider", f"init_from={source}", wider, "train.max_steps=1")
    output = capsys.readouterr().out
    assert "of another shape" in output
    assert "layers.0.feed_forward.w1.weight" in output


def test_measured_statistics_and_random_text_encoder_are_made_once(train, toy_parts):
    asked = ("autoencoder.stats=measure", "text_encoder.path=random", "train.max_steps=1")
    folder = train("run", *asked)
    stats = folder / "latent_stats.safetensors"
    made = stats.stat().st_mtime_ns
    recorded = load_config(TrainConfig, folder / "config.yaml")
    assert recorded.autoencoder.stats == str(stats)
    assert recorded.text_encoder.path == str(folder / "text_encoder")
    train("run", *asked, "train.max_steps=2")
    assert stats.stat().st_mtime_ns == made


def test_statistics_of_another_resolution_are_warned_of_with_numbers(train, tmp_path, capsys):
    """The toy has fewer images than are compared, so that the numbers are known."""

    def warnings(name, stats, *overrides):
        capsys.readouterr()
        train(name, f"autoencoder.stats={stats}", "train.max_steps=1", *overrides)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("the latent statistics")]

    at_32 = ["data.resolution=32"]
    assert warnings("measured", "measure", *at_32) == []
    own = LatentStats.load(tmp_path / "measured" / "latent_stats.safetensors", 32)
    assert own.resolutions == (32,)
    shifted = own.mean + own.std, 2 * own.std  # seen through these, images of 32 px have means of -1/2
    LatentStats(*shifted, own.encoder, (64,)).save(tmp_path / "shifted.safetensors")
    (line,) = warnings("other", tmp_path / "shifted.safetensors", *at_32)
    assert line.startswith(f"the latent statistics {tmp_path}/shifted.safetensors were measured at 64 px, ")
    assert "training is at 32 px: on a few training images" in line
    assert "means of 0.500 rms (at most 0.50" in line
    assert "deviations from 0.50 to 0.50 instead of 1" in line
    assert warnings("trusted", tmp_path / "shifted.safetensors") == []  # at 64 px, as they say
    for file, mean in (("near", own.mean + 0.1 * own.std), ("far", own.mean + 3 * own.std)):
        torch.save({"mean": mean[None], "std": own.std[None]}, tmp_path / f"{file}.pt")  # no resolution is recorded
    assert warnings("near", tmp_path / "near.pt", *at_32) == []
    (line,) = warnings("far", tmp_path / "far.pt", *at_32)
    assert "far.pt do not fit the images, training is at 32 px" in line
    assert "means of 3.000 rms" in line


def test_statistics_are_measured_at_the_resolutions_of_all_sources(train, toy_parts, capsys):
    manifest = toy_parts / "manifest.jsonl"
    sources = ", ".join(f"{{path: {manifest}, resolution: {side}}}" for side in (32, 64))
    settings = ["data.path=null", f"data.sources=[{sources}]", "train.max_steps=1"]
    folder = train("both", *settings, "autoencoder.stats=measure")
    stats = LatentStats.load(folder / "latent_stats.safetensors", 32)
    assert stats.resolutions == (32, 64)
    alone = train("alone", "autoencoder.stats=measure", "train.max_steps=1") / "latent_stats.safetensors"
    assert not torch.equal(LatentStats.load(alone, 32).mean, stats.mean)
    capsys.readouterr()
    train("mixed", *settings, f"autoencoder.stats={alone}")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "were measured at" in line]
    assert "alone/latent_stats.safetensors were measured at 64 px, training is at 32 px" in line


def test_residual_latents_train_and_export(train, tmp_path):
    """An R autoencoder has 8 channels more; the published file names carry the model away and back."""
    vit = {"overrides": {"embed_dim": 32, "depth": 1, "num_heads": 1}, "outnorm": "per_image"}
    encoder = {"model_name": "dinov3_vits16plus", "weights": "random"}
    encoder["overrides"] = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    decoder = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 40}
    params = {"embed_dim": 32, "ddconfig": decoder, "dinoconfig": encoder, "extra_vit_config": vit}
    stats = LatentStats(torch.zeros(40), torch.ones(40))
    SVGAutoencoder.from_config({"model": {"params": params}}, stats=stats).save_pretrained(tmp_path / "residual")
    tiny = ["model_overrides.dim=64", "model_overrides.n_layers=3", "model_overrides.axes_dims=[8,12,12]"]
    tiny += ["model_overrides.multiple_of=256"]
    folder = train("run", f"autoencoder.config={tmp_path / 'residual'}", "train.max_steps=1", *tiny)
    assert read_transformer(folder).config.in_channels == 40
    export.main([str(folder), str(tmp_path / "out"), "--published"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "consolidated.00-of-01.pth", "consolidated_ema.00-of-01.pth", "model_args.pth",
    ]  # fmt: skip
    again, before = (read_transformer(source, ema=False) for source in (tmp_path / "out", folder))
    assert again.config == before.config
    assert largest_difference({k: v for k, v in again.state.items() if k != "norm_final.weight"}, before.state) == 0


def test_export_needs_a_name_to_look_published(train, tmp_path):
    folder = train("run", "train.max_steps=1", "train.ema_decay=[0.9,0.5]")
    with pytest.raises(UserError, match="export it without --published"):
        export.main([str(folder), str(tmp_path / "out"), "--published"])
    with pytest.raises(UserError, match="--raw"):
        export.main([str(folder), str(tmp_path / "out"), "--published", "--raw"])
    export.main([str(folder), str(tmp_path / "fast"), "--ema_decay", "0.5"])
    export.main([str(folder), str(tmp_path / "slow")])
    fast, slow, raw = (read_transformer(f, ema=e) for f, e in ((tmp_path / "fast", 0), (tmp_path / "slow", 0),
                                                               (folder, False)))  # fmt: skip
    assert 0 < largest_difference(fast.state, raw.state) < largest_difference(slow.state, raw.state)
    with pytest.raises(UserError, match=r"no average with decay 0.7, only 0.9, 0.5"):
        export.main([str(folder), str(tmp_path / "none"), "--ema_decay", "0.7"])
