"""Distances between two sets of feature vectors, in fp64 on the host: (N, D) and (M, D) → one number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

CHUNK = 2048  # rows of a kernel matrix at a time

Kernel = Callable[[Tensor, Tensor], Tensor]  # (n, D), (m, D) → (n, m)


def median_distance(features: Tensor) -> float:
    """Median Euclidean distance between two different rows of (N, D), over the first `CHUNK` rows.

    The usual bandwidth of a Gaussian kernel (Gretton et al. 2012, A Kernel Two-Sample Test, section 8).
    """
    return torch.pdist(features[:CHUNK].double()).median().item()


def mmd(x: Tensor, y: Tensor, bandwidth: float, own: Sequence[int] | None = None) -> float:
    """Squared maximum mean discrepancy of (N, D) and (M, D) under the kernel exp(−‖a − b‖² / 2σ²), unbiased.

    The distance of Jayasumana et al. 2024, Rethinking FID: Towards a Better Evaluation Metric for Image Generation
    (arXiv 2401.09603, eq. 4): three means of the kernel, over the pairs within x, within y and across. Only pairs of
    independent rows count, so the expectation is 0 for equal distributions and values may be slightly negative.

    Args:
        bandwidth: σ > 0, in units of the features.
        own: the row of y that each row of x belongs to, such as the real image of its caption. Such rows, and rows of
            x with the same one, are not independent: their pairs are left out. None: all rows are.

    Raises:
        ValueError: a bandwidth that is not positive, or fewer than two independent rows.
    """
    if not bandwidth > 0:
        raise ValueError(f"mmd needs two rows and a positive bandwidth, got {bandwidth}")
    return _discrepancy(x, y, partial(_gaussian, bandwidth=bandwidth), own)


def polynomial_mmd(x: Tensor, y: Tensor, own: Sequence[int] | None = None) -> float:
    """As `mmd`, under the kernel (a·b / D + 1)³, which has no setting: on InceptionV3 features the KID
    (Bińkowski et al. 2018, arXiv 1801.01401).

    Raises:
        ValueError: fewer than two independent rows.
    """
    return _discrepancy(x, y, lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3, own)


def _gaussian(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    return torch.exp(-_squared_distances(a, b) / (2 * bandwidth**2))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1) - 2 * a @ b.T).clamp(min=0)


def _discrepancy(x: Tensor, y: Tensor, kernel: Kernel, own: Sequence[int] | None) -> float:
    y_groups = torch.arange(len(y))
    x_groups = len(y) + torch.arange(len(x)) if own is None else torch.as_tensor(own)
    if min(len(x_groups.unique()), len(y)) < 2:
        raise ValueError(f"mmd needs two rows; got {len(x)} and {len(y)}")
    one, other = (x.double(), x_groups), (y.double(), y_groups)
    within = _kernel_mean(*one, *one, kernel) + _kernel_mean(*other, *other, kernel)
    return (within - 2 * _kernel_mean(*one, *other, kernel)).item()


def _kernel_mean(x: Tensor, x_groups: Tensor, y: Tensor, y_groups: Tensor, kernel: Kernel) -> Tensor:
    """Mean over the pairs of different groups."""
    total, count = x.new_zeros(()), 0
    for rows, groups in zip(x.split(CHUNK), x_groups.split(CHUNK)):
        apart = groups[:, None] != y_groups  # (chunk, M)
        total += (kernel(rows, y) * apart).sum()
        count += int(apart.sum())
    return total / count


def precision_recall(made: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of made rows (N, D) among the real ones (M, D), and of real rows among the made ones.

    A row lies among others if it is as near to one of them as that one's `neighbours`-th nearest of its own set
    (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2).

    Raises:
        ValueError: no more rows than `neighbours` in one of the sets.
    """
    if min(len(made), len(real)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} rows; got {len(made)} and {len(real)}")
    made, real = made.double(), real.double()
    return _share_among(made, real, neighbours), _share_among(real, made, neighbours)


def _share_among(rows: Tensor, others: Tensor, neighbours: int) -> float:
    radii = torch.cat([  # of itself, a row has the distance 0
        _squared_distances(some, others).kthvalue(neighbours + 1, dim=1).values for some in others.split(CHUNK)
    ])  # fmt: skip
    inside = sum(int((_squared_distances(some, others) <= radii).any(dim=1).sum()) for some in rows.split(CHUNK))
    return inside / len(rows)


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
