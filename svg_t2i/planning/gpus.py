"""Cards that a run may be planned for: memory, arithmetic and how fast they exchange data."""

from __future__ import annotations

import re
from dataclasses import dataclass

from autoencoder.common.config import UserError
from svg_t2i.transformer.flops import peak_tflops


@dataclass(frozen=True)
class GPU:
    """A card.

    Attributes:
        name: as in data sheets.
        memory: GB.
        link: GB/s in each direction to the other cards of its machine: NVLink, else PCIe.
        network: GB/s in each direction to other machines; an assumption, 400 Gb/s a card where that is usual.
        tflops: dense bf16 peak, or None where it differs between the cards that are meant.
    """

    name: str
    memory: float
    link: float = 25.0
    network: float = 12.5

    @property
    def title(self) -> str:
        """The name with the memory, where the name does not say it."""
        size = f"{self.memory:g}"
        return self.name if re.search(rf"\b{size} ?GB", self.name) else f"{self.name} ({size} GB)"

    @property
    def tflops(self) -> float | None:
        return peak_tflops(self.name)


CONTEXT, NCCL, FRAGMENTS = 0.5e9, 1.5e9, 0.03  # bytes, bytes where there are several GPUs, share of the tensors


def own_share(tensors: float, gpus: int = 1) -> float:
    """Bytes that a device takes besides so many of tensors: its context, exchange with others, fragmentation."""
    return CONTEXT + (NCCL if gpus > 1 else 0) + FRAGMENTS * tensors


def tensors_within(total: float) -> float:
    """The bytes of tensors in the total with `own_share` on one GPU."""
    return (total - CONTEXT) / (1 + FRAGMENTS)


GPUS = {
    "a100": GPU("NVIDIA A100 80GB", 80, 300, 25),
    "a100-40": GPU("NVIDIA A100 40GB", 40, 300, 25),
    "h100": GPU("NVIDIA H100 80GB", 80, 450, 50),
    "h200": GPU("NVIDIA H200", 141, 450, 50),
    "b200": GPU("NVIDIA B200", 180, 900, 50),
    "l40s": GPU("NVIDIA L40S", 48),
    "4090": GPU("NVIDIA GeForce RTX 4090", 24),
    "24gb": GPU("card of 24 GB", 24),
    "16gb": GPU("card of 16 GB", 16),
    "12gb": GPU("card of 12 GB", 12),
    "8gb": GPU("card of 8 GB", 8),
}


def find_gpu(name: str) -> GPU:
    """A card of the table, by its key. UserError for another."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name}: unknown; choose one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
