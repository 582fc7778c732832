"""An endless, shuffled, resumable order of prompts: a function of (seed, epoch) and position.

Shards are read in a shuffled order through a buffer that is shuffled as it fills, so an epoch is
a permutation of all prompts while no more than the buffer is held in memory. A file smaller than
the buffer is shuffled fully; in a larger one a prompt can move forward by at most the buffer.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from sfumato.data.skips import SkipLog, SkipReport


@dataclass(frozen=True)
class StreamState:
    """Where a stream stands: `position` prompts of `epoch` are consumed (both count from 0)."""

    epoch: int = 0
    position: int = 0


def shuffle_buffered(prompts: Iterator[str], rng: random.Random, buffer: int) -> Iterator[str]:
    """Yield a random order of `prompts`, never holding more than `buffer` of them."""
    pool: list[str] = []
    for prompt in prompts:
        pool.append(prompt)
        if len(pool) == buffer:
            yield _draw(pool, rng)
    while pool:
        yield _draw(pool, rng)


def _draw(pool: list[str], rng: random.Random) -> str:
    # Of random.Random's methods, only random() is promised to be the same in every Python.
    chosen = int(rng.random() * len(pool))
    pool[chosen], pool[-1] = pool[-1], pool[chosen]
    return pool.pop()


@final
class PromptStream:
    """Give out prompts epoch after epoch, the same on every process that reads the same files."""

    def __init__(
        self,
        shards: Sequence[Path],
        read: Callable[[Path], Iterator[str]],
        skips: SkipLog,
        *,
        seed: int = 0,
        shuffle: bool = True,
        buffer: int = 10_000,
    ) -> None:
        """Stand before the first prompt of epoch 0.

        Args:
            shards: the files, in file order.
            read: gives the prompts of one file, in file order.
            skips: where `read` counts what it leaves out.
            seed: with the epoch, decides the order.
            shuffle: False keeps the file order in every epoch.
            buffer: the largest number of prompts held for shuffling.
        """
        if buffer < 1:
            raise ValueError(f"the shuffle buffer holds {buffer} prompts; give 1 or more")
        self._shards = tuple(shards)
        self._read = read
        self._skips = skips
        self._seed = seed
        self._shuffle = shuffle
        self._buffer = buffer
        self._begin(0)

    @property
    def skipped(self) -> SkipReport:
        """What has been left out so far, by reason."""
        return self._skips.report()

    def next(self, global_batch_size: int, start: int, stop: int) -> list[str]:
        """Advance by one global batch and return its rows `start` to `stop`.

        Every process calls this with the same size and its own rows, so that all of them stay at
        the same position. A batch may straddle epochs.

        Raises:
            ValueError: the rows are not inside the batch, or an epoch has no prompt at all.
        """
        if global_batch_size < 1 or not 0 <= start <= stop <= global_batch_size:
            raise ValueError(
                f"rows {start} to {stop} of a global batch of {global_batch_size} do not exist; "
                "give 0 <= start <= stop <= global_batch_size, and a batch of at least 1"
            )
        batch = [self._advance() for _ in range(global_batch_size)]
        return batch[start:stop]

    def state(self) -> StreamState:
        """Return what `restore` needs to go on with the very next prompt."""
        return StreamState(self._epoch, self._position)

    def restore(self, state: StreamState) -> None:
        """Go to `state` by reading over the prompts of its epoch that were consumed.

        Raises:
            ValueError: the epoch has fewer prompts than were consumed, so the files changed.
        """
        if state.epoch < 0 or state.position < 0:
            raise ValueError(f"{state} is no place in a stream; epoch and position count from 0")
        self._begin(state.epoch)
        for passed in range(state.position):
            if next(self._prompts, None) is None:
                raise ValueError(
                    f"cannot resume at prompt {state.position} of epoch {state.epoch}: it now has "
                    f"only {passed} prompts ({self.skipped.summary()}). Restore the files that "
                    "the run was started with, or start a new run"
                )
        self._position = state.position

    def _advance(self) -> str:
        while (prompt := next(self._prompts, None)) is None:
            if self._position == 0:
                raise ValueError(
                    f"epoch {self._epoch} has no readable prompt ({self.skipped.summary()}); "
                    "check that the files are still there"
                )
            self._begin(self._epoch + 1)
        self._position += 1
        return prompt

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self._position = 0
        self._prompts = self._order(epoch)

    def _order(self, epoch: int) -> Iterator[str]:
        if not self._shuffle:
            return self._chain(self._shards)
        # A string seeds through SHA-512, whatever PYTHONHASHSEED.
        rng = random.Random(f"prompts of epoch {epoch}, seed {self._seed}")
        shards = sorted(self._shards, key=lambda _: rng.random())
        return shuffle_buffered(self._chain(shards), rng, self._buffer)

    def _chain(self, shards: Sequence[Path]) -> Iterator[str]:
        for shard in shards:
            yield from self._read(shard)
