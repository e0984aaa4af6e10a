"""A step of stage 1 at full size on a pretended device: prints the memory of each player's turn, as JSON.

python tests/cuda/autoencoder.py IMAGES SIDE fp32|bf16
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fake_cuda  # first: it loads what torch must find

import torch  # isort: skip
from autoencoder.evaluation.metrics import lpips_network
from autoencoder.training.losses import AutoencoderLoss, LossConfig
from networks import make_autoencoder


def main(images: int, side: int, precision: str) -> dict[str, object]:
    autoencoder, loss = make_autoencoder(), AutoencoderLoss(LossConfig(), lpips_network()).train()
    trained = [*autoencoder.decoder.parameters(), *loss.discriminator.parameters()]
    names = {id(weight) for weight in trained}
    fake_cuda.pretend(devices=1)
    mode = fake_cuda.FakeCuda()
    with mode:
        for module in (autoencoder, loss):
            for weight in module.parameters():
                weight.requires_grad_(id(weight) in names)
            fake_cuda.on_device(module)
        optimizer = [torch.zeros_like(weight) for weight in (*autoencoder.decoder.parameters(),) for _ in range(2)]
        optimizer += [torch.zeros_like(weight) for weight in loss.discriminator.parameters() for _ in range(2)]
        gc.collect()
        static = mode.now
        mode.clear()
        batch = torch.zeros(images, 3, side, side, device="cuda")
        latents = torch.zeros(images, 384, side // 16, side // 16, device="cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            mode.phase = "decoder"
            recons = [autoencoder.decoder(latents)]
            total, _ = loss.generator_loss([batch], recons, autoencoder.decoder.last_layer, 10_000)
        total.backward()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            mode.phase = "discriminator"
            other, _ = loss.discriminator_loss([batch], recons, 10_001)
        other.backward()
        gc.collect()
    return {"static": round(static / fake_cuda.GB, 3), **mode.report()}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
