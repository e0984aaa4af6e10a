"""Autoencoder training through its entry, on a network of a few thousand parameters."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from autoencoder import train as entry
from autoencoder.config import UserError, load_config
from autoencoder.data import BatchStream, ImageDataset, group_by_size
from autoencoder.images import aspect_buckets
from autoencoder.manifest import Manifest, ResumableSampler
from autoencoder.model import SVGAutoencoder
from autoencoder.training import AutoencoderTrainConfig

FOR_TEST = "configs/autoencoder/pure/svg_autoencoder_P_dd_M_IN_stage1_bs64_256_gpu1_forTest"
NAME = FOR_TEST.rsplit("/", 1)[1]
TINY = [
    "model.params.embed_dim=32",
    "model.params.ddconfig={z_channels: 32, ch: 32, ch_mult: [1, 1, 1, 1, 1], num_res_blocks: 0}",
    "model.params.dinoconfig={weights: random, overrides: {embed_dim: 32, depth: 1, num_heads: 1}}",
    "model.params.lossconfig.params.disc_ndf=8",
    "model.params.lossconfig.params.disc_num_layers=2",
    "data.params.train_resol=64",
    "training.trainer.accelerator=cpu",
    "training.log_images_every_n_steps=1000",
]
PUBLISHED = {
    "stage1_bs64_256_gpu1_forTest": None,
    "stage1_bs64_256_woattn": (256, 64, None),
    "stage2_bs16_512_woattn": (512, 16, "stage1_bs64_256_woattn"),
    "stage3_bs3_1024_woattn": (1024, 3, "stage2_bs16_512_woattn"),
}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def manifest(tmp_path):
    """Seven images of different sizes: at 128 px some become landscape, some portrait, some square."""
    generator = np.random.default_rng(0)
    lines = []
    for i, (width, height) in enumerate([(90, 90), (200, 80), (80, 200), (128, 128), (70, 64), (256, 100), (150, 150)]):
        coarse = Image.fromarray(generator.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"path": f"{i}.png"}))
    path = tmp_path / "manifest.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def run(tmp_path, manifest):
    """run("key=value", ..., logdir=...) trains and returns the run's folder."""

    def run(*overrides, logdir="logs"):
        folder = tmp_path / logdir
        paths = [f"training.logdir={folder}", f"data.params.json_path={manifest}"]
        entry.main(["--config", FOR_TEST, "--devices", "1", *TINY, *paths, *overrides])
        return folder / NAME

    return run


def read(folder, step):
    return torch.load(folder / "checkpoints" / f"step_{step:07d}.ckpt", weights_only=True)


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}, events


def assert_equal(a, b, where=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def test_resumed_run_equals_uninterrupted_run(run, tmp_path):
    settings = [
        "training.trainer.max_steps=6",
        "training.save_every_n_train_steps=3",
        "training.accumulate_grad_batches=2",
        "training.lr_schedule=cosine",
        "training.warmup_steps=2",
        "model.params.lossconfig.params.disc_start=4",
        "model.params.ddconfig.dropout=0.1",
        "data.params.train_resol=128",
    ]
    whole = run(*settings)
    resumed = tmp_path / "resumed" / NAME
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "step_0000003.ckpt", resumed / "checkpoints")
    (resumed / "checkpoints" / "last.ckpt").symlink_to("step_0000003.ckpt")
    assert run(*settings, "data.params.num_workers=1", logdir="resumed") == resumed
    ours, theirs = read(resumed, 6), read(whole, 6)
    for part in ("state_dict", "optimizer_states", "ImageDataModule", "global_step"):
        assert_equal(ours[part], theirs[part], part)
    assert theirs["ImageDataModule"] == {"position": 6 * 2 * 2, "seed": 0}
    assert len(theirs["optimizer_states"]) == 2
    assert (whole / "checkpoints" / "last.ckpt").resolve().name == "step_0000006.ckpt"
    assert not list((whole / "checkpoints").glob("*.tmp"))


