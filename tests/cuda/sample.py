"""Sampling with guidance at full size on a pretended device: prints the memory of each stage, as JSON.

python tests/cuda/sample.py 1024 1 resident|offload
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fake_cuda  # first: it loads what torch must find

import torch  # isort: skip
from networks import gemma, make_autoencoder
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.sampling.conditioning import encode_prompts
from svg_t2i.sampling.denoising import denoise
from svg_t2i.sampling.networks import stage
from svg_t2i.sampling.options import PRESETS
from svg_t2i.transformer.model import build_model


def main(side: int, images: int, how: str) -> dict[str, object]:
    autoencoder = make_autoencoder()
    fake_cuda.pretend(devices=1)
    options, cells = replace(PRESETS["stage4"], system_prompt="empty"), side // 16
    mode = fake_cuda.FakeCuda()
    with mode, torch.no_grad():
        text_encoder = gemma()
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            transformer = build_model("NextDiT_2B_GQA_patch1_Adaln_Refiner")
        torch.set_default_dtype(torch.float32)
        parts = fake_cuda.on_device(autoencoder), transformer, text_encoder.model, text_encoder.tokenizer
        pipeline = SVGT2IPipeline(*parts, sampling=options)
        del transformer, parts
        if how == "offload":
            pipeline.enable_model_cpu_offload(device="cuda")
        networks = pipeline.networks
        gc.collect()
        resident = mode.now
        mode.clear()
        mode.phase = "encode"
        conditions = encode_prompts(networks, ["150 tokens"] * images, options)
        latents = [torch.zeros(384, cells, cells, device="cuda") for _ in range(images)]
        mode.phase = "denoise"
        mode.down.clear()
        mode.kernels.clear()
        solved = []

        def on_step(step: int, t: float, group: list[torch.Tensor], rows: list[int]) -> None:
            solved[:] = group
            if step == 2:
                raise StopIteration  # all steps are alike

        with stage("denoising"):
            try:
                denoise(networks.transformer, latents, conditions, options, on_step=on_step)
            except StopIteration:
                down = dict(mode.down)
        mode.phase = "decode"
        gc.collect()
        with stage("decoding"), torch.autocast("cuda", torch.bfloat16):
            for x in solved:
                networks.autoencoder.decode(networks.autoencoder.denormalize(x[None]))
    return {"resident": round(resident / fake_cuda.GB, 2), **mode.report(), "down": down}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
