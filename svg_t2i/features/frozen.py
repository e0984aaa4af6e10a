"""The frozen networks of training: images → clean latents, captions → text features.

Their fingerprints are recorded in every checkpoint: a DiT means nothing to other encoders or statistics.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoencoder.common.config import UserError
from autoencoder.common.processes import World
from autoencoder.images.files import to_float
from autoencoder.model import SVGAutoencoder
from svg_t2i.data.feature_cache import FeatureBatch
from svg_t2i.data.sources import TrainBatch
from svg_t2i.features.settings import AutoencoderSource, TextSource
from svg_t2i.features.sharded_at_rest import ShardedAtRest
from svg_t2i.text.encoder import TextEncoder
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.transformer.packing import TextFeatures


@dataclass(frozen=True)
class MicroBatch:
    """B samples ready for the transformer, on its device."""

    tokens: Tensor  # (T, p·p·C) clean normalised latents, fp32
    sizes: tuple[tuple[int, int], ...]  # (h, w) of each latent
    positions: Tensor  # (B,) int64, in the training stream
    resolutions: Tensor  # (B,) int64, nominal side of each image in pixels: sets its timestep shift
    text: TextFeatures
    counted: bool = True  # False: only keeps its process in step with the others


class CaptionCache:
    """Text features by caption: each is encoded once while it stays among the recent ones (up to `max_tokens`).

    A caption's features depend in their last bits on what it is encoded with. Emptying the cache at every checkpoint
    makes a resumed run repeat the uninterrupted one bit for bit.
    """

    def __init__(self, encoder: TextEncoder, max_tokens: int):
        self.encoder, self.max_tokens = encoder, max_tokens
        self._features: OrderedDict[str, Tensor] = OrderedDict()  # least recently used first
        self._tokens = 0

    def __call__(self, captions: Sequence[str]) -> TextFeatures:
        """Features of all captions, in order, on the encoder's device."""
        distinct = list(dict.fromkeys(captions))
        found = {caption: self._features[caption] for caption in distinct if caption in self._features}
        missing = [caption for caption in distinct if caption not in found]
        if missing:
            encoded = self.encoder.encode(missing)
            found |= zip(missing, encoded.features.split(encoded.lengths))
        if self.max_tokens:
            self._remember(found)
        rows = [found[caption] for caption in captions]
        return TextFeatures(torch.cat(rows), tuple(len(row) for row in rows))

    def _remember(self, used: Mapping[str, Tensor]) -> None:
        for caption, features in used.items():
            if caption not in self._features:
                self._features[caption] = features.clone()  # a view would keep its whole batch alive
                self._tokens += len(features)
            self._features.move_to_end(caption)
        while self._tokens > self.max_tokens:
            _, dropped = self._features.popitem(last=False)
            self._tokens -= len(dropped)

    def clear(self) -> None:
        """Forget everything."""
        self._features.clear()
        self._tokens = 0


class FrozenNetworks:
    """Autoencoder and text encoder: images and captions → what the transformer is trained on.

    Attributes:
        fingerprints: identity of both, recorded in checkpoints.
        at_rest: where weights are sharded at rest, what makes them whole.
    """

    def __init__(self, autoencoder: SVGAutoencoder, text_encoder: TextEncoder, cache_tokens: int, precision: str):
        self.autoencoder, self.precision = autoencoder, precision
        self.captions = CaptionCache(text_encoder, cache_tokens)
        self.fingerprints: dict[str, Any] = {
            "autoencoder": autoencoder.fingerprint(),
            "text_encoder": text_encoder.fingerprint(),
        }
        self.at_rest: ShardedAtRest | None = None

    def shard(self, world: World) -> None:
        """Keep a share of the weights on each rank from now on (see `ShardedAtRest`)."""
        self.at_rest = ShardedAtRest((self.autoencoder, self.captions.encoder.model), world)

    def whole(self) -> AbstractContextManager:
        """Inside it the networks can be used, whether or not they are sharded at rest."""
        return nullcontext() if self.at_rest is None else self.at_rest.whole()

    def prepare(
        self, batches: Sequence[TrainBatch | FeatureBatch], transformer: SVGDiT, device: torch.device
    ) -> Iterator[MicroBatch]:
        """Encode a step's micro-batches from the loader; those of a cache only move.

        Each is encoded when it is asked for, so that one at a time takes memory; all before the first where weights are
        sharded at rest, which are gathered once for a step.
        """
        prepared = (self._prepare(batch.to(device), transformer) for batch in batches)
        if self.at_rest is None:
            yield from prepared
            return
        with self.whole():
            waiting = deque(prepared)
        while waiting:
            yield waiting.popleft()

    @torch.no_grad()
    def _prepare(self, batch: TrainBatch | FeatureBatch, transformer: SVGDiT) -> MicroBatch:
        """One micro-batch on its device. Latents are normalised in fp32 whatever the precision."""
        if isinstance(batch, FeatureBatch):
            packed = transformer.pack(batch.unpacked())
            return MicroBatch(*packed, batch.positions, batch.resolutions, batch.text, batch.counted)
        tokens, sizes = [], []
        for images in batch.images:  # (n, 3, H, W) uint8
            with mixed_precision(self.precision, images.device):
                latents = self.autoencoder.encode(to_float(images))  # (n, C, h, w)
            group, group_sizes = transformer.pack(self.autoencoder.normalize(latents.float()))
            tokens.append(group)
            sizes += group_sizes
        text = self.captions(batch.captions)
        return MicroBatch(torch.cat(tokens), tuple(sizes), batch.positions, batch.resolutions, text, batch.counted)


def mixed_precision(precision: str, device: torch.device) -> torch.autocast:
    """Autocast to bf16 when `precision` says so. Weights, reductions and losses stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def load_frozen(
    autoencoder: AutoencoderSource, text_encoder: TextSource, precision: str, world: World, sharded: bool = False
) -> FrozenNetworks:
    """Both networks on this process's device, the text encoder in the run's precision.

    sharded: keep a share of the weights on each rank (`ShardedAtRest`), where there are several.

    Raises:
        UserError: as `SVGAutoencoder.from_pretrained` and `TextEncoder.from_pretrained`; or there are no statistics.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with world.main_first():  # one process downloads, the others find the files
        encoder = TextEncoder.from_pretrained(text_encoder.path, text_encoder.max_length, dtype, world.device)
        loaded = autoencoder.load().to(world.device)
    if loaded.stats is None:
        raise UserError(
            "autoencoder.stats is not set and the autoencoder brings no latent statistics: give the published file or "
            "one of python -m autoencoder.measure_latents, or 'measure' to take them from the training images"
        )
    frozen = FrozenNetworks(loaded, encoder, text_encoder.cache_tokens, precision)
    if sharded and world.size > 1:
        frozen.shard(world)
    return frozen
