"""What a decoder adds that no image has: texture on flat colours, a grid of cells, pictures that change as they move.

    flat_error     RMS of reconstruction − colour over 27 flat colours, in 8-bit levels
    flat_texture   the part of it that is no one colour: RMS about each picture's own mean colour
    flat_grid      power of that texture at the frequencies of the latent grid, over its mean power
    shift_error    RMS between the reconstruction of a moved image and the moved reconstruction, in 8-bit levels
    error_grid     as flat_grid, of reconstruction − image
    spectrum       mean power of reconstruction − image in bands of equal width, from 0 to half a cycle per pixel

Frequencies of the grid are the multiples of 1/16 cycle per pixel in both directions, but for 0: an error without a grid
has a ratio near 1 there. All but the flat colours are means over the first `MOST_IMAGES` images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autoencoder.common.processes import World
from autoencoder.evaluation.metrics import to_8bit
from autoencoder.images.files import LATENT_PIXELS, to_float
from autoencoder.model import SVGAutoencoder

LEVELS = (32, 128, 224)  # of each channel, in the flat colours
FLAT_SIDE = 256  # px at most
MOST_IMAGES = 64
BANDS = 8


@torch.no_grad()
def flat_colours(autoencoder: SVGAutoencoder, resolution: int, device: torch.device) -> dict[str, float]:
    """flat_error, flat_texture and flat_grid, inside a margin of a cell, where no edge of the picture shows."""
    side = min(resolution, FLAT_SIDE)
    levels = torch.tensor(LEVELS, dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels)[:, :, None, None]  # (27, 3, 1, 1)
    margin = LATENT_PIXELS if side >= 4 * LATENT_PIXELS else 0
    inside = slice(margin, side - margin)
    errors = []
    for colour in colours:
        image = colour[None].expand(1, 3, side, side).to(device)
        recon = to_8bit(autoencoder.decode(autoencoder.encode(to_float(image))))
        errors.append((recon.double() - image.double())[..., inside, inside].cpu())
    error = torch.cat(errors)  # (27, 3, s, s)
    texture = error - error.mean(dim=(2, 3), keepdim=True)
    return {
        "flat_error": error.square().mean().sqrt().item(),
        "flat_texture": texture.square().mean().sqrt().item(),
        "flat_grid": grid_ratio(power(texture).mean(dim=0, keepdim=True)).item(),
    }


def power(error: Tensor) -> Tensor:
    """(n, 3, H, W) → power of its frequencies, (n, H, W) in fp64, mean over channels."""
    return torch.fft.fft2(error.double(), norm="ortho").abs().square().mean(dim=1)


def grid_ratio(spectrum: Tensor) -> Tensor:
    """(n, H, W) power → (n,): mean at the frequencies of the latent grid over mean at all, 0 left out of both."""
    height, width = spectrum.shape[1:]
    rows, columns = (
        torch.arange(side, device=spectrum.device) % (side // LATENT_PIXELS) == 0 for side in (height, width)
    )
    on_grid = rows[:, None] & columns
    on_grid[0, 0] = False
    rest = spectrum.flatten(1)[:, 1:].mean(dim=1)
    return spectrum[:, on_grid].mean(dim=1) / rest.clamp_min(1e-12)


def band_powers(spectrum: Tensor) -> Tensor:
    """(n, H, W) power → (n, BANDS): means over rings of equal width; the corners belong to the last."""
    vertical, horizontal = (torch.fft.fftfreq(side, device=spectrum.device) for side in spectrum.shape[1:])
    radius = (vertical[:, None].square() + horizontal.square()).sqrt()
    band = (radius * 2 * BANDS).long().clamp_max(BANDS - 1).flatten()
    sums = spectrum.new_zeros(len(spectrum), BANDS).index_add(1, band, spectrum.flatten(1))
    return sums / torch.bincount(band, minlength=BANDS).clamp_min(1)


def shift_errors(autoencoder: SVGAutoencoder, images: Tensor, places: Sequence[int]) -> Tensor:
    """(n, 3, H, W) uint8 → (n,) fp64: by 1 to 15 px down and right, after the number of the image."""
    height, width = (side - LATENT_PIXELS for side in images.shape[2:])
    shifts = [1 + place % (LATENT_PIXELS - 1) for place in places]
    moved = torch.stack([image[:, s : s + height, s : s + width] for image, s in zip(images, shifts, strict=True)])
    still, moved = (  # one after the other, to need no more memory than the reconstructions
        to_8bit(autoencoder.decode(autoencoder.encode(to_float(some)))).double()
        for some in (images[:, :, :height, :width], moved)
    )
    errors = [
        (one[:, s:, s:] - other[:, : height - s, : width - s]).square().mean().sqrt()
        for one, other, s in zip(still, moved, shifts, strict=True)
    ]
    return torch.stack(errors)


class Artefacts:
    """What one process has seen of one resolution: rows of shift error, grid ratio and bands, by place."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.rows: list[Tensor] = []

    def add(self, autoencoder: SVGAutoencoder, places: Sequence[int], images: Tensor, recons: Tensor) -> None:
        """uint8 images (n, 3, H, W) of these places; recons: floats of the same shape, nominally in [-1, 1]."""
        chosen = [i for i, place in enumerate(places) if place < MOST_IMAGES]
        if not chosen or min(images.shape[2:]) < 3 * LATENT_PIXELS:
            return
        images, own = images[chosen], [places[i] for i in chosen]
        spectrum = power(to_8bit(recons[chosen]).double() - images.double())
        shifts = shift_errors(autoencoder, images, own)
        rows = torch.cat([torch.stack([shifts, grid_ratio(spectrum)], dim=1), band_powers(spectrum)], dim=1)
        self.places += own
        self.rows.append(rows.cpu())

    def merged(self, world: World) -> dict[str, float | list[float]]:
        """The means of all processes together, on the main one; nothing where there are no images."""
        rows = torch.cat(self.rows) if self.rows else torch.zeros(0, 2 + BANDS, dtype=torch.float64)
        gathered = world.gather((torch.tensor(self.places, dtype=torch.int64), rows))
        if not world.is_main:
            return {}
        places, rows = (torch.cat(tensors) for tensors in zip(*gathered))
        if not len(places):
            return {}
        means = rows[places.argsort()].mean(dim=0).tolist()
        return {"shift_error": means[0], "error_grid": means[1], "spectrum": means[2:]}
