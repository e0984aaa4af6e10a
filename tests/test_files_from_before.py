"""Files that an earlier version wrote still load, go on and give the same numbers.

`data/before_rooms/README.md` says what they are and how they were made. The tests go through the commands: they are
about files, and hold wherever the code behind the commands lives.
"""

import importlib
import json
import logging
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from autoencoder.model import SVGAutoencoder
from svg_t2i.pipeline import SVGT2IPipeline

FILES = Path(__file__).parent / "data" / "before_rooms"
EXPECTED = json.loads((FILES / "expected.json").read_text())
ROUNDING = 1e-5 if torch.__version__ >= "2.14" else 2e-3  # of the version that made them; others add up otherwise
LAST = "logs/stage1/checkpoints/last.ckpt"

pytestmark = pytest.mark.filterwarnings("ignore:RANDOM ENCODER")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """A copy of the files, to stand in: all paths in them are relative."""
    with tarfile.open(FILES / "files.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    if transformers.__version__.startswith("4."):  # the files are of transformers 5, whose class has another name here
        for path in tmp_path.rglob("tokenizer_config.json"):
            path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the numbers are a CPU's
    return tmp_path


def run(module: str, *arguments: str) -> None:
    """`python -m MODULE ARGUMENTS` in this process."""
    logging.getLogger().handlers.clear()  # those of the last command write where nobody reads any more
    importlib.import_module(module).main(list(arguments))


def checksum(tensors) -> list[float]:
    """Norm of all values together, and where they point to: both notice a change of any value or of the order."""
    values = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    norm = values.norm()
    return [norm.item(), (values @ torch.arange(len(values)).double().cos() / norm).item()]


def check(name: str, found: dict) -> None:
    assert found.keys() == EXPECTED[name].keys()
    for part, values in found.items():
        assert values == pytest.approx(EXPECTED[name][part], rel=ROUNDING, abs=ROUNDING), f"{name}: {part}"


# -- what a run has reached -------------------------------------------------------------------------------------------


def transformer_run(folder: str, step: int) -> dict:
    """Loss of a step, and checksums of all that the checkpoint after it holds."""
    dcp_to_torch_save(f"{folder}/checkpoints/{step:07d}", "whole.pth")
    state = torch.load("whole.pth", weights_only=True)
    assert state.keys() == {"model", "ema", "optimizer", "guard"}
    parts = {name: list(state[name].values()) for name in ("model", "ema")}
    for kind in ("step", "exp_avg", "exp_avg_sq"):
        parts[kind] = [value for name, value in state["optimizer"].items() if name.endswith(f".{kind}")]
    events = EventAccumulator(f"{folder}/tensorboard").Reload()
    loss = next(event.value for event in events.Scalars("train/loss") if event.step == step)
    return {"loss": loss, **{name: checksum(tensors) for name, tensors in parts.items()}}


def autoencoder_run(folder: str, step: int) -> dict:
    """Position in the data, and checksums of all that a Lightning checkpoint holds.

    Weights of fewer than two dimensions are left out: GroupNorm makes the biases here do nothing, so that their
    gradients are rounding errors, which Adam scales up.
    """
    checkpoint = torch.load(f"{folder}/checkpoints/step_{step:07d}.ckpt", weights_only=True)
    state, averages = checkpoint["state_dict"], checkpoint["ema_state_dict"]
    parts = {
        "encoder": [tensor for name, tensor in state.items() if name.startswith("encoder.")],
        "decoder": [tensor for name, tensor in state.items() if name.startswith("decoder.")],
        "discriminator": [tensor for name, tensor in state.items() if name.startswith("loss.discriminator.")],
        "ema": list(averages.values()),
    }
    for player, optimizer in zip(("decoder", "discriminator"), checkpoint["optimizer_states"], strict=True):
        for kind in ("exp_avg", "exp_avg_sq"):
            parts[f"{kind}, {player}"] = [entry[kind] for entry in optimizer["state"].values()]
        assert {entry["step"].item() for entry in optimizer["state"].values()} == {step}
    sums = {name: checksum(tensor for tensor in tensors if tensor.ndim > 1) for name, tensors in parts.items()}
    return {"step": checkpoint["global_step"], "position": checkpoint["ImageDataModule"]["position"], **sums}


# -- the tests --------------------------------------------------------------------------------------------------------


def test_a_run_of_the_transformer_goes_on(capsys):
    """Weights, average, optimiser and place in the data come from the old checkpoint; else step 3 would differ."""
    run("svg_t2i.train", "--config", "results/config.yaml", "train.max_steps=3")
    assert "resumed from results/checkpoints/0000002" in capsys.readouterr().out
    check("transformer, step 3", transformer_run("results", 3))


def test_a_run_of_the_autoencoder_goes_on(capsys):
    shutil.copy("logs/stage1/config.yaml", "stage1.yaml")  # the file's name is the run's
    run("autoencoder.train", "--config", "stage1.yaml", "training.trainer.max_steps=3")
    assert "resuming at step 2" in capsys.readouterr().out
    check("autoencoder, step 3", autoencoder_run("logs/stage1", 3))


@pytest.mark.parametrize("averaged", [False, True], ids=["raw", "averaged"])
def test_the_autoencoder_loads(averaged):
    config = Path("logs/stage1/config.yaml")
    if averaged:
        config.write_text(config.read_text().replace("use_ema: false", "use_ema: true"))
    autoencoder = SVGAutoencoder.from_pretrained(config, LAST, "latent_stats.safetensors")
    image = torch.linspace(-1, 1, 3 * 64 * 48).view(1, 3, 64, 48).mul(40).sin()
    with torch.no_grad():
        latents = autoencoder.encode(image)
        found = {"latents": latents, "normalised": autoencoder.normalize(latents), "image": autoencoder.decode(latents)}
    name = f"reconstruction, {'averaged' if averaged else 'raw'} weights"
    check(name, {part: checksum([tensor]) for part, tensor in found.items()})


def test_the_commands_read_the_autoencoder():
    own = ["logs/stage1/config.yaml", "--checkpoint", LAST, "--data", "manifest.jsonl", "--resolution", "64"]
    run("autoencoder.measure_latents", *own, "--output", "again.safetensors", "--compare", "latent_stats.safetensors")
    again, before = load_file("again.safetensors"), load_file("latent_stats.safetensors")
    torch.testing.assert_close(again, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("folder", ["pipeline", "results", "exported"])
def test_a_pipeline_loads(folder):
    """Saved whole; as a run that names its parts; exported, with the parts named. It is the same one."""
    parts = {"autoencoder": "pipeline/autoencoder", "text_encoder": "text_encoder"} if folder == "exported" else {}
    pipeline = SVGT2IPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    sizes = {"height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": 3.0, "time_shift": 1.5}
    found = {}
    for kind in ("latent", "pt"):
        images = pipeline(["much noise", "number 3"], seed=[1, 2], output_type=kind, **sizes).images
        found[kind] = checksum(images)
    check("pipeline", found)


def test_a_feature_cache_is_read():
    own = ["--config", "dit.yaml", "data.feature_cache=cache"]
    run("svg_t2i.train", *own, "results_dir=from_cache", "train.max_steps=2")
    check("transformer from the cache, step 2", transformer_run("from_cache", 2))


def test_a_feature_cache_is_continued():
    """A shard made today, beside old ones, holds what the old one held."""
    shard = Path("cache/00000.safetensors")
    shard.rename("before.safetensors")
    run("svg_t2i.cache_features", "--config", "dit.yaml", "data.feature_cache=cache", "--shard_size", "3")
    made = load_file(shard)
    assert not made.pop("replaced").any()  # which the old one does not tell
    torch.testing.assert_close(made, load_file("before.safetensors"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["own_manifest", "own_folder", "published_native", "published_imagenet"])
def test_targets_are_understood(name):
    """The names of models, losses, data and splits that configs have: published ones, and modules of that time."""
    run("autoencoder.train", "--config", f"targets/{name}.yaml", "training.trainer.max_steps=1")
    check(f"targets, {name}", autoencoder_run(f"logs/{name}", 1))
