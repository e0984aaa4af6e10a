"""Parity of image and data handling: crop sizes and choices, crops, RGB rules, training order, weight averaging."""

import numpy as np
import torch
from PIL import Image

from autoencoder.images.files import crop_square, crop_to_size, frontier_sizes, nearest_bucket, to_rgb
from autoencoder.images.order import SampleOrder
from svg_t2i.training.optimizer import ema_update

EMA_DECAY = 0.95  # the release's default


def check(vectors):
    _check_sizes(vectors)
    for case, (_, size) in enumerate(vectors.config["crops"]):
        image = Image.fromarray(vectors.tensors[f"in.crop.{case}"].numpy())
        vectors.compare(f"out.center_crop.{case}", _pixels(crop_to_size(image, tuple(size))))
        vectors.compare(f"out.center_crop_arr.{case}", _pixels(crop_square(image, min(size))))

    rgba = Image.fromarray(vectors.tensors["in.rgba"].numpy())
    vectors.compare("out.rgba_to_rgb", _pixels(to_rgb(rgba)))
    palette_image = Image.fromarray(vectors.tensors["in.p.index"].numpy()).convert("P")
    palette_image.putpalette(vectors.tensors["in.p.palette"].numpy().tobytes())
    vectors.compare("out.p_to_rgb", _pixels(to_rgb(palette_image)))

    for case, arguments in enumerate(vectors.config["samplers"]):
        length, rank, world_size, batch_size, total_steps, resume_step, seed = arguments
        positions = np.arange(resume_step * batch_size + rank, total_steps * batch_size, world_size)
        vectors.compare(f"out.sampler.{case}", torch.tensor(SampleOrder([length], seed=seed).locate(positions)[1]))

    averaged = [vectors.tensors["in.ema.ema"].clone()]
    ema_update(averaged, [vectors.tensors["in.ema.model"]], EMA_DECAY)
    vectors.compare("out.ema.default", averaged[0])


def _check_sizes(vectors):
    for num_patches, patch_size, max_aspect in vectors.config["grids"]:
        case = f"p{num_patches}.s{patch_size}.r{max_aspect:g}"
        sizes = frontier_sizes(num_patches, patch_size, max_aspect)
        vectors.compare(f"out.sizes.{case}", torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2))
        if f"out.choice.{case}" in vectors.tensors:
            choices = [nearest_bucket(tuple(size), sizes) for size in vectors.config["inputs"]]
            vectors.compare(f"out.choice.{case}", torch.tensor(choices))


def _pixels(image):
    return torch.from_numpy(np.array(image))  # (H, W, 3) uint8
