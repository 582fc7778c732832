"""Distances and diversity of sets of images, as functions of their features in float64.

MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y), over pairs of different images (unbiased)
KID (arXiv 1801.01401): k = (x . y / d + 1)^3
CMMD (arXiv 2401.09603): 1000 MMD^2 of unit vectors with k = exp(-|x - y|^2 / (2 * 10^2))
FID (arXiv 1706.08500): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
Vendi score (arXiv 2210.02410): exp of the entropy of the eigenvalues of K / n, K = cosines
precision and recall (arXiv 1904.06991): shares inside the other set's balls of k neighbours
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Features = Float[Tensor, "_ _"]  # images x numbers
ROWS = 1024  # of a matrix of kernels in memory
SIGMA, CMMD_SCALE = 10.0, 1000.0
NEIGHBOURS = 3


def kid(x: Features, y: Features) -> float:
    """Return the kernel inception distance over all pairs; published ones average subsets of it."""
    return _mmd(lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3, *_pair(x, y))


def cmmd(x: Features, y: Features) -> float:
    """Return CLIP's maximum mean discrepancy, unbiased: near 0 for equal distributions."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp((a @ b.T - 1) / SIGMA**2)  # |a - b|^2 = 2 - 2 a . b

    x, y = _pair(x, y)
    return CMMD_SCALE * _mmd(kernel, F.normalize(x, dim=1), F.normalize(y, dim=1))


def frechet(x: Features, y: Features) -> float:
    """Return the Frechet distance of the normal distributions with these means and covariances."""
    x, y = _pair(x, y)
    first, second = (torch.cov(f.T).reshape(f.shape[1], -1) for f in (x, y))
    # tr (C1 C2)^(1/2) = sum of the singular values of C1^(1/2) C2^(1/2), both symmetric
    both = torch.linalg.svdvals(_root(first) @ _root(second)).sum()
    gap = (x.mean(0) - y.mean(0)).square().sum()
    return (gap + first.trace() + second.trace() - 2 * both).item()


def vendi(x: Features) -> float:
    """Return how many different images there seem to be: 1 to n."""
    unit = F.normalize(x.double(), dim=1)
    small = unit @ unit.T if len(unit) < unit.shape[1] else unit.T @ unit  # the same eigenvalues
    values = torch.linalg.eigvalsh(small / len(unit)).clamp(min=0)
    return torch.special.entr(values).sum().exp().item()


def precision_recall(x: Features, y: Features, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Return the share of x that lies in y's balls, and the share of y that lies in x's."""
    x, y = _pair(x, y)
    return _inside(x, y, neighbours), _inside(y, x, neighbours)


def _inside(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """Return the share of points nearer to a centre than its `neighbours`-th neighbour."""
    radii = torch.cat(
        [_distances(part, centres).kthvalue(neighbours + 1).values for part in centres.split(ROWS)]
    )
    near = [(_distances(part, centres) <= radii).any(1) for part in points.split(ROWS)]
    return torch.cat(near).double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _mmd(kernel: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    def total(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([kernel(part, b).sum() for part in a.split(ROWS)]).sum()

    def different(a: Tensor) -> Tensor:
        own = torch.stack([kernel(part, part).diagonal().sum() for part in a.split(ROWS)]).sum()
        return (total(a, a) - own) / (len(a) * (len(a) - 1))

    return (different(x) + different(y) - 2 * total(x, y) / (len(x) * len(y))).item()


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"features of {x.shape[1]} and {y.shape[1]} numbers cannot be compared; compute both "
            "by the same network"
        )
    return x.double(), y.double()
