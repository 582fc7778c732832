"""Endless epochs of samples: each epoch is a permutation, known from counts alone."""

import abc
import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from sfumato.diffusion.randomness import derive


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
        self._permutation: tuple[int, Sequence[int]] | None = None

    def pick(self, number: int) -> RowPick:
        """Return a row; its seed is a function of (seed, key, epoch, member)."""
        epoch, position = divmod(number, self.samples)
        member = self._order(epoch)[position]
        seed = derive(self._seed, "image", self._key, epoch, member)
        return RowPick(0, self._members[member], seed)

    def find(self, number: int) -> tuple[int, int]:
        """Return 0 and the number of a sample; see `Epochs.find`."""
        return 0, self._members[number]

    def _order(self, epoch: int) -> Sequence[int]:
        if self._permutation is None or self._permutation[0] != epoch:
            order: Sequence[int] = range(self.samples)
            if self._shuffle:
                # Only random() is promised to be the same in every Python.
                rng = random.Random(derive(self._seed, "order", self._key, epoch))
                order = sorted(order, key=lambda _: rng.random())
            self._permutation = epoch, order
        return self._permutation[1]


@dataclass(frozen=True)
class _Epoch:
    """The shards of an epoch in their order, and where its windows begin."""

    number: int
    shards: np.ndarray
    firsts: Sequence[int]  # of each window: index into shards; and the end
    starts: Sequence[int]  # of each window: position in the epoch; and the end


@dataclass(frozen=True)
class _Window:
    """The samples of one window in their order: from `start` up to `stop` of all epochs."""

    start: int
    stop: int
    shards: np.ndarray
    rows: np.ndarray


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
        """
        assert buffer >= 1 and sum(counts) >= 1, "settings and counts were checked"
        self._counts = np.asarray(counts, dtype=np.int64)
        self._totals = self._counts if totals is None else np.asarray(totals, dtype=np.int64)
        self._ends = np.cumsum(self._counts)
        self._seed = seed
        self._own_seed = seed if key is None else derive(seed, "pool", key)
        self._shuffle = shuffle
        self._buffer = buffer
        self._epoch: _Epoch | None = None
        self._window: _Window | None = None
        self.samples = int(self._ends[-1])

    def pick(self, number: int) -> RowPick:
        """Return a row; its seed is a function of (seed, key, epoch, shard, row)."""
        window = self._window
        if window is None or not window.start <= number < window.stop:
            window = self._window = self._open(number)
        shard = int(window.shards[number - window.start])
        row = int(window.rows[number - window.start])
        epoch = number // self.samples
        return RowPick(shard, row, derive(self._own_seed, "sample", epoch, shard, row))

    def find(self, number: int) -> tuple[int, int]:
        """Return shard and row of a sample by its number in file order; see `Epochs.find`."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard] - self._counts[shard])

    def _open(self, number: int) -> _Window:
        """List and shuffle the window that holds a row."""
        passed, position = divmod(number, self.samples)
        if self._epoch is None or self._epoch.number != passed:
            self._epoch = self._arrange(passed)
        epoch = self._epoch
        index = bisect.bisect_right(epoch.starts, position) - 1
        shards = epoch.shards[epoch.firsts[index] : epoch.firsts[index + 1]]
        counts = self._counts[shards]
        rows = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        shards = np.repeat(shards, counts)
        if self._shuffle:
            order = permutation(len(rows), derive(self._own_seed, "window", passed, index))
            shards, rows = shards[order], rows[order]
        first = passed * self.samples
        return _Window(first + epoch.starts[index], first + epoch.starts[index + 1], shards, rows)

    def _arrange(self, number: int) -> _Epoch:
        shards = np.arange(len(self._counts))
        if self._shuffle:
            shards = permutation(len(shards), derive(self._seed, "shards", number))
        totals: list[int] = np.cumsum(self._totals[shards]).tolist()
        ends: list[int] = np.cumsum(self._counts[shards]).tolist()
        firsts, starts, passed = [0], [0], 0
        while starts[-1] < self.samples:
            last = bisect.bisect_left(totals, passed + self._buffer, lo=firsts[-1])
            firsts.append(min(last + 1, len(ends)))
            starts.append(ends[firsts[-1] - 1])
            passed = totals[firsts[-1] - 1]
        return _Epoch(number, shards, firsts, starts)


def permutation(count: int, seed: int) -> np.ndarray:
    """Return a permutation of 0..count-1 that is the same on every machine.

    It sorts raw 64-bit words of Philox 4x64-10 (Salmon et al. 2011), counters from 1, with the seed
    as the key; NumPy promises bit generators' raw words to stay as they are, but not shuffles.
    """
    words = np.random.Philox(key=seed).random_raw(count)
    return np.argsort(np.asarray(words), kind="stable")
