"""An endless, resumable order of rows out of thousands of shards, read ahead by threads."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

from sfumato.data.ahead import Ahead, Made, first_usable
from sfumato.data.entries import Entry, Refusals
from sfumato.data.left_out import SkipReport
from sfumato.data.shard_order import ShardOrder, ShardPick
from sfumato.data.shard_readers import Row, ShardReader
from sfumato.data.stream import Stream, check_rows
from sfumato.diffusion.randomness import derive

ATTEMPTS = 16  # replacements of a row that cannot be read, from anywhere
_Place = tuple[int, int]  # epoch and position


@final
class ShardStream(Stream[Row]):
    """Give out rows epoch after epoch; a process reads its own rows alone.

    The place is epoch and position in the order of all processes, so a run goes on with any number
    of them. A row that cannot be read is counted and replaced, by one that (seed, epoch, its place
    in the files, attempt) decides, so that no process has to know what another one met.
    """

    def __init__(
        self,
        order: ShardOrder,
        reader: ShardReader,
        refusals: Refusals,
        *,
        shards: str,
        settings: str,
        workers: int,
        prefetch: int,
    ) -> None:
        """Stand before the first row.

        Args:
            order: which row comes when.
            reader: makes rows.
            refusals: where rows that cannot be read are counted.
            shards: fingerprint of what is read.
            settings: of the order, in words.
            workers: threads that read; 0 reads when asked.
            prefetch: batches read ahead.
        """
        self._order = order
        self._reader = reader
        self._refusals = refusals
        self._shards = shards
        self._settings = settings
        place = (order.epoch, order.position)
        self._ahead = Ahead(
            self._plan, self._make, self._go_to, place, workers=workers, prefetch=prefetch
        )

    @property
    def samples(self) -> int:
        """How many samples an epoch has."""
        return self._order.samples

    @property
    def skipped(self) -> SkipReport:
        """What has been left out so far, by reason."""
        return self._refusals.log.report()

    def next(self, global_batch_size: int, start: int, stop: int) -> list[Row]:
        """Advance by one global batch; see `Stream.next`. The next call is prepared alike.

        Raises:
            ValueError: the rows are not inside the batch, no replacement of a broken row can be
                read, or a record changed since the index was written.
        """
        check_rows(global_batch_size, start, stop)
        return self._ahead.next((global_batch_size, start, stop), self._refusals)

    def state(self) -> dict[str, Any]:
        """Return how many rows (`position`) of which `epoch` are consumed, and of which shards."""
        epoch, position = self._ahead.place
        return {
            "epoch": epoch,
            "position": position,
            "shards": self._shards,
            "order": self._settings,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken; nothing is read for it.

        Raises:
            ValueError: the samples, or their order, are not those of then.
        """
        if state.keys() != {"epoch", "position", "shards", "order"}:
            raise ValueError(
                f"{str(dict(state))[:80]} is no place in a stream of shards; resume with the kind "
                "of data that the run was started with"
            )
        if state["shards"] != self._shards:
            raise ValueError(
                "cannot resume: the prepared folder, or what is read of it, has other samples "
                "than the run was started with. Restore the folder, data.shards.selection and the "
                "cache, or start a new run"
            )
        if state["order"] != self._settings:
            raise ValueError(
                f"cannot resume: the order was {state['order']}, and now is {self._settings}, so "
                "samples of the epoch would be repeated and lost. Restore data.shards.shuffle, "
                "data.shards.buffer and training.seed, or start a new run"
            )
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position < self._order.samples:
            raise ValueError(
                f"epoch={epoch}, position={position} is no place in epochs of "
                f"{self._order.samples} samples; both count from 0"
            )
        self._ahead.restore((epoch, position))

    def _go_to(self, place: _Place) -> None:
        self._order.epoch, self._order.position = place

    def _plan(
        self, global_batch_size: int, start: int, stop: int
    ) -> tuple[list[ShardPick], _Place]:
        picks = self._order.take(global_batch_size, start, stop)
        return picks, (self._order.epoch, self._order.position)

    def _make(self, pick: ShardPick) -> Made[Row]:
        """Read a row, or the first of its replacements that can be read."""
        return first_usable(self._tries(pick))

    def _tries(self, pick: ShardPick) -> Iterator[tuple[Entry, Callable[[], Row]]]:
        for attempt in range(ATTEMPTS + 1):
            shard, row = pick.shard, pick.row
            if attempt > 0:
                number = derive(pick.seed, "replacement", attempt) % self._order.samples
                shard, row = self._order.place(number)
            yield self._reader.prepare(shard, row, derive(pick.seed, "frame", attempt))
