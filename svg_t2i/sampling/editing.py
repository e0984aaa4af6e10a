"""Sampling that starts from images: what latents of a vision foundation model make possible.

    variation        noise an encoded image to time t and sample on
    image_to_image   the same with a prompt, t said as the share of the steps that run
    inpaint          repaint latent cells, keep the others
    interpolate      between two images, two prompts, or both
    retrieve         the nearest images of a folder: the latents know what is in a picture

Images are PIL images, files, or tensors (3, H, W) in [0, 1]. Their sides are cropped to multiples of 16 pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from autoencoder.common.config import UserError
from autoencoder.images.files import (
    LATENT_PIXELS,
    ImageError,
    crop_square,
    crop_to_size,
    load_image,
    to_float,
    to_rgb,
    to_uint8_tensor,
)
from svg_t2i.sampling.denoising import strength_start
from svg_t2i.sampling.generation import Generation, SVGT2IOutput
from svg_t2i.sampling.options import check_side

log = logging.getLogger(__name__)

ImageInput = Image.Image | str | Path | Tensor
EMBEDDING_SIZE, EMBEDDING_BATCH = 256, 16
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class Match:
    """An image file and its similarity to the query, a cosine in [-1, 1]."""

    path: Path
    similarity: float


class ImageMethods(Generation):
    """The methods of `SVGT2IPipeline` that start from images.

    Keywords that they share with a text-to-image call (num_images_per_prompt, seed, generator, output_type,
    return_dict, callback_on_step_end, preset, and the fields of `SamplingOptions`) mean the same here.
    """

    def image_to_image(
        self,
        prompt: str | Sequence[str],
        image: ImageInput | Sequence[ImageInput],
        *,
        strength: float = 0.6,
        **settings: Any,
    ) -> SVGT2IOutput | tuple:
        """Redraw an image after a prompt. One image, or one per prompt.

        strength: how much changes, in (0, 1]: the last `strength` of the steps run. 1 starts from noise alone.
        """
        if not 0 < strength <= 1:
            raise UserError(f"strength = {strength}: must be above 0 and at most 1")
        return self._from_images(prompt, image, strength=strength, **settings)

    def variation(
        self, image: ImageInput | Sequence[ImageInput], *, t: float = 0.3, prompt: str = "", **settings: Any
    ) -> SVGT2IOutput | tuple:
        """Other images like this one: noised to time t in [0, 1) and sampled on; the nearer to 1, the more alike."""
        images = _as_list(image)
        return self._from_images([prompt] * len(images), images, start=t, **settings)

    def inpaint(
        self,
        prompt: str | Sequence[str],
        image: ImageInput | Sequence[ImageInput],
        mask_image: ImageInput,
        *,
        strength: float = 1.0,
        **settings: Any,
    ) -> SVGT2IOutput | tuple:
        """Repaint the cells where the mask is white; the latents of all other cells stay exactly what they were.

        mask_image: an image of the image's size (a cell is repainted if any of its 16×16 pixels is white), or a
            tensor of latent cells (H/16, W/16), nonzero where to repaint.
        strength: as in `image_to_image`, for the repainted cells.
        """
        if not 0 < strength <= 1:
            raise UserError(f"strength = {strength}: must be above 0 and at most 1")
        return self._from_images(prompt, image, strength=strength, mask=mask_image, **settings)

    def _from_images(
        self,
        prompt: str | Sequence[str],
        image: ImageInput | Sequence[ImageInput],
        *,
        strength: float | None = None,
        start: float = 0.0,
        mask: ImageInput | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        generator: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        preset: str | None = None,
        **options: Any,
    ) -> SVGT2IOutput | tuple:
        """Noise encoded images to `start` (or to where `strength` begins) and sample on, one image per prompt."""
        if not 0 <= start < 1:
            raise UserError(f"t = {start}: must lie in [0, 1); 0 is noise, 1 the image itself")
        sized = {name: options.get(name) for name in ("height", "width")}
        settings = self.resolve_options(preset, output_type, **options)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        images = [prepare_image(one, **sized) for one in _as_list(image)]
        if len(images) == 1:
            images *= len(prompts)
        if len(images) != len(prompts):
            raise UserError(f"{len(images)} images for {len(prompts)} prompts; give one per prompt, or a single one")
        heights, widths = [x.shape[1] for x in images], [x.shape[2] for x in images]
        request = self.plan_request(prompts, heights, widths, num_images_per_prompt, seed, settings)
        settings = settings.repeated(len(prompts), num_images_per_prompt)
        cells = [prepare_mask(mask, size).to(self.device) for size in request.sizes] if mask is not None else None
        starts = [start] * len(request.sizes)
        if strength is not None and strength < 1:
            starts = [strength_start(settings, size, strength) for size in request.sizes]
        conditions = self.encode_prompts(request.prompts, settings)
        clean = [x for x in self.encode_images(images) for _ in range(num_images_per_prompt)]
        noise, solved = self.draw_noise(request, generator), list(clean)
        for begin in dict.fromkeys(starts):  # sizes with a dynamic time shift of their own start at their own times
            rows = [i for i, one in enumerate(starts) if one == begin]
            x = [torch.lerp(noise[i], clean[i], begin) for i in rows]
            masked = {} if cells is None else {"known": [clean[i] for i in rows], "repaint": [cells[i] for i in rows]}
            of_group = conditions.select(rows)
            ends = self.solve(x, of_group, settings, callback_on_step_end, start=begin, rows=rows, **masked)
            for i, end in zip(rows, ends, strict=True):
                solved[i] = end
        return self.finish(solved, output_type, return_dict)

    def interpolate(
        self,
        prompt: str | Sequence[str] = "",
        image: Sequence[ImageInput] | None = None,
        *,
        weights: int | Sequence[float] = 5,
        t: float = 0.3,
        seed: int | Sequence[int] = 0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        preset: str | None = None,
        **options: Any,
    ) -> SVGT2IOutput | tuple:
        """Images on the way from one prompt or image to another, all from the same noise (or one seed each).

        Between prompts the two velocities are mixed; between images the latents, along the great circle in each
        cell, which are then noised to time t and sampled on.

        Args:
            prompt: one for all, or two.
            image: two images, or None.
            weights: of the second prompt and image, in [0, 1]; or how many, evenly from 0 to 1.
            t: with images only, in [0, 1]; 1 decodes the mixed latents as they are.
        """
        prompts = [prompt] * 2 if isinstance(prompt, str) else list(prompt)
        images = None if image is None else list(image)
        shares = _weights(weights)
        if len(prompts) != 2 or (images is not None and len(images) != 2):
            raise UserError("interpolate wants two prompts (or one for all) and two images (or none)")
        if images is None and isinstance(prompt, str):
            raise UserError("interpolate has nothing to go between: give two prompts, or two images")
        if not 0 <= t <= 1:
            raise UserError(f"t = {t}: must lie in [0, 1]; 0 is noise, 1 the mixed image itself")
        settings = self.resolve_options(preset, output_type, **options)
        if images is not None:
            first = prepare_image(images[0], options.get("height"), options.get("width"))
            pair = [first, prepare_image(images[1], *first.shape[1:])]
            settings = self.resolve_options(preset, **options | {"height": first.shape[1], "width": first.shape[2]})
        seeds = [seed] * len(shares) if isinstance(seed, int) else seed
        request = self.plan_request([prompts[0]] * len(shares), None, None, 1, seeds, settings)
        begin, start = self.draw_noise(request), 0.0
        if images is not None:
            start = t
            left, right = self.encode_images(pair)
            begin = [torch.lerp(noise, slerp(left, right, share), t) for noise, share in zip(begin, shares)]
        if start < 1:
            others = None if isinstance(prompt, str) else [prompts[1]] * len(shares)
            conditions = self.encode_prompts(request.prompts, settings, others, shares)
            begin = self.solve(begin, conditions, settings, callback_on_step_end, start=start)
        return self.finish(begin, output_type, return_dict)

    def retrieve(self, image: ImageInput, folder: str | Path | Sequence[Path], *, top_k: int = 10) -> list[Match]:
        """The images below a folder (or among files) whose latents are most like the query's, best first.

        Unreadable files are passed over with a warning. Raises UserError if no image is left.
        """
        if top_k < 1:
            raise UserError(f"top_k = {top_k}: must be at least 1")
        files = list_images(folder) if isinstance(folder, (str, Path)) else [Path(path) for path in folder]
        query = self.embed_images([crop_square(_to_pil(image), EMBEDDING_SIZE)])
        paths, rows = [], [query.new_zeros(0, query.shape[1])]
        for begin in range(0, len(files), EMBEDDING_BATCH):
            readable = {}
            for path in files[begin : begin + EMBEDDING_BATCH]:
                try:
                    readable[path] = crop_square(load_image(path), EMBEDDING_SIZE)
                except ImageError as error:
                    log.warning("passed over: %s", error)
            if readable:
                rows.append(self.embed_images(list(readable.values())))
                paths += readable
        if not paths:
            raise UserError(f"{folder}: not one readable image")
        similarity = (torch.cat(rows) @ query[0]).cpu()
        best = similarity.argsort(descending=True)[:top_k].tolist()
        return [Match(paths[i], float(similarity[i])) for i in best]

    def embed_images(self, images: Sequence[ImageInput]) -> Tensor:
        """Unit vectors (B, C) that are near for pictures of like things: normalised latents averaged over the cells."""
        latents = self.encode_images([prepare_image(image) for image in images])
        return F.normalize(torch.stack([x.mean(dim=(1, 2)) for x in latents]), dim=1)

    def encode_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Images (3, H, W) in [-1, 1] → normalised latents (C, H/16, W/16), fp32; equal sizes are encoded together."""
        by_shape: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            by_shape.setdefault(image.shape, []).append(i)
        latents: list[Any] = list(images)
        with self._stage("encoding the images", self.autoencoder):
            for rows in by_shape.values():
                batch = torch.stack([images[i] for i in rows]).to(self.device)
                for i, x in zip(rows, self.autoencoder.normalize(self.autoencoder.encode(batch).float())):
                    latents[i] = x
        return latents


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """From `first` to `second` (C, h, w) along the great circle in every cell; lengths change linearly."""
    lengths = [x.norm(dim=0, keepdim=True).clamp_min(1e-12) for x in (first, second)]
    a, b = first / lengths[0], second / lengths[1]
    angle = (a * b).sum(dim=0, keepdim=True).clamp(-1, 1).acos()
    straight = angle.sin() < 1e-4  # (nearly) parallel or opposite: there the circle is undefined
    divisor = angle.sin().masked_fill(straight, 1.0)
    left = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / divisor)
    right = torch.where(straight, share, (share * angle).sin() / divisor)
    return (left * a + right * b) * torch.lerp(*lengths, share)


