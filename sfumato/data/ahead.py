"""Rows of the next batches, made ahead of their use by threads; what they are does not change."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar, final

from sfumato.data.decode import RefusedImageError
from sfumato.data.entries import Entry, Refusals

Row = TypeVar("Row")
Pick = TypeVar("Pick")
Place = TypeVar("Place")
Call = tuple[int, int, int]  # global batch size, start, stop


@dataclass(frozen=True)
class Made(Generic[Row]):
    """A row, and what was tried before it, with the reasons why that was left."""

    row: Row
    broken: tuple[tuple[Entry, str], ...]


@dataclass(frozen=True)
class _Batch(Generic[Row, Place]):
    """What is under way, and the place behind it."""

    rows: tuple[Future[Made[Row]], ...]
    place: Place


@final
class Ahead(Generic[Pick, Row, Place]):
    """Hand out batches in their order, and prepare the next ones on the guess of equal calls.

    Attributes:
        place: behind the batch that was handed out last.
    """

    def __init__(
        self,
        plan: Callable[[int, int, int], tuple[Sequence[Pick], Place]],
        make: Callable[[Pick], Made[Row]],
        go_to: Callable[[Place], None],
        place: Place,
        *,
        workers: int,
        prefetch: int,
    ) -> None:
        """Stand at a place.

        Args:
            plan: advances the order by a global batch; returns the picks of the rows that a
                process makes itself, and the place behind the batch.
            make: makes a row, in any thread.
            go_to: takes the order to a place.
            place: where the order stands.
            workers: threads; 0 makes rows when asked.
            prefetch: batches under way beside the one that is asked for.
        """
        self.place = place
        self._plan = plan
        self._make = make
        self._go_to = go_to
        self._prefetch = prefetch
        self._executor = ThreadPoolExecutor(workers) if workers else None
        self._call: Call | None = None
        self._batches: deque[_Batch[Row, Place]] = deque()

    def next(self, call: Call, refusals: Refusals) -> list[Row]:
        """Advance by one global batch and return its rows; count what had to be replaced."""
        if call != self._call:
            self.restore(self.place)
            self._call = call
        made = self._make_now(call) if self._executor is None else self._wait(self._executor, call)
        for entry, reason in (broken for each in made for broken in each.broken):
            refusals.add(entry, reason)
        return [each.row for each in made]

    def restore(self, place: Place) -> None:
        """Go to a place; drop what is under way."""
        for batch in self._batches:
            for row in batch.rows:
                row.cancel()
        self._batches.clear()
        self.place = place
        self._go_to(place)

    def _make_now(self, call: Call) -> list[Made[Row]]:
        # The order may stand behind a batch that raised an error.
        self._go_to(self.place)
        picks, place = self._plan(*call)
        made = [self._make(pick) for pick in picks]
        self.place = place
        return made

    def _wait(self, executor: ThreadPoolExecutor, call: Call) -> list[Made[Row]]:
        while len(self._batches) <= self._prefetch:
            picks, place = self._plan(*call)
            rows = tuple(executor.submit(self._make, pick) for pick in picks)
            self._batches.append(_Batch(rows, place))
        made = [row.result() for row in self._batches[0].rows]
        self.place = self._batches.popleft().place
        return made


def first_usable(tries: Iterable[tuple[Entry, Callable[[], Row]]]) -> Made[Row]:
    """Make the first row that can be made.

    Raises:
        ValueError: none can; it names the last one.
    """
    broken: list[tuple[Entry, str]] = []
    for entry, make in tries:
        try:
            return Made(make(), tuple(broken))
        except RefusedImageError as error:
            broken.append((entry, str(error)))
    entry, reason = broken[-1]
    raise ValueError(
        f"{len(broken)} samples in a row cannot be decoded, the last is {entry.name} ({reason}); "
        "check that the files are still there and whole"
    )
