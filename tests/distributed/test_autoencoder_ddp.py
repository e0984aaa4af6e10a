"""Autoencoder training on two processes (gloo) against one process with twice the batch, through the entry."""

import json
import os
import socket
import traceback

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from autoencoder.train import main
from autoencoder.training.losses import SyncedBatchNorm, mean_over_processes

NAME = "svg_autoencoder_P_dd_M_IN_stage1_bs64_256_gpu1_forTest"
ARGUMENTS = [
    "--config",
    f"configs/autoencoder/pure/{NAME}",
    "model.params.dinoconfig={weights: random, overrides: {embed_dim: 32, depth: 1, num_heads: 1}}",
    "model.params.ddconfig={z_channels: 40, ch: 32, ch_mult: [1, 1, 1, 1, 1], num_res_blocks: 0}",
    "model.params.extra_vit_config={outnorm: per_image, overrides: {embed_dim: 32, depth: 1, num_heads: 1}}",
    "model.params.lossconfig.params.disc_ndf=8",
    "model.params.lossconfig.params.disc_num_layers=2",
    "model.params.lossconfig.params.disc_start=3",  # the discriminator joins in the second step
    "model.params.lossconfig.params.logvar_init=6",  # keeps the adaptive weight below its upper limit
    "training.trainer.accelerator=cpu",
    "training.trainer.max_steps=4",
    "training.log_images_every_n_steps=100",
    "training.ema_decay=0.9",
    "training.latent_noise=0.3",
    "training.trainer.gradient_clip_val=100.0",
]
CASES = {
    "squares with one BatchNorm": [
        "data.params.train_resol=64",
        "data.params.max_aspect=1",
        "model.params.lossconfig.params.disc_per_image=false",
        "training.trainer.sync_batchnorm=true",
        "training.accumulate_grad_batches=2",
    ],
    "native aspect, as published": [
        "data.params.train_resol=128",
        "training.validate_every_n_steps=2",
    ],
}

pytestmark = pytest.mark.filterwarnings("ignore")


def on_two_processes(function):
    """Runs function() in two forks of this process that torchrun could have started, and waits for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            os.environ |= address | {"TORCHELASTIC_RUN_ID": "test"} | {key: str(value) for key, value in ranks.items()}
            try:
                function()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def scalars(folder):
    events = EventAccumulator(str(folder / NAME)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_like_one_with_twice_the_batch(case, tmp_path, repo_root):
    images = repo_root / "configs" / "example_images"
    lines = [json.dumps({"path": str(path)}) for path in sorted(images.iterdir())[:5]]  # 3 and 2: not as many batches
    (tmp_path / "val.jsonl").write_text("\n".join(lines))
    validation = [f"data.params.val_json_path={tmp_path}/val.jsonl"] if "native" in case else []

    def train(folder, devices, batch_size):
        sizes = [f"--devices={devices}", f"data.params.batch_size={batch_size}", f"training.logdir={tmp_path}/{folder}"]
        main([*ARGUMENTS, *CASES[case], *validation, *sizes])

    on_two_processes(lambda: train("two", 2, 2))
    train("one", 1, 4)

    two, one = (scalars(tmp_path / folder) for folder in ("two", "one"))
    own = {"train/images_per_s", "train/data_wait", "train/memory_gib"}
    assert two.keys() == one.keys() >= {"train/total_loss", "train/d_weight", "train/disc_loss", "train/g_loss"}
    for tag in one.keys() - own:
        rounded = "grad_norm" in tag or "d_weight" in tag  # Adam's first steps turn rounding into whole steps
        rtol = 2e-2 if rounded else 1e-3
        torch.testing.assert_close(two[tag], one[tag], rtol=rtol, atol=1e-5, msg=lambda text, tag=tag: f"{tag}: {text}")
    assert len(one["train/disc_loss"]) == 3
    assert max(one["train/d_weight"]) < 0.5e4

    two, one = (
        torch.load(tmp_path / folder / NAME / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in ("two", "one")
    )
    assert two["ImageDataModule"] == one["ImageDataModule"]
    for part in ("state_dict", "ema_state_dict"):
        for name, value in one[part].items():
            if name.endswith(".weight"):  # some biases have no gradient but rounding
                assert (two[part][name] - value).abs().mean() < 2e-6, name  # a step moves by up to 1e-4


def test_synced_batchnorm_is_batchnorm_over_the_global_batch():
    torch.manual_seed(0)
    x, target = torch.randn(4, 3, 5, 6) * 2 + 3, torch.randn(4, 3, 5, 6)
    plain = nn.BatchNorm2d(3)
    nn.init.normal_(plain.weight, 1.0, 0.3)
    nn.init.normal_(plain.bias)

    def run(layer, x, target):
        x = x.clone().requires_grad_()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        return loss.detach(), x.grad, layer.weight.grad, layer.bias.grad

    synced = SyncedBatchNorm(3)
    synced.load_state_dict(plain.state_dict())
    expected = run(plain, x, target)

    def compare():
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        loss, of_x, *of_parameters = run(synced, x[2 * rank :][:2], target[2 * rank :][:2])
        torch.testing.assert_close(mean_over_processes(loss), expected[0])
        torch.testing.assert_close(of_x / 2, expected[1][2 * rank :][:2])  # DDP's mean over processes makes it half
        for ours, theirs in zip(of_parameters, expected[2:]):
            torch.testing.assert_close(mean_over_processes(ours), theirs)
        for ours, theirs in zip(synced.buffers(), plain.buffers()):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(synced.eval()(x), plain.eval()(x))

    on_two_processes(compare)
    run(synced, x, target)  # alone
    for ours, theirs in zip(synced.buffers(), plain.buffers()):
        torch.testing.assert_close(ours, theirs)
