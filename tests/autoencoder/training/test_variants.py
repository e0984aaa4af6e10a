"""The residual and `hyconfig` autoencoders end to end."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.common.config import UserError, build, read_config
from autoencoder.latents.statistics import LatentStats, StatsAccumulator
from autoencoder.model import DROPPED, SVGAutoencoder
from autoencoder.training import run as entry
from autoencoder.training.settings import AutoencoderTrainConfig

D, R = 48, 8
DINO = {"weights": "random", "overrides": {"embed_dim": D, "depth": 1, "num_heads": 3}}
DD = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 0}
HY = {"block_out_channels": [32, 32, 32, 32, 32], "num_res_blocks": 0}
VIT = {"overrides": {"embed_dim": 48, "depth": 1, "num_heads": 3}}
PURE = "configs/autoencoder/pure/svg_autoencoder_P_dd_M_IN_"
PRETRAINED = "configs/autoencoder/pre-trained/svg_autoencoder_"

pytestmark = pytest.mark.filterwarnings("ignore")


def config(decoder="ddconfig", vit=VIT, **params) -> dict:
    """`model.params` of a toy autoencoder, residual unless `vit` is None."""
    settings = {"z_channels": D + R if vit else D, **(DD if decoder == "ddconfig" else HY)}
    return {"model": {"params": {"dinoconfig": DINO, decoder: settings, "extra_vit_config": vit, **params}}}


def make(*arguments, **keywords) -> SVGAutoencoder:
    """With random weights in every part, the residual branch's layer scales included."""
    model = SVGAutoencoder.from_config(config(*arguments, **keywords))
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 48) * 2 - 1


# -- latents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["ddconfig", "hyconfig"])
def test_latents_are_features_then_matched_residual_channels(decoder, images):
    model = make(decoder)
    latents = model.encode(images)
    assert latents.shape == (2, D + R, 2, 3)
    assert model.channels == D + R
    assert model.decode(latents).shape == images.shape
    features = model.encoder(images)
    assert torch.equal(latents[:, :D], features)
    expected = model.extra_vit(model.encoder.normalize_images(images), features)
    assert torch.equal(latents[:, D:], expected)
    spread = [x.transpose(0, 1).flatten(1).std(1).mean() for x in (latents[:, :D], latents[:, D:])]
    torch.testing.assert_close(*spread, atol=1e-3, rtol=1e-3)


def test_gradients_reach_the_residual_branch_in_training_only(images):
    model = make()
    assert not model.encode(images).requires_grad
    model.train()
    model.decode(model.encode(images)).square().mean().backward()
    parts = {name: [p.grad is not None for p in getattr(model, name).parameters()] for name in ("extra_vit", "decoder")}
    assert all(parts["extra_vit"])
    assert all(parts["decoder"])
    assert not any(p.grad is not None or p.requires_grad for p in model.encoder.parameters())
    with torch.no_grad():
        assert not model.encode(images).requires_grad


def test_trainable_parameters():
    def ids(parameters):
        return {id(parameter) for parameter in parameters}

    both, frozen, pure = make(), make(vit=VIT | {"frozen": True}), make(vit=None)
    trained = [*both.decoder.parameters(), *both.extra_vit.parameters()]
    assert ids(both.trainable_parameters()) == ids(trained)
    assert ids(frozen.trainable_parameters()) == ids(frozen.decoder.parameters())
    assert ids(pure.trainable_parameters()) == ids(pure.decoder.parameters())
    assert not frozen.train().encode(torch.zeros(1, 3, 32, 32)).requires_grad
    assert [make(vit=VIT | {"mask_ratio": x}).draws_in_training() for x in (0.0, 0.1)] == [False, True]


def test_bf16(images):
    model = make().train()
    exact = model.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        latents = model.encode(images)
        loss = model.decode(latents).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.trainable_parameters())
    assert (latents - exact).abs().mean() < 0.02 * exact.abs().mean()
    latents = model.bfloat16().encode(images)
    assert latents.dtype == torch.bfloat16
    assert model.decode(latents).dtype == torch.bfloat16


# -- statistics -------------------------------------------------------------------------------------------------------


