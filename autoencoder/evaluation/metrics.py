"""Reconstruction metrics with the conventions of published tables.

Reconstructions are clipped to [-1, 1], mapped to [0, 1] and rounded to 8 bit before anything is measured; the images
are 8 bit already. PSNR takes a peak of 255, SSIM the Gaussian window of its paper (Wang et al. 2004), LPIPS
(arXiv 1801.03924) the VGG trunk; these are means over images. rFID (arXiv 1706.08500) compares the InceptionV3
features of all images with those of all reconstructions; the network is the original one, converted from TensorFlow
by torch-fidelity, with its original resizing.

A metric whose network cannot be had has a reason instead of a value.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from autoencoder.common.config import UserError
from autoencoder.common.processes import World
from autoencoder.images.files import to_float

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names it in torch.hub's folder
FEATURE_GRID = 2.0**-15
PER_IMAGE = ("psnr", "ssim", "lpips", "shift_r", "shift_g", "shift_b")


class Unavailable(UserError):
    """A metric cannot be computed here; the message is the reason and the remedy."""


def to_8bit(images: Tensor) -> Tensor:
    """Floats, nominally in [-1, 1] → uint8, clipped and rounded; what saving as PNG would keep."""
    unit = (images.float().clamp(-1.0, 1.0) + 1.0) / 2.0  # [0, 1]
    return (unit * 255.0).round().to(torch.uint8)


def psnr(images: Tensor, recons: Tensor) -> Tensor:
    """uint8 (n, 3, H, W) each → (n,) dB in fp64; infinite for identical images."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    pair = recons.double(), images.double()
    return peak_signal_noise_ratio(*pair, data_range=255.0, reduction="none", dim=(1, 2, 3)).reshape(-1)


def ssim(images: Tensor, recons: Tensor) -> Tensor:
    """uint8 (n, 3, H, W) each → (n,), mean over channels and all positions; images are mirrored beyond their edges."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    pair = recons.float(), images.float()
    return structural_similarity_index_measure(*pair, data_range=255.0, reduction="none").reshape(-1)


def colour_shift(images: Tensor, recons: Tensor) -> Tensor:
    """uint8 (n, 3, H, W) each → (n, 3) fp64: mean of reconstruction − image, in 8-bit levels."""
    return (recons.double() - images.double()).mean(dim=(2, 3))


class ImageMetrics:
    """Metrics of single pairs.

    Args:
        lpips: the network, called with two tensors (n, 3, H, W) in [-1, 1]; None leaves LPIPS out (NaN).
    """

    def __init__(self, lpips: nn.Module | None) -> None:
        self.lpips = lpips

    @torch.no_grad()
    def __call__(self, images: Tensor, recons: Tensor) -> Tensor:
        """uint8 (n, 3, H, W) each → (n, 6) fp64, the columns of PER_IMAGE."""
        lpips = torch.full((len(images),), torch.nan, device=images.device)
        if self.lpips is not None:
            lpips = self.lpips(to_float(images), to_float(recons)).flatten(1).mean(dim=1)
        columns = [metric(images, recons).double() for metric in (psnr, ssim)] + [lpips.double()]  # (n,) each
        return torch.cat([torch.stack(columns, dim=1), colour_shift(images, recons)], dim=1)


class FrechetDistance:
    """FID between images and reconstructions, from sums in fp64 that can be added up over processes.

    Features are rounded to multiples of 2⁻¹⁵. Sums of their products then fit fp64 without rounding (for 2¹⁷ images
    and features below 8), so that order and grouping do not matter to the last bit; the distance changes by about 1e-7.
    """

    def __init__(self, extractor: nn.Module, device: torch.device | None = None) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.metric = FrechetInceptionDistance(_OnGrid(extractor), sync_on_compute=False).to(device)
        self.metric.orig_dtype = torch.float64  # of the result; else known after the first update only

    @torch.no_grad()
    def update(self, images: Tensor, recons: Tensor) -> None:
        """Add uint8 pairs (n, 3, H, W)."""
        self.metric.update(images, real=True)
        self.metric.update(recons, real=False)

    def sums(self) -> dict[str, Tensor]:
        """All that has been added; to be summed over processes and given to `distance`."""
        return dict(self.metric.metric_state)

    def sums_of_all(self, world: World) -> dict[str, Tensor]:
        """`sums` of all processes together, on the CPU."""
        return {name: world.reduce_sum(value.detach().cpu().clone()) for name, value in self.sums().items()}

    def distance(self, sums: dict[str, Tensor]) -> float:
        """FID of the given sums. Unavailable with fewer than two images."""
        if sums["real_features_num_samples"] < 2:
            raise Unavailable("rFID needs at least 2 images")
        for name, value in sums.items():
            setattr(self.metric, name, value.cpu())
        return self.metric.compute().item()


class _OnGrid(nn.Module):
    """Features of `extractor`, in fp64 and rounded to the grid."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor
        self.num_features: int = extractor.num_features

    def forward(self, images: Tensor) -> Tensor:
        return (self.extractor(images).double() / FEATURE_GRID).round() * FEATURE_GRID


def build_inception() -> nn.Module:
    """InceptionV3 (2015) → 2048 pooled features of uint8 images (n, 3, H, W) of any size.

    Raises:
        Unavailable: torch-fidelity is not installed, or the weights are neither cached nor downloadable.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        inception = FrechetInceptionDistance(feature=2048, antialias=False).inception  # the original resizing
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(
            f"InceptionV3 cannot be had ({error}): install torch-fidelity and let it download, or put its weights "
            f"{INCEPTION_FILE} into {torch.hub.get_dir()}/checkpoints"
        ) from error
    inception.num_features = 2048
    return inception.requires_grad_(False)


def lpips_network() -> nn.Module:
    """The network of `build_lpips` with random weights in its trunk."""
    import lpips

    with warnings.catch_warnings():  # the package builds its trunk by an old torchvision spelling
        warnings.simplefilter("ignore", UserWarning)
        model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    layers = list(model.lins)
    del model.lins  # the same layers are registered as lin0 … lin4, the names in checkpoints
    model.lins = layers
    return model.eval().requires_grad_(False)


def build_lpips() -> nn.Module:
    """LPIPS with a VGG-16 trunk (arXiv 1801.03924): `lpips(x, y)` of images in [-1, 1] → distances (n, 1, 1, 1).

    The network and its calibration come from the `lpips` package, by the authors of the metric: its parameter names
    are those in published checkpoints, it is differentiable, and does not read values back to the host.
    (torchmetrics ships a copy as a private class behind a metric that refuses values outside [-1, 1], which a
    decoder produces, and synchronises to check.) VGG-16 comes from torchvision's usual place, in `torch.hub`'s folder.

    Raises:
        Unavailable: the VGG-16 weights are neither cached nor downloadable.
    """
    from torchvision.models import VGG16_Weights

    try:
        vgg = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        url = VGG16_Weights.IMAGENET1K_V1.url
        raise Unavailable(
            f"LPIPS needs torchvision's VGG-16 weights, which cannot be had ({error}): put {url} into "
            f"{torch.hub.get_dir()}/checkpoints, or train without: model.params.lossconfig.params.perceptual_weight=0"
        ) from error
    model = lpips_network()
    slices = {name.split(".")[1]: name.split(".")[0] for name in model.net.state_dict()}  # "0" → "slice1", ...
    features = {key.removeprefix("features."): value for key, value in vgg.items() if key.startswith("features.")}
    model.net.load_state_dict({f"{slices[key.split('.')[0]]}.{key}": value for key, value in features.items()})
    return model
