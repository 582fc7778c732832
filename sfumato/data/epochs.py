"""Endless epochs of samples: each epoch is a permutation, known from counts alone."""

import abc
import bisect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import final

import numpy as np

from sfumato.diffusion.randomness import derive

AHEAD = 2  # shards behind a window that are told with it, at least


@dataclass(frozen=True, slots=True)
class RowPick:
    """One row of a global batch.

    Attributes:
        shard: index of the shard; 0 where all samples are one list.
        row: which of the shard's samples of this size, from 0.
        seed: of everything random about this row.
        bucket: index of the size that it is made in.
    """

    shard: int
    row: int
    seed: int
    bucket: int = 0


class Epochs(abc.ABC):
    """Samples that are interchangeable in a batch; each epoch is a permutation of them.

    The seed of a row depends on the seed of all, the pool's key, the epoch and the sample.

    Attributes:
        samples: in an epoch.
    """

    samples: int

    @abc.abstractmethod
    def pick(self, number: int) -> RowPick:
        """Return a row by its number, which counts from the first row of the first epoch."""

    @abc.abstractmethod
    def find(self, number: int) -> tuple[int, int]:
        """Return shard and row of a sample by its number in file order; from any thread."""


@final
class ListEpochs(Epochs):
    """Samples of one list, of which some may come several times in an epoch."""

    def __init__(self, members: Sequence[int], *, key: str, seed: int, shuffle: bool) -> None:
        """List the samples.

        Args:
            members: the number of each sample, once for each time in an epoch.
            key: of the pool; decides the order with the seed.
            seed: decides the order.
            shuffle: False keeps the order of members.
        """
        self.samples = len(members)
        self._members = members
        self._key = key
        self._seed = seed
        self._shuffle = shuffle
        self._order = lru_cache(maxsize=1)(self._list)

    def pick(self, number: int) -> RowPick:
        epoch, position = divmod(number, self.samples)
        member = self._order(epoch)[position]
        seed = derive(self._seed, "image", self._key, epoch, member)
        return RowPick(0, self._members[member], seed)

    def find(self, number: int) -> tuple[int, int]:
        return 0, self._members[number]

    def _list(self, epoch: int) -> Sequence[int]:
        if not self._shuffle:
            return range(self.samples)
        # Only random() is promised to be the same in every Python.
        rng = random.Random(derive(self._seed, "order", self._key, epoch))
        return sorted(range(self.samples), key=lambda _: rng.random())


@final
class ShardEpochs(Epochs):
    """Samples of thousands of shards; memory is in proportion to the shards and one window.

    The shards of an epoch are permuted and taken together in windows of at least `buffer` samples,
    the last window of what is left; each window is permuted as a whole. Counts decide all of it,
    so any position is reached without reading a file.
    """

    def __init__(
        self,
        counts: Sequence[int],
        totals: Sequence[int] | None = None,
        *,
        seed: int,
        shuffle: bool,
        buffer: int,
        key: str | None = None,
        ahead: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        """Count the samples.

        Args:
            counts: samples of each shard; some, but not all, may be 0.
            totals: samples of each shard in all pools, which decide the windows: so pools that
                are drawn from in step read the same shards. None is `counts`.
            seed: with the epoch, decides the order.
            shuffle: False keeps file order in every epoch.
            buffer: samples that are shuffled among each other, at least.
            key: of the pool, if there are several.
            ahead: is told, when a window begins, its shards and those of the next, in their order.
        """
        assert buffer >= 1 and sum(counts) >= 1, "settings and counts were checked"
        self._counts = np.asarray(counts, dtype=np.int64)
        self._totals = self._counts if totals is None else np.asarray(totals, dtype=np.int64)
        self._ends = np.cumsum(self._counts)
        self._seed = seed
        self._own_seed = seed if key is None else derive(seed, "pool", key)
        self._shuffle = shuffle
        self._buffer = buffer
        self.samples = int(self._ends[-1])
        self._ahead = ahead
        self._windows = lru_cache(maxsize=2)(self._list_windows)  # the next epoch's are told ahead
        self._window = lru_cache(maxsize=1)(self._list_window)

    def pick(self, number: int) -> RowPick:
        epoch, position = divmod(number, self.samples)
        starts, _ = self._windows(epoch)
        window = bisect.bisect_right(starts, position) - 1
        shards, rows = self._window(epoch, window)
        shard, row = (int(part[position - starts[window]]) for part in (shards, rows))
        return RowPick(shard, row, derive(self._own_seed, "sample", epoch, shard, row))

    def find(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard] - self._counts[shard])

    def _list_windows(self, epoch: int) -> tuple[list[int], list[np.ndarray]]:
        """Return where each window of an epoch begins, and at last its end; and their shards."""
        shards = np.arange(len(self._counts))
        if self._shuffle:
            shards = permutation(len(shards), derive(self._seed, "shards", epoch))
        totals: list[int] = np.cumsum(self._totals[shards]).tolist()
        ends: list[int] = np.cumsum(self._counts[shards]).tolist()
        starts, windows, first, passed = [0], [], 0, 0
        while starts[-1] < self.samples:
            last = min(bisect.bisect_left(totals, passed + self._buffer, lo=first), len(ends) - 1)
            windows.append(shards[first : last + 1])
            starts.append(ends[last])
            first, passed = last + 1, totals[last]
        return starts, windows

    def _list_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shard and row of each sample of a window, in their order."""
        shards = self._windows(epoch)[1][window]
        if self._ahead is not None:
            self._ahead(self._upcoming(epoch, window))
        counts = self._counts[shards]
        rows = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        shards = np.repeat(shards, counts)
        if self._shuffle:
            order = permutation(len(rows), derive(self._own_seed, "window", epoch, window))
            shards, rows = shards[order], rows[order]
        return shards, rows

    def _upcoming(self, epoch: int, window: int) -> list[int]:
        """Return the shards of a window, and of as many windows behind it as have `AHEAD`."""
        own, *later = self._windows(epoch)[1][window:]
        behind: list[int] = []
        for shards in chain(later, self._windows(epoch + 1)[1]):
            if len(behind) >= AHEAD:
                break
            behind += shards[self._counts[shards] > 0].tolist()
        return list(dict.fromkeys([*own[self._counts[own] > 0].tolist(), *behind]))


def permutation(count: int, seed: int) -> np.ndarray:
    """Return a permutation of 0..count-1 that is the same on every machine.

    It sorts raw 64-bit words of Philox 4x64-10 (Salmon et al. 2011), counters from 1, with the seed
    as the key; NumPy promises bit generators' raw words to stay as they are, but not shuffles.
    """
    words = np.random.Philox(key=seed).random_raw(count)
    return np.argsort(np.asarray(words), kind="stable")
