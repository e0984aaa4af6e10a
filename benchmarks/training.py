"""Time whole optimiser steps of ours against diffusers' Lumina2Transformer2DModel, in one process.

Both have the same sizes and weights and see the same latents and captions; a step is noise, forward, loss, backward,
gradient clipping, fused AdamW and one running average. The peer gets captions padded to the longest and a mask, as it
wants them. Steps alternate, so that a busy machine slows all alike. Timings are medians.

    python -m benchmarks.training                # two small models, CPU, uniform and ragged captions
    python -m benchmarks.training --compile      # compiled blocks against eager ones, too
    python -m benchmarks.training --device cuda --model NextDiT_2B_GQA_patch1_Adaln_Refiner \
        --pixels 1024 --batch 2 --compile [--live] [--peer none] [--profile]   # model FLOP utilisation on a GPU

Models of the table of sizes take turns case by case, not step by step: two of them do not fit one GPU. With
--checkpointing the peer recomputes its blocks as well, each as a whole.

On a GPU every measured step of ours runs under torch.cuda.set_sync_debug_mode("error"): one that waited for the device
would end the benchmark. --live adds steps that begin with images and captions: DINOv3 ViT-S+/16 and a model of
Gemma-2-2b's size, both with random weights, encode them.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from diffusers import Lumina2Transformer2DModel
from torch import Tensor

from autoencoder.common.processes import World
from benchmarks.forward import lumina2_peer, ragged_lengths, randomise, timings
from benchmarks.networks import SMALL_DECODER, random_autoencoder, random_text_encoder
from svg_t2i.data.settings import DataConfig
from svg_t2i.data.sources import TrainBatch
from svg_t2i.features.frozen import FrozenNetworks, MicroBatch
from svg_t2i.features.settings import AutoencoderSource
from svg_t2i.training.monitor import Meter
from svg_t2i.training.settings import LoopConfig, ParallelConfig, TrainConfig
from svg_t2i.training.sharding import compiled_graphs, parallelize
from svg_t2i.training.step import FlowObjective, TrainState, train_step
from svg_t2i.transformer.config import MODELS, DiTConfig
from svg_t2i.transformer.flops import peak_tflops, training_flops
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.transformer.packing import TextFeatures

UNIFORM_TOKENS = 128


class Ready:
    """Stands in for the frozen networks: micro-batches come encoded."""

    @staticmethod
    def prepare(batches: list[MicroBatch], *_: object) -> Iterator[MicroBatch]:
        return iter(batches)


class Ours:
    """The training step of this project on one batch."""

    def __init__(self, model: SVGDiT, options: argparse.Namespace, world: World, compile: bool = False):
        self.config = TrainConfig(
            model="benchmark",
            results_dir="unused",
            data=DataConfig(path="unused", resolution=options.pixels),
            train=LoopConfig(1, options.batch, options.batch, precision=options.precision),
            autoencoder=AutoencoderSource(config="unused"),
            parallel=ParallelConfig(activation_checkpointing=options.checkpointing, compile=compile),
        )
        self.world = world
        objective = FlowObjective(model, self.config)
        self.objective = parallelize(objective, self.config.parallel, options.precision, world)
        self.state = TrainState.start(model, self.config)
        self.meter = Meter(world, self.config, model.config)

    def step(self, batch: MicroBatch | TrainBatch, frozen: FrozenNetworks | type[Ready] = Ready) -> None:
        train_step(self.state, self.objective, [batch], frozen, self.config, self.world, self.meter)


class Peer:
    """The same step around Lumina2Transformer2DModel."""

    def __init__(self, model: Lumina2Transformer2DModel, options: argparse.Namespace, compile: bool = False):
        self.model, self.precision = model, options.precision
        if options.checkpointing != "none":
            model.enable_gradient_checkpointing()  # of whole blocks
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.95), eps=1e-15, fused=True)
        self.ema = [weight.detach().clone() for weight in model.parameters()]
        if compile:
            for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
                block.compile(dynamic=True)

    def step(self, clean: Tensor, captions: Tensor, mask: Tensor) -> None:
        """clean (B, C, h, w), captions (B, L, D), mask (B, L)."""
        timesteps, noise = torch.rand(len(clean), device=clean.device), torch.randn_like(clean)
        t = timesteps[:, None, None, None]
        with torch.autocast(clean.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            velocity = self.model(t * clean + (1 - t) * noise, timesteps, captions, mask, return_dict=False)[0]
        (velocity.float() - (clean - noise)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 2.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, list(self.model.parameters()), 1e-4)


class Batch:
    """The same samples as each side wants them: latents of square images, captions of these lengths."""

    def __init__(self, model: SVGDiT, options: argparse.Namespace, lengths: tuple[int, ...], device: torch.device):
        side, config = options.pixels // 16, model.config
        self.lengths = lengths
        self.image_tokens = [(side // config.patch_size) ** 2] * len(lengths)
        self.clean = torch.randn(len(lengths), config.in_channels, side, side, device=device)
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        self.captions, self.mask = torch.randn(*mask.shape, config.cap_feat_dim, device=device), mask.to(device)
        tokens, sizes = model.pack(self.clean)
        positions = torch.arange(len(lengths), device=device)
        text = TextFeatures.from_padded(self.captions, mask)
        self.packed = MicroBatch(tokens, sizes, positions, torch.full_like(positions, options.pixels), text)
        longest = TextFeatures(self.captions.flatten(0, 1), (max(lengths),) * len(lengths))
        self.padded = replace(self.packed, text=longest)  # our step, paying for padding

    def operations(self, config: DiTConfig) -> int:
        """Useful ones of a step."""
        return training_flops(config, self.image_tokens, self.lengths)


def frozen_networks(options: argparse.Namespace, channels: int, device: torch.device) -> FrozenNetworks:
    """DINOv3 ViT-S+/16 and a text model of Gemma-2-2b's size, with random weights."""
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    autoencoder, text_encoder = random_autoencoder(channels, SMALL_DECODER), random_text_encoder(device, dtype)
    return FrozenNetworks(autoencoder.to(device), text_encoder, cache_tokens=0, precision=options.precision)


