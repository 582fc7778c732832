"""Engines that map a function over shards: this process, a pool of processes, or Ray.

Results come in the order of the items. A shard whose worker died is made by another worker.
"""

import abc
import os
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, final

from tqdm import tqdm

from sfumato.data.left_out import tally
from sfumato.data.prepared.format import PreparedError

Item = TypeVar("Item")
Result = TypeVar("Result")
Tick = Callable[[int], object]  # takes how many rows are done
# Makes one shard. A worker keeps the function, and what it loads, from shard to shard.
Function = Callable[[Item, Tick], Result]
_TRIES = 3  # workers that may die of one shard
_WAITING = 8  # results for each worker that wait for an earlier shard
_NAMED = 3  # reasons in a line of progress


@dataclass(frozen=True)
class Ticked:
    """Rows of a shard are done."""

    count: int


@dataclass(frozen=True)
class Made:
    """A shard is made."""

    result: Any


@dataclass(frozen=True)
class Failed:
    """A shard cannot be made; other workers could not make it either."""

    error: Exception


@dataclass(frozen=True)
class Died:
    """The worker of a shard died."""

    reason: str


Event = tuple[int, Ticked | Made | Failed | Died]  # with the number of the shard


class Crew(abc.ABC):
    """Workers that make shards, numbered by who asks, until they are closed."""

    @abc.abstractmethod
    def start(self, number: int, item: Any) -> None:
        """Give a shard to a worker that has none."""

    @abc.abstractmethod
    def wait(self) -> list[Event]:
        """Wait until there is news."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the workers."""


class Engine(abc.ABC):
    """Where shards are made."""

    @abc.abstractmethod
    def crew(self, function: Function[Any, Any], *, gpu: bool) -> tuple[Crew, int] | None:
        """Return workers and how many they are; None makes shards in this process.

        Args:
            gpu: give each worker a GPU, where there are any.
        """

    def close(self) -> None:
        """Let the engine go."""
        return


@final
class Local(Engine):
    """This process, or a pool of processes on this machine."""

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers or 1

    def crew(self, function: Function[Any, Any], *, gpu: bool) -> tuple[Crew, int] | None:
        if self._workers == 1:
            return None
        from sfumato.preparation.pool import Pool

        return Pool(function), self._workers


ALONE = Local()


def open_engine(kind: str, workers: int | None, address: str | None, folder: Path) -> Engine:
    """Return an engine, which is closed by who asks.

    Args:
        kind: local or ray.
        workers: as in `PrepareConfig`.
        address: of a Ray cluster.
        folder: that is prepared.

    Raises:
        ValueError: there is no such Ray cluster, or one of another version.
    """
    if kind == "local":
        return Local(workers)
    from sfumato.preparation.cluster import Cluster

    return Cluster(address, workers, folder)


