"""Plan of a packing: which input rows each tar covers.

Tar k covers the input rows from k N to (k + 1) N - 1, of all containers numbered through.
"""

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import final

from sfumato.data.left_out import UNREADABLE
from sfumato.data.prepared.format import FORMAT, PreparedError
from sfumato.files import compact, write_text
from sfumato.preparation.engine import ALONE, Engine, Progress, Tick, map_shards
from sfumato.preparation.sources import Container, Part, Tar
from sfumato.records import read_record

COUNTED = ".rows"  # in shards/: how many rows the tars that are packed list


@dataclass(frozen=True)
class Count:
    """What listing a container gave: its rows, and what was left out by reason."""

    name: str
    identity: str
    rows: int
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class Counts:
    """The counts of all containers of a packing, and a hash of what decides them."""

    settings: str
    containers: tuple[Count, ...]


@dataclass(frozen=True)
class PackShard:
    """What becomes one tar.

    Attributes:
        name: of the tar.
        rows: number of the first input row, and of the one behind the last.
        parts: where these rows lie.
        dropped: what listing left out of the containers that begin here, by reason.
    """

    name: str
    rows: tuple[int, int]
    parts: tuple[Part, ...]
    dropped: Mapping[str, int]

    def __str__(self) -> str:
        """Return the name."""
        return self.name


@final
class Plan:
    """The shards of a packing, each made when it is asked for."""

    def __init__(
        self, containers: Sequence[Container], counts: Sequence[Count], per_shard: int
    ) -> None:
        self._containers, self._counts, self._per_shard = containers, counts, per_shard
        self._firsts = [0, *accumulate(count.rows for count in counts)]

    @property
    def rows(self) -> int:
        """How many input rows there are."""
        return self._firsts[-1]

    @property
    def names(self) -> list[str]:
        """The names of all tars."""
        return [f"{number:06d}" for number in range(-(-self.rows // self._per_shard))]

    @property
    def dropped(self) -> Counter[str]:
        """What listing left out, by reason."""
        return _sum(self._counts)

    def shards(self) -> Iterator[PackShard]:
        """Yield the shards."""
        beginning = 0  # first of the containers of which no row has come
        for number in range(0, self.rows, self._per_shard):
            end = min(number + self._per_shard, self.rows)
            low = bisect.bisect_right(self._firsts, number) - 1
            high = bisect.bisect_left(self._firsts, end)
            parts = (self._part(index, number, end) for index in range(low, high))
            # Containers without rows count with the shard that ends where they stand.
            following = bisect.bisect_right(self._firsts, end - 1)
            if end == self.rows:
                following = len(self._counts)
            dropped = _sum(self._counts[beginning:following])
            beginning = following
            name = f"{number // self._per_shard:06d}"
            yield PackShard(name, (number, end), tuple(filter(None, parts)), dropped)

    def _part(self, index: int, start: int, end: int) -> Part | None:
        first, last = self._firsts[index : index + 2]
        low, high = max(start, first), min(end, last)
        return self._containers[index].part(low - first, high - first) if low < high else None


def make_plan(
    containers: Sequence[Container], settings: str, per_shard: int, shards: Path, engine: Engine
) -> Plan:
    """Count the rows of all containers, and return the plan; tars are counted once.

    Args:
        settings: a hash of what decides which rows a container lists.
        shards: the folder of the tars, which remembers the counts.

    Raises:
        ValueError: a container lacks a column.
    """
    written, known = _known(shards / COUNTED, settings)
    counts = [
        count if _is_known(each, count, written) else None
        for each, count in zip_longest(containers, known[: len(containers)])
    ]
    todo = [index for index, count in enumerate(counts) if count is None]
    tars = [each for each in (containers[index] for index in todo) if isinstance(each, Tar)]
    if tars:
        with Progress("list", len(tars), "tar") as progress:
            at = engine if len(tars) > 1 else ALONE  # a worker takes longer to start
            listed = map_shards(_count, tars, at, tick=progress.tick)
            fresh = list(listed)
        for index, count in zip(todo, fresh, strict=True):
            counts[index] = count
        text = {"format": FORMAT, **asdict(Counts(settings, tuple(filter(None, counts))))}
        write_text(shards / COUNTED, compact(text).decode() + "\n", failure=PreparedError)
    else:
        for index in todo:  # a whole source is listed already
            counts[index] = _count(containers[index], lambda _: None)
    return Plan(containers, list(filter(None, counts)), per_shard)


def _known(file: Path, settings: str) -> tuple[int, tuple[Count, ...]]:
    """Return when the counts that a folder remembers were written, in ns, and the counts."""
    try:
        counts = read_record(file, Counts, "", version=FORMAT)
    except ValueError:
        return 0, ()
    if counts.settings != settings:
        return 0, ()
    return file.stat().st_mtime_ns, counts.containers


def _is_known(container: Container, count: Count | None, written: int) -> bool:
    if not isinstance(container, Tar) or count is None or container.newest > written:
        return False
    if UNREADABLE in count.dropped:  # it may be readable now
        return False
    return (count.name, count.identity) == (container.name, container.identity)


def _count(container: Container, tick: Tick) -> Count:
    listing = container.listed()
    tick(1)
    return Count(container.name, container.identity, len(listing.rows), dict(listing.dropped))


def _sum(counts: Sequence[Count]) -> Counter[str]:
    total = Counter[str]()
    for count in counts:
        total.update(count.dropped)
    return total
