"""The autoencoder as one object: the latent contract, checkpoints, saved folders, and what it refuses."""

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from autoencoder.common.config import ConfigError, UserError
from autoencoder.latents.statistics import LatentStats
from autoencoder.model import SVGAutoencoder

D = 48


def published_config(**params) -> dict:
    """The published YAML layout at toy size."""
    dd = {"double_z": True, "z_channels": D, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32}
    dd |= {"ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 0, "attn_resolutions": [], "dropout": 0.0}
    dino = {"dinov3_location": "/somewhere/dinov3", "model_name": "dinov3_vits16plus", "weights": "random"}
    dino["overrides"] = {"embed_dim": D, "depth": 2, "num_heads": 3}
    defaults = {"embed_dim": D, "ddconfig": dd, "dinoconfig": dino, "lossconfig": None, "extra_vit_config": None}
    defaults |= {"ckpt_path": None, "is_train": True, "num_layer": -1}
    return {"training": {"logdir": "x"}, "model": {"target": "…DinoDecoder", "params": defaults | params}, "data": {}}


pytestmark = pytest.mark.filterwarnings("ignore:RANDOM ENCODER")


@pytest.fixture
def model():
    model = SVGAutoencoder.from_config(published_config())
    model.set_stats(LatentStats(torch.randn(D), torch.rand(D) + 0.5, model.encoder.fingerprint(), (256, 512)))
    return model.eval()


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 48) * 2 - 1


def same(first: SVGAutoencoder, second: SVGAutoencoder, images: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(first.decode(first.encode(images)), second.decode(second.encode(images)))


def lightning_checkpoint(model: SVGAutoencoder, path) -> dict:
    """A file in the published layout, with everything that training leaves in it."""
    state = dict(model.state_dict())
    state |= {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(2)}
    state |= {"norm_vit.weight": torch.ones(D + 8)}
    content = {"state_dict": state, "epoch": 3, "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}]}
    torch.save(content, path)
    return content


def test_contract(model, images):
    latents = model.encode(images)
    assert latents.shape == (2, D, 2, 3)
    assert not latents.requires_grad
    normalized = model.normalize(latents)
    mean, std = model.stats.mean[:, None, None], model.stats.std[:, None, None]
    torch.testing.assert_close(normalized, (latents - mean) / std)
    torch.testing.assert_close(model.denormalize(normalized), latents, atol=1e-5, rtol=1e-5)
    decoded = model.decode(latents)
    assert decoded.shape == images.shape
    assert decoded.requires_grad  # the decoder trains, the encoder never
    assert model.channels == D
    assert model.encoder.patch_size == 16
    assert torch.equal(latents, model.train().encode(images))


def test_half_precision_keeps_statistics_and_decodes(model, images):
    fingerprint = model.fingerprint()
    model.bfloat16()
    assert model.fingerprint() == fingerprint
    latents = model.encode(images)
    assert latents.dtype == torch.bfloat16
    assert model.normalize(latents).dtype == torch.float32
    assert model.decode(model.denormalize(model.normalize(latents))).dtype == torch.bfloat16


def test_without_statistics_says_how_to_get_them(images):
    model = SVGAutoencoder.from_config(published_config())
    for method in (model.normalize, model.denormalize):
        with pytest.raises(UserError, match="measure_latents"):
            method(model.encode(images))
    assert model.fingerprint()["stats"] is None


def test_statistics_of_another_encoder_are_refused(model):
    with pytest.raises(UserError, match="measured on another encoder"):
        model.set_stats(LatentStats(torch.zeros(D), torch.ones(D), encoder="0123"))
    with pytest.raises(UserError, match="9 channels, the autoencoder has 48"):
        model.set_stats(LatentStats(torch.zeros(9), torch.ones(9)))
    model.require_fingerprint(model.fingerprint(), "itself")
    with pytest.raises(UserError, match="checkpoint X was made with another autoencoder.*stats 77"):
        model.require_fingerprint(model.fingerprint() | {"stats": "77"}, "checkpoint X")


def test_saved_folder_comes_back_identical(model, images, tmp_path):
    for parameter in model.decoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "ae")
    files = {"config.json", "model.safetensors", "latent_stats.safetensors"}
    assert {path.name for path in (tmp_path / "ae").iterdir()} == files
    loaded = SVGAutoencoder.from_pretrained(tmp_path / "ae").eval()
    assert same(loaded, model, images)
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.stats.resolutions == (256, 512)
    assert torch.equal(loaded.normalize(loaded.encode(images)), model.normalize(model.encode(images)))
    other = LatentStats(torch.zeros(D), torch.ones(D))
    assert torch.equal(SVGAutoencoder.from_pretrained(tmp_path / "ae", stats=other).stats.mean, other.mean)
    with pytest.raises(UserError, match="leave out checkpoint"):
        SVGAutoencoder.from_pretrained(tmp_path / "ae", checkpoint=tmp_path / "x.ckpt")


@pytest.mark.parametrize("residual", [False, True])
def test_summed_layers_belong_to_what_is_saved_and_measured(model, images, tmp_path, residual):
    config = published_config(**({"embed_dim": D + 8} if residual else {}))
    params = config["model"]["params"]
    params["dinoconfig"]["layers"] = [0, 1]
    if residual:
        params["extra_vit_config"] = {"output_dim": 8, "overrides": {"embed_dim": 32, "depth": 1, "num_heads": 1}}
        params["ddconfig"]["z_channels"] = D + 8
    summed = SVGAutoencoder.from_config(config).eval()
    both = summed.encode(images)[:, :D]
    last = model.encode(images)
    params["dinoconfig"]["layers"] = [0]
    first = SVGAutoencoder.from_config(config).eval().encode(images)[:, :D]
    torch.testing.assert_close(both, first + last, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="measured on another encoder"):
        summed.set_stats(model.stats if not residual else LatentStats(torch.zeros(D + 8), torch.ones(D + 8), "0123"))
    summed.save_pretrained(tmp_path / "ae")
    loaded = SVGAutoencoder.from_pretrained(tmp_path / "ae").eval()
    assert loaded.encoder.blocks == (0, 1)
    assert same(loaded, summed, images)
    assert loaded.fingerprint() == summed.fingerprint() != model.fingerprint()


def test_mixed_up_or_broken_folder_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["fingerprint"]["encoder"] = "feed"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="another autoencoder.*encoder feed"):
        SVGAutoencoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is broken"):
        SVGAutoencoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="no saved autoencoder"):
        SVGAutoencoder.from_pretrained(tmp_path)