@final
class Progress:
    """What became of the rows of a stage: counted, and shown with the rate while it runs."""

    def __init__(self, stage: str, total: int | None, unit: str, *, shards: int = 0) -> None:
        """Begin with nothing.

        Args:
            total: how many units there are; None is unknown.
            shards: how many shards there are, to be shown beside the units.
        """
        self.kept, self._dropped = 0, Counter[str]()
        self._shards, self._done = shards, 0
        # A log gets a line now and then; a terminal shows each step.
        pause = 0.1 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(desc=stage, total=total, unit=unit, mininterval=pause, maxinterval=pause)

    def __enter__(self) -> "Progress":
        """Show the progress until the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def bins(self) -> dict[str, int]:
        """What was kept, and what was left out by reason."""
        return tally(self.kept, [self._dropped])

    def tick(self, count: int) -> None:
        """Move on by some rows, or back by those of a dead worker."""
        self._bar.update(count)

    def add(self, kept: int, dropped: Mapping[str, int]) -> None:
        """Count a finished shard."""
        self.kept += kept
        self._dropped.update(dropped)
        self._done += 1
        said = [f"{self._done:,} of {self._shards:,} tars"] if self._shards else []
        if total := self._dropped.total():
            most = self._dropped.most_common(_NAMED)
            named = ", ".join(f"{count:,} {reason}" for reason, count in most)
            more = ", ..." if len(self._dropped) > _NAMED else ""
            said.append(f"{total:,} left out: {named}{more}")
        self._bar.set_postfix_str("; ".join(said), refresh=False)


@dataclass
class _Try(Generic[Item]):
    """A shard that is to be made, how many workers died of it, and its rows that are done."""

    item: Item
    deaths: int = 0
    rows: int = 0


@dataclass
class _Queue(Generic[Item]):
    """Shards by number: those to come, to be made again, being made, and made."""

    coming: Iterator[Item]
    again: deque[int] = field(default_factory=deque)
    tries: dict[int, _Try[Item]] = field(default_factory=dict)
    made: dict[int, Any] = field(default_factory=dict)
    count: int = 0  # that came

    def take(self, most: int) -> int | None:
        """Return the number of the next shard to make; None if there is none below `most`."""
        if self.again:
            return self.again.popleft()
        if self.count >= most:
            return None
        for item in self.coming:
            self.tries[self.count] = _Try(item)
            self.count += 1
            return self.count - 1
        return None


def map_shards(
    function: Function[Item, Result],
    items: Iterable[Item],
    engine: Engine = ALONE,
    *,
    tick: Tick = lambda _: None,
    gpu: bool = False,
) -> Generator[Result, None, None]:
    """Yield the function's result for each item, in order; memory does not grow with the items.

    Args:
        function: makes a shard; made again, it writes the same bytes. It can be pickled.
        items: shards; their text is what messages call them.
        engine: where shards are made.
        tick: is told of rows that are done.
        gpu: whether the function uses a GPU.

    Raises:
        Exception: of the function; other shards may be finished then.
        PreparedError: workers died of one shard again and again.
    """
    crew = engine.crew(function, gpu=gpu)
    if crew is None:
        for item in items:
            yield function(item, tick)
        return
    try:
        yield from _mapped(*crew, _Queue(iter(items)), tick)
    finally:
        crew[0].close()


def _mapped(crew: Crew, workers: int, queue: _Queue[Any], tick: Tick) -> Iterator[Any]:
    running, following = set[int](), 0
    while True:
        while len(running) < workers:
            number = queue.take(following + _WAITING * workers)
            if number is None:
                break
            running.add(number)
            crew.start(number, queue.tries[number].item)
        if not running:
            return
        for number, event in crew.wait():
            shard = queue.tries[number]
            if isinstance(event, Ticked):
                shard.rows += event.count
                tick(event.count)
                continue
            running.discard(number)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Made):
                queue.made[number] = event.result
                del queue.tries[number]
                continue
            tick(-shard.rows)
            shard.deaths, shard.rows = shard.deaths + 1, 0
            _tell_of_death(shard, event.reason)
            queue.again.append(number)
        while following in queue.made:
            yield queue.made.pop(following)
            following += 1


def _tell_of_death(shard: _Try[Any], reason: str) -> None:
    if shard.deaths == _TRIES:
        raise PreparedError(
            f"{_TRIES} workers died, one after another, while they made {shard.item} ({reason}); "
            "if memory is short, set fewer workers, and run the same command again"
        )
    tqdm.write(
        f"a worker died while it made {shard.item} ({reason}); another makes it again",
        file=sys.stderr,
    )


def attempt(function: Function[Any, Any], item: Any, tick: Tick) -> Made | Failed:
    """Make a shard in a worker."""
    try:
        return Made(function(item, tick))
    except Exception as error:  # noqa: BLE001 - whatever it is, the first process raises it
        if not isinstance(error, ValueError):
            error.add_note(f"in a worker ({os.getpid()}):\n{traceback.format_exc()}")
        return Failed(error)
