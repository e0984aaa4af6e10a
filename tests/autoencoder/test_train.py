"""The entry: what it builds from a config, where it starts, and what it refuses."""

import pytest
import torch
from PIL import Image

from autoencoder import train as entry
from autoencoder.common.config import UserError, load_config
from autoencoder.training.settings import AutoencoderTrainConfig

THREE = "model.params.lossconfig.params.disc_num_layers=3"
PUBLISHED = {
    "stage1_bs64_256_gpu1_forTest": None,
    "stage1_bs64_256_woattn": (256, 64, None),
    "stage2_bs16_512_woattn": (512, 16, "stage1_bs64_256_woattn"),
    "stage3_bs3_1024_woattn": (1024, 3, "stage2_bs16_512_woattn"),
}

pytestmark = pytest.mark.filterwarnings("ignore")


def test_init_weight_takes_what_fits_and_names_the_rest(toy, caplog):
    source = toy.run("training.trainer.max_steps=1", logdir="first") / "checkpoints" / "last.ckpt"
    still = ["training.trainer.max_steps=1", f"model.init_weight={source}", "model.base_learning_rate=0"]
    # the next stage: larger images, the encoder comes with the checkpoint, another discriminator
    second = ["model.params.lossconfig.params.disc_ndf=4", "data.params.train_resol=128"]
    folder = toy.run(*still, *second, "model.params.dinoconfig.weights=null", logdir="second")
    before, after = toy.read(source.parent.parent, 1)["state_dict"], toy.read(folder, 1)["state_dict"]
    same = {name for name in after if torch.equal(before[name], after[name])}
    assert {name for name in after if name.split(".")[0] in ("encoder", "decoder")} <= same
    assert "loss.discriminator.main.0.weight" in caplog.text
    # another encoder of the same width: the checkpoint's is left out, as a whole
    caplog.clear()
    deeper = "model.params.dinoconfig.overrides={embed_dim: 32, depth: 2, num_heads: 1}"
    other = toy.read(toy.run(*still, deeper, logdir="third"), 1)["state_dict"]
    assert torch.equal(before["decoder.conv_in.weight"], other["decoder.conv_in.weight"])
    assert "encoder.blocks.1.norm1.weight" in other
    assert "encoder.norm.weight" in caplog.text
    with pytest.raises(UserError, match="no weights yet: set dinoconfig.weights"):
        toy.run(*still, deeper, "model.params.dinoconfig.weights=null", logdir="fourth")
    with pytest.raises(UserError, match="no decoder weight in it fits"):
        toy.run(*still, "model.params.ddconfig.ch=64", logdir="fifth")


def test_the_imagenet_layout(toy):
    for split in ("train", "val"):
        (toy.folder / "imagenet" / split / "n01").mkdir(parents=True)
        for i in range(3):
            Image.open(toy.folder / f"{i}.png").save(toy.folder / "imagenet" / split / "n01" / f"{i}.JPEG")

    def data(split, target):
        params = f"{{data_root: {toy.folder}/imagenet, size: 64}}"
        return f"{split}: {{target: ldm.data.imagenet.{target}, params: {params}}}"

    splits = f"{data('train', 'ImageNetTrain')}, {data('validation', 'ImageNetValidation')}"
    overrides = [*toy.tiny, f"training.logdir={toy.folder}/in", "training.trainer={max_epochs: 2, accelerator: cpu}"]
    small = [f"data.params={{batch_size: 1, num_workers: 0, {splits}}}", "training.validate_every_n_steps=3"]
    small += ["model.params.lossconfig.params.perceptual_weight=0", "training.log_every_n_steps=1"]
    small += ["training.save_every_n_train_steps=4", "training.save_every_n_epochs=1"]
    name = "svg_autoencoder_P_dd_M_IN_stage1_bs64_256_woattn"
    entry.main(["--config", f"configs/autoencoder/pure/{name}", "--devices", "1", *overrides, *small])
    values, _ = toy.scalars(toy.folder / "in" / name)
    assert set(values["train/rec_loss"]) == set(range(1, 7))  # 2 epochs of 3
    assert set(values["val/rec_loss"]) == {3, 6}
    steps = {path.stem for path in (toy.folder / "in" / name / "checkpoints").glob("step_*")}
    assert steps == {"step_0000003", "step_0000004", "step_0000006"}


