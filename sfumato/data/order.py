"""Orders: which row comes next, a function of the seed and of how many rows were taken.

PromptOrder  prompts: files in a shuffled order, through a buffer that is shuffled as it fills
PoolOrder    images: pools by size and source; whichever is furthest behind its share comes next
"""

import abc
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar, final

from sfumato.data.epochs import Epochs, RowPick
from sfumato.data.left_out import SkipLog
from sfumato.diffusion.randomness import derive

Pick = TypeVar("Pick")
ATTEMPTS = 16  # replacements of a broken row: from its own size, then as many from anywhere
_LOGGER = logging.getLogger(__name__)


class Resumable(abc.ABC):
    """A position in rows that never end."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on with the very next row, fit for JSON."""

    @abc.abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken.

        Raises:
            ValueError: there is no such position, so the files or settings changed.
        """


class Order(Resumable, Generic[Pick]):
    """Choose rows without end, for all processes alike."""

    @abc.abstractmethod
    def take(self, count: int, start: int, stop: int) -> list[Pick]:
        """Advance by a global batch of `count` rows; return those from `start` to `stop` - 1."""

    @abc.abstractmethod
    def tries(self, pick: Pick) -> Iterator[Pick]:
        """Yield a pick, and then what may replace it; from any thread."""


@dataclass(frozen=True)
class Guard:
    """A part of the state that has to be the same on resume.

    Attributes:
        value: of now.
        change: what happened where another value was saved.
        advice: what to restore then.
    """

    value: str
    change: str
    advice: str


def check_keys(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a state with other keys than an order's own with a ValueError."""
    if state.keys() != own.keys():
        raise ValueError(
            f"{str(dict(state))[:80]} is no position in this data, which has {', '.join(own)}; "
            "resume with the kind of data that the run was started with"
        )


# Prompts: one pass over files an epoch


