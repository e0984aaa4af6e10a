"""Images and masks as a call takes them, and what becomes of them.

Images are PIL images, files, open files, arrays (H, W, 3) or tensors (3, H, W); floats lie in [0, 1]. Masks are the
same with one channel, white or 1 where to repaint, or tensors of latent cells (H/16, W/16). URLs are not fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from autoencoder.common.config import UserError
from autoencoder.images.files import LATENT_PIXELS, crop_to_size, load_image, to_float, to_rgb, to_uint8_tensor
from svg_t2i.sampling.options import check_side

ImageInput = Image.Image | str | Path | BinaryIO | np.ndarray | Tensor
KINDS = "a PIL image, a file, an array (H, W, 3) or a tensor (3, H, W)"


@dataclass(frozen=True)
class Mask:
    """Where an image is repainted.

    cells: (h, w), 1 for the latent cells that are repainted and 0 for those that are kept.
    pixels: (1, H, W) in [0, 1], the share of the new image in each pixel.
    """

    cells: Tensor
    pixels: Tensor


def prepare_image(image: ImageInput, height: int | None = None, width: int | None = None) -> Tensor:
    """(3, H, W) in [-1, 1], cropped in the middle to the size given, or else to the multiples of 16 below its own.

    Raises:
        UserError: unreadable, of another shape or range, or smaller than 16 pixels; a float tensor of no fitting size.
    """
    if isinstance(image, (Tensor, np.ndarray)) and not _is_bytes(image):
        return 2 * _float_pixels(image, 3, "image") - 1
    return to_float(to_uint8_tensor(crop_image(image, height, width)))


def crop_image(image: ImageInput, height: int | None = None, width: int | None = None) -> Image.Image:
    """An image scaled and cropped in the middle to the size given, or cropped to multiples of 16 below its own.

    Raises:
        UserError: unreadable, or smaller than 16 pixels.
    """
    picture = to_rgb_image(image)
    for name, side in zip(("width", "height"), picture.size):
        if side < LATENT_PIXELS:
            raise UserError(f"image {name} = {side}: images are at least {LATENT_PIXELS} pixels high and wide")
    size = [given or own // LATENT_PIXELS * LATENT_PIXELS for given, own in zip((width, height), picture.size)]
    for name, side in zip(("image width", "image height"), size):
        check_side(name, side)
    return crop_to_size(picture, tuple(size))


def prepare_mask(mask: ImageInput, size: tuple[int, int]) -> Mask:
    """A mask for an image of (h, w) latent cells. A cell is repainted if any of its pixels is more than half white.

    Raises:
        UserError: unreadable, of another size, or there is nothing to repaint.
    """
    h, w = size
    if isinstance(mask, (Tensor, np.ndarray)) and tuple(mask.shape) == size:
        cells = (torch.as_tensor(mask) != 0).float()
        pixels = F.interpolate(cells[None, None], scale_factor=LATENT_PIXELS)[0]
    else:
        height, width = h * LATENT_PIXELS, w * LATENT_PIXELS
        if isinstance(mask, (Tensor, np.ndarray)) and not _is_bytes(mask):
            if (height, width) not in (tuple(mask.shape[-2:]), tuple(mask.shape[:2])):
                raise UserError(f"mask of {tuple(mask.shape)}: the image has {h}×{w} cells and {height}×{width} pixels")
            pixels = _float_pixels(mask, 1, "mask")
        else:
            picture = to_rgb_image(mask).convert("L").convert("RGB")
            white = crop_to_size(picture, (width, height))
            pixels = to_uint8_tensor(white)[:1].float() / 255
        cells = F.max_pool2d((pixels > 0.5).float(), LATENT_PIXELS)[0]  # (h, w)
    if not cells.any():
        raise UserError("the mask is black everywhere: nothing to repaint; white marks what to repaint")
    return Mask(cells, pixels)


def masks_for(mask: Any, sizes: Sequence[tuple[int, int]], per_prompt: int) -> list[Mask]:
    """A mask for every image of a call, from one for all or one per prompt."""
    each = _one_each(mask, len(sizes) // per_prompt)
    return [prepare_mask(each[i // per_prompt], size) for i, size in enumerate(sizes)]


def _one_each(mask: Any, images: int) -> list[ImageInput]:
    """As many masks as images, from one for all or one per image. UserError for another number."""
    masks = as_list(mask)
    if len(masks) not in (1, images):
        raise UserError(f"{len(masks)} masks for {images} images; give one per image, or a single one")
    return masks * images if len(masks) == 1 else masks


def to_rgb_image(image: ImageInput) -> Image.Image:
    """An image as RGB, upright. UserError for float tensors, which have no size to be changed to."""
    if isinstance(image, Image.Image):
        return to_rgb(image, turn=True)
    if isinstance(image, (str, Path)):
        return load_image(image)
    if hasattr(image, "read"):
        return load_image(image.read(), name=str(getattr(image, "name", "the open file")))
    if isinstance(image, (Tensor, np.ndarray)) and _is_bytes(image):
        array = np.asarray(image)
        if isinstance(image, Tensor) and array.ndim == 3:
            array = array.transpose(1, 2, 0)
        array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
        if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)):
            return to_rgb(Image.fromarray(array), turn=False)
        raise UserError(f"image of shape {tuple(image.shape)}: give {KINDS}")
    if isinstance(image, (Tensor, np.ndarray)):
        raise UserError("an image of floats cannot be resized here; give a PIL image, a file, or whole numbers (uint8)")
    raise UserError(f"image = {image!r}: give {KINDS}")


def as_list(image: Any) -> list[ImageInput]:
    """One image or several, also as a tensor (B, 3, H, W) or an array (B, H, W, 3), as a list."""
    if isinstance(image, (Tensor, np.ndarray)) and image.ndim == 4:
        return list(image)
    return list(image) if isinstance(image, (list, tuple)) else [image]


def _is_bytes(image: Tensor | np.ndarray) -> bool:
    return str(image.dtype).endswith("uint8")


def _float_pixels(image: Tensor | np.ndarray, channels: int, what: str) -> Tensor:
    """(channels, H, W) fp32 in [0, 1] from a tensor, or an array with the channels last. UserError for others."""
    values = torch.as_tensor(image)
    if isinstance(image, np.ndarray) and values.ndim == 3:
        values = values.permute(2, 0, 1)
    if values.ndim == 2:
        values = values[None]
    shape = "(3, H, W)" if channels == 3 else "(H, W) or (1, H, W)"
    if values.dtype == torch.bool and channels == 1:
        values = values.float()
    if values.ndim != 3 or values.shape[0] != channels or not values.is_floating_point():
        raise UserError(f"{what} tensors are float {shape} in [0, 1], got {tuple(image.shape)} {image.dtype}")
    check_side(f"{what} height", values.shape[1])
    check_side(f"{what} width", values.shape[2])
    if not (values.min() >= 0 and values.max() <= 1):
        raise UserError(f"{what} tensors lie in [0, 1]; got values from {values.min():.3g} to {values.max():.3g}")
    return values.float()


# ------------------------------------------------------------------------------------------- repainting a part closely


@dataclass(frozen=True)
class CloseUp:
    """The part of an image around a mask, enlarged to the size that is sampled; `paste` puts the result back."""

    original: Image.Image
    mask: Image.Image
    box: tuple[int, int, int, int]
    size: tuple[int, int]

    @classmethod
    def of(cls, image: ImageInput, mask: ImageInput, padding: int, size: tuple[int, int]) -> CloseUp:
        """`padding` pixels around the mask, widened to the proportions of `size` (width, height)."""
        from diffusers.image_processor import VaeImageProcessor

        picture, white = to_rgb_image(image), to_rgb_image(mask).convert("L")
        if white.size != picture.size:
            raise UserError(
                f"padding_mask_crop: the mask is {white.size} and the image {picture.size}; make them equal"
            )
        if not white.getbbox():
            raise UserError("the mask is black everywhere: nothing to repaint; white marks what to repaint")
        box = VaeImageProcessor.get_crop_region(white, *size, pad=padding)
        return cls(picture, white, tuple(box), size)

    @property
    def image(self) -> Image.Image:
        """The part of the image, to be repainted."""
        return self.original.crop(self.box).resize(self.size, Image.Resampling.LANCZOS)

    @property
    def part(self) -> Image.Image:
        """The part of the mask."""
        return self.mask.crop(self.box).resize(self.size, Image.Resampling.BILINEAR)

    def paste(self, painted: Image.Image) -> Image.Image:
        """The whole image with the repainted part; where the mask is black, its pixels are the original's."""
        width, height = self.box[2] - self.box[0], self.box[3] - self.box[1]
        whole = self.original.copy()
        small = painted.resize((width, height), Image.Resampling.LANCZOS)
        whole.paste(small, self.box[:2], self.mask.crop(self.box))
        return whole


def close_ups(image: Any, mask: Any, padding: int, size: tuple[int, int], output_type: str) -> list[CloseUp]:
    """A close-up of every image, with its mask or the one for all. UserError for what does not go with it."""
    images = as_list(image)
    if not isinstance(padding, int) or padding < 0 or output_type != "pil":
        raise UserError(f"padding_mask_crop = {padding!r}: give pixels from 0 on, and leave output_type at 'pil'")
    return [CloseUp.of(one, white, padding, size) for one, white in zip(images, _one_each(mask, len(images)))]