def test_bf16_and_scaled_learning_rate(toy):
    folder = toy.run("training.trainer.max_steps=2", "training.trainer.precision=bf16-mixed", "training.scale_lr=true")
    values, _ = toy.scalars(folder)
    assert values["lr-Adam/decoder"][1] == pytest.approx(2e-4)  # base 1e-4 × batch 2
    assert all(tensor.dtype != torch.bfloat16 for tensor in toy.read(folder, 2)["state_dict"].values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.target=torch.nn.Linear"], "model.target: unknown target"),
        (["data.target=os.system"], "data.target: unknown target"),
        (["data.params.batchsize=3"], "did you mean 'batch_size'"),
        (["data.params.train_resol=100"], "multiple of 16"),
        (["training.trainer.precision=16-mixed"], "precision.*choose one of"),
        (["training.trainer.max_steps=null"], "give max_steps or max_epochs"),
        (["model.params.lossconfig=null"], "lossconfig is missing"),
        (["data.params.json_path=absent.jsonl"], "absent.jsonl"),
        (["model.init_weight=absent.ckpt"], "absent.ckpt"),
        (["model.params.dinoconfig.weights=null"], "no weights yet"),
        (["model.params.dinoconfig.weights=absent.pth"], "encoder weights .dinoconfig.weights.*absent.pth"),
        (["model.params.is_train=false"], "is_train is false"),
        (["model.base_learning_rate=-1"], "base_learning_rate = -1"),
        (["model.params.hyconfig={z_channels: 32}"], "one decoder, given are ddconfig and hyconfig"),
        (["training.ema_decay=1"], "ema_decay = 1"),
        (["training.keep_last_k=0"], "keep_last_k = 0 must be at least 1"),
        (["training.trainer.gradient_clip_val=0"], "gradient_clip_val = 0"),
        (["training.latent_noise=-1"], "latent_noise = -1"),
        (["training.latent_stats=a.safetensors"], "latent_noise its units, which is 0"),
        (["data.params.train_resol=16", "data.params.max_aspect=1", THREE], "needs images of 24 px.*asks for 16"),
        (["training.trainer.sync_batchnorm=true"], "sync_batchnorm.*every image alone"),
        (
            ["training.trainer.sync_batchnorm=true", "data.params.train_resol=128"]
            + ["model.params.lossconfig.params.disc_per_image=false"],
            "sync_batchnorm.*different sizes",
        ),
    ],
)
def test_bad_input_is_named_before_anything_is_written(toy, overrides, message):
    with pytest.raises(UserError, match=message):
        toy.run(*overrides)
    assert not (toy.folder / "logs").exists()


def test_a_used_folder_is_not_overwritten(toy):
    folder = toy.run("training.trainer.max_steps=1")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    for overrides, message in [
        (["resume=false"], "not empty and resume is false"),
        (["training.trainer.max_steps=2", "model.params.ddconfig.ch=64"], "does not fit the configured model"),
    ]:
        with pytest.raises(UserError, match=message):
            toy.run(*overrides)
    toy.run("training.trainer.max_steps=1")  # done already: says so and leaves
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    with pytest.raises(UserError, match=r"training.seed = 7.*started with 0"):
        toy.run("training.trainer.max_steps=2", "training.seed=7")


def test_a_residual_branch_cannot_be_frozen_in_the_middle_of_a_run(toy):
    toy.run(*toy.residual, "training.trainer.max_steps=1")
    with pytest.raises(UserError, match="number of trained weights"):
        toy.run(*toy.residual, "training.trainer.max_steps=2", "model.params.extra_vit_config.frozen=true")


def test_unreadable_images_are_one_message(toy):
    for i in range(7):
        (toy.folder / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 7 images is usable; the first: .*png") as caught:
        toy.run("training.trainer.max_steps=1", "data.params.num_workers=1")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_published_configs(name, published):
    config = load_config(AutoencoderTrainConfig, f"configs/autoencoder/pure/svg_autoencoder_P_dd_M_IN_{name}")
    assert config.model.base_learning_rate == 1e-4
    if published:
        size, batch_size, previous = published
        assert config.data.params["batch_size"] == batch_size
        assert [config.data.params[split]["params"]["size"] for split in ("train", "validation")] == [size, size]
        assert config.model.params.lossconfig["params"]["disc_start"] == 5000
        assert (previous is None) == (config.model.init_weight is None)
        assert previous is None or f"{previous}/checkpoints/last.ckpt" in config.model.init_weight