def test_run_logs_and_leaves_a_published_format_checkpoint(run, capsys):
    folder = run(
        "training.trainer.max_steps=4",
        "training.log_images_every_n_steps=2",
        "training.save_every_n_train_steps=2",
        "model.params.lossconfig.params.disc_start=5",
    )
    values, events = scalars(folder)
    assert set(values["train/rec_loss"]) == {1, 2, 3, 4}
    assert set(values["train/disc_loss"]) == {3, 4}  # steps 0-based: 2·2 + 1 ≥ 5
    assert set(values["train/g_loss"]) == {4}  # 2·3 ≥ 5
    assert values["train/lr"][1] == pytest.approx(1e-4)
    assert [image.step for image in events.Images("train/images")] == [2, 4]
    assert "step 4/4" in capsys.readouterr().out
    config = load_config(AutoencoderTrainConfig, folder / "config.yaml")
    first, last = (read(folder, step)["state_dict"] for step in (2, 4))
    assert {name.split(".")[0] for name in last} == {"encoder", "decoder", "loss"}
    moved = {name.rsplit(".", 1)[0].split(".")[0] for name in last if not torch.equal(first[name], last[name])}
    assert moved == {"decoder", "loss"}
    model = SVGAutoencoder.from_config(folder / "config.yaml", checkpoint=folder / "checkpoints" / "last.ckpt")
    assert model.channels == config.model.params.embed_dim


def test_encoder_stays_in_eval_mode_through_training_and_image_logging(run, monkeypatch):
    modes, frozen = [], entry.AutoencoderModule.training_step

    def watched(module, *arguments):
        modes.append((module.decoder.training, [part.training for part in module.encoder.modules()]))
        return frozen(module, *arguments)

    monkeypatch.setattr(entry.AutoencoderModule, "training_step", watched)
    run("training.trainer.max_steps=3", "training.log_images_every_n_steps=1")
    assert len(modes) == 3
    assert all(decoder and not any(encoder) for decoder, encoder in modes)


def test_it_learns(run):
    settings = ["training.trainer.max_steps=60", "training.log_every_n_steps=10", "model.base_learning_rate=0.003"]
    folder = run(*settings, "model.params.lossconfig.params.disc_weight=0", "training.lr_schedule=cosine")
    losses = scalars(folder)[0]["train/rec_loss"]
    assert losses[60] < 0.6 * losses[10]


def test_accumulation_equals_a_larger_batch(run):
    settings = ["training.trainer.max_steps=2", "model.params.lossconfig.params.disc_weight=0"]
    large = read(run(*settings, "data.params.batch_size=4", logdir="large"), 2)
    accumulated = ["data.params.batch_size=2", "training.accumulate_grad_batches=2"]
    small = read(run(*settings, *accumulated, logdir="small"), 2)
    for name, value in large["state_dict"].items():
        if name.startswith("decoder.") and name.endswith(".weight"):  # some biases have no gradient but rounding
            assert (value - small["state_dict"][name]).abs().mean() < 2e-6, name  # a step moves by up to 1e-4


def test_init_weight_takes_what_fits_and_names_the_rest(run, caplog):
    source = run("training.trainer.max_steps=1", logdir="first") / "checkpoints" / "last.ckpt"
    smaller = ["model.params.lossconfig.params.disc_ndf=4", f"model.init_weight={source}"]
    folder = run("training.trainer.max_steps=1", *smaller, "model.base_learning_rate=0", logdir="second")
    before, after = (
        torch.load(path, weights_only=True)["state_dict"] for path in (source, folder / "checkpoints/last.ckpt")
    )
    assert torch.equal(before["decoder.conv_in.weight"], after["decoder.conv_in.weight"])
    assert "loss.discriminator.main.0.weight" in caplog.text