def prepare_image(image: ImageInput, height: int | None = None, width: int | None = None) -> Tensor:
    """(3, H, W) in [-1, 1], cropped in the middle to the size given, or else to the multiples of 16 below its own."""
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise UserError(f"image tensors are float (3, H, W) in [0, 1], got {tuple(image.shape)} {image.dtype}")
        check_side("image height", image.shape[1])
        check_side("image width", image.shape[2])
        if image.min() < 0 or image.max() > 1:
            raise UserError(f"image tensors lie in [0, 1]; got values from {image.min():.3g} to {image.max():.3g}")
        return 2 * image.float() - 1
    return to_float(to_uint8_tensor(crop_image(image, height, width)))


def crop_image(image: Image.Image | str | Path, height: int | None = None, width: int | None = None) -> Image.Image:
    """An image or file scaled and cropped in the middle to the size given, or cropped to multiples of 16 below its own.

    Raises:
        UserError: unreadable, or smaller than 16 pixels.
    """
    picture = _to_pil(image)
    size = [given or own // LATENT_PIXELS * LATENT_PIXELS for given, own in zip((width, height), picture.size)]
    for name, side in zip(("image width", "image height"), size):
        check_side(name, side)
    return crop_to_size(picture, tuple(size))


def prepare_mask(mask: ImageInput, size: tuple[int, int]) -> Tensor:
    """Latent cells (h, w) to repaint, 1 or 0, from a mask image or a tensor of cells; UserError if there are none."""
    h, w = size
    if isinstance(mask, Tensor):
        if mask.shape != (h, w):
            raise UserError(f"mask of {tuple(mask.shape)} cells: the image has {h}×{w} (height/16 × width/16)")
        cells = (mask != 0).float()
    else:
        picture = mask if isinstance(mask, Image.Image) else load_image(mask)
        white = crop_to_size(picture.convert("L").convert("RGB"), (w * LATENT_PIXELS, h * LATENT_PIXELS))
        pixels = (to_uint8_tensor(white)[:1] > 127).float()  # (1, H, W)
        cells = F.max_pool2d(pixels, LATENT_PIXELS)[0]  # (h, w)
    if not cells.any():
        raise UserError("the mask is black everywhere: nothing to repaint; white marks what to repaint")
    return cells


def list_images(folder: str | Path) -> list[Path]:
    """All image files below a folder, sorted. UserError if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"{folder}: no image file in it")
    return files


def _to_pil(image: ImageInput) -> Image.Image:
    if isinstance(image, Tensor):
        raise UserError("an image tensor cannot be resized here; give a PIL image or a file")
    return to_rgb(image) if isinstance(image, Image.Image) else load_image(image)


def _as_list(image: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    if isinstance(image, Tensor) and image.ndim == 4:
        return list(image)
    return list(image) if isinstance(image, (list, tuple)) else [image]


def _weights(weights: int | Sequence[float]) -> list[float]:
    if isinstance(weights, int):
        if weights < 2:
            raise UserError(f"weights = {weights}: at least 2 images make a way between two ends")
        return [i / (weights - 1) for i in range(weights)]
    shares = [float(share) for share in weights]
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise UserError(f"weights = {list(weights)}: numbers in [0, 1], 0 for the first end")
    return shares
