"""Orders: which row comes next, a function of the seed and of how many rows were taken.

Three algorithms share one contract:

PromptOrder  prompts: files in a shuffled order, through a buffer that is shuffled as it fills
PoolOrder    images: pools by size and source; whichever is furthest behind its share comes next
WindowOrder  thousands of shards: windows of several shards, each shuffled as a whole
"""

import abc
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, final

from sfumato.data.epochs import Epochs, RowPick, ShardEpochs
from sfumato.data.left_out import SkipLog
from sfumato.diffusion.randomness import derive

Pick = TypeVar("Pick")
ATTEMPTS = 16  # replacements of a broken row: from its own size, then as many from anywhere
_LOGGER = logging.getLogger(__name__)


class Order(abc.ABC, Generic[Pick]):
    """Choose rows without end, for all processes alike."""

    @abc.abstractmethod
    def take(self, count: int, start: int, stop: int) -> list[Pick]:
        """Advance by a global batch of `count` rows; return those from `start` to `stop` - 1."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on with the very next row, fit for JSON."""

    @abc.abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken.

        Raises:
            ValueError: the rows, or their order, are not those of then.
        """

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


def check_keys(state: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Refuse the state of another kind of order with a ValueError."""
    if state.keys() != {*keys}:
        raise ValueError(
            f"{str(dict(state))[:80]} is no position in this data, which has {', '.join(keys)}; "
            "resume with the kind of data that the run was started with"
        )


