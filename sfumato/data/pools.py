"""Aspect-ratio buckets, and pools of samples by bucket and source.

Buckets are sizes of about one area, so that pictures lose little when they are cropped. For every
multiple a of the divisor, b is the largest multiple with a b <= height x width; the sizes are all
a x b and b x a with 1/2 <= a / b <= 2, and height x width itself. Around 1024 x 1024 with divisor
64 these are 13 of SDXL's 40 (arXiv:2307.01952, appendix I), the largest of each shape.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sfumato.data.epochs import Epochs
from sfumato.data.order import Pool
from sfumato.data.sample import Size

NARROWEST, WIDEST = 0.5, 2.0


def bucket_sizes(height: int, width: int, divisor: int) -> tuple[Size, ...]:
    """List the sizes in pixels, from wide to tall; 13 around 1024 x 1024 with 64.

    Raises:
        ValueError: a side is not a positive multiple of the divisor.
    """
    check_size(height, width, divisor)
    area = height * width
    sizes = {(height, width)}
    for a in range(divisor, math.isqrt(int(area * WIDEST)) + 1, divisor):
        b = area // a // divisor * divisor
        if b and NARROWEST <= a / b <= WIDEST:
            sizes |= {(a, b), (b, a)}
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))


def check_size(height: int, width: int, divisor: int) -> None:
    """Refuse a size that the model cannot make with a ValueError."""
    if divisor < 1 or height < 1 or width < 1 or height % divisor or width % divisor:
        raise ValueError(
            f"images of {height} x {width} pixels cannot be trained on; give positive multiples "
            f"of {divisor}"
        )


@lru_cache(maxsize=65536)
def nearest(original: Size, sizes: tuple[Size, ...]) -> int:
    """Return the index of the size whose log aspect ratio is nearest; of two, the larger size."""

    def distance(index: int) -> tuple[float, int]:
        height, width = sizes[index]
        ratio = math.log(original[0] / original[1]) - math.log(height / width)
        return round(abs(ratio), 9), -height * width

    return min(range(len(sizes)), key=distance)


@dataclass(frozen=True)
class SourceShare:
    """The usable samples of one source.

    Attributes:
        name: of the source.
        counts: samples of each bucket.
        repeats: how often each comes in an epoch.
        weight: share of the rows; None is in proportion to samples x repeats.
    """

    name: str
    counts: Sequence[int]
    repeats: int
    weight: float | None

    def of(self, bucket: int) -> float:
        """Return the share of a bucket of this source."""
        if self.weight is None:
            return float(self.counts[bucket] * self.repeats)
        return self.weight * self.counts[bucket] / sum(self.counts)


def build_pools(
    sources: Sequence[SourceShare],
    sizes: Sequence[Size],
    rows: Callable[[str, int, Sequence[int]], Epochs],
) -> list[Pool]:
    """Return the pools that are not empty, by size; either all sources have a weight or none.

    Args:
        sizes: of the buckets.
        rows: returns the samples of a pool: of its key, its bucket, and some sources by index.
    """
    weighted = any(source.weight is not None for source in sources)
    everyone = range(len(sources))
    pools = []
    for bucket, (height, width) in enumerate(sizes):
        for chosen in [[index] for index in everyone] if weighted else [everyone]:
            if any(sources[index].counts[bucket] for index in chosen):
                key = f"{height}x{width}" + (f" {sources[chosen[0]].name}" if weighted else "")
                share = sum(sources[index].of(bucket) for index in chosen)
                pools.append(Pool(key, bucket, rows(key, bucket, chosen), share))
    return pools
