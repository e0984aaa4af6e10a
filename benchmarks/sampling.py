"""Time sampling against diffusers: SVGDiT and our guidance against Lumina2Transformer2DModel in its own pipeline.

Both hold the same weights, start from the same noise, get the same text features and run the same Euler grid with
guidance; text encoding and decoding are left out. The peer is `Lumina2Pipeline.__call__` itself, whose loop calls the
transformer twice a step on captions padded to 256 tokens, as that pipeline pads them (`--pad 0`: to the longest). The
two alternate in one process, so that a busy machine slows both alike. On a GPU, `--full` times the 2B model at
1024 px, its decoder, and the first step.

    python -m benchmarks.sampling [--dim 192 --layers 8 --grid 16 16 --batch 1 --steps 8 --threads 2]
    python -m benchmarks.sampling --batch 8 --alone     # a forward pass for each of our images, as calls have it
    python -m benchmarks.sampling --full
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline
from torch import Tensor

from autoencoder.decoders.convolutional import ConvDecoder, DecoderConfig
from benchmarks.forward import lumina2_peer, ragged_lengths, randomise, timings
from svg_t2i.sampling.denoising import Conditions, denoise
from svg_t2i.sampling.options import SamplingOptions
from svg_t2i.transformer.config import MODELS, PUBLISHED, DiTConfig
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.transformer.packing import TextFeatures

EMPTY_TOKENS = 1  # of the unconditional text


def caption_features(lengths: Sequence[int], width: int, device: torch.device, dtype: torch.dtype) -> TextFeatures:
    """Random features of captions of these lengths, then those of the empty text."""
    total = sum(lengths) + EMPTY_TOKENS
    features = torch.randn(total, width, generator=torch.Generator().manual_seed(1))
    return TextFeatures(features.to(device, dtype), (*lengths, EMPTY_TOKENS))


def ours(model: SVGDiT, noise: Tensor, text: TextFeatures, options: SamplingOptions, packed: bool = True) -> Tensor:
    """Noise (B, C, h, w) → latents by our denoiser. packed: the images share forward passes."""
    count = len(noise)
    rows = (tuple(range(count)),)
    scales = options.guidance_scales(count)
    conditions = Conditions(text, rows, (count,) * count, None, scales)
    return torch.stack(denoise(model, list(noise), conditions, options, packed=packed))


def peer_pipeline(model: SVGDiT) -> Lumina2Pipeline:
    """Lumina2Pipeline around a transformer with the weights of `model`; only its denoising loop will run."""
    transformer = lumina2_peer(model).to(next(model.parameters()))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    pipeline = Lumina2Pipeline(transformer, scheduler, vae=None, text_encoder=None, tokenizer=None)
    pipeline.vae_scale_factor = 8  # it takes height // 8, in latent cells
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Lumina2Pipeline, pad: int, noise: Tensor, text: TextFeatures, options: SamplingOptions) -> Tensor:
    """The same by the peer's own loop: captions padded to `pad` tokens at least, two calls a step."""
    longest = max(pad, *text.lengths)
    padded = [torch.cat([x, x.new_zeros(longest - len(x), x.shape[1])]) for x in text.features.split(text.lengths)]
    embeds = torch.stack(padded)
    mask = torch.tensor([[True] * n + [False] * (longest - n) for n in text.lengths], device=noise.device)
    count = len(noise)
    return pipeline(
        prompt_embeds=embeds[:-1],
        prompt_attention_mask=mask[:-1],
        negative_prompt_embeds=embeds[-1:].repeat(count, 1, 1),
        negative_prompt_attention_mask=mask[-1:].repeat(count, 1),
        latents=noise.to(embeds.dtype),
        height=noise.shape[2] * 8,
        width=noise.shape[3] * 8,
        num_inference_steps=options.num_inference_steps - 1,
        guidance_scale=options.guidance_scale,
        cfg_normalization=False,
        output_type="latent",
        return_dict=False,
    )[0]