def test_published_checkpoint_brings_its_encoder(model, images, tmp_path):
    with torch.no_grad():
        model.encoder.backbone.reg_token += 1  # unlike any fresh encoder
    lightning_checkpoint(model, tmp_path / "last.ckpt")
    config = published_config()
    config["model"]["params"]["dinoconfig"]["weights"] = "/absent/dinov3.pth"
    loaded = SVGAutoencoder.from_config(config, checkpoint=tmp_path / "last.ckpt").eval()
    assert same(loaded, model, images)
    fresh = SVGAutoencoder.from_config(published_config()).eval()
    assert not same(fresh, model, images)
    fresh.load_checkpoint(tmp_path / "last.ckpt")
    assert same(fresh, model, images)


def test_yaml_finds_its_checkpoint_beside_it_and_takes_overrides(model, images, tmp_path):
    lightning_checkpoint(model, tmp_path / "ae.ckpt")
    (tmp_path / "ae.yaml").write_text(yaml.safe_dump(published_config(ckpt_path="ae.ckpt")))
    model.stats.save(tmp_path / "stats.safetensors")
    loaded = SVGAutoencoder.from_pretrained(tmp_path / "ae", stats=tmp_path / "stats.safetensors").eval()
    assert same(loaded, model, images)
    assert loaded.fingerprint() == model.fingerprint()
    with pytest.raises(UserError, match=r"of another shape: decoder.conv_in.weight is \(32, 48, 3, 3\).*\(64, "):
        SVGAutoencoder.from_config(tmp_path / "ae.yaml", overrides=["model.params.ddconfig.ch=64"])


@pytest.mark.parametrize("place", ["pre-trained/autoencoder", "autoencoder", "."], ids=["release", "renamed", "alone"])
def test_the_release_s_yaml_finds_its_checkpoint_wherever_the_folder_lies(model, images, tmp_path, place):
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    lightning_checkpoint(model, folder / "ae-P.ckpt")
    config = published_config(ckpt_path="pre-trained/autoencoder/ae-P.ckpt")
    (folder / "ae.yaml").write_text(yaml.safe_dump(config))
    assert same(SVGAutoencoder.from_config(folder / "ae.yaml").eval(), model, images)


