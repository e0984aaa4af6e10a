"""Low-rank adapters (LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353) of the transformer: their settings, and merging.

An adapter adds (alpha / rank) · B A to the weight of a linear layer, with A (rank, in) and B (out, rank) trained and
the weight frozen. The layers are peft's. B starts at zero, so that an untrained adapter changes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoencoder.common.config import UserError, first_line, require
from autoencoder.common.weights import replacing
from svg_t2i.transformer.model import SVGDiT

if TYPE_CHECKING:  # peft takes seconds to import, which runs without adapters need not wait for
    from peft import LoraConfig

FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it
NAME = "default"  # peft's, of the adapter that is trained
TARGETS = (
    "attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.1",
)  # fmt: skip


@dataclass(frozen=True)
class LoraSettings:
    """The `lora` section of a run: what is trained instead of the transformer's own weights.

    target_modules: linear layers by the end of their names, as peft matches them; attention, feed-forward and
        modulation of every block, unless given.
    """

    rank: int
    alpha: float | None = None  # null: as the rank, so that the change is B A itself
    dropout: float = 0.0  # of the adapters' inputs in training; its draws depend on the micro-batches
    use_dora: bool = False  # also train the length of every row of the weights
    target_modules: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "positive, or null for the rank")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        require(len(self.target_modules) > 0, "target_modules", self.target_modules, "at least one name")

    def peft_config(self) -> LoraConfig:
        """The same for peft."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            use_dora=self.use_dora,
            target_modules=list(self.target_modules),
        )


def add_adapter(transformer: SVGDiT, settings: LoraSettings) -> None:
    """Put a fresh adapter on a transformer, in place, fp32: its weights alone are trained from here on.

    Raises:
        UserError: a target that is no linear layer of the model, or a library beside peft that it cannot work with.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in settings.target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise UserError(
                f"lora.target_modules: {target!r} is no linear layer of this model; give the end of a name, such as "
                f"{', '.join(TARGETS)}"
            )
    try:
        with torch.no_grad():  # DoRA takes the norms of the weights
            inject_adapter_in_model(settings.peft_config(), transformer, NAME)
    except ImportError as error:  # it looks at the versions of libraries that are not used here, such as torchao
        raise UserError(f"lora: peft cannot work here: {first_line(error)}; install what it names") from error
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # autocast chooses; a copy in fp32 would be made for each layer
    for weight in transformer.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def file_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's weights by their names in files instead of those in the model, where each says whose it is."""
    shortened = {name.replace(f".{NAME}.weight", ".weight"): weight for name, weight in weights.items()}
    return {name.replace("magnitude_vector.weight", "magnitude_vector"): x for name, x in shortened.items()}


def merge_adapter(transformer: SVGDiT, settings: LoraSettings, weights: Mapping[str, Tensor]) -> SVGDiT:
    """The transformer with an adapter's weights, by their names in the model, added to its own; done in place.

    Raises:
        UserError: the weights are not those of such an adapter.
    """
    from peft.tuners.lora import LoraModel

    with torch.no_grad():
        tuner = LoraModel(transformer, settings.peft_config(), NAME)
        own = {name for name, weight in transformer.named_parameters() if weight.requires_grad}
        if own != weights.keys():
            raise UserError(f"not the weights of a LoRA of rank {settings.rank}: {sorted(own ^ weights.keys())[:4]}")
        transformer.load_state_dict(weights, strict=False)
        return tuner.merge_and_unload()


def write_adapter(folder: str | os.PathLike, weights: Mapping[str, Tensor], settings: LoraSettings) -> Path:
    """Write the file that `pipeline.load_lora_weights(folder)` reads, at once or not at all.

    weights: of the adapter, by their names in the model.
    """
    config = {f"transformer.{key}": value for key, value in settings.peft_config().to_dict().items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config, default=sorted)}
    tensors = {
        f"transformer.{name}": tensor.detach().cpu().contiguous() for name, tensor in file_names(weights).items()
    }
    path = Path(folder) / FILE
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)
    return path
