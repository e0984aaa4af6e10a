"""The plan as its user sees it, and what it must not depend on."""

import re
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import Gemma2Config, Gemma2Model

from autoencoder.common.config import UserError, load_config
from svg_t2i import plan
from svg_t2i.checkpoints.adapters import LoraSettings
from svg_t2i.loading.quantization import count_quantizable, quantize, quantized_layers
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.planning.gpus import GPUS, find_gpu
from svg_t2i.planning.networks import (
    GEMMA_IN_BLOCKS,
    GEMMA_PARAMETERS,
    GEMMA_WIDTH,
    TransformerCounts,
    count,
    transformer_counts,
)
from svg_t2i.planning.training import CHECKPOINTING, GB, communication_seconds, plan_training
from svg_t2i.training.settings import TrainConfig
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.flops import attention_flops, forward_flops, training_flops

STAGE1 = "configs/autoencoder/pure/svg_autoencoder_P_dd_M_IN_stage1_bs64_256_woattn"


def run(words):
    plan.main(words.split())


@pytest.fixture(scope="module")
def stage1():
    return load_config(TrainConfig, plan.find_plan_config("stage1_256"))


def test_the_issue_s_own_line(capsys):
    run("--config stage1_256 --gpus 64 --gpu h100 --price 2")
    out = capsys.readouterr().out
    assert "2.61 B trained and 2.69 B frozen" in out
    assert "1 micro-batch of up to 24 a GPU" in out
    assert "a checkpoint has 41.8 GB" in out
    assert "fastest that fits: parallel.data_parallel=hsdp parallel.activation_checkpointing=none" in out
    assert out.count("← fastest") == 1
    assert "An estimate" in out
    assert "91000 steps" in out


def test_more_gpus_are_faster_and_hold_less(stage1):
    plans = [plan_training(stage1, find_gpu("h100"), gpus) for gpus in (8, 64)]
    for found in plans:
        assert found.flops_per_image == training_flops(stage1.model_config(384, 2304), [256], [150])
        assert {(c.data_parallel, c.checkpointing) for c in found.choices} >= {
            (mode, checkpointing) for mode in ("ddp", "sdp", "fsdp") for checkpointing in CHECKPOINTING
        }
        assert found.best.total <= 80 * GB
        fitting = [c for c in found.choices if c.total <= 80 * GB]
        assert found.best.seconds == min(c.seconds for c in fitting)
    few, many = plans
    assert (few.micro_batches, many.micro_batches) == (8, 1)
    assert few.best.seconds == pytest.approx(8 * many.best.seconds, rel=0.01)
    of_eight, of_all = (next(c for c in found.choices if c.data_parallel == "sdp") for found in plans)
    assert of_eight.memory["weights"] == 8 * of_all.memory["weights"]
    assert few.best.data_parallel == "sdp"  # as the config says: least to exchange


def test_uneven_shares_and_settings_show(stage1):
    uneven = plan_training(stage1, find_gpu("a100"), 1000)
    assert uneven.idle_share == pytest.approx(1 - 1536 / 2000)
    usual = plan_training(stage1, find_gpu("h100"), 8)
    changed = replace(
        stage1,
        parallel=replace(stage1.parallel, shard_frozen=True),
        train=replace(stage1.train, micro_batch_size=12),
    )
    plan = plan_training(changed, find_gpu("h100"), 8, utilisation=0.66)
    assert plan.choices[0].memory["frozen networks"] < usual.choices[0].memory["frozen networks"] / 5
    activations = [found.choices[0].memory["activations"] for found in (plan, usual)]
    assert activations[0] == pytest.approx(activations[1] / 2, rel=0.02)
    assert plan.best.seconds == pytest.approx(usual.best.seconds / 2)


def test_what_goes_over_the_network():
    """By hand, 1e9 parameters in bf16 on 16 cards of two machines, three micro-batches."""
    h100, counts = GPUS["h100"], TransformerCounts(10**9, 10**9, 0)
    seconds = {
        mode: communication_seconds(mode, counts, 3, 16, h100, "bf16") for mode in ("ddp", "sdp", "fsdp", "hsdp")
    }
    assert seconds == pytest.approx(
        {"ddp": 8 / 50, "sdp": (2 + 3 * 4) / 50, "fsdp": 3 * (4 + 4) / 50, "hsdp": 24 / 450 + 8 / 8 / 50}
    )
    assert communication_seconds("fsdp", counts, 3, 1, h100, "bf16") == 0
    adapter = TransformerCounts(10**9, 10**6, 0)  # nothing but its gradients by ddp
    assert communication_seconds("ddp", adapter, 3, 16, h100, "bf16") == pytest.approx(8e-3 / 50)


def test_fine_tuning_on_one_card(capsys):
    run("--config finetune_lora --gpus 1 --gpu 24gb")
    out = capsys.readouterr().out
    assert "0.03 B trained and 5.30 B frozen" in out
    assert "activation_checkpointing=selective" in out
    assert "a checkpoint has 0.4 GB" in out
    run("--config finetune_lora --gpus 1 --gpu 16gb")
    assert "activation_checkpointing=full" in capsys.readouterr().out
    run("--config finetune_full --gpus 1 --gpu h100")
    assert "full" in capsys.readouterr().out.split("head-room")[1].split("too large")[0]


