"""The training step, on a network of a few thousand parameters through the entry."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from autoencoder.common.config import UserError, load_config
from autoencoder.images.files import aspect_buckets, crop_to_size, nearest_bucket, to_float, to_pil, to_uint8_tensor
from autoencoder.latents.statistics import LatentStats
from autoencoder.model import SVGAutoencoder
from autoencoder.training import run as entry
from autoencoder.training.batches import ManifestParams
from autoencoder.training.losses import LossConfig
from autoencoder.training.module import latent_noise
from autoencoder.training.settings import AutoencoderTrainConfig, TrainerConfig, TrainingConfig
from tests.bounds import check_bounds

pytestmark = pytest.mark.filterwarnings("ignore")

# All options at once
EVERYTHING = [
    "training.trainer.max_steps=6",
    "training.save_every_n_train_steps=3",
    "training.accumulate_grad_batches=2",
    "training.lr_schedule=cosine",
    "training.warmup_steps=2",
    "training.ema_decay=0.9",
    "training.latent_noise=0.3",
    "training.trainer.gradient_clip_val=1.0",
    "model.params.lossconfig.params.disc_start=4",
    "model.params.ddconfig.dropout=0.1",
    "data.params.train_resol=128",
    "data.params.batch_size=1",
]

TRAINING = {"trainer": TrainerConfig(max_steps=1)}


@pytest.fixture(scope="module")
def whole(shared_toy):
    """The folder of a run with all options and a residual branch, checkpoints at steps 3 and 6."""
    return shared_toy.run(*shared_toy.residual, *EVERYTHING)


def test_a_resumed_run_equals_an_uninterrupted_run(shared_toy, whole, assert_equal):
    toy, resumed = shared_toy, shared_toy.folder / "resumed" / shared_toy.name
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "step_0000003.ckpt", resumed / "checkpoints")
    (resumed / "checkpoints" / "last.ckpt").symlink_to("step_0000003.ckpt")
    assert toy.run(*toy.residual, *EVERYTHING, "data.params.num_workers=1", logdir="resumed") == resumed
    ours, theirs = toy.read(resumed, 6), toy.read(whole, 6)
    for part in ("state_dict", "ema_state_dict", "optimizer_states", "ImageDataModule", "global_step"):
        assert_equal(ours[part], theirs[part], part)
    content = theirs["ImageDataModule"].pop("content")
    assert theirs["ImageDataModule"] == {"position": 6 * 2, "seed": 0}
    assert re.fullmatch("[0-9a-f]{16}", content)
    assert len(theirs["optimizer_states"]) == 2
    assert (whole / "checkpoints" / "last.ckpt").resolve().name == "step_0000006.ckpt"
    ours, theirs = (toy.scalars(folder)[0] for folder in (resumed, whole))
    for tag in ("train/rec_loss", "train/disc_loss", "lr-Adam/decoder"):
        assert ours[tag] == {step: theirs[tag][step] for step in (4, 5, 6)}, tag


def test_a_folder_of_odd_files_trains(toy, odd_images, caplog):
    steps = ["training.trainer.max_steps=2", "data.params.batch_size=10", "data.params.max_aspect=1"]
    folder = toy.run(f"data.params.json_path={odd_images}", *steps, logdir="odd")
    assert toy.read(folder, 2)["global_step"] > 0
    (line,) = (folder / "unusable.jsonl").read_text().splitlines()
    assert "damaged.jpg: not a readable image" in json.loads(line)["reason"]
    assert "1 unusable samples were replaced: 1 × not a readable image; all are listed in" in caplog.text
    assert "THE DATA CHANGED" not in caplog.text
    (odd_images / "bilevel.png").unlink()
    toy.run(f"data.params.json_path={odd_images}", "training.trainer.max_steps=3", *steps[1:], logdir="odd")
    assert f"THE DATA CHANGED: {odd_images} lists other images" in caplog.text


def test_everything_is_trained_averaged_and_loaded(shared_toy, whole):
    first, last = (shared_toy.read(whole, step) for step in (3, 6))
    state, average = last["state_dict"], last["ema_state_dict"]
    assert {name.split(".")[0] for name in state} == {"encoder", "extra_vit", "decoder", "loss"}
    moved = {name.split(".")[0] for name, value in state.items() if not torch.equal(first["state_dict"][name], value)}
    assert moved == {"extra_vit", "decoder", "loss"}
    assert not torch.equal(first["state_dict"]["extra_vit.freqs"], state["extra_vit.freqs"])
    assert average.keys() == {name for name in state if name.startswith(("decoder.", "extra_vit."))}
    for use_ema in (False, True):
        model = SVGAutoencoder.from_config(
            whole / "config.yaml", whole / "checkpoints" / "last.ckpt", overrides=[f"model.params.use_ema={use_ema}"]
        )
        model.save_pretrained(shared_toy.folder / "saved")
        for loaded in (model, SVGAutoencoder.from_pretrained(shared_toy.folder / "saved")):
            for name, value in loaded.state_dict().items():
                assert torch.equal(value, (average if use_ema and name in average else state)[name]), name
    values, _ = shared_toy.scalars(whole)
    assert set(values["train/grad_norm_decoder"]) == set(range(1, 7))
    assert set(values["train/grad_norm_discriminator"]) == {3, 4, 5, 6}
    rates = {n: 1e-4 * min(1, n / 2) * (0.5 + 0.5 * math.cos(math.pi * (n - 1) / 6)) for n in range(1, 7)}
    assert values["lr-Adam/decoder"] == pytest.approx(rates)  # one value a step, of two micro-batches
    assert values["lr-Adam-1/discriminator"] == pytest.approx(rates)
    assert last["optimizer_states"][1]["param_groups"][0]["lr"] == pytest.approx(rates[6])  # is what Adam used


def test_run_logs_and_leaves_a_published_format_checkpoint(toy, capsys):
    folder = toy.run(
        "training.trainer.max_steps=4",
        "training.log_images_every_n_steps=2",
        "training.save_every_n_train_steps=2",
        "model.params.lossconfig.params.disc_start=5",
        "training.warmup_steps=4",
    )
    values, events = toy.scalars(folder)
    assert set(values["train/rec_loss"]) == {1, 2, 3, 4}
    assert set(values["train/disc_loss"]) == {3, 4}  # steps 0-based: 2·2 + 1 ≥ 5
    assert set(values["train/g_loss"]) == {4}  # 2·3 ≥ 5
    assert values["lr-Adam/decoder"] == pytest.approx({1: 2.5e-5, 2: 5e-5, 3: 7.5e-5, 4: 1e-4})
    assert [image.step for image in events.Images("train/images")] == [1, 2, 4]
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [(line[1], line[line.index("lr") + 1]) for line in lines] == [
        ("1/4", "2.5e-05"), ("2/4", "5e-05"), ("3/4", "7.5e-05"), ("4/4", "0.0001")
    ]  # fmt: skip
    config = load_config(AutoencoderTrainConfig, folder / "config.yaml")
    first, last = (toy.read(folder, step)["state_dict"] for step in (2, 4))
    assert {name.split(".")[0] for name in last} == {"encoder", "decoder", "loss"}
    moved = {name.rsplit(".", 1)[0].split(".")[0] for name in last if not torch.equal(first[name], last[name])}
    assert moved == {"decoder", "loss"}
    model = SVGAutoencoder.from_config(folder / "config.yaml", checkpoint=folder / "checkpoints" / "last.ckpt")
    assert model.channels == config.model.params.embed_dim
    with pytest.raises(UserError, match="no averaged weights.*leave out model.params.use_ema"):
        SVGAutoencoder.from_config(
            folder / "config.yaml", folder / "checkpoints" / "last.ckpt", overrides=["model.params.use_ema=true"]
        )


def test_encoder_stays_in_eval_mode_through_training_and_image_logging(toy, monkeypatch):
    modes, frozen = [], entry.AutoencoderModule.training_step

    def watched(module, *arguments):
        modes.append((module.decoder.training, [part.training for part in module.encoder.modules()]))
        return frozen(module, *arguments)

    monkeypatch.setattr(entry.AutoencoderModule, "training_step", watched)
    toy.run("training.trainer.max_steps=3", "training.log_images_every_n_steps=1")
    assert len(modes) == 3
    assert all(decoder and not any(encoder) for decoder, encoder in modes)


def test_it_learns(toy):
    settings = ["training.trainer.max_steps=40", "training.log_every_n_steps=10", "model.base_learning_rate=0.003"]
    folder = toy.run(*settings, "model.params.lossconfig.params.disc_weight=0", "training.lr_schedule=cosine")
    losses = toy.scalars(folder)[0]["train/rec_loss"]
    assert losses[40] < 0.6 * losses[10]


def test_accumulation_equals_a_larger_batch(toy):
    settings = ["training.trainer.max_steps=2", "model.params.lossconfig.params.disc_weight=0"]
    large = toy.read(toy.run(*settings, "data.params.batch_size=4", logdir="large"), 2)
    accumulated = ["data.params.batch_size=2", "training.accumulate_grad_batches=2"]
    small = toy.read(toy.run(*settings, *accumulated, logdir="small"), 2)
    for name, value in large["state_dict"].items():
        if name.startswith("decoder.") and name.endswith(".weight"):  # some biases have no gradient but rounding
            assert (value - small["state_dict"][name]).abs().mean() < 2e-6, name  # a step moves by up to 1e-4


def test_validation_measures_the_averaged_weights(toy):
    data = [f"data.params.val_json_path={toy.manifest}", "data.params.train_resol=128", "data.params.batch_size=3"]
    settings = ["training.trainer.max_steps=4", "training.validate_every_n_steps=2", "training.ema_decay=0.9"]
    folder = toy.run(*data, *settings, "model.base_learning_rate=0.01")
    values, _ = toy.scalars(folder)
    assert set(values["val/psnr"]) == set(values["val/rec_loss"]) == {2, 4}
    assert "val/lpips" not in values  # no LPIPS network in this run
    model = SVGAutoencoder.from_config(
        folder / "config.yaml", folder / "checkpoints" / "last.ckpt", overrides=["model.params.use_ema=true"]
    )
    expected = []
    for line in toy.manifest.read_text().splitlines():
        image = Image.open(toy.folder / json.loads(line)["path"]).convert("RGB")
        image = crop_to_size(image, nearest_bucket(image.size, aspect_buckets(128)))
        with torch.no_grad():
            recon = to_pil(model.decode(model.encode(to_float(to_uint8_tensor(image))[None]))[0])
        pair = np.array(image), np.array(recon)
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        ssim = structural_similarity(*pair, data_range=255, channel_axis=2, **settings)
        expected.append([peak_signal_noise_ratio(*pair, data_range=255), ssim])
    psnr, ssim = np.mean(expected, axis=0)
    assert values["val/psnr"][4] == pytest.approx(psnr, rel=1e-4)
    assert values["val/ssim"][4] == pytest.approx(ssim, rel=1e-2)  # they treat the border differently


def test_noise_is_of_the_given_scale_and_belongs_to_positions():
    latents, scale = torch.zeros(1, 3, 40, 40), torch.tensor([1.0, 2.0, 4.0])
    noise = torch.cat([latent_noise(latents, [position], 0.5, 7, scale) for position in range(400)])
    torch.testing.assert_close(latent_noise(latents.expand(3, -1, -1, -1), [5, 2, 9], 0.5, 7, scale), noise[[5, 2, 9]])
    assert not torch.equal(latent_noise(latents, [5], 0.5, 8, scale), noise[5:6])
    deviations = noise.flatten(2).std(2)  # (400, 3): σ per image, times the scale
    torch.testing.assert_close(deviations / deviations[:, :1], (scale / scale[0]).expand(400, 3), rtol=0.2, atol=0)
    sigmas = deviations[:, 0].double().numpy()
    assert scipy.stats.kstest(sigmas, scipy.stats.halfnorm(scale=0.5).cdf).pvalue > 0.01


def test_noise_is_measured_in_statistics_of_these_latents(toy):
    LatentStats(torch.zeros(32), torch.ones(32)).save(toy.folder / "own.safetensors")
    LatentStats(torch.zeros(32), torch.ones(32), encoder="another").save(toy.folder / "other.safetensors")
    noise = ["training.trainer.max_steps=1", "training.latent_noise=0.5"]
    toy.run(*noise, f"training.latent_stats={toy.folder}/own.safetensors")
    with pytest.raises(UserError, match="measured on another encoder"):
        toy.run(*noise, f"training.latent_stats={toy.folder}/other.safetensors", logdir="other")


def test_divergence_is_reported(toy):
    with pytest.raises(UserError, match="diverged.*base_learning_rate"):
        toy.run("training.trainer.max_steps=20", "model.base_learning_rate=1e30")


@pytest.mark.parametrize(
    ("section", "others", "name", "allowed", "refused"),
    [
        *((TrainerConfig, {"max_steps": 1}, name, [1], [0]) for name in ("devices", "num_nodes", "max_epochs")),
        (TrainerConfig, {}, "max_steps", [1], [0, None]),
        (TrainerConfig, {"max_steps": 1}, "gradient_clip_val", [None, 0.5], [0.0]),
        *(
            (TrainingConfig, TRAINING, name, [1], [0])
            for name in (
                "accumulate_grad_batches", "save_every_n_train_steps", "save_every_n_epochs", "keep_last_k",
                "log_every_n_steps", "log_images_every_n_steps", "validate_every_n_steps",
            )
        ),
        (TrainingConfig, TRAINING, "warmup_steps", [0], [-1]),
        (TrainingConfig, TRAINING, "ema_decay", [None, 0.5], [0.0, 1.0]),
        (TrainingConfig, TRAINING, "latent_noise", [0.0, 0.5], [-0.5, math.inf]),
        (TrainingConfig, TRAINING, "latent_stats", [None], ["stats.pt"]),  # it gives latent_noise its units
        (ManifestParams, {"json_path": "x", "train_resol": 64}, "batch_size", [1], [0]),
        (ManifestParams, {"json_path": "x", "train_resol": 64, "batch_size": 1}, "num_workers", [0], [-1]),
        (ManifestParams, {"json_path": "x", "train_resol": 64, "batch_size": 1}, "bucket_window", [1], [0]),
        *((LossConfig, {}, name, [0], [-1]) for name in ("disc_start", "disc_weight", "disc_factor")),
        (LossConfig, {}, "perceptual_weight", [0], [-1]),
    ],
)  # fmt: skip
def test_bounds_are_allowed_and_what_lies_beyond_is_refused(section, others, name, allowed, refused):
    check_bounds(section, others, name, allowed, refused)


def test_noise_stays_that_of_earlier_runs():
    """Numbers that must not change, from (seed, position)."""
    noise = latent_noise(torch.zeros(2, 1, 1, 3), [0, 10**6], tau=0.5, seed=3)
    expected = [
        [-0.43576937913894653, -0.8406950235366821, -0.6074478030204773],
        [0.40401533246040344, -0.4164781868457794, 0.3254883885383606],
    ]
    torch.testing.assert_close(noise.flatten(1), torch.tensor(expected))
