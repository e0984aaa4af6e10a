"""Time one forward and backward pass of SVGDiT against diffusers' Lumina2Transformer2DModel, in one process.

Both hold the same weights and get the same latents and the same captions of different lengths: packed for us, padded
for the peer, as each of them wants it. The two alternate, so that a busy machine slows both alike.

    python -m benchmarks.forward [--dim 192 --layers 6 --grid 4 4 --captions 8 16 --batch 64 --threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import Lumina2Transformer2DModel
from torch import Tensor, nn

from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.transformer.packing import TextFeatures

RENAMES = {
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder": "time_caption_embed.caption_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
    "adaLN_modulation.1": "norm1.linear",
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "attention_norm2": "norm2",
    "feed_forward.w": "feed_forward.linear_",
}


def ragged_lengths(count: int, seed: int = 0) -> tuple[int, ...]:
    """Caption lengths in tokens, system prompt included: a tenth dropped (2 tokens), and of the others a third each
    short (24 to 48), of middle length (49 to 128) and long (129 to 256), uniform within."""
    generator = torch.Generator().manual_seed(seed)
    ranges = ((24, 48), (49, 128), (129, 256))
    lengths = []
    for _ in range(count):
        dropped, kind, within = torch.rand(3, generator=generator).tolist()
        low, high = ranges[int(3 * kind)]
        lengths.append(2 if dropped < 0.1 else low + int((high - low + 1) * within))
    return tuple(lengths)


def lumina2_state_dict(model: SVGDiT) -> dict[str, Tensor]:
    """Our weights under the key names of Lumina2Transformer2DModel."""
    config, renamed = model.config, {}
    for key, value in model.state_dict().items():
        key = key.replace("attention_norm1", "norm1" if key.startswith("context_refiner") else "norm1.norm")
        for ours, theirs in RENAMES.items():
            key = key.replace(ours, theirs)
        if "attention.qkv" in key:
            heads = (config.n_heads, config.kv_heads, config.kv_heads)
            parts = value.split([count * config.head_dim for count in heads])
            for name, part in zip("qkv", parts, strict=True):
                renamed[key.replace("attention.qkv", f"attn.to_{name}")] = part
        else:
            renamed[key] = value
    return renamed


def lumina2_peer(model: SVGDiT) -> Lumina2Transformer2DModel:
    """Lumina2Transformer2DModel with the sizes and weights of `model` (which must have query/key norms)."""
    config = model.config
    with next(model.parameters()).device:
        peer = Lumina2Transformer2DModel(
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            hidden_size=config.dim,
            num_layers=config.n_layers,
            num_refiner_layers=config.n_refiner_layers,
            num_attention_heads=config.n_heads,
            num_kv_heads=config.kv_heads,
            multiple_of=config.multiple_of,
            ffn_dim_multiplier=config.ffn_dim_multiplier,
            norm_eps=config.norm_eps,
            axes_dim_rope=config.axes_dims,
            axes_lens=config.axes_lens,
            cap_feat_dim=config.cap_feat_dim,
        )
    peer.load_state_dict(lumina2_state_dict(model))
    for module in peer.modules():
        if hasattr(module, "norm_q"):
            module.norm_q.eps = module.norm_k.eps = 1e-6  # the peer takes 1e-5 here, the published model 1e-6
    return peer


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random weights everywhere, so that no zero-initialised gate hides a difference."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            is_norm = parameter.ndim == 1 and "norm" in name and "adaLN" not in name
            parameter.copy_(1 + 0.1 * noise if is_norm else noise / max(parameter.shape[-1], 64) ** 0.5)


def timings(
    cases: dict[str, Callable[[], None]], repeats: int, device: torch.device, warm_up: int = 2
) -> dict[str, float]:
    """Median seconds of each case; the cases alternate, and the first `warm_up` rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(warm_up + repeats):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=192, help="width; heads are 32 wide")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--channels", type=int, default=192, help="latent channels")
    parser.add_argument("--grid", type=int, nargs=2, default=(4, 4), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--captions", type=int, nargs=2, default=(8, 16), help="shortest and longest, tokens")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="compile the blocks of both models")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    config = DiTConfig(
        dim=options.dim,
        n_layers=options.layers,
        n_refiner_layers=1,
        n_heads=options.dim // 32,
        n_kv_heads=options.kv_heads,
        axes_dims=(8, 12, 12),
        in_channels=options.channels,
        cap_feat_dim=256,
    )
    ours = SVGDiT(config)
    randomise(ours)
    theirs = lumina2_peer(ours).to(device, dtype)
    ours.to(device, dtype)

    latents = torch.randn(options.batch, options.channels, *options.grid, device=device, dtype=dtype)
    timesteps = torch.rand(options.batch, device=device)
    lengths = torch.randint(options.captions[0], options.captions[1] + 1, (options.batch,))
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    captions = torch.randn(*mask.shape, config.cap_feat_dim, device=device, dtype=dtype)
    text, mask = TextFeatures.from_padded(captions, mask), mask.to(device)

    def run_ours() -> Tensor:
        return ours(latents, timesteps, text)

    def run_theirs() -> Tensor:
        return theirs(latents, timesteps, captions, mask, return_dict=False)[0]

    with torch.no_grad():
        difference = (run_ours() - run_theirs()).abs().max().item()
    if options.compile:
        for model in (ours, theirs):
            for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
                block.compile(dynamic=True)
    cases = {
        "SVGDiT": lambda: run_ours().float().square().mean().backward(),
        "Lumina2Transformer2DModel": lambda: run_theirs().float().square().mean().backward(),
    }
    tokens = options.batch * options.grid[0] * options.grid[1] + int(lengths.sum())
    print(f"{tokens} tokens, {lengths.unique().numel()} caption lengths, {options.threads} threads, {device}, {dtype}")
    print(f"largest difference of the outputs: {difference:.1e}")
    seconds = timings(cases, options.repeats, device)
    for name, value in seconds.items():
        print(f"{name:28s}{1000 * value:9.1f} ms forward + backward")
    print(f"ratio {seconds['Lumina2Transformer2DModel'] / seconds['SVGDiT']:.2f} (above 1: SVGDiT is faster)")


if __name__ == "__main__":
    main()
