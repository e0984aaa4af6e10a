"""What a run reports: operation counts, phases, TensorBoard and Weights & Biases, pictures, traces."""

import json
import math
import sys
import time
import types

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from autoencoder.common.config import UserError, load_config
from svg_t2i.train import main
from svg_t2i.training.monitor import Phases, ProgressLogger, loss_scalars, profiling
from svg_t2i.training.settings import TrainConfig
from svg_t2i.training.sharding import World
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.flops import peak_tflops, training_flops
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.transformer.packing import TextFeatures


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_writes_scalars_and_a_trace(toy_parts, tmp_path, rank):
    overrides = [f"results_dir={tmp_path}", "monitor.profile_steps=1"]
    config = load_config(TrainConfig, toy_parts / "train.yaml", overrides)
    world = World(rank, rank, 2, torch.device("cpu"))
    logger = ProgressLogger(config, 0, world)
    assert (logger.board is not None) == (rank == 0)
    with profiling(config, world) as after_step:
        for _ in range(12):
            after_step()
    names = sorted(path.name for path in tmp_path.rglob("*") if path.name in ("tensorboard", "trace.json"))
    assert names == (["tensorboard", "trace.json"] if rank == 0 else [])


@pytest.mark.parametrize(("patch", "head"), [(1, {}), (2, {}), (1, {"aux_loss": "flow", "aux_block": 2})])
def test_operations_are_those_that_torch_counts(patch, head, monkeypatch):
    for module in ("cpu_kernels", "model"):  # the fast forms have products of their own in the norms
        monkeypatch.setattr(f"svg_t2i.transformer.{module}.works_fast", lambda *tensors: False)
    sizes = DiTConfig(
        dim=64, n_layers=3, n_heads=2, n_kv_heads=1, n_refiner_layers=2, axes_dims=(8, 12, 12), in_channels=20,
        cap_feat_dim=48, patch_size=patch, **head,
    )  # fmt: skip
    model, images, texts = SVGDiT(sizes), [24 // patch**2, 16 // patch**2], [5, 7]
    latents = [torch.randn(20, 4, 6, requires_grad=True), torch.randn(20, 4, 4, requires_grad=True)]
    features = torch.randn(12, 48)
    with FlopCounterMode(display=False) as counter:
        tokens, grids = model.pack(latents)
        passed = model.forward_packed(tokens, grids, torch.rand(2), TextFeatures(features, (5, 7)), aux=bool(head))
        (sum(v.sum() for v in passed) if head else passed.sum()).backward()
    joint = sum((i + t) ** 2 for i, t in zip(images, texts)) * sizes.n_layers
    refined = sum(i**2 + t**2 for i, t in zip(images, texts)) * sizes.n_refiner_layers
    attention = 3 * 4 * sizes.dim * (joint + refined)  # torch does not count the CPU's attention
    rows = 4 * (sizes.n_layers * (sum(images) + sum(texts)) + sizes.n_refiner_layers * sum(images))
    rows += sum(images) * (1 + bool(head))
    gains = 2 * len(images) * sizes.dim * rows  # their gradients are added up by products, which are no use to a model
    timesteps = 2 * len(images) * 256 * sizes.modulation_dim  # sinusoids get no gradient, so it takes one product less
    assert training_flops(sizes, images, texts) == counter.get_total_flops() - gains + attention + timesteps


def test_peaks_are_found_by_name():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("cpu") is None


def test_phases_add_up_and_go_on():
    phases = Phases(torch.device("cpu"))
    assert phases.pop() == {}
    for name in ("data", "model", "data"):
        phases.start(name)
        time.sleep(0.02)
    first = phases.pop()
    assert first["data"] >= 0.04
    assert 0.02 <= first["model"] < first["data"]
    assert phases.pop().keys() == {"data"}  # still under way


def test_empty_loss_bins_are_left_out():
    assert loss_scalars([1.0, math.nan]) == {"loss_at_t/0.00-0.50": 1.0}


def run(toy_parts, folder, *overrides):
    main(["--config", str(toy_parts / "train.yaml"), f"results_dir={folder}", *overrides])


def test_tensorboard_pictures_and_trace(toy_parts, tmp_path):
    run(
        toy_parts, tmp_path, "train.max_steps=12", "train.log_every=6", "monitor.peak_tflops=0.001",
        "monitor.profile_steps=1", "samples.every=12", "samples.prompts=[a picture, much noise, number]",
        "samples.num_inference_steps=2", "train.ema_decay=[0.9,0.99]", "train.ema_warmup=true",
        "evaluation.every=6", "evaluation.metrics=[mmd]", f"evaluation.manifest={toy_parts / 'manifest.jsonl'}",
        "evaluation.num_images=4", "evaluation.sampling.width=64", "evaluation.sampling.height=64",
        "evaluation.sampling.num_inference_steps=1",
    )  # fmt: skip
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    names = {name.removeprefix("train/") for name in board.Tags()["scalars"]}
    assert names >= {
        "loss", "grad_norm", "lr", "skipped", "replaced", "ema_decay", "text_tokens", "text_tokens_std",
        "images_per_second", "tokens_per_second", "memory_gib",
        "flop_utilisation", "share_of_data", "share_of_encode", "share_of_model", "share_of_update",
    }  # fmt: skip
    assert any(name.startswith("loss_at_t/") for name in names)
    shares = [board.Scalars(f"train/share_of_{phase}")[-1].value for phase in ("data", "encode", "model", "update")]
    assert 0.5 < sum(shares) <= 1.01
    assert [event.step for event in board.Scalars("train/loss")] == [6, 12]
    assert board.Tags()["images"] == ["samples"]
    assert board.Scalars("train/ema_decay")[-1].value == pytest.approx(12 / 21)  # of update 12, still warming up
    assert 0.01 < board.Scalars("train/memory_gib")[-1].value < 100
    evaluated = board.Scalars("eval/mmd")
    assert [event.step for event in evaluated] == [6, 12]
    assert all(math.isfinite(event.value) for event in evaluated)
    with Image.open(tmp_path / "samples" / "0000012.png") as grid:
        assert grid.width >= 3 * 64
    assert json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]