def test_what_an_adapter_takes():
    """By hand: a (rank, in) and a (out, rank) matrix for each layer it is put on."""
    sizes, lora = DiTConfig(dim=64, n_layers=2, n_heads=2, axes_dims=(8, 12, 12)), LoraSettings(rank=4)
    plain, adapted = transformer_counts(sizes), transformer_counts(sizes, lora)
    assert plain.trained == plain.all == adapted.all
    block = 4 * ((64 + 192) + (64 + 64) + 3 * (64 + 256))
    modulation = 4 * (64 + 256)
    assert adapted.trained == 6 * block + 4 * modulation + 4 * (64 + 64)


def test_frozen_weights_need_fewer_operations():
    sizes = DiTConfig(dim=64, n_layers=2, n_heads=2, axes_dims=(8, 12, 12))
    forward, attending = forward_flops(sizes, 16, 8), attention_flops(sizes, 16, 8)
    assert attending == 4 * 64 * (2 * 24**2 + 2 * (16**2 + 8**2))
    assert training_flops(sizes, [16], [8]) == 3 * forward
    assert training_flops(sizes, [16], [8], frozen=True) == 2 * (forward - attending) + 3 * attending


def test_nothing_fits_says_what_is_needed(capsys):
    run("--config stage1_256 --gpus 1 --gpu 24gb")
    out = capsys.readouterr().out
    assert "nothing fits: 6" in out
    assert "too large" in out
    assert "fastest" not in out.replace("← fastest", "fastest")


def test_sampling(capsys):
    for gpu, all_together, in_turns in (("h100", "fits", "fits"), ("12gb", "does not fit", "fits")):
        plan.main(["--sample", "1024", "--gpu", gpu])
        out = capsys.readouterr().out
        assert f"GB, which {all_together}\n" in out.split("all networks")[1]
        assert f"which {in_turns}\n" in out.split("taking turns")[1]
    assert "no time" in out


@pytest.mark.parametrize(
    ("gpu", "answers"),  # all on the card, taking turns, in 8 bits on the card, in 8 bits taking turns
    [
        ("24gb", ["fits"] * 4),
        ("16gb", ["fits"] * 4),
        ("12gb", ["does not fit", "fits", "fits", "fits"]),
        ("8gb", ["does not fit", "fits", "does not fit", "fits"]),
    ],
)
def test_which_card_is_large_enough(capsys, gpu, answers):
    plan.main(["--sample", "1024", "--gpu", gpu])
    assert re.findall(r"GB, which (fits|does not fit)", capsys.readouterr().out) == answers


def test_what_quantisation_keeps_in_8_bits(saved_pipeline):
    """Counted beforehand as it is done; and of Gemma-2-2B, which is not here, by its published configuration."""
    loaded = SVGT2IPipeline.from_pretrained(saved_pipeline)
    networks = (loaded.transformer, loaded.text_encoder)
    expected = [count_quantizable(network) for network in networks]
    quantize("int8", *networks)
    assert expected == [
        sum(network.get_parameter(x).numel() for x in quantized_layers(network)) for network in networks
    ]
    with torch.device("meta"):
        gemma = Gemma2Model(Gemma2Config())
    assert gemma.config.hidden_size == GEMMA_WIDTH
    assert (count(gemma), count_quantizable(gemma)) == (GEMMA_PARAMETERS, GEMMA_IN_BLOCKS)


def test_a_small_model_of_folders_is_no_gemma(toy_parts, tmp_path, capsys):
    """Sizes of the networks that are named, without their weights."""
    content = yaml.safe_load((toy_parts / "train.yaml").read_text())
    plan.main(["--config", str(toy_parts / "train.yaml"), "--gpus", "2", "--gpu", "4090"])
    out = capsys.readouterr().out
    assert "taken to be as large" not in out
    assert "0.00 B trained and 0.00 B frozen" in out
    content["text_encoder"]["path"] = "someone/t5"
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(content))
    plan.main(["--config", str(tmp_path / "train.yaml"), "--gpus", "2"])
    assert "taken to be as large as Gemma-2-2B" in capsys.readouterr().out


def test_the_autoencoder(capsys):
    run(f"--config {STAGE1} --gpus 8 --gpu h200 --price 3")
    out = capsys.readouterr().out
    assert "43.0 M trained parameters, and 2.8 M of the discriminator" in out
    assert "64 images of 256×256 px at once on a GPU, 512 a step" in out
    assert "which fits\n" in out
    assert "a million images" in out
    run(f"--config {STAGE1} --gpu a100 training.trainer.max_steps=100 training.trainer.max_epochs=null")
    out = capsys.readouterr().out
    assert "does not fit: use a smaller data.params.batch_size" in out
    assert "100 steps: " in out


def test_every_shipped_config_of_the_autoencoder_has_a_plan(capsys):
    folders = [plan.FOLDER.parent / "autoencoder" / name for name in ("pure", "residual")]
    paths = [path for folder in folders for path in folder.glob("*.yaml")]
    for path in paths:
        run(f"--config {path} data.params.batch_size=1")
    assert capsys.readouterr().out.count("An estimate") == len(paths)
    assert len(paths) >= 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpu h1000", "--gpu h1000: unknown; choose one of a100"),
        ("--config stage9", "stage9.*does not exist"),
        ("--gpus 0", "--gpus 0 must be at least 1"),
        ("--utilisation 1.5", "utilisation = 1.5"),
        ("--sample 100", "multiple of 16"),
        ("--price -1", "--price"),
        ("train.micro_batch=3", "unknown key 'train.micro_batch'"),
        (f"--config {STAGE1} --sample 256", "--sample plans for the networks of a DiT training"),
        (f"--config {STAGE1} training.tranier=1", "unknown key 'training.tranier'"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(UserError, match=message):
        run(words)