def test_misfitting_checkpoints_name_keys_and_leave_the_model_alone(model, images, tmp_path):
    content = lightning_checkpoint(model, tmp_path / "good.ckpt")
    state = content["state_dict"]
    state["decoder.surprise"] = state.pop("decoder.conv_out.bias")
    torch.save(content, tmp_path / "bad.ckpt")
    before = model.decode(model.encode(images))
    with pytest.raises(UserError, match="1 missing: decoder.conv_out.bias; 1 unexpected: decoder.surprise"):
        model.load_checkpoint(tmp_path / "bad.ckpt")
    assert torch.equal(model.decode(model.encode(images)), before)
    torch.save({"state_dict": state | {"extra_vit.freqs": torch.ones(1)}}, tmp_path / "residual.ckpt")
    with pytest.raises(UserError, match="residual branch"):
        model.load_checkpoint(tmp_path / "residual.ckpt")


def test_files_that_are_no_checkpoints(model, tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        model.load_checkpoint(tmp_path / "absent.ckpt")
    torch.save({"state_dict": {}, "code": nn.Linear}, tmp_path / "code.ckpt")  # a class: must not be unpickled
    with pytest.raises(UserError, match="unpickling them can run code"):
        model.load_checkpoint(tmp_path / "code.ckpt")
    torch.save({"epoch": 3}, tmp_path / "empty.ckpt")
    with pytest.raises(UserError, match="neither a state dict nor.*holds: epoch"):
        model.load_checkpoint(tmp_path / "empty.ckpt")
    lightning_checkpoint(model, tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    for name, data in (("cut.ckpt", whole[: len(whole) // 2]), ("text.ckpt", b"hello"), ("cut.safetensors", b"\1\2")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            model.load_checkpoint(tmp_path / name)


class Runs:
    """Calls function(*arguments) when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_settings_of_any_class_are_left_out_and_attacks_refused(model, tmp_path, caplog):
    path, victim = tmp_path / "last.ckpt", tmp_path / "victim"
    victim.touch()
    content = lightning_checkpoint(model, path)
    loader = OmegaConf.create({"data": {"sizes": [256, 512], "root": "${oc.env:HOME}"}})
    for settings in (
        {"config": loader, "list": loader.data.sizes, "path": tmp_path, "score": np.float64(0.5)},
        argparse.Namespace(lr=1e-4),
        {ModelCheckpoint: {"best": np.ones(2), "kinds": {1, 2}}},  # as Lightning named callbacks before 1.5
    ):
        caplog.clear()
        torch.save(content | {"hyper_parameters": settings}, path)
        model.load_checkpoint(path)
        assert "last.ckpt: settings left out, which are objects of" in caplog.text
    for attack in (
        Runs(os.remove, str(victim)),
        Runs(shutil.rmtree, str(victim)),
        Runs(eval, f"open({str(victim)!r}, 'w').write('gone')"),
        Runs(getattr, nn.Module, "load_state_dict"),
        Runs(subprocess.Popen, ["rm", str(victim)]),
    ):
        torch.save(content | {"hyper_parameters": {"path": tmp_path, "lr": attack}}, path)
        with pytest.raises(UserError, match="unpickling them can run code"):
            model.load_checkpoint(path)
        assert victim.read_text() == ""
    torch.save(
        content | {"hyper_parameters": Runs(foreign, str(victim))}, path
    )  # passes as settings, and is not called
    model.load_checkpoint(path)
    assert victim.read_text() == ""
    assert f"{foreign.__module__}.foreign" in caplog.text


def foreign(path):
    Path(path).write_text("called")


def test_bad_configs():
    with pytest.raises(ConfigError, match="'model.*z_channel'|'z_channel'|ddconfig.z_channel.*z_channels"):
        SVGAutoencoder.from_config({"model": {"params": {"ddconfig": {"z_channel": 3}}}})
    config = published_config(embed_dim=32)  # of no consequence, as in the release
    config["model"]["params"]["ddconfig"]["z_channels"] = 384
    with pytest.raises(UserError, match="gives 48 channels, but ddconfig.z_channels is 384; set it to 48"):
        SVGAutoencoder.from_config(config)
    config = published_config()
    config["model"]["params"]["ddconfig"]["ch_mult"] = [1, 1, 1]
    with pytest.raises(UserError, match="ch_mult.*scales by 4"):
        SVGAutoencoder.from_config(config)
    with pytest.raises(ConfigError, match="no section model.params"):
        SVGAutoencoder.from_config({"data": {}})
    with pytest.raises(UserError, match="float images"):
        SVGAutoencoder.from_config(published_config()).encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
