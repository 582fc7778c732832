"""Endless, shuffled, resumable orders; that of prompts is a function of (seed, epoch) and position.

Shards are read in a shuffled order through a buffer that is shuffled as it fills, so an epoch is
a permutation of all prompts while no more than the buffer is held in memory. A file smaller than
the buffer is shuffled fully; in a larger one a prompt can move forward by at most the buffer.
"""

import abc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, final

from sfumato.data.left_out import SkipLog, SkipReport

Row = TypeVar("Row")


class Stream(abc.ABC, Generic[Row]):
    """Give out rows without end, the same on every process that reads the same files."""

    @abc.abstractmethod
    def next(self, global_batch_size: int, start: int, stop: int) -> list[Row]:
        """Advance by one global batch and return its rows `start` to `stop`.

        Every process calls this with the same size and its own rows, so that all of them stay at
        the same position.

        Raises:
            ValueError: the rows are not inside the batch, or nothing can be read any more.
        """

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on with the very next row, fit for JSON."""

    @abc.abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken.

        Raises:
            ValueError: there is no such place, so the files or settings changed.
        """

    @property
    @abc.abstractmethod
    def skipped(self) -> SkipReport:
        """What has been left out so far, by reason."""


def check_rows(global_batch_size: int, start: int, stop: int) -> None:
    """Refuse rows that are not inside the batch with a ValueError."""
    if global_batch_size < 1 or not 0 <= start <= stop <= global_batch_size:
        raise ValueError(
            f"rows {start} to {stop} of a global batch of {global_batch_size} do not exist; "
            "give 0 <= start <= stop <= global_batch_size, and a batch of at least 1"
        )


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
class PromptStream(Stream[str]):
    """Give out prompts epoch after epoch."""

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
        """Advance by one global batch, which may straddle epochs; see `Stream.next`.

        Raises:
            ValueError: the rows are not inside the batch, or an epoch has no prompt at all.
        """
        check_rows(global_batch_size, start, stop)
        batch = [self._advance() for _ in range(global_batch_size)]
        return batch[start:stop]

    def state(self) -> dict[str, Any]:
        """Return how many prompts (`position`) of which `epoch` are consumed, from 0."""
        return {"epoch": self._epoch, "position": self._position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to `state` by reading over the prompts of its epoch that were consumed.

        Raises:
            ValueError: the epoch has fewer prompts than were consumed, so the files changed.
        """
        if state.keys() != {"epoch", "position"}:
            raise ValueError(
                f"{dict(state)} is no place in a stream of prompts, which has an epoch and a "
                "position; resume with the kind of data that the run was started with"
            )
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or position < 0:
            raise ValueError(
                f"epoch={epoch}, position={position} is no place in a stream; both count from 0"
            )
        self._begin(epoch)
        for passed in range(position):
            if next(self._prompts, None) is None:
                raise ValueError(
                    f"cannot resume at prompt {position} of epoch {epoch}: it now has "
                    f"only {passed} prompts ({self.skipped.summary()}). Restore the files that "
                    "the run was started with, or start a new run"
                )
        self._position = position

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