def test_validation_and_the_imagenet_layout(run, tmp_path, manifest):
    for split in ("train", "val"):
        (tmp_path / "imagenet" / split / "n01").mkdir(parents=True)
        for i in range(3):
            Image.open(tmp_path / f"{i}.png").save(tmp_path / "imagenet" / split / "n01" / f"{i}.JPEG")

    def data(split, target):
        return f"{split}: {{target: ldm.data.imagenet.{target}, params: {{data_root: {tmp_path}/imagenet, size: 64}}}}"

    splits = f"{data('train', 'ImageNetTrain')}, {data('validation', 'ImageNetValidation')}"
    overrides = [*TINY[:5], *TINY[6:], f"training.logdir={tmp_path}/in", "training.trainer={max_epochs: 2}"]
    small = [f"data.params={{batch_size: 1, num_workers: 0, {splits}}}", "training.validate_every_n_steps=3"]
    small += ["model.params.lossconfig.params.perceptual_weight=0", "training.log_every_n_steps=1"]
    name = "svg_autoencoder_P_dd_M_IN_stage1_bs64_256_woattn"
    entry.main(["--config", f"configs/autoencoder/pure/{name}", "--devices", "1", *overrides, *small])
    values, _ = scalars(tmp_path / "in" / name)
    assert set(values["train/rec_loss"]) == set(range(1, 7))  # 2 epochs of 3
    assert set(values["val/rec_loss"]) == {3, 6}


def test_bf16_and_scaled_learning_rate(run):
    folder = run("training.trainer.max_steps=2", "training.trainer.precision=bf16-mixed", "training.scale_lr=true")
    values, _ = scalars(folder)
    assert values["train/lr"][1] == pytest.approx(2e-4)  # base 1e-4 × batch 2
    assert all(tensor.dtype != torch.bfloat16 for tensor in read(folder, 2)["state_dict"].values())


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
    ],
)
def test_bad_input_is_named_before_anything_is_written(run, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        run(*overrides)
    assert not (tmp_path / "logs").exists()


def test_a_used_folder_is_not_overwritten(run, tmp_path):
    folder = run("training.trainer.max_steps=1")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    for overrides, message in [
        (["resume=false"], "not empty and resume is false"),
        (["training.trainer.max_steps=2", "model.params.ddconfig.ch=64"], "does not fit the configured model"),
    ]:
        with pytest.raises(UserError, match=message):
            run(*overrides)
    run("training.trainer.max_steps=1")  # done already: says so and leaves
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    with pytest.raises(UserError, match=r"training.seed = 7.*started with 0"):
        run("training.trainer.max_steps=2", "training.seed=7")


def test_divergence_is_reported(run):
    with pytest.raises(UserError, match="diverged.*base_learning_rate"):
        run("training.trainer.max_steps=20", "model.base_learning_rate=1e30")


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path, files = tmp_path / "last.ckpt", entry.AtomicCheckpointIO()
    files.save_checkpoint({"state_dict": {"a": torch.ones(2)}}, path)

    def interrupted(checkpoint, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.save_checkpoint({"state_dict": {"a": torch.zeros(2)}}, path)
    assert torch.equal(files.load_checkpoint(path)["state_dict"]["a"], torch.ones(2))


def test_crops_depend_on_position_only(manifest):
    source = Manifest.open(manifest, require_captions=False)
    dataset = ImageDataset(source, aspect_buckets(128), seed=3)
    batches = {}
    for world_size in (1, 2):
        for rank in range(world_size):
            sampler = ResumableSampler(len(source), rank, world_size, 4, 5, 0, 3)
            for keys in BatchStream(sampler, 4 // world_size):
                batches.setdefault(world_size, {}).update({position: dataset[position, i] for position, i in keys})
    assert batches[1].keys() == batches[2].keys() == set(range(20))
    assert all(torch.equal(batches[1][position], batches[2][position]) for position in range(20))
    assert len({tuple(image.shape) for image in batches[1].values()}) > 1


def test_groups_keep_every_image():
    images = [torch.full((3, *size), float(i)) for i, size in enumerate([(16, 32), (32, 16), (16, 32), (32, 32)])]
    groups = group_by_size(images)
    assert [tuple(group.shape) for group in groups] == [(2, 3, 16, 32), (1, 3, 32, 16), (1, 3, 32, 32)]
    assert groups[0][:, 0, 0, 0].tolist() == [0, 2]


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
