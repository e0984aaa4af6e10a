"""Errors of memory that name the stage of sampling and the option that makes it smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from autoencoder.common.config import UserError, first_line

ADVICE = {
    "encoding the prompts": "give fewer prompts at once, or enable_model_cpu_offload() (--cpu_offload)",
    "encoding the images": "give fewer or smaller images at once, or enable_model_cpu_offload() (--cpu_offload)",
    "denoising": "make fewer images at once (--batch_size), a smaller height and width, torch_dtype=torch.bfloat16 "
    "(--dtype bf16), or enable_model_cpu_offload() (--cpu_offload)",
    "decoding": "make smaller images, or enable_model_cpu_offload() (--cpu_offload)",
    "loading the weights": "use torch_dtype=torch.bfloat16 (--dtype bf16), or enable_model_cpu_offload() "
    "(--cpu_offload)",
}
_CPU_ALLOCATION = ("can't allocate memory", "not enough memory", "std::bad_alloc")


class MemoryShortage(UserError):
    """Not enough memory; the message names stage and remedy."""


@contextmanager
def memory_stage(name: str) -> Iterator[None]:
    """Turn an allocation that fails inside into a `MemoryShortage` that names this stage; `name` is a key of ADVICE."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        raise MemoryShortage(f"out of memory while {name}: {ADVICE[name]}. ({first_line(error)})") from error


def _is_shortage(error: BaseException) -> bool:
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(phrase in str(error) for phrase in _CPU_ALLOCATION)
