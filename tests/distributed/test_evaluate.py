"""Two gloo processes against one: evaluation and statistics, to the last bit."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
from torchvision.models import VGG16_Weights, vgg16

from autoencoder.evaluation.metrics import INCEPTION_FILE
from autoencoder.images.files import crop_square, to_float, to_pil, to_uint8_tensor
from autoencoder.model import SVGAutoencoder

# A process that forks, as imports take longest; torchrun would set the same variables.
SCRIPT = """
import os, socket, sys, warnings
import torch
from torch import nn
from autoencoder import evaluate_reconstruction, measure_latents
from autoencoder.evaluation import latent_statistics

warnings.simplefilter("ignore")


class TinyFeatures(nn.Module):
    num_features = 12

    def forward(self, images):
        return images[:, :, 3, 2:6].float().flatten(1) / 255


class Distance(nn.Module):
    def forward(self, x, y):
        return (x - y).square().mean(dim=(1, 2, 3), keepdim=True)


if sys.argv[2] == "small":
    networks = evaluate_reconstruction.Networks(lpips=Distance(), inception=TinyFeatures())
    evaluate_reconstruction.Networks.build = lambda device: networks
latent_statistics.CHUNKS_PER_ROUND = 2
folder = sys.argv[1]
shared = [f"{folder}/ae", "--data", f"{folder}/photos", "--device", "cpu", "--batch_size", "2", "--resolution", "64"]
shared += ["32"] if sys.argv[2] == "small" else ["--max_images", "6"]


def evaluate(name):
    evaluate_reconstruction.main([*shared, "--midpoints", "--output", f"{folder}/{name}"])


def evaluate_one_chunk(name):
    evaluate_reconstruction.main([*shared, "--batch_size", "16", "--output", f"{folder}/one_chunk_{name}"])


def measure(name):
    measure_latents.main([*shared, "--output", f"{folder}/{name}.safetensors", "--max_aspect", "4"])


def in_two_processes(entry):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            try:
                entry("of2")
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert statuses == [0, 0], statuses
    del os.environ["WORLD_SIZE"]


entries = (evaluate, evaluate_one_chunk, measure) if sys.argv[2] == "small" else (evaluate,)
for entry in entries:
    in_two_processes(entry)
for entry in entries:
    entry("of1")
"""


@pytest.fixture
def folder(tmp_path):
    """A saved autoencoder and 11 images, one of them broken: the last chunk is partial, and one process has fewer."""
    dino = {"weights": "random", "overrides": {"embed_dim": 48, "depth": 1, "num_heads": 3}}
    dd = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 0, "z_channels": 48}
    config = {"model": {"params": {"dinoconfig": dino, "ddconfig": dd}}}
    (tmp_path / "ae.yaml").write_text(yaml.safe_dump(config))
    SVGAutoencoder.from_config(tmp_path / "ae.yaml").save_pretrained(tmp_path / "ae")
    rng = np.random.default_rng(3)
    (tmp_path / "photos").mkdir()
    for index in range(11):
        shape = (60 + 9 * index, 130 - 8 * index, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / "photos" / f"{index:02}.png")
    (tmp_path / "photos" / "04.png").write_text("broken")
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def run_script(folder, repo_root, networks):
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "script.py"), str(folder), networks]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.filterwarnings("ignore:RANDOM ENCODER")
def test_two_processes_find_what_one_does(folder, repo_root):
    run_script(folder, repo_root, "small")
    for folders in (("of1", "of2"), ("one_chunk_of1", "one_chunk_of2")):  # one chunk: the other process has nothing
        reports = [json.loads((folder / name / "metrics.json").read_text()) for name in folders]
        for report in reports:
            del report["seconds"]
        assert reports[0] == reports[1]  # fp64 numbers, rFID among them: equal to the last bit
        assert [result["images"] for result in reports[0]["results"]] == [10, 10]
        assert reports[0]["results"][0]["rfid"] > 0
        assert reports[0]["results"][0]["artefacts"]["shift_error"] > 0
        assert (reports[0]["results"][0]["ifid"] is None) == folders[0].startswith("one_chunk")
        assert reports[0]["unreadable"] == 1
        for name in ("images.csv", "metrics.csv"):
            assert len({(folder / one / name).read_bytes() for one in folders}) == 1
    for suffix in ("", "-32", "-64"):
        one, two = (load_file(folder / f"of{count}{suffix}.safetensors") for count in (1, 2))
        assert torch.equal(one["mean"], two["mean"])
        assert torch.equal(one["std"], two["std"])


@pytest.fixture
def networks(tmp_path, monkeypatch):
    """Files of random weights where torch.hub has the real ones, under their names; returns the Inception file."""
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with torch.device("meta"):
        vgg = vgg16(weights=None)
    state = {
        name: torch.zeros(()).expand(x.shape) for name, x in vgg.state_dict().items()
    }  # takes no space in the file
    for name, x in state.items():
        if name.startswith("features.") and x.ndim == 4:
            state[name] = torch.randn(x.shape) * (2 / x[0].numel()) ** 0.5
    torch.save(state, checkpoints / VGG16_Weights.IMAGENET1K_V1.url.rsplit("/")[-1])
    path = checkpoints / INCEPTION_FILE
    with monkeypatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
        inception = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for norm in (module for module in inception.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 1.0, 3.0)
    torch.save(inception.state_dict(), path)
    return path


def frechet_distance(x, y):
    """Of features (n, D) with n < D: Tr √(AB) of covariances A = XᵀX, B = YᵀY is the sum of singular values of XYᵀ."""
    mean = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
    x, y = ((features - features.mean(axis=0)) / np.sqrt(len(features) - 1) for features in (x, y))
    return mean + np.square(x).sum() + np.square(y).sum() - 2 * np.linalg.svd(x @ y.T, compute_uv=False).sum()


@pytest.mark.filterwarnings("ignore")
def test_networks_in_their_files_give_the_values_of_torch_fidelity_and_torchmetrics(folder, networks, repo_root):
    """The command from end to end but for trained weights, which cannot be had here; LPIPS has its real calibration."""
    run_script(folder, repo_root, "real")
    (one,), (two,) = (json.loads((folder / name / "metrics.json").read_text())["results"] for name in ("of1", "of2"))
    assert one == two
    assert one["unavailable"] == {}
    assert one["images"] == 5
    model = SVGAutoencoder.from_pretrained(folder / "ae")
    inception = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=networks)
    features, distances = [], []
    for index in (0, 2, 6, 8, 10):  # six of eleven, of which 4 is broken
        image = to_uint8_tensor(crop_square(Image.open(folder / "photos" / f"{index:02}.png"), 64))[None]
        with torch.no_grad():
            recon = to_uint8_tensor(to_pil(model.decode(model.encode(to_float(image)))[0]))[None]
            features.append(inception(torch.cat([image, recon]))[0].double().numpy())
            pair = to_float(image), to_float(recon)
            distances.append(learned_perceptual_image_patch_similarity(*pair, net_type="vgg").item())
    features = np.stack(features)  # (n, 2, 2048)
    assert one["rfid"] == pytest.approx(frechet_distance(features[:, 0], features[:, 1]), rel=1e-3)
    assert one["lpips"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert min(one["rfid"], one["lpips"]) > 1e-3
