"""Bad input, as a user meets it: the entries say one thing, exit with 2, and leave every file as it was.

The wording of each message is tested beside the module that raises it; here it must name the culprit and a remedy.
"""

import json
import logging
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from autoencoder import evaluate_reconstruction, measure_latents, reconstruct
from autoencoder import train as autoencoder_train
from autoencoder.common.config import save_config
from autoencoder.latents.statistics import LatentStats
from autoencoder.model import SVGAutoencoder
from svg_t2i import cache_features, sample
from svg_t2i import train as transformer_train

ENCODER = {"model_name": "dinov3_vits16plus", "weights": "random"}
ENCODER["overrides"] = {"embed_dim": 32, "depth": 1, "num_heads": 2}
DECODER = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 0, "z_channels": 32}
LOSS = {
    "target": "autoencoder.training.losses.AutoencoderLoss",
    "params": {"disc_weight": 0.0, "perceptual_weight": 0.0},
}


def broken_png(width: int, height: int) -> bytes:
    """The head of a PNG file that claims to have so many pixels, and no pixel."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b"")]
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def place(tmp_path_factory, toy_parts):
    """A folder with an autoencoder config, weights and statistics that fit nothing, bad manifests, and results."""
    folder = tmp_path_factory.mktemp("place")
    config = {
        "training": {"logdir": str(folder / "logs"), "trainer": {"max_steps": 1, "accelerator": "cpu"}},
        "model": {
            "base_learning_rate": 1e-3,
            "params": {"embed_dim": 32, "ddconfig": DECODER, "dinoconfig": ENCODER, "lossconfig": LOSS},
        },
        "data": {
            "target": "autoencoder.training.batches.ManifestParams",
            "params": {"batch_size": 2, "train_resol": 64, "json_path": str(toy_parts / "manifest.jsonl")},
        },
    }
    save_config(config, folder / "ae.yaml")
    wider = {"embed_dim": 64, "ddconfig": DECODER | {"z_channels": 64}, "dinoconfig": ENCODER | {"weights": "random"}}
    wider["dinoconfig"] = wider["dinoconfig"] | {"overrides": {"embed_dim": 64, "depth": 1, "num_heads": 2}}
    torch.save(SVGAutoencoder.from_config({"model": {"params": wider}}).state_dict(), folder / "wider.pth")
    LatentStats(torch.zeros(32), torch.ones(32), encoder="0" * 16).save(folder / "others.safetensors")

    (folder / "huge.png").write_bytes(broken_png(60_000, 60_000))
    (folder / "cut.png").write_bytes(broken_png(64, 64))
    Image.new("RGB", (64, 64)).save(folder / "good.png")
    for name, line in [
        ("lines", '{"path": '),
        ("huge", '{"path": "huge.png", "prompt": "huge"}'),
        ("cut", '{"path": "cut.png", "prompt": "cut off"}'),
        ("gone", '{"path": "gone.png", "prompt": "gone"}'),
    ]:
        good = json.dumps({"path": "good.png", "prompt": "good"})
        (folder / f"{name}.jsonl").write_text("\n".join([good, *[line] * 400]))
    (folder / "empty.txt").write_text("\n \n")
    for used in ("used", "logs/ae", "used_evaluation"):
        (folder / used).mkdir(parents=True)
        (folder / used / "mine.txt").write_text("kept")
    (folder / "used_evaluation" / "metrics.json").write_text("{}")
    return folder


TRAIN_AE = (autoencoder_train, ["--config", "{place}/ae.yaml", "training.logdir={out}"])
TRAIN_DIT = (transformer_train, ["--config", "{toy}/train.yaml", "results_dir={out}", "train.max_steps=1"])
CACHE = (cache_features, ["--config", "{toy}/train.yaml", "data.feature_cache={out}", "data.crops_per_image=1"])
SAMPLE = (sample, ["--checkpoint", "{pipeline}", "--output", "{out}"])
MEASURE = (measure_latents, ["{place}/ae.yaml", "--resolution", "64", "--output", "{out}/stats.safetensors"])
RECONSTRUCT = (reconstruct, ["{place}/ae.yaml", "{place}/good.png", "--resolution", "64", "--output", "{out}"])
EVALUATE = (evaluate_reconstruction, ["{place}/ae.yaml", "--data", "{toy}/manifest.jsonl", "--resolution", "64"])

CASES = {
    "manifest missing, stage 1": (*TRAIN_AE, ["data.params.json_path={place}/none.jsonl"], ["none.jsonl"]),
    "manifest missing, stage 2": (*TRAIN_DIT, ["data.path={place}/none.jsonl"], ["none.jsonl"]),
    "manifest missing, statistics": (*MEASURE, ["--manifest", "{place}/none.jsonl"], ["none.jsonl"]),
    "manifest lines, stage 1": (*TRAIN_AE, ["data.params.json_path={place}/lines.jsonl"], ["lines.jsonl:2", "repair"]),
    "manifest lines, stage 2": (*TRAIN_DIT, ["data.path={place}/lines.jsonl"], ["lines.jsonl:2", "repair"]),
    "image missing": (*TRAIN_DIT, ["data.path={place}/gone.jsonl"], ["gone.jsonl", "gone.png: no such image"]),
    "image unreadable": (*TRAIN_DIT, ["data.path={place}/cut.jsonl"], ["cut.jsonl", "cut.png: not a readable"]),
    "image unreadable, stage 1": (*TRAIN_AE, ["data.params.json_path={place}/cut.jsonl"], ["cut.png: not a readable"]),
    "image unreadable, cache": (*CACHE, ["data.path={place}/cut.jsonl"], ["cut.jsonl", "cut.png: not a readable"]),
    "image unreadable, statistics": (*MEASURE, ["--manifest", "{place}/cut.jsonl"], ["cut.jsonl", "cut.png"]),
    "image oversized": (*TRAIN_DIT, ["data.path={place}/huge.jsonl"], ["huge.png", "3600000000 pixels", "limit"]),
    "weights missing, stage 1": (*TRAIN_AE, ["model.params.dinoconfig.weights=absent.pth"], ["absent.pth", "path"]),
    "weights missing, stage 2": (
        *TRAIN_DIT, ["autoencoder.config={place}/ae.yaml", "autoencoder.encoder_weights=absent.pth"], ["absent.pth"],
    ),
    "weights missing, checkpoint": (*RECONSTRUCT, ["--checkpoint", "absent.ckpt"], ["absent.ckpt", "path"]),
    "weights missing, sampling": (
        *SAMPLE, ["--checkpoint", "{place}/none", "--prompt", "x"], ["none", "no such folder"],
    ),
    "checkpoint of another shape": (*RECONSTRUCT, ["--checkpoint", "{place}/wider.pth"], ["wider.pth", "Use the YAML"]),
    "checkpoint of another shape, stage 1": (
        *TRAIN_AE, ["model.params.ckpt_path={place}/wider.pth"], ["wider.pth", "shape"],
    ),
    "another's statistics": (
        *TRAIN_DIT, ["autoencoder.stats={place}/others.safetensors"], ["another encoder", "measure"],
    ),
    "another's statistics, sampling": (
        *SAMPLE, ["--latent_stats", "{place}/others.safetensors", "--prompt", "x"], ["another encoder", "measure"],
    ),
    "resolution, stage 1": (*TRAIN_AE, ["data.params.train_resol=100"], ["100", "multiple of 16"]),
    "resolution, stage 2": (*TRAIN_DIT, ["data.resolution=100"], ["100", "multiple of 16"]),
    "resolution, statistics": (
        *MEASURE, ["--manifest", "{toy}/manifest.jsonl", "--resolution", "100"], ["100", "multiple of 16"],
    ),
    "resolution, sampling": (
        *SAMPLE, ["--prompt", "x", "--resolution", "100x64"], ["100", "multiples of 16", "such as 96"],
    ),
    "unknown key, stage 1": (*TRAIN_AE, ["training.trainer.max_step=3"], ["max_step'", "did you mean 'max_steps'"]),
    "unknown key, stage 2": (*TRAIN_DIT, ["optim.lrr=3"], ["optim.lrr", "did you mean 'lr'"]),
    "unknown target, data": (*TRAIN_AE, ["data.target=os.system"], ["os.system", "known: "]),
    "unknown target, model": (*TRAIN_AE, ["model.target=os.system"], ["os.system", "known: "]),
    "unknown target, loss": (*TRAIN_AE, ["model.params.lossconfig.target=os.system"], ["os.system", "known: "]),
    "prompt file empty": (*SAMPLE, ["--prompts", "{place}/empty.txt"], ["empty.txt", "holds no prompt"]),
    "folder used, stage 1": (*TRAIN_AE, ["training.logdir={place}/logs", "resume=false"], ["not empty", "logdir"]),
    "folder used, stage 2": (*TRAIN_DIT, ["results_dir={place}/used", "resume=false"], ["not empty", "another folder"]),
    "folder used, sampling": (*SAMPLE, ["--prompt", "x", "--output", "{place}/used"], ["not empty", "another"]),
    "folder used, reconstructions": (*RECONSTRUCT, ["--output", "{place}/used"], ["not empty", "--overwrite"]),
    "folder used, evaluation": (*EVALUATE, ["--output", "{place}/used_evaluation"], ["has results", "--overwrite"]),
}  # fmt: skip


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message(name, place, toy_parts, saved_pipeline, tmp_path, capfd, monkeypatch):
    module, arguments, bad, words = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # those of the last entry write where nobody reads
    names = {"place": place, "toy": toy_parts, "pipeline": saved_pipeline, "out": tmp_path / "out"}
    monkeypatch.setattr("sys.argv", ["command", *(word.format(**names) for word in arguments + bad)])
    before = files(place) | files(toy_parts) | files(saved_pipeline)
    with pytest.raises(SystemExit) as exit_info:
        module.main()
    assert exit_info.value.code == 2
    printed = capfd.readouterr().err
    assert printed.count("error: ") == 1
    assert "Traceback" not in printed
    message = printed[printed.index("error: ") :]
    assert [word for word in words if word not in message] == [], message
    assert {path: now for path, now in files(place).items() if path in before} == {
        path: then for path, then in before.items() if place in path.parents
    }
    assert not list(tmp_path.rglob("*.png")) + list(tmp_path.rglob("*.ckpt"))
