"""Which sample of thousands of shards comes next: a function of (seed, epoch, position).

An epoch is a permutation of all samples. Its shards are permuted and taken together in windows of
at least `buffer` samples, the last of what is left; each window is permuted as a whole. Counts
alone decide, so any position is reached without reading a file.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from sfumato.diffusion.randomness import derive


@dataclass(frozen=True, slots=True)
class ShardPick:
    """One row of a global batch.

    Attributes:
        shard: index of the shard.
        row: which of its samples, from 0.
        seed: of everything random about this row: a function of (seed, epoch, shard, row).
    """

    shard: int
    row: int
    seed: int


@dataclass(frozen=True)
class _Epoch:
    """The shards of an epoch in their order, and where its windows begin."""

    number: int
    shards: np.ndarray
    firsts: Sequence[int]  # of each window: index into shards; and the end
    starts: Sequence[int]  # of each window: position in the epoch; and the end


@dataclass(frozen=True)
class _Window:
    """The samples of one window in their order: position `start` up to `stop` of the epoch."""

    epoch: int
    start: int
    stop: int
    shards: np.ndarray
    rows: np.ndarray


@final
class ShardOrder:
    """Choose samples, for all processes alike; memory is in proportion to shards and a window.

    Attributes:
        samples: in an epoch.
        epoch: of the next sample, from 0; it can be set, as can
        position: how many samples of the epoch have been taken.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, shuffle: bool, buffer: int) -> None:
        """Stand before the first sample.

        Args:
            counts: samples of each shard; some, but not all, may be 0.
            seed: with the epoch, decides the order.
            shuffle: False keeps file order in every epoch.
            buffer: samples that are shuffled among each other, at least.
        """
        assert buffer >= 1 and sum(counts) >= 1, "settings and counts were checked"
        self._counts = np.asarray(counts, dtype=np.int64)
        self._ends = np.cumsum(self._counts)
        self._seed = seed
        self._shuffle = shuffle
        self._buffer = buffer
        self._arranged: _Epoch | None = None
        self._window: _Window | None = None
        self.samples = int(self._ends[-1])
        self.epoch = self.position = 0

    def take(self, count: int, start: int, stop: int) -> list[ShardPick]:
        """Advance by `count` samples, which may straddle epochs; return `start` to `stop` - 1."""
        picks = []
        for place in range(self.position + start, self.position + stop):
            passed, position = divmod(place, self.samples)
            picks.append(self._pick(self.epoch + passed, position))
        passed, self.position = divmod(self.position + count, self.samples)
        self.epoch += passed
        return picks

    def place(self, number: int) -> tuple[int, int]:
        """Return shard and row of a sample by its number in file order."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard] - self._counts[shard])

    def _pick(self, epoch: int, position: int) -> ShardPick:
        window = self._window
        if window is None or window.epoch != epoch or not window.start <= position < window.stop:
            window = self._window = self._open(epoch, position)
        shard = int(window.shards[position - window.start])
        row = int(window.rows[position - window.start])
        return ShardPick(shard, row, derive(self._seed, "sample", epoch, shard, row))

    def _open(self, number: int, position: int) -> _Window:
        """List and shuffle the window that holds a position."""
        if self._arranged is None or self._arranged.number != number:
            self._arranged = self._arrange(number)
        epoch = self._arranged
        index = bisect.bisect_right(epoch.starts, position) - 1
        shards = epoch.shards[epoch.firsts[index] : epoch.firsts[index + 1]]
        counts = self._counts[shards]
        rows = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        shards = np.repeat(shards, counts)
        if self._shuffle:
            order = permutation(len(rows), derive(self._seed, "window", number, index))
            shards, rows = shards[order], rows[order]
        return _Window(number, epoch.starts[index], epoch.starts[index + 1], shards, rows)

    def _arrange(self, number: int) -> _Epoch:
        shards = np.arange(len(self._counts))
        if self._shuffle:
            shards = permutation(len(shards), derive(self._seed, "shards", number))
        ends: list[int] = np.cumsum(self._counts[shards]).tolist()
        firsts, starts = [0], [0]
        while starts[-1] < self.samples:
            last = bisect.bisect_left(ends, starts[-1] + self._buffer, lo=firsts[-1])
            firsts.append(min(last + 1, len(ends)))
            starts.append(ends[firsts[-1] - 1])
        return _Epoch(number, shards, firsts, starts)


def permutation(count: int, seed: int) -> np.ndarray:
    """Return a permutation of 0..count-1 that is the same on every machine.

    It sorts raw 64-bit words of Philox 4x64-10 (Salmon et al. 2011), counters from 1, with the seed
    as the key; NumPy promises bit generators' raw words to stay as they are, but not shuffles.
    """
    words = np.random.Philox(key=seed).random_raw(count)
    return np.argsort(np.asarray(words), kind="stable")
