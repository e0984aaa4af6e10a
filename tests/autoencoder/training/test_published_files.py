"""Every published configuration file at full size, and checkpoints as the release's training leaves them."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from torchvision.models import VGG16_Weights, vgg16

from autoencoder.common.config import UserError, build, read_config
from autoencoder.model import DROPPED, ModelConfig, SVGAutoencoder
from autoencoder.training.losses import build_loss
from autoencoder.training.settings import AutoencoderTrainConfig

PURE = "configs/autoencoder/pure/svg_autoencoder_P_dd_M_IN_"
RESIDUAL = "configs/autoencoder/residual/svg_autoencoder_R_"
PRETRAINED = "configs/autoencoder/pre-trained/svg_autoencoder_"
FILES = {
    **{f"{PURE}{name}": 384 for name in ("stage1_bs64_256_gpu1_forTest", "stage1_bs64_256_woattn")},
    **{f"{PURE}{name}": 384 for name in ("stage2_bs16_512_woattn", "stage3_bs3_1024_woattn")},
    **{f"{RESIDUAL}dd_M_IN_stage1_{name}_vit-rope-s_woattn": 392 for name in ("bs64_256", "bs16_512", "bs3_1024")},
    f"{RESIDUAL}hy3_M_IN_stage1_bs64_256": 392,
    **{f"{PRETRAINED}P_stage{name}": 384 for name in ("1_256", "2_512", "3_1024")},
    **{f"{PRETRAINED}R_stage{name}": 392 for name in ("1_256", "2_512", "3_1024")},
}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def built():
    """One full-size autoencoder of each kind of `model.params`, on the meta device."""
    made: dict[ModelConfig, SVGAutoencoder] = {}

    def build_once(params: ModelConfig) -> SVGAutoencoder:
        key = repr((params.ddconfig, params.hyconfig, params.extra_vit_config))
        if key not in made:
            made[key] = SVGAutoencoder(params).to("meta")
        return made[key]

    return build_once


@pytest.mark.parametrize(("path", "channels"), FILES.items(), ids=lambda value: str(value).rsplit("/", 1)[-1])
def test_published_files_build_at_full_size(path, channels, built):
    content = read_config(path)
    if "training" in content:
        build(AutoencoderTrainConfig, content)
    params = content["model"]["params"]
    name = path.rsplit("_autoencoder_", 1)[1]
    if "pre-trained" in path:
        stage = f"{name[0]}-stage{name[len('P_stage')]}"
        assert params["ckpt_path"] == f"pre-trained/autoencoder/svg_autoencoder-{stage}.ckpt"
    params["dinoconfig"]["weights"] = None
    model = built(build(ModelConfig, params, path))
    state = model.state_dict()
    assert model.channels == channels
    assert state["decoder.conv_in.weight"].shape[1] == channels
    assert state["decoder.conv_in.weight"].ndim == (5 if "hy3" in path else 4)
    assert ("extra_vit.freqs" in state) == name.startswith("R")


@pytest.fixture(scope="module")
def published(request):
    """Names and shapes in the release's checkpoints: of P, R and R_hy3."""
    path = Path(request.config.getoption("--parity-dir")) / "shapes_autoencoder_checkpoint.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return {kind: model["keys"] for kind, model in json.loads(path.read_text())["models"].items()}


def kind_of(path):
    return "R_hy3" if "hy3" in path else path.rsplit("_autoencoder_", 1)[1][0]


def shapes(module, prefix=""):
    return {prefix + name: list(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.rsplit("/", 1)[-1])
def test_published_files_have_exactly_the_published_weights(path, built, published, monkeypatch):
    content, keys = read_config(path), published[kind_of(path)]
    content["model"]["params"]["dinoconfig"]["weights"] = None
    params = build(ModelConfig, content["model"]["params"], path)
    assert shapes(built(params)) == {name: shape for name, shape in keys.items() if not name.startswith(DROPPED)}
    if params.lossconfig is not None:
        with torch.device("meta"):  # LPIPS gets no weights: there are none to be had in a test
            monkeypatch.setattr(VGG16_Weights, "get_state_dict", lambda *_, **__: vgg16().state_dict())
            lpips = {"perceptual_weight": 1.0}  # forTest goes without, to need no download
            loss = build_loss(params.lossconfig | {"params": params.lossconfig["params"] | lpips})
        assert shapes(loss, "loss.") == {name: shape for name, shape in keys.items() if name.startswith("loss.")}


def released_file(keys, path):
    """All that training with Lightning 1.9 leaves in a file, with these weights: each of another value, and small."""
    state = {}
    for number, (name, shape) in enumerate(keys.items()):
        value = torch.tensor(1e-4 * (1 + number))
        if name.endswith("qkv.bias_mask"):
            state[name] = torch.tensor([1.0, 0.0, 1.0])[:, None].expand(3, shape[0] // 3).flatten()
        else:
            state[name] = (torch.tensor(7) if name.endswith("num_batches_tracked") else value).expand(shape)
    progress = {"total": {"ready": 9, "completed": 9}, "current": {"ready": 9, "completed": 9}}
    checkpoint = ModelCheckpoint(dirpath=path.parent, every_n_train_steps=5000, save_top_k=-1)
    moments = {"step": torch.tensor(9.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    content = {
        "epoch": 3, "global_step": 10000, "pytorch-lightning_version": "1.9.0", "state_dict": state,
        "loops": {"fit_loop": {"epoch_loop.batch_progress": progress, "state_dict": {}}},
        "callbacks": {
            checkpoint.state_key: checkpoint.state_dict() | {"best_model_score": torch.tensor(0.5), "dirpath": path},
            ModelCheckpoint: {"best_model_score": np.float32(0.5)},
        },
        "optimizer_states": [{"state": {0: moments}, "param_groups": [{"lr": 1e-4, "betas": (0.5, 0.9)}]}] * 2,
        "lr_schedulers": [], "hparams_name": "kwargs",
        "hyper_parameters": {"ddconfig": OmegaConf.create({"ch_mult": [1, 1, 2, 2, 4], "ch": 128})},
        "datamodule_hyper_parameters": argparse.Namespace(batch_size=64, root=path.parent),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return state


@pytest.mark.parametrize("kind", ["P", "R"])
def test_a_released_file_loads_as_it_is(kind, published, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pre-trained" / "autoencoder" / f"svg_autoencoder-{kind}-stage3.ckpt"
    state = released_file(published[kind], path)
    model = SVGAutoencoder.from_config(f"{PRETRAINED}{kind}_stage3_1024")
    loaded = model.state_dict()
    for name in state.keys() - {name for name in state if name.startswith(DROPPED)}:
        if not name.endswith("qkv.bias"):  # its keys' part is masked
            torch.testing.assert_close(loaded[name], state[name], msg=name)
    assert model.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 384 if kind == "P" else 392, 2, 2)
    assert "settings left out" in caplog.text
    assert model.encoder.fingerprint()  # it has come with the file


def test_a_released_file_with_three_dimensional_weights_loads_as_it_is(published, tmp_path):
    """On the meta device, as it is large: names and shapes are checked, values are not kept."""
    released_file(published["R_hy3"], tmp_path / "last.ckpt")
    with torch.device("meta"):
        model = SVGAutoencoder.from_config(f"{RESIDUAL}hy3_M_IN_stage1_bs64_256", tmp_path / "last.ckpt")
    assert model.channels == 392
    with pytest.raises(UserError, match="has the decoder of a hyconfig"):
        SVGAutoencoder.from_config(f"{RESIDUAL}dd_M_IN_stage1_bs64_256_vit-rope-s_woattn", tmp_path / "last.ckpt")
