"""The networks of GenEval's verdicts: Mask2Former finds objects, CLIP names their colours. Both by transformers.

The official tool runs the same kinds of networks by mmdet and open_clip: Mask2Former with Swin-S, trained on COCO, and
CLIP ViT-L/14. Mask2Former's weights here are those of its authors, there a training of mmdet's: single pictures may get
another verdict.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from autoencoder.common.config import UserError
from autoencoder.common.hub import folder_or_hub_name
from svg_t2i.evaluation.clip_score import CLIPScorer
from svg_t2i.evaluation.geneval import COLOURS, CONFIDENCE, NAMES, Found
from svg_t2i.text.loading import ERRORS, pretrained, reason_of, whole_model

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
BACKGROUND = "#999999"  # around an object whose colour is read
COLOUR_TEXTS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


class Detector:
    """Objects of COCO's 80 classes in a picture, by a Mask2Former for instances.

    Args:
        path_or_id: folder or Hub name.
        least: confidence below which objects are left out.

    Raises:
        UserError: it cannot be had, or is no such network.
    """

    def __init__(self, path_or_id: str | os.PathLike, device: torch.device | str = "cpu", least: float = CONFIDENCE):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        self.least = least
        source = folder_or_hub_name(str(path_or_id), "detector", f"such as {DETECTOR}")
        try:
            model = whole_model(Mask2FormerForUniversalSegmentation, source)
            self.processor = pretrained(AutoImageProcessor, source)
        except ERRORS as error:
            raise UserError(
                f"--detector {source!r} cannot be had ({reason_of(error)}); give a folder of one"
            ) from error
        if model.config.num_labels != len(NAMES):
            raise UserError(
                f"--detector {source!r} knows {model.config.num_labels} classes; wanted are COCO's {len(NAMES)}"
            )
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> dict[str, list[Found]]:
        """Name → objects, for those names that have one."""
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.model.device)
        output = self.model(pixel_values=pixels)
        size = image.height, image.width
        labels, scores, masks = instances(
            output.class_queries_logits[0], output.masks_queries_logits[0], size, self.least
        )
        found: dict[str, list[Found]] = {}
        for label, score, mask in zip(labels.tolist(), scores.tolist(), masks.cpu().numpy()):
            found.setdefault(NAMES[label], []).append(Found(box_of(mask), score, mask))
        return found


def instances(classes: Tensor, masks: Tensor, size: tuple[int, int], least: float) -> tuple[Tensor, Tensor, Tensor]:
    """A network's answers → labels (n,), confidences (n,) above `least`, masks (n, H, W) of bool, none empty.

    As Mask2Former's authors have it: of all pairs of query and class the Q most probable; confidence is the
    probability times the mean of the mask's own within it.

    Args:
        classes: logits (Q, number of classes + 1), the last for no object. masks: logits (Q, h, w). size: H, W.
    """
    probabilities = classes.float().softmax(dim=-1)[:, :-1]
    best, places = probabilities.flatten().topk(len(classes))
    likely = best > least  # the confidence is not above the probability
    best, places = best[likely], places[likely]
    if not len(best):
        return places, best, masks.new_zeros((0, *size), dtype=torch.bool)
    queries, labels = places // probabilities.shape[1], places % probabilities.shape[1]
    logits = interpolate(masks[None, queries].float(), size=size, mode="bilinear")[0]
    inside = logits > 0
    area = inside.sum(dim=(1, 2))
    scores = best * (logits.sigmoid() * inside).sum(dim=(1, 2)) / area.clamp(min=1)
    kept = (scores > least) & (area > 0)
    return labels[kept], scores[kept], inside[kept]


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box around a mask (H, W) that is not empty; right and bottom lie behind it."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class ColourReader:
    """The colour of each object, by a CLIP: the one of `COLOURS` whose descriptions are most like the cut-out object.

    Raises:
        UserError: the CLIP cannot be had.
    """

    def __init__(self, path_or_id: str | os.PathLike, device: torch.device | str = "cpu"):
        self.clip = CLIPScorer(path_or_id, device)
        self._texts: dict[str, Tensor] = {}

    def __call__(self, image: Image.Image, objects: Sequence[Found], name: str) -> list[str]:
        """A colour for each object of the name."""
        crops = [cut_out(image, one) for one in objects]
        likeness = self.clip.image_features(crops) @ self.descriptions(name).T
        return [COLOURS[i] for i in likeness.argmax(dim=1).tolist()]

    def descriptions(self, name: str) -> Tensor:
        """(colours, D): of each colour the mean of its descriptions, of unit length."""
        if name not in self._texts:
            texts = [text.format(colour=colour, name=name) for colour in COLOURS for text in COLOUR_TEXTS]
            features = self.clip.text_features(texts).unflatten(0, (len(COLOURS), len(COLOUR_TEXTS)))
            self._texts[name] = normalize(features.mean(dim=1), dim=-1)
        return self._texts[name]


def cut_out(image: Image.Image, one: Found) -> Image.Image:
    """The object's box, grey where the object is not."""
    image = image.convert("RGB")
    if one.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), Image.fromarray(one.mask))
    return image.crop(one.box)
