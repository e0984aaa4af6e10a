"""Time the attention back ends on the packed sequences of training, forward and backward, in one process.

The model's own choice (`svg_t2i.transformer.attention.attention`) and each variable-length kernel there is, beside one
padded call of each back end of torch's scaled_dot_product_attention, with key/value heads shared (`enable_gqa`) and
repeated. Padded calls have samples of one length, so nothing is computed on padding: the kernels are compared.

    python -m benchmarks.attention [--device cuda]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.forward import timings
from svg_t2i.transformer.attention import Segments, attention

HEADS, KV_HEADS = 24, 8
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip


def dense(backend: SDPBackend, repeat: bool, samples: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of packed (T, H, D), all samples equally long, by one call of a back end."""
    q, k, v = (x.unflatten(0, (samples, -1)).transpose(1, 2) for x in (q, k, v))
    if repeat:
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=not repeat).transpose(1, 2).flatten(0, 1)


def forward_backward(run: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> None:
    torch.autograd.grad(run(*inputs), inputs, upstream)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--head-dim", type=int, default=96)
    parser.add_argument("--shapes", nargs="+", default=["24x384", "8x1152", "2x4224"], help="samples x tokens")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    for shape in options.shapes:
        samples, length = map(int, shape.split("x"))
        tensors = [torch.randn(samples * length, heads, options.head_dim, device=device, dtype=torch.bfloat16)
                   for heads in (HEADS, KV_HEADS, KV_HEADS)]  # fmt: skip
        inputs, upstream = [x.requires_grad_() for x in tensors], torch.randn_like(tensors[0])
        offsets = torch.arange(samples + 1, dtype=torch.int32, device=device) * length
        owner = torch.arange(samples, dtype=torch.int32, device=device).repeat_interleave(length)
        segments = Segments.build((length,) * samples, offsets, owner)
        runs: dict[str, Callable[..., Tensor]] = {"ours": partial(attention, segments=segments)}
        for name in segments.packed_kernels if device.type == "cuda" else ():
            runs[f"packed {name}"] = partial(attention, segments=segments, backend=name)
        for name, backend in BACKENDS.items():
            for ending, repeat in (("", False), (", repeated", True)):
                runs[name + ending] = partial(dense, backend, repeat, samples)
        cases, refused = {}, []
        for name, run in runs.items():
            try:
                forward_backward(run, inputs, upstream)
            except RuntimeError:  # "No available kernel"
                refused.append(name)
            else:
                cases[name] = partial(forward_backward, run, inputs, upstream)
        seconds = timings(cases, options.repeats, device)
        operations = 3.5 * 4 * samples * length**2 * HEADS * options.head_dim  # backward is 2.5 times forward
        print(f"\n{samples} samples of {length} tokens, {HEADS} heads of {options.head_dim}, {KV_HEADS} for keys")
        for name, value in sorted(seconds.items(), key=lambda item: item[1]):
            print(f"  {name:22s}{1000 * value:9.3f} ms{operations / value / 1e12:9.1f} TFLOP/s")
        print(f"  not available here: {', '.join(refused) or 'none'}")


if __name__ == "__main__":
    main()