def check_guards(state: Mapping[str, Any], guards: Mapping[str, Guard]) -> None:
    """Refuse the state of other data with a ValueError."""
    for key, guard in guards.items():
        if state[key] != guard.value:
            raise ValueError(
                f"cannot resume: {guard.change} ({key} was {state[key]!r}, and now is "
                f"{guard.value!r}). {guard.advice}, or start a new run"
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
        """Advance by a global batch, which may straddle epochs; see `Order.take`.

        Raises:
            ValueError: an epoch has no prompt at all.
        """
        return [self._advance() for _ in range(count)][start:stop]

    def state(self) -> dict[str, Any]:
        """Return how many prompts (`position`) of which `epoch` are consumed, from 0."""
        return {"epoch": self._epoch, "position": self._position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to `state` by reading over the prompts of its epoch that were consumed.

        Raises:
            ValueError: the epoch has fewer prompts than were consumed, so the files changed.
        """
        check_keys(state, ("epoch", "position"))
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
                    f"only {passed} prompts ({self._skips.report().summary()}). Restore the files "
                    "that the run was started with, or start a new run"
                )
        self._position = position

    def tries(self, pick: str) -> Iterator[str]:
        """Yield the prompt: a broken one was left out when its file was read."""
        yield pick

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
            return self._chain(self._shards)
        # A string seeds through SHA-512, whatever PYTHONHASHSEED.
        rng = random.Random(f"prompts of epoch {epoch}, seed {self._seed}")
        shards = sorted(self._shards, key=lambda _: rng.random())
        return shuffle_buffered(self._chain(shards), rng, self._buffer)

    def _chain(self, shards: Sequence[Path]) -> Iterator[str]:
        for shard in shards:
            yield from self._read(shard)


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

    Whichever pool is furthest behind its share comes next, so counts never stray far from their
    shares, and how many rows each pool has given is all that has to be remembered.
    """

    def __init__(
        self, pools: Sequence[Pool], *, name: str, guards: Mapping[str, Guard], anywhere: int = 0
    ) -> None:
        """Stand before the first row.

        Args:
            pools: by size; none is empty.
            name: of the pools in the state.
            guards: what has to be the same on resume.
            anywhere: samples, by number, that may replace broken ones of any size; 0 is none.
        """
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

    def take(self, count: int, start: int, stop: int) -> list[RowPick]:
        """Advance by a global batch, all of one size; see `Order.take`."""
        group = self._groups[self._furthest_behind(self._groups, count)]
        self._warn_if_small(group, count)
        single = [[index] for index in group]
        picks = []
        for row in range(count):
            index = group[self._furthest_behind(single, 1)]
            if start <= row < stop:
                picks.append(self._pick(index))
            self.drawn[index] += 1
        return picks

    def state(self) -> dict[str, Any]:
        """Return how many rows each pool has given, and of how many samples."""
        pools = {
            pool.key: {"drawn": drawn, "samples": pool.rows.samples}
            for pool, drawn in zip(self._pools, self.drawn, strict=True)
        }
        return {self._name: pools, **{key: guard.value for key, guard in self._guards.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken; nothing is read for it.

        Raises:
            ValueError: the samples are not those of then; it names the pool.
        """
        check_keys(state, (self._name, *self._guards))
        saved = {key: pool["samples"] for key, pool in state[self._name].items()}
        now = {pool.key: pool.rows.samples for pool in self._pools}
        for key in dict.fromkeys((*saved, *now)):
            if saved.get(key) != now.get(key):
                raise ValueError(
                    f"cannot resume: the data had {saved.get(key, 0)} samples of {key}, and now "
                    f"has {now.get(key, 0)}. Restore the files and settings that the run was "
                    "started with, or start a new run"
                )
        check_guards(state, self._guards)
        self.drawn = [state[self._name][pool.key]["drawn"] for pool in self._pools]

    def tries(self, pick: RowPick) -> Iterator[RowPick]:
        """Yield a pick, then others of its size, then any others; see `Order.tries`."""
        (group,) = (each for each in self._groups if self._pools[each[0]].bucket == pick.bucket)
        pools = [self._pools[index].rows for index in group]
        for attempt in range(1 + ATTEMPTS * (2 if self._anywhere else 1)):
            shard, row = pick.shard, pick.row
            if attempt > 0:
                chance = derive(pick.seed, "replacement", attempt)
                if attempt > ATTEMPTS:
                    row = chance % self._anywhere
                else:
                    shard, row = _find(pools, chance % sum(pool.samples for pool in pools))
            yield RowPick(shard, row, derive(pick.seed, "frame", attempt), pick.bucket)

    def _pick(self, index: int) -> RowPick:
        pool = self._pools[index]
        pick = pool.rows.pick(self.drawn[index])
        return RowPick(pick.shard, pick.row, pick.seed, pool.bucket)

    def _furthest_behind(self, groups: Sequence[Sequence[int]], count: int) -> int:
        """Return the group that, with `count` rows to come, misses most of its share."""
        shares = [sum(self._shares[i] for i in group) for group in groups]
        drawn = [sum(self.drawn[i] for i in group) for group in groups]
        goal = (sum(drawn) + count) / sum(shares)
        return max(range(len(groups)), key=lambda g: (shares[g] * goal - drawn[g], -g))

    def _warn_if_small(self, group: Sequence[int], count: int) -> None:
        samples = sum(self._pools[index].rows.samples for index in group)
        if samples < count and group[0] not in self._small:
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


# Prepared shards: windows of several shards


@final
class WindowOrder(Order[RowPick]):
    """Give out the samples of shards of one size; a batch may straddle epochs."""

    def __init__(self, rows: ShardEpochs, *, guards: Mapping[str, Guard]) -> None:
        """Stand before the first row; `guards` are what has to be the same on resume."""
        self.rows = rows
        self._guards = guards
        self._number = 0

    def take(self, count: int, start: int, stop: int) -> list[RowPick]:
        """Advance by a global batch; see `Order.take`."""
        first, self._number = self._number, self._number + count
        return [self.rows.pick(number) for number in range(first + start, first + stop)]

    def state(self) -> dict[str, Any]:
        """Return how many rows (`position`) of which `epoch` are consumed, and of which shards."""
        epoch, position = divmod(self._number, self.rows.samples)
        guards = {key: guard.value for key, guard in self._guards.items()}
        return {"epoch": epoch, "position": position, **guards}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken; nothing is read for it.

        Raises:
            ValueError: the samples, or their order, are not those of then.
        """
        check_keys(state, ("epoch", "position", *self._guards))
        check_guards(state, self._guards)
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position < self.rows.samples:
            raise ValueError(
                f"epoch={epoch}, position={position} is no place in epochs of "
                f"{self.rows.samples} samples; both count from 0"
            )
        self._number = epoch * self.rows.samples + position

    def tries(self, pick: RowPick) -> Iterator[RowPick]:
        """Yield a pick, and then samples from anywhere; see `Order.tries`."""
        for attempt in range(ATTEMPTS + 1):
            shard, row = pick.shard, pick.row
            if attempt > 0:
                chance = derive(pick.seed, "replacement", attempt)
                shard, row = self.rows.find(chance % self.rows.samples)
            yield RowPick(shard, row, derive(pick.seed, "frame", attempt))