def live_batch(options: argparse.Namespace, lengths: tuple[int, ...]) -> TrainBatch:
    """Images and captions of about these lengths, on the host."""
    images = torch.randint(0, 256, (len(lengths), 3, options.pixels, options.pixels), dtype=torch.uint8)
    if torch.cuda.is_available():
        images = images.pin_memory()
    captions = tuple(" ".join(["word"] * (length - 1)) for length in lengths)
    positions = torch.arange(len(lengths))
    return TrainBatch((images,), captions, positions, torch.full_like(positions, options.pixels))


def checked(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The step, failing where it compiles once more or waits for a GPU."""

    def run() -> None:
        graphs = compiled_graphs()
        step()
        if compiled_graphs() != graphs:
            raise RuntimeError(f"{compiled_graphs() - graphs} graphs were compiled after the first step")

    def run_on_gpu() -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run_on_gpu if device.type == "cuda" else run


def model_sizes(options: argparse.Namespace) -> DiTConfig:
    if options.model is not None:
        return replace(MODELS[options.model], in_channels=options.channels)
    heads = options.dim // 32
    return DiTConfig(
        dim=options.dim, n_layers=options.layers, n_heads=heads, n_kv_heads=max(1, heads // 3), axes_dims=(8, 12, 12),
        in_channels=options.channels, cap_feat_dim=256,
    )  # fmt: skip


def random_model(sizes: DiTConfig, device: torch.device) -> SVGDiT:
    """The same weights at every call."""
    with device:
        model = SVGDiT(sizes)
    randomise(model)
    return model


def our_cases(
    sizes: DiTConfig, batch: Batch, options: argparse.Namespace, device: torch.device, compile: bool
) -> dict[str, Callable[[], None]]:
    """Steps of the model, by the name of the case."""
    trainer = Ours(random_model(sizes, device), options, World(device=device), compile)
    start = time.perf_counter()
    trainer.step(batch.packed)  # compiles, which waits for the device
    if compile:
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    cases = {"ours, compiled" if compile else "ours": lambda: trainer.step(batch.packed)}
    if not compile and len(set(batch.lengths)) > 1:
        cases["ours, padded"] = lambda: trainer.step(batch.padded)
    if options.live and compile == options.compile:
        frozen, live = frozen_networks(options, sizes.in_channels, device), live_batch(options, batch.lengths)
        cases["ours, encoding live"] = lambda: trainer.step(live, frozen)
    return {name: checked(step, device) for name, step in cases.items()}


def peer_cases(
    sizes: DiTConfig, batch: Batch, options: argparse.Namespace, device: torch.device, compile: bool
) -> dict[str, Callable[[], None]]:
    """Steps of the peer with the same weights."""
    peer = Peer(lumina2_peer(random_model(sizes, device)), options, compile)
    name = "diffusers, compiled" if compile else "diffusers"
    return {name: lambda: peer.step(batch.clean, batch.captions, batch.mask)}


Make = Callable[[DiTConfig, Batch, argparse.Namespace, torch.device, bool], dict[str, Callable[[], None]]]


def in_turn(
    makers: list[tuple[Make, bool]], sizes: DiTConfig, batch: Batch, options: argparse.Namespace, device: torch.device
) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and most bytes of each case, one model on the device after another. What finds no memory is left out."""
    seconds: dict[str, float] = {}
    memory: dict[str, int] = {}
    gpu = device.type == "cuda"
    for make, compile in makers:
        case = f"{make.__name__}, compiled" if compile else make.__name__
        try:
            for case, step in make(sizes, batch, options, device, compile).items():
                if gpu:
                    torch.cuda.reset_peak_memory_stats(device)
                seconds |= timings({case: step}, options.repeats, device)
                memory[case] = torch.cuda.max_memory_allocated(device) if gpu else 0
                print(f"{case}: {1000 * seconds[case]:.1f} ms, {memory[case] / 2**30:.1f} GiB", flush=True)
                if options.profile:
                    print_profile(case, step)
        except torch.OutOfMemoryError:
            print(f"{case}: out of memory", flush=True)
        step = None
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
    return seconds, memory


def compare(options: argparse.Namespace, name: str, lengths: tuple[int, ...], device: torch.device) -> None:
    """Print a table for one distribution of caption lengths."""
    torch._dynamo.reset()  # what earlier tables compiled counts against a limit
    sizes, gpu = model_sizes(options), device.type == "cuda"
    with torch.device("meta"):
        shapes = SVGDiT(sizes)
    batch = Batch(shapes, options, lengths, device)
    kinds = [our_cases] if options.peer == "none" else [our_cases, peer_cases]
    makers = [(make, compile) for make in kinds for compile in sorted({False, options.compile})]
    if options.model is None:
        made = (make(sizes, batch, options, device, compile) for make, compile in makers)
        seconds = timings({case: step for cases in made for case, step in cases.items()}, options.repeats, device)
        memory: dict[str, int] = {}
    else:
        seconds, memory = in_turn(makers, sizes, batch, options, device)
    peak = options.peak_tflops or (peak_tflops(torch.cuda.get_device_name(device)) if gpu else None)
    tokens = sum(lengths) + sum(batch.image_tokens)
    print(f"\n{options.precision}, {name} captions: {min(lengths)} to {max(lengths)} tokens; {tokens} tokens a step")
    heads = ("ms a step", "images/s", "TFLOP/s", "utilisation", "vs diffusers", "GiB")
    print(f"{'':24s}{''.join(f'{head:>13s}' for head in heads)}")
    for case, value in seconds.items():
        rate = batch.operations(sizes) / value / 1e12
        used = f"{rate / peak:.1%}" if peak else "–"
        times = f"{seconds['diffusers'] / value:.2f}×" if "diffusers" in seconds else "–"
        held = f"{memory[case] / 2**30:.1f}" if memory.get(case) else "–"
        numbers = f"{1000 * value:13.1f}{len(lengths) / value:13.1f}{rate:13.2f}"
        print(f"{case:24s}{numbers}{used:>13s}{times:>13s}{held:>13s}")


def print_profile(case: str, step: Callable[[], None]) -> None:
    """The operations of one step that take most of the device's time."""
    with torch.profiler.profile() as profile:
        step()
    events = [event for event in profile.key_averages() if event.self_device_time_total]
    total = sum(event.self_device_time_total for event in events)
    print(f"\n{case}: {total / 1000:.1f} ms on the device")
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:30]:
        print(f"  {event.self_device_time_total / 1000:9.2f} ms{event.count:6d} × {event.key[:110]}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), help="a size of the table, instead of --dim and --layers")
    parser.add_argument("--dim", type=int, default=192, help="width; heads are 32 wide")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--channels", type=int, default=384, help="latent channels")
    parser.add_argument("--pixels", type=int, default=256, help="side of the square images")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--captions", choices=["uniform", "ragged"], nargs="+", default=["uniform", "ragged"])
    parser.add_argument("--peer", choices=["diffusers", "none"], default="diffusers")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["bf16", "fp32"], nargs="+", help="default: bf16; on a CPU, both")
    parser.add_argument("--checkpointing", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--compile", action="store_true", help="measure compiled blocks as well")
    parser.add_argument("--live", action="store_true", help="measure steps that encode images and captions as well")
    parser.add_argument("--profile", action="store_true", help="list the operations of a step; with --model")
    parser.add_argument("--peak-tflops", type=float, help="of the device, where it is not known")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    device = torch.device(options.device)
    precisions = options.precision or (["bf16"] if device.type == "cuda" else ["bf16", "fp32"])
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{options.threads} CPU threads"
    print(f"{machine}, torch {torch.__version__}; {options.batch} images of {options.pixels} px")
    lengths = {"uniform": (UNIFORM_TOKENS,) * options.batch, "ragged": ragged_lengths(options.batch)}
    for precision in precisions:
        chosen = argparse.Namespace(**vars(options) | {"precision": precision})
        for name in options.captions:
            compare(chosen, name, lengths[name], device)


if __name__ == "__main__":
    main()
