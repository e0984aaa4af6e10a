"""CLIP score: how well an image fits its caption, by a CLIP model of Hugging Face."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from autoencoder.common.hub import folder_or_hub_name
from autoencoder.evaluation.metrics import Unavailable
from svg_t2i.text.loading import ERRORS, pretrained, reason_of, whole_model


class CLIPScorer:
    """Image and text features of unit length; their scalar product times 100 is the CLIP score.

    Captions are cut to what the model reads (77 tokens for the original ones), as in every published CLIP score.

    Raises:
        Unavailable: the model can neither be read from the folder nor had from the Hub, or is no CLIP.
    """

    def __init__(self, path_or_id: str | os.PathLike, device: torch.device | str = "cpu"):
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        source = str(path_or_id)
        try:
            source = folder_or_hub_name(source, "clip", "such as openai/clip-vit-base-patch32")
            self.model = whole_model(AutoModel, source).eval().requires_grad_(False).to(device)
            self.tokenizer = pretrained(AutoTokenizer, source)
            self.processor = pretrained(AutoImageProcessor, source)
        except ERRORS as error:
            reason = reason_of(error)
            raise Unavailable(f"CLIP {source!r} cannot be had ({reason}); give a folder that holds one") from error
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise Unavailable(f"{source!r} is a {type(self.model).__name__}, which has no image and text features")
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(limit or self.tokenizer.model_max_length, self.tokenizer.model_max_length)

    @torch.inference_mode()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images of any size → (n, D), of unit length."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        return self._unit(self.model.get_image_features(**inputs))

    @torch.inference_mode()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Captions → (n, D), of unit length."""
        inputs = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.model.device)
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}  # no token types, which CLIP has not
        return self._unit(self.model.get_text_features(**tokens))

    @staticmethod
    def _unit(output: Tensor | object) -> Tensor:
        features = output if isinstance(output, Tensor) else output.pooler_output  # a tensor until transformers 4
        return normalize(features.float(), dim=-1)


def clip_score(images: Tensor, texts: Tensor) -> float:
    """100 · max(cos, 0), mean over pairs of unit rows (N, D) (arXiv 2104.08718, without its factor 2.5)."""
    return 100 * (images.double() * texts.double()).sum(dim=1).clamp(min=0).mean().item()
