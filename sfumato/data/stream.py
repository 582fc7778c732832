"""Streams of rows: endless, resumable at the exact row, the same on every process.

A stream joins an order (which row comes next) with a function that reads rows. Threads read the
next batches ahead of their use, and a row that turns out broken is counted and replaced. Neither
changes what comes when.
"""

import abc
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, final

from sfumato.data.entries import Entry
from sfumato.data.left_out import SkipLog, SkipReport
from sfumato.data.order import Order, Resumable

Pick = TypeVar("Pick")
Row = TypeVar("Row")
Other = TypeVar("Other")


class Stream(Resumable, Generic[Row]):
    """Give out rows without end, the same on every process that reads the same files."""

    @abc.abstractmethod
    def next(self, global_batch_size: int, start: int, stop: int) -> list[Row]:
        """Advance by one global batch and return its rows `start` to `stop`.

        Every process calls this with the same size and its own rows, so that all of them stay at
        the same position.

        Raises:
            ValueError: the rows are not inside the batch, or nothing can be read any more.
        """

    @property
    @abc.abstractmethod
    def skipped(self) -> SkipReport:
        """What has been left out so far, by reason."""


class BrokenRowError(Exception):
    """A row that cannot be read; a stream counts the entry and replaces the row.

    Attributes:
        entry: where the row lies.
        reason: the same for all rows with this fault.
    """

    def __init__(self, entry: Entry, reason: str) -> None:
        super().__init__(f"{entry.name}: {reason}")
        self.entry = entry
        self.reason = reason


@dataclass(frozen=True)
class _Batch(Generic[Row]):
    """Calls that read, or wait for, a row and the faults met before; and the state after them."""

    rows: Sequence[Callable[[], tuple[Row, Sequence[BrokenRowError]]]]
    futures: Sequence[Future[tuple[Row, Sequence[BrokenRowError]]]]
    state: dict[str, Any]


@final
class OrderedStream(Stream[Row], Generic[Pick, Row]):
    """Give out the rows of an order; a process reads its own rows only.

    A replacement is a function of the broken row's pick, so that no process has to know what
    another one met.

    Attributes:
        order: stands after the rows that were read ahead.
    """

    def __init__(
        self,
        order: Order[Pick],
        read: Callable[[Pick], Row],
        skips: SkipLog,
        *,
        workers: int = 0,
        prefetch: int = 0,
    ) -> None:
        """Stand where the order stands.

        Args:
            order: which row comes next.
            read: reads a row, from any thread. A BrokenRowError tells that this row cannot be
                read, a ValueError that no row can be trusted.
            skips: what was left out before; broken rows are added.
            workers: threads that read; 0 reads when asked.
            prefetch: batches read ahead, on the guess that the next calls are like the last one.
        """
        self.order = order
        self._read = read
        self._skips = skips
        self._threads = ThreadPoolExecutor(workers) if workers else None
        self._prefetch = prefetch if workers else 0
        self._state = order.state()
        self._call: tuple[int, int, int] | None = None
        self._batches: deque[_Batch[Row]] = deque()

    @property
    def skipped(self) -> SkipReport:
        return self._skips.report()

    def next(self, global_batch_size: int, start: int, stop: int) -> list[Row]:
        check_rows(global_batch_size, start, stop)
        call = (global_batch_size, start, stop)
        if call != self._call and self._batches:
            self.restore(self._state)
        self._call = call
        while len(self._batches) <= self._prefetch:
            self._batches.append(self._begin(self.order.take(*call)))
        # A batch that cannot be read stays, so that the state remains the one before it.
        rows = [row() for row in self._batches[0].rows]
        self._state = self._batches.popleft().state
        for broken in (error for _, errors in rows for error in errors):
            self._skips.refuse(broken.entry.container, broken.entry.position, broken.reason)
        return [row for row, _ in rows]

    def state(self) -> dict[str, Any]:
        return self._state

    def restore(self, state: Mapping[str, Any]) -> None:
        self.order.restore(state)
        for future in (future for batch in self._batches for future in batch.futures):
            future.cancel()
        self._batches.clear()
        self._state = self.order.state()

    def _begin(self, picks: Sequence[Pick]) -> _Batch[Row]:
        state = self.order.state()
        if self._threads is None:
            return _Batch([partial(self._read_or_replace, pick) for pick in picks], (), state)
        futures = [self._threads.submit(self._read_or_replace, pick) for pick in picks]
        return _Batch([future.result for future in futures], futures, state)

    def _read_or_replace(self, pick: Pick) -> tuple[Row, Sequence[BrokenRowError]]:
        """Read a row, or the first of its replacements that can be read."""
        broken: list[BrokenRowError] = []
        for each in self.order.tries(pick):
            try:
                return self._read(each), broken
            except BrokenRowError as error:
                broken.append(error)
        raise ValueError(
            f"{len(broken)} samples in a row cannot be decoded, the last is "
            f"{broken[-1].entry.name} ({broken[-1].reason}); check that the files are still there "
            "and whole"
        )


@dataclass(frozen=True)
class Pair(Generic[Row, Other]):
    """A row of each of two streams."""

    first: Row
    second: Other


@final
class PairedStream(Stream[Pair[Row, Other]], Generic[Row, Other]):
    """Give out the rows of two streams side by side."""

    def __init__(self, first: Stream[Row], second: Stream[Other]) -> None:
        self._streams = first, second

    def next(self, global_batch_size: int, start: int, stop: int) -> list[Pair[Row, Other]]:
        first, second = self._streams
        rows = first.next(global_batch_size, start, stop)
        others = second.next(global_batch_size, start, stop)
        return [Pair(row, other) for row, other in zip(rows, others, strict=True)]

    def state(self) -> dict[str, Any]:
        first, second = self._streams
        return {"first": first.state(), "second": second.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state.keys() != {"first", "second"}:
            raise ValueError(
                f"{dict(state)} is no place in a pair of streams; resume with the kind of data "
                "that the run was started with"
            )
        for each, name in zip(self._streams, ("first", "second"), strict=True):
            each.restore(state[name])

    @property
    def skipped(self) -> SkipReport:
        first, second = self._streams
        return first.skipped + second.skipped


def check_rows(global_batch_size: int, start: int, stop: int) -> None:
    """Refuse rows that are not inside the batch with a ValueError."""
    if global_batch_size < 1 or not 0 <= start <= stop <= global_batch_size:
        raise ValueError(
            f"rows {start} to {stop} of a global batch of {global_batch_size} do not exist; "
            "give 0 <= start <= stop <= global_batch_size, and a batch of at least 1"
        )
