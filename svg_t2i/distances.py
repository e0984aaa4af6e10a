"""Distances between two sets of feature vectors, in fp64 on the host: (N, D) and (M, D) → one number."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2048  # rows of a kernel matrix at a time


def median_distance(features: Tensor) -> float:
    """Median Euclidean distance between two different rows of (N, D), over the first `CHUNK` rows.

    The usual bandwidth of a Gaussian kernel (Gretton et al. 2012, A Kernel Two-Sample Test, section 8).
    """
    return torch.pdist(features[:CHUNK].double()).median().item()


def mmd(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Squared maximum mean discrepancy of (N, D) and (M, D) under the kernel exp(−‖a − b‖² / 2σ²), unbiased.

    Equation 4 of Jayasumana et al. 2024, Rethinking FID: Towards a Better Evaluation Metric for Image Generation
    (arXiv 2401.09603): pairs of a row with itself are left out, so the expectation is 0 for equal distributions and
    single values may be slightly negative. Unlike FID it needs no normality and few images.

    Args:
        bandwidth: σ > 0, in units of the features.

    Raises:
        ValueError: fewer than two rows, or a bandwidth that is not positive.
    """
    if min(len(x), len(y)) < 2 or not bandwidth > 0:
        raise ValueError(f"mmd needs two rows and a positive bandwidth; got {len(x)}, {len(y)} rows, {bandwidth}")
    x, y = x.double(), y.double()
    within_x = (_kernel_sum(x, x, bandwidth) - len(x)) / (len(x) * (len(x) - 1))
    within_y = (_kernel_sum(y, y, bandwidth) - len(y)) / (len(y) * (len(y) - 1))
    across = _kernel_sum(x, y, bandwidth) / (len(x) * len(y))
    return (within_x + within_y - 2 * across).item()


def _kernel_sum(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    squares = y.square().sum(dim=1)
    total = x.new_zeros(())
    for rows in x.split(CHUNK):
        distances = (rows.square().sum(dim=1, keepdim=True) + squares - 2 * rows @ y.T).clamp(min=0)  # (chunk, M)
        total += torch.exp(-distances / (2 * bandwidth**2)).sum()
    return total


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance between the normal distributions fitted to (N, D) and (M, D) (Heusel et al. 2017, eq. 6).

    With centred rows X = QR the covariance is RᵀR / (N − 1), and the trace of the square root of the product of two
    covariances is the sum of the singular values of R_x R_yᵀ. No matrix root is taken, so few rows are no trouble.

    Raises:
        ValueError: fewer than two rows.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a covariance needs two rows; got {len(x)} and {len(y)}")
    means, roots = [], []
    for features in (x.double(), y.double()):
        mean = features.mean(dim=0)
        means.append(mean)
        roots.append(torch.linalg.qr(features - mean, mode="r").R / (len(features) - 1) ** 0.5)  # (min(N, D), D)
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    spread = roots[0].square().sum() + roots[1].square().sum() - 2 * shared
    return ((means[0] - means[1]).square().sum() + spread).item()
