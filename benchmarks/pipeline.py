"""Time whole calls of the pipeline, prompt to image, in each way to take less memory or fewer evaluations.

    python -m benchmarks.pipeline                      # a small model on a CPU
    python -m benchmarks.pipeline --device cuda        # the 2.6B model at 1024 px, 50 steps with guidance

Weights are random, so it is times and memory that are compared, not pictures. On a GPU: bf16, a text model of
Gemma-2-2b's size, the most memory of a call, and beside it what `svg_t2i.plan` expects.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass, replace

import torch

from autoencoder.common.config import REPO_ROOT, load_config
from benchmarks.forward import randomise
from benchmarks.networks import SMALL_DECODER, random_autoencoder, random_text_encoder
from svg_t2i.loading.quantization import quantize
from svg_t2i.pipeline import SVGT2IPipeline, set_verbosity
from svg_t2i.planning.gpus import find_gpu, tensors_within
from svg_t2i.planning.sampling import SamplingPlan, plan_sampling
from svg_t2i.sampling.options import SamplingOptions
from svg_t2i.training.settings import TrainConfig
from svg_t2i.transformer.config import MODELS, PUBLISHED, DiTConfig
from svg_t2i.transformer.model import SVGDiT

PROMPT = " ".join(["word"] * 149)  # 150 tokens


@dataclass(frozen=True)
class Way:
    """How calls are made. quantization: kind of the weights. offload: networks take turns on the device."""

    name: str
    quantization: str | None = None
    offload: bool = False
    preset: str | None = None


WAYS = [
    Way("all networks on the device"),
    Way("preset fast", preset="fast"),
    Way("int8 weights", quantization="int8"),
    Way("networks taking turns", offload=True),
    Way("int8 weights, networks taking turns", quantization="int8", offload=True),
    Way("8-bit products (fp8_dynamic)", quantization="fp8_dynamic"),
]


def make_pipeline(way: Way, device: torch.device, options: SamplingOptions) -> SVGT2IPipeline:
    """The networks of the recipe on a GPU, small ones on a CPU."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    small = DiTConfig(dim=192, n_layers=4, n_heads=4, n_kv_heads=2, axes_dims=(16, 16, 16), in_channels=64,
                      cap_feat_dim=256)  # fmt: skip
    config = MODELS[PUBLISHED] if gpu else small
    with device:
        transformer = SVGDiT(config)
    randomise(transformer)
    overrides = {} if gpu else {"overrides": {"embed_dim": 64, "depth": 1, "num_heads": 1}}
    autoencoder = random_autoencoder(config.in_channels, {} if gpu else SMALL_DECODER, **overrides)
    text_encoder = random_text_encoder(device, dtype, small=not gpu)
    parts = autoencoder.to(device), transformer.to(dtype), text_encoder.model, text_encoder.tokenizer
    pipeline = SVGT2IPipeline(*parts, sampling=options)
    pipeline.set_progress_bar_config(disable=True)
    if way.quantization:
        quantize(way.quantization, pipeline.transformer, pipeline.text_encoder)
    if way.offload:
        pipeline.enable_model_cpu_offload(device=device)
    return pipeline


def measure(way: Way, device: torch.device, options: SamplingOptions, repeats: int) -> tuple[float, int, int]:
    """-> seconds of a call (the median), captions that went through the transformer in it, most bytes of tensors."""
    pipeline, evaluations = make_pipeline(way, device, options), 0

    def count(_: object, arguments: tuple) -> None:
        nonlocal evaluations
        evaluations += len(arguments[1].lengths)

    def call(steps: int | None = None) -> float:
        start = time.perf_counter()
        pipeline(PROMPT, seed=0, preset=way.preset, num_inference_steps=steps, output_type="pt")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    call(steps=3)  # warms up
    handle = pipeline.transformer.layers[0].register_forward_pre_hook(count)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seconds = sorted(call() for _ in range(repeats))[repeats // 2]
    handle.remove()
    return seconds, evaluations // repeats, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def planned_bytes(way: Way, plan: SamplingPlan) -> float | None:
    """What the plan expects of tensors; None of ways that it does not know."""
    if way.quantization not in (None, "int8") or way.preset:
        return None
    peaks = plan.in_8_bits if way.quantization else (plan.resident, plan.taking_turns)
    return tensors_within(peaks[way.offload])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, help="pixels; 1024 on a GPU, else 128")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    set_verbosity(False)
    device = torch.device(arguments.device)
    gpu = device.type == "cuda"
    side = arguments.side or (1024 if gpu else 128)
    options = replace(SamplingOptions(), height=side, width=side, num_inference_steps=arguments.steps,
                      system_prompt="empty")  # fmt: skip
    config = load_config(TrainConfig, REPO_ROOT / "configs" / "svg_t2i" / "stage4_sft.yaml")
    plan = plan_sampling(config, find_gpu("h100"), side) if gpu else None
    print(f"One image of {side} px, {arguments.steps} steps with guidance, torch {torch.__version__}")
    for way in WAYS:
        if way.quantization == "fp8_dynamic" and not (gpu and torch.cuda.get_device_capability(device) >= (8, 9)):
            print(f"{way.name}: needs a GPU of compute capability 8.9", flush=True)
            continue
        seconds, evaluations, peak = measure(way, device, options, arguments.repeats)
        planned = planned_bytes(way, plan) if plan else None
        memory = f", {peak / 2**30:.1f} GiB" if gpu else ""
        memory += f" (planned: {planned / 2**30:.1f})" if planned else ""
        print(f"{way.name}: {seconds:.2f} s, {evaluations} evaluations{memory}", flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