@final
class PromptOrder(Order[str]):
    """Give out prompts epoch after epoch, each a permutation of all prompts.

    A file smaller than the buffer is shuffled fully; in a larger one a prompt can move forward by
    at most the buffer. No more than the buffer is held in memory.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        read: Callable[[Path], Iterator[str]],
        skips: SkipLog,
        *,
        seed: int,
        shuffle: bool,
        buffer: int,
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

    def take(self, count: int, start: int, stop: int) -> list[str]:
        return [self._advance() for _ in range(count)][start:stop]

    def state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position}

    def restore(self, state: Mapping[str, Any]) -> None:
        check_keys(state, self.state())
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or position < 0:
            raise ValueError(
                f"epoch={epoch}, position={position} is no position; both count from 0"
            )
        self._begin(epoch)
        for passed in range(position):
            if next(self._prompts, None) is None:
                raise ValueError(
                    f"cannot resume at prompt {position} of epoch {epoch}: it now has "
                    f"only {passed} prompts ({self._skips.report().summary()}). Restore the files "
                    "that the run was started with, or start a new run"
                )
        self._position = position

    def tries(self, pick: str) -> Iterator[str]:
        yield pick  # A broken prompt was left out when its file was read.

    def _advance(self) -> str:
        while (prompt := next(self._prompts, None)) is None:
            if self._position == 0:
                raise ValueError(
                    f"epoch {self._epoch} has no readable prompt "
                    f"({self._skips.report().summary()}); check that the files are still there"
                )
            self._begin(self._epoch + 1)
        self._position += 1
        return prompt

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self._position = 0
        self._prompts = self._prompts_of(epoch)

    def _prompts_of(self, epoch: int) -> Iterator[str]:
        if not self._shuffle:
            return chain.from_iterable(map(self._read, self._shards))
        # A string seeds through SHA-512, whatever PYTHONHASHSEED.
        rng = random.Random(f"prompts of epoch {epoch}, seed {self._seed}")
        shards = sorted(self._shards, key=lambda _: rng.random())
        prompts = chain.from_iterable(map(self._read, shards))
        return shuffle_buffered(prompts, rng, self._buffer)


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


# Images: samples by their numbers, in memory or in shards


@dataclass(frozen=True)
class Pool:
    """Samples that share a size and, with weights, a source.

    Attributes:
        key: names the pool, in states and messages.
        bucket: index of the size that its pictures are cropped to.
        rows: the samples in their order.
        share: how often it is drawn from, relative to the others.
    """

    key: str
    bucket: int
    rows: Epochs
    share: float


@final
class PoolOrder(Order[RowPick]):
    """Draw from several pools in proportion to their shares; a batch has one size.

    The pool that is furthest behind its share comes next, so counts never stray far from their
    shares. Only the number of rows that each pool gave has to be remembered.

    Attributes:
        drawn: how many rows each pool has given.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        *,
        name: str | None = None,
        guards: Mapping[str, Guard],
        anywhere: int = 0,
    ) -> None:
        """Stand before the first row.

        Args:
            pools: by size; none is empty.
            name: of the pools in the state; the state of a single pool without a name is how many
                rows (`position`) of which `epoch` are consumed.
            guards: what has to be the same on resume.
            anywhere: samples, by number, that may replace broken ones of any size; 0 is none.
        """
        assert name or len(pools) == 1, "only the rows of one pool have an epoch and a position"
        self._pools = tuple(pools)
        buckets = dict.fromkeys(pool.bucket for pool in pools)
        self._groups = [
            [i for i, pool in enumerate(pools) if pool.bucket == bucket] for bucket in buckets
        ]
        whole = sum(pool.share for pool in pools)
        self._shares = [pool.share / whole for pool in pools]
        self._name = name
        self._guards = guards
        self._anywhere = anywhere
        self._small: set[int] = set()
        self.drawn = [0] * len(self._pools)

    @property
    def samples(self) -> int:
        """How many samples all pools have."""
        return sum(pool.rows.samples for pool in self._pools)

    def take(self, count: int, start: int, stop: int) -> list[RowPick]:
        group = self._groups[self._furthest_behind(self._groups, count)]
        self._warn_if_small(group, count)
        single = [[index] for index in group]
        picks = []
        for row in range(count):
            index = group[self._furthest_behind(single, 1)]
            if start <= row < stop:
                pool = self._pools[index]
                picks.append(replace(pool.rows.pick(self.drawn[index]), bucket=pool.bucket))
            self.drawn[index] += 1
        return picks

    def state(self) -> dict[str, Any]:
        guards = {key: guard.value for key, guard in self._guards.items()}
        if self._name is None:
            epoch, position = divmod(self.drawn[0], self.samples)
            return {"epoch": epoch, "position": position, **guards}
        pools = {
            pool.key: {"drawn": drawn, "samples": pool.rows.samples}
            for pool, drawn in zip(self._pools, self.drawn, strict=True)
        }
        return {self._name: pools, **guards}

    def restore(self, state: Mapping[str, Any]) -> None:
        check_keys(state, self.state())
        saved = {} if self._name is None else state[self._name]
        if self._name is not None:
            self._check_samples({key: pool["samples"] for key, pool in saved.items()})
        for key, guard in self._guards.items():
            if state[key] != guard.value:
                raise ValueError(
                    f"cannot resume: {guard.change} ({key} was {state[key]!r}, and now is "
                    f"{guard.value!r}). {guard.advice}, or start a new run"
                )
        if self._name is None:
            self.drawn = [self._number(state["epoch"], state["position"])]
        else:
            self.drawn = [saved[pool.key]["drawn"] for pool in self._pools]

    def tries(self, pick: RowPick) -> Iterator[RowPick]:
        """Yield a pick, then others of its size, then any others."""
        pools = [pool.rows for pool in self._pools if pool.bucket == pick.bucket]
        samples = sum(pool.samples for pool in pools)
        for attempt in range(1 + ATTEMPTS * (2 if self._anywhere else 1)):
            shard, row = pick.shard, pick.row
            if attempt > 0:
                chance = derive(pick.seed, "replacement", attempt)
                if attempt > ATTEMPTS:
                    row = chance % self._anywhere
                else:
                    shard, row = _find(pools, chance % samples)
            yield RowPick(shard, row, derive(pick.seed, "frame", attempt), pick.bucket)

    def _check_samples(self, saved: Mapping[str, int]) -> None:
        now = {pool.key: pool.rows.samples for pool in self._pools}
        for key in dict.fromkeys((*saved, *now)):
            if saved.get(key) != now.get(key):
                raise ValueError(
                    f"cannot resume: the data had {saved.get(key, 0)} samples of {key}, and now "
                    f"has {now.get(key, 0)}. Restore the files and settings that the run was "
                    "started with, or start a new run"
                )

    def _number(self, epoch: int, position: int) -> int:
        if epoch < 0 or not 0 <= position < self.samples:
            raise ValueError(
                f"epoch={epoch}, position={position} is no position in epochs of {self.samples} "
                "samples; both count from 0"
            )
        return epoch * self.samples + position

    def _furthest_behind(self, groups: Sequence[Sequence[int]], count: int) -> int:
        """Return the group that, with `count` rows to come, misses most of its share."""
        if len(groups) == 1:
            return 0
        shares = [sum(self._shares[i] for i in group) for group in groups]
        drawn = [sum(self.drawn[i] for i in group) for group in groups]
        goal = (sum(drawn) + count) / sum(shares)
        return max(range(len(groups)), key=lambda g: (shares[g] * goal - drawn[g], -g))

    def _warn_if_small(self, group: Sequence[int], count: int) -> None:
        samples = sum(self._pools[index].rows.samples for index in group)
        if self._name and samples < count and group[0] not in self._small:
            self._small.add(group[0])
            _LOGGER.warning(
                "%d samples fall to %s pixels, fewer than the global batch of %d, which repeats "
                "them; add images of this shape, or switch buckets off",
                *(samples, self._pools[group[0]].key.partition(" ")[0], count),
            )


def _find(pools: Sequence[Epochs], number: int) -> tuple[int, int]:
    for pool in pools:
        if number < pool.samples:
            return pool.find(number)
        number -= pool.samples
    raise AssertionError("the number lies inside the pools")
