"""Which sample is trained on next: a function of (seed, how many rows each pool has given).

A pool holds the samples that share a size and, with weights, a source; it gives them out epoch
after epoch, each epoch a permutation. Whichever pool is furthest behind its share comes next, so
counts never stray far from their shares and no draw has to be remembered.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from sfumato.data.frame import Size
from sfumato.diffusion.randomness import derive


@dataclass(frozen=True)
class Pool:
    """Samples that are interchangeable in a batch.

    Attributes:
        key: names the pool, in states and messages.
        size: what its pictures are cropped to.
        members: indices of samples, one for each time in an epoch.
        share: how often it is drawn from, relative to the others.
    """

    key: str
    size: Size
    members: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class Pick:
    """One row of a global batch.

    Attributes:
        bucket: index of the size.
        sample: index of the sample.
        seed: of everything random about this row: a function of (seed, pool, epoch, member).
    """

    bucket: int
    sample: int
    seed: int


@final
class Order:
    """Choose samples, for all processes alike."""

    def __init__(self, pools: Sequence[Pool], *, seed: int, shuffle: bool) -> None:
        """Stand before the first row; `shuffle=False` keeps the order of members."""
        self.pools = tuple(pools)
        self.sizes = tuple(dict.fromkeys(pool.size for pool in pools))
        self._of_bucket = [
            [i for i, pool in enumerate(pools) if pool.size == size] for size in self.sizes
        ]
        whole = sum(pool.share for pool in pools)
        self._shares = [pool.share / whole for pool in pools]
        self._seed = seed
        self._shuffle = shuffle
        self._permutations: dict[int, tuple[int, Sequence[int]]] = {}
        self.drawn = [0] * len(self.pools)

    def take(self, count: int) -> list[Pick]:
        """Advance by a batch, all of one size."""
        bucket = self._furthest_behind(self._of_bucket, count)
        pools = self._of_bucket[bucket]
        picks = []
        for _ in range(count):
            chosen = pools[self._furthest_behind([[pool] for pool in pools], 1)]
            picks.append(self._pick(bucket, chosen))
            self.drawn[chosen] += 1
        return picks

    def members(self, bucket: int) -> Iterator[tuple[int, ...]]:
        """Yield the members of each pool of a bucket."""
        return (self.pools[i].members for i in self._of_bucket[bucket])

    def _furthest_behind(self, groups: Sequence[Sequence[int]], count: int) -> int:
        """Return the group that, with `count` rows to come, misses most of its share."""
        shares = [sum(self._shares[i] for i in group) for group in groups]
        drawn = [sum(self.drawn[i] for i in group) for group in groups]
        goal = (sum(drawn) + count) / sum(shares)
        return max(range(len(groups)), key=lambda g: (shares[g] * goal - drawn[g], -g))

    def _pick(self, bucket: int, index: int) -> Pick:
        pool = self.pools[index]
        epoch, position = divmod(self.drawn[index], len(pool.members))
        member = self._permutation(index, epoch)[position]
        seed = derive(self._seed, "image", pool.key, epoch, member)
        return Pick(bucket, pool.members[member], seed)

    def _permutation(self, index: int, epoch: int) -> Sequence[int]:
        known = self._permutations.get(index)
        if known is not None and known[0] == epoch:
            return known[1]
        order: Sequence[int] = range(len(self.pools[index].members))
        if self._shuffle:
            # Of random.Random's methods, only random() is promised to be the same in every Python.
            rng = random.Random(derive(self._seed, "order", self.pools[index].key, epoch))
            order = sorted(order, key=lambda _: rng.random())
        self._permutations[index] = epoch, order
        return order


def check_counts(pools: Sequence[Pool], saved: Mapping[str, int]) -> None:
    """Refuse to go on with other samples than before with a ValueError that names the pool."""
    now = {pool.key: len(pool.members) for pool in pools}
    for key in dict.fromkeys((*saved, *now)):
        if saved.get(key) != now.get(key):
            raise ValueError(
                f"cannot resume: the data had {saved.get(key, 0)} samples of {key}, and now has "
                f"{now.get(key, 0)}. Restore the files and settings that the run was started "
                "with, or start a new run"
            )