def test_replaced_samples_are_reported(toy_parts, tmp_path, capsys):
    """One image of seven is damaged, and every step is an epoch."""
    lines = [json.loads(line) for line in (toy_parts / "manifest.jsonl").read_text().splitlines()]
    (tmp_path / "damaged.png").write_bytes((toy_parts / "0.png").read_bytes()[:100])
    for line in lines:
        line["path"] = str(toy_parts / line["path"])
    lines[2]["path"] = "damaged.png"
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = ["train.global_batch_size=7", "train.micro_batch_size=7", "train.max_steps=2"]
    run(toy_parts, tmp_path / "run", f"data.path={tmp_path / 'm.jsonl'}", *settings)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("train/replaced")] == [1, 2]
    output = capsys.readouterr().out
    assert "damaged.png" in output
    assert output.count("  replaced 1\n") == output.count("  replaced 2\n") == 1


def test_wandb_gets_the_same_scalars(toy_parts, tmp_path, monkeypatch):
    logged, starts = {}, []
    module = types.ModuleType("wandb")

    def init(**options):
        starts.append(options)
        finish = lambda: logged.setdefault("finished", True)  # noqa: E731
        return types.SimpleNamespace(log=lambda values, step: logged.setdefault(step, values), finish=finish)

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    for steps in (2, 3):  # the second goes on
        settings = ["monitor.wandb_project=p", f"train.max_steps={steps}", "monitor.tensorboard=false"]
        run(toy_parts, tmp_path / "named", *settings)
    assert [start["project"] for start in starts] == ["p", "p"]
    assert [start["name"] for start in starts] == ["named", "named"]
    assert starts[0]["id"] == starts[1]["id"]
    assert starts[0]["config"]["train"]["max_steps"] == 2
    assert logged[2]["train/loss"] > 0
    assert logged["finished"]
    assert not (tmp_path / "named" / "tensorboard").exists()


def test_wandb_itself(toy_parts, tmp_path, monkeypatch):
    """The library, without a network: it writes what it would send."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install -e .[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(
        toy_parts, tmp_path, "monitor.wandb_project=p", "train.max_steps=2", "samples.every=2",
        "samples.prompts=[a picture, noise]", "samples.num_inference_steps=1",
    )  # fmt: skip
    wandb.teardown()  # its own process has written all
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    (record,) = folder.glob("*.wandb")
    content = record.read_bytes()
    for name in (b"train/loss", b"train/grad_norm", b"loss_at_t/", b"train/share_of_data", b"samples"):
        assert name in content
    (picture,) = folder.glob("files/media/images/samples_2_*.png")
    with Image.open(picture) as sent, Image.open(tmp_path / "samples" / "0000002.png") as grid:
        assert sent.tobytes() == grid.tobytes()


def test_missing_wandb_is_named(toy_parts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        run(toy_parts, tmp_path, "monitor.wandb_project=p")
