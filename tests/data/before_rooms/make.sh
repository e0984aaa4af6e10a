#!/usr/bin/env bash
# How files.tar.xz was made, with the code of commit 314ce1e; see README.md.
set -euo pipefail
python - <<'PYTHON'
import json
import numpy as np
import torch
import yaml
from pathlib import Path
from PIL import Image
from autoencoder.model import SVGAutoencoder
from svg_t2i.text import make_toy_text_encoder

rng, samples = np.random.default_rng(0), []
for split in ("images/train/a", "images/val/a"):
    Path(split).mkdir(parents=True)
for i, size in enumerate([(64, 64), (96, 48), (64, 64), (48, 96), (64, 64)]):
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.NEAREST)
    image.save(f"images/train/a/{i}.png")
    samples.append({"path": f"images/train/a/{i}.png", "prompt": f"{'very ' * (i % 3)}much noise number {i}"})
image.save("images/val/a/0.JPEG", quality=90)
image.save("images/train/a/5.JPEG", quality=90)  # the release's image folders hold .JPEG
Path("manifest.jsonl").write_text("\n".join(map(json.dumps, samples)) + "\n")
make_toy_text_encoder([sample["prompt"] for sample in samples], "text_encoder", hidden_size=32, layers=2)

params = {
    "embed_dim": 8,
    "ddconfig": {"z_channels": 8, "ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 0},
    "dinoconfig": {"weights": "random", "overrides": {"embed_dim": 8, "depth": 1, "num_heads": 1}},
}
torch.manual_seed(0)
autoencoder = SVGAutoencoder.from_config({"model": {"params": params}})
decoder = autoencoder.decoder.state_dict()
for name, tensor in decoder.items():  # 3 of 32 channels live; the others stay exactly zero and compress to nothing
    if tensor.ndim == 4:
        tensor *= 3
        for axis, size in enumerate(tensor.shape[:2]):
            if size == 32:
                tensor.narrow(axis, 3, 29).zero_()
    elif "norm" not in name:
        tensor.zero_()
torch.save({f"decoder.{name}": tensor for name, tensor in decoder.items()}, "start.pth")

def write(path, model, loss, data):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    losses = {"perceptual_weight": 0.0, "disc_start": 1, "disc_num_layers": 1, "disc_ndf": 4}
    config = {
        "training": {
            "logdir": "logs", "ema_decay": 0.5, "save_every_n_train_steps": 1, "image_logger_type": "none",
            "log_every_n_steps": 1, "trainer": {"max_steps": 2, "devices": 1, "accelerator": "cpu"},
        },
        "model": {
            "base_learning_rate": 1e-3, "target": model, "init_weight": "start.pth",
            "params": {**params, "lossconfig": {"target": loss, "params": losses}},
        },
        "data": data,
    }
    Path(path).write_text(yaml.safe_dump(config, sort_keys=False))

manifest = {"batch_size": 2, "train_resol": 64, "json_path": "manifest.jsonl"}
squares = {
    "batch_size": 2,
    "train": {"target": "ldm.data.imagenet.ImageNetTrain", "params": {"data_root": "images", "size": 64}},
    "validation": {"target": "ldm.data.imagenet.ImageNetValidation", "params": {"data_root": "images", "size": 64}},
}
own = "autoencoder.model.SVGAutoencoder", "autoencoder.losses.AutoencoderLoss"
write("stage1.yaml", *own, {"target": "autoencoder.data.ManifestParams", "params": manifest})
write("targets/own_manifest.yaml", *own, {"target": "autoencoder.data.ManifestParams", "params": manifest})
write("targets/own_folder.yaml", *own, {"target": "autoencoder.data.FolderParams", "params": squares})
write(
    "targets/published_native.yaml",
    "ldm.models.dinov3_decoder_native_resolution.DinoDecoder",
    "ldm.modules.losses.LPIPSWithDiscriminatorDecoder",
    {"target": "utils.data_module_allinone.DataModuleFromConfigJson", "params": manifest},
)
write(
    "targets/published_imagenet.yaml",
    "ldm.models.dinov3_decoder_imagenet.DinoDecoder",
    "ldm.modules.losses.LPIPSWithDiscriminatorDecoderIN",
    {"target": "utils.data_module_allinone.DataModuleFromConfig", "params": squares},
)

config = {
    "model": "tiny",
    "model_overrides": {
        "dim": 12, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "axes_dims": [2, 2, 2], "multiple_of": 12,
        "ffn_dim_multiplier": 0.25,
    },
    "results_dir": "results",
    "data": {"path": "manifest.jsonl", "resolution": 64, "num_workers": 0, "crops_per_image": 1},
    "train": {
        "max_steps": 2, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "log_every": 1,
        "ckpt_every": 2, "ema_decay": 0.5,
    },
    "optim": {"lr": 1e-2, "eps": 1e-6},
    "autoencoder": {
        "config": "logs/stage1/config.yaml",
        "checkpoint": "logs/stage1/checkpoints/last.ckpt",
        "stats": "latent_stats.safetensors",
    },
    "text_encoder": {"path": "text_encoder"},
}
Path("dit.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
PYTHON

python -m autoencoder.train --config stage1.yaml
python -m autoencoder.measure_latents logs/stage1/config.yaml --checkpoint logs/stage1/checkpoints/last.ckpt \
    --data manifest.jsonl --resolution 64 --output latent_stats.safetensors
python -m svg_t2i.train --config dit.yaml
python -m svg_t2i.cache_features --config dit.yaml data.feature_cache=cache --shard-size 3
python -m svg_t2i.export results exported
python -c "
from svg_t2i.pipeline import SVGT2IPipeline
SVGT2IPipeline.from_pretrained('results').save_pretrained('pipeline')"

rm -r logs/stage1/events* logs/stage1/hparams.yaml logs/stage1/checkpoints/step_0000001.ckpt \
    results/tensorboard latent_stats.png
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=2026-11-26 --mode=u+rw,go+r -cJf ../files.tar.xz *