def measured(model: SVGAutoencoder, images: torch.Tensor) -> LatentStats:
    moments = StatsAccumulator()
    with torch.no_grad():
        moments.update(model.encode(images))
    return moments.result(model.latent_fingerprint())


def test_statistics_cover_all_channels_or_are_made_up_on_request(tmp_path, images):
    model = make()
    stats = measured(model, images)
    assert stats.channels == D + R
    stats.save(tmp_path / "own.safetensors")
    model.set_stats(LatentStats.load(tmp_path / "own.safetensors", D + R))
    published = {"mean": torch.randn(3, D), "std": torch.rand(3, D) + 0.1}
    torch.save(published, tmp_path / "published.pt")
    with pytest.raises(UserError, match="48 channels, the autoencoder has 56.*measure_latents.*published_stats: true"):
        SVGAutoencoder.from_config(config(), stats=tmp_path / "published.pt")
    filled = SVGAutoencoder.from_config(config(vit=VIT | {"published_stats": True}), stats=tmp_path / "published.pt")
    assert torch.equal(filled.stats.mean[:D], published["mean"][-1])
    torch.testing.assert_close(filled.stats.std[D:], published["std"][-1].mean().expand(R))


def test_statistics_belong_to_the_residual_weights_and_matching(images):
    model = make()
    stats = measured(model, images)
    fingerprint = model.latent_fingerprint()
    assert model.bfloat16().latent_fingerprint() == fingerprint
    with torch.no_grad():
        model.extra_vit.heads[2].bias += 1
    with pytest.raises(UserError, match="measured on another encoder"):
        model.set_stats(stats)
    seeded = []
    for outnorm in ("batch", "per_image", "batch"):
        torch.manual_seed(5)
        seeded.append(make(vit=VIT | {"outnorm": outnorm}).latent_fingerprint())
    assert seeded[0] != seeded[1]
    assert seeded[0] == seeded[2]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def published_checkpoint(model, path):
    """A Lightning file with all that the release's training leaves in it."""
    state = dict(model.state_dict())
    state |= {"loss.logvar": torch.zeros(()), "norm_vit.weight": torch.ones(40), "norm_vit.bias": torch.ones(40)}
    state |= {"extra_vit.head.weight": torch.ones(1000, 48), "extra_vit.head.bias": torch.ones(1000)}
    state |= {"extra_vit.freqs_t_x": torch.ones(4096), "extra_vit.freqs_t_y": torch.ones(4096)}
    torch.save({"state_dict": state}, path)


@pytest.mark.parametrize("decoder", ["ddconfig", "hyconfig"])
def test_checkpoints_and_saved_folders_come_back(decoder, tmp_path, images):
    model = make(decoder)
    model.set_stats(LatentStats(torch.randn(D + R), torch.rand(D + R) + 0.5, encoder=model.latent_fingerprint()))
    published_checkpoint(model, tmp_path / "last.ckpt")
    model.save_pretrained(tmp_path / "folder")
    expected = model.decode(model.encode(images))
    for loaded in (
        SVGAutoencoder.from_config(config(decoder), checkpoint=tmp_path / "last.ckpt"),
        SVGAutoencoder.from_pretrained(tmp_path / "folder"),
    ):
        torch.testing.assert_close(loaded.decode(loaded.encode(images)), expected)
        assert loaded.latent_fingerprint() == model.latent_fingerprint()
    assert loaded.fingerprint() == model.fingerprint()


def test_checkpoints_of_another_variant_are_refused_in_one_sentence(tmp_path):
    files = {"pure": make(vit=None), "residual": make(), "hy": make("hyconfig")}
    for name, model in files.items():
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
    for settings, name, message in [
        (config(), "pure", "pure.pth has no residual branch.*configuration has one.*null.*svg_autoencoder_P_"),
        (config(vit=None), "residual", "residual.pth has a residual branch.*has none.*describe it.*svg_autoencoder_R_"),
        (config(), "hy", "hy.pth has the decoder of a hyconfig, but model.params describes one in ddconfig"),
        (config("hyconfig"), "residual", "residual.pth has the decoder of a ddconfig, but.* in hyconfig"),
    ]:
        with pytest.raises(UserError, match=message):
            SVGAutoencoder.from_config(settings, checkpoint=tmp_path / f"{name}.pth")