def compare(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> float:
    """Print times and the largest difference of the results; returns how many times faster we are."""
    heads = arguments.dim // 48
    axes = (16, 16, 16)
    config = DiTConfig(dim=arguments.dim, n_layers=arguments.layers, n_heads=heads, n_kv_heads=heads // 2 or 1,
                       axes_dims=axes, in_channels=arguments.channels, cap_feat_dim=512)  # fmt: skip
    model = SVGDiT(config).eval().requires_grad_(False)
    randomise(model)
    model.to(device, dtype)
    lengths = arguments.captions or ragged_lengths(arguments.batch)
    text = caption_features(lengths, config.cap_feat_dim, device, dtype)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(arguments.batch, config.in_channels, *arguments.grid, generator=generator).to(device)
    options = SamplingOptions(
        solver="euler", num_inference_steps=arguments.steps + 1, guidance_scale=4.0, renorm_cfg=0.0
    )
    peer = peer_pipeline(model)
    common = (noise, text, options)
    cases = {
        "SVGDiT": partial(ours, model, *common, packed=not arguments.alone),
        "diffusers": partial(theirs, peer, arguments.pad, *common),
    }
    with torch.no_grad():
        a, b = (run().float() for run in cases.values())
        seconds = timings(cases, arguments.repeats, device)
    print(f"largest difference of the results: {(a - b).abs().max().item():.1e} (of {b.abs().max().item():.1f})")
    for name, value in seconds.items():
        print(f"{name:10s}{1000 * value:9.1f} ms for {arguments.batch} images of {arguments.steps} steps")
    ratio = seconds["diffusers"] / seconds["SVGDiT"]
    print(f"ratio {ratio:.2f} (above 1: SVGDiT is faster), captions of {min(lengths)} to {max(lengths)} tokens")
    return ratio


def full_size(device: torch.device, repeats: int) -> None:
    """The 2B model at 1024 px in bf16: seconds an image at batch 1 and 4, decoder, first step."""
    config = MODELS[PUBLISHED]
    with torch.device(device):
        model = SVGDiT(config).eval().requires_grad_(False)
    randomise(model)
    model.to(torch.bfloat16)
    decoder = ConvDecoder(DecoderConfig()).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    options = SamplingOptions()  # dpm, 50 steps, guidance 4
    short = SamplingOptions(num_inference_steps=3)
    for batch in (1, 4):
        text = caption_features([120] * batch, config.cap_feat_dim, device, torch.bfloat16)
        noise = torch.randn(batch, config.in_channels, 64, 64, device=device)
        ours(model, noise, text, short)  # warms up
        case = partial(ours, model, noise, text, options)
        (seconds,) = timings({"": case}, repeats, device, warm_up=0).values()
        print(f"2B, 1024 px, 50 steps with guidance, batch {batch}: {seconds / batch:.2f} s an image")
    one_step = SamplingOptions(num_inference_steps=1)
    (seconds,) = timings(
        {"": partial(ours, model, noise[:1], text.select([0, batch]), one_step)}, repeats, device
    ).values()
    print(f"one step of one image, text refined: {seconds:.3f} s")

    def decode() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return decoder(noise[:1])

    with torch.inference_mode():
        (seconds,) = timings({"": decode}, 10 * repeats, device).values()
    print(f"decoder, 1024 px: {1000 * seconds:.1f} ms")


def main(argv: list[str] | None = None) -> float | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=192, help="a multiple of 96")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--grid", type=int, nargs=2, default=(16, 16), help="latent height and width")
    parser.add_argument("--captions", type=int, nargs="+", help="tokens of each caption; default: as in training")
    parser.add_argument("--pad", type=int, default=256, help="tokens that the peer pads captions to")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="a forward pass for each of our images, as calls have it")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="the 2B model; needs a GPU of 24 GB or more")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if arguments.captions and len(arguments.captions) != arguments.batch:
        parser.error(f"{len(arguments.captions)} lengths of captions for a batch of {arguments.batch}")
    if arguments.full:
        full_size(device, arguments.repeats)
        return None
    return compare(arguments, device, dtype)


if __name__ == "__main__":
    main()