def test_only_named_keys_are_dropped(tmp_path):
    model = make()
    published_checkpoint(model, tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    dropped = [name for name in content["state_dict"] if name.startswith(DROPPED)]
    assert len(dropped) == len(content["state_dict"]) - len(model.state_dict()) == 7
    content["state_dict"]["extra_vit.pos_embed"] = torch.zeros(1)
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match="1 unexpected: extra_vit.pos_embed"):
        model.load_checkpoint(tmp_path / "odd.ckpt")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"hyconfig": HY}, "one decoder, given are ddconfig and hyconfig"),
        ({"ddconfig": None}, "one decoder, given are none"),
        ({"ddconfig": DD | {"z_channels": D}}, "48 channels and the residual branch 8.*z_channels is 48; set it to 56"),
        ({"extra_vit_config": {"mask_ratoi": 0.1}}, "did you mean 'mask_ratio'"),
        (
            {"extra_vit_config": {"overrides": {**VIT["overrides"], "patch_size": 8}}},
            "its patches have 8 px, the encoder's 16",
        ),
    ],
)
def test_bad_configs(params, message):
    with pytest.raises(UserError, match=message):
        SVGAutoencoder.from_config(config(**params))


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["ddconfig", "hyconfig"])
def test_training_moves_the_residual_branch_and_resumes(decoder, tmp_path):
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    (tmp_path / "manifest.jsonl").write_text("\n".join(json.dumps({"path": f"{i}.png"}) for i in range(3)))
    base = read_config(f"{PURE}stage1_bs64_256_gpu1_forTest")
    params = config(decoder, vit=VIT | {"mask_ratio": 0.5, "outnorm": "per_image"})["model"]["params"]
    loss = {"disc_start": 2, "disc_ndf": 4, "disc_num_layers": 1, "perceptual_weight": 0.0}
    target = base["model"]["params"]["lossconfig"]["target"]
    base["model"]["params"] = params | {"lossconfig": {"target": target, "params": loss}}
    base["data"]["params"] |= {"json_path": str(tmp_path / "manifest.jsonl"), "train_resol": 64, "num_workers": 0}
    base["data"]["params"] |= {"batch_size": 2}
    base["training"] |= {"save_every_n_train_steps": 1, "log_images_every_n_steps": 1}
    base["training"]["trainer"] |= {"accelerator": "cpu", "devices": 1, "max_steps": 2}

    def run(name, steps):
        base["training"]["trainer"]["max_steps"] = steps
        entry.train(build(AutoencoderTrainConfig, base), tmp_path / name)
        files = sorted((tmp_path / name / "checkpoints").glob("step_*.ckpt"))
        return [torch.load(file, weights_only=True)["state_dict"] for file in files]

    first, second = run("whole", 2)
    moved = {name.split(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert moved == {"extra_vit", "decoder", "loss"}
    still = [name for name in first if name.startswith("extra_vit.") and torch.equal(first[name], second[name])]
    assert not still
    run("resumed", 1)
    resumed = run("resumed", 2)[-1]
    assert all(torch.equal(resumed[name], second[name]) for name in second)


# -- configuration files ----------------------------------------------------------------------------------------------


def test_pretrained_files_find_the_released_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="svg_autoencoder-R-stage2.ckpt"):
        SVGAutoencoder.from_config(f"{PRETRAINED}R_stage2_512")
    released = tmp_path / "pre-trained" / "autoencoder"
    released.mkdir(parents=True)
    content = config(ckpt_path="pre-trained/autoencoder/svg_autoencoder-R-stage2.ckpt")
    published_checkpoint(make(), released / "svg_autoencoder-R-stage2.ckpt")
    assert SVGAutoencoder.from_config(content).channels == D + R


def test_own_residual_configuration_keeps_images_apart():
    config = build(AutoencoderTrainConfig, read_config("configs/autoencoder/demo/residual"))
    model = SVGAutoencoder(config.model.params)
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(model.encode(images)[:1], model.encode(images[:1]), atol=1e-4, rtol=1e-4)
    assert model.decode(model.encode(images)).shape == images.shape
