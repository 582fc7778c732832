"""An endless, resumable order of images with captions, decoded ahead by threads."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, final

from sfumato.data.ahead import Ahead, Made, first_usable
from sfumato.data.decode import Bounds, read_rgb
from sfumato.data.entries import Entry, Refusals
from sfumato.data.frame import Placement, Sample, Size, frame, to_tensor
from sfumato.data.image_order import Order, Pick, Pool, check_counts
from sfumato.data.left_out import SkipReport
from sfumato.data.stream import Stream, check_rows
from sfumato.diffusion.randomness import derive

_LOGGER = logging.getLogger(__name__)
ATTEMPTS = 16  # replacements of a broken sample from its own bucket, then as many from anywhere


@dataclass(frozen=True)
class Loading:
    """How samples are made: what is left to chance, what is refused, how far ahead."""

    random_crop: bool
    flip: bool
    bounds: Bounds
    workers: int
    prefetch: int


def make_sample(entry: Entry, size: Size, placement: Placement, bounds: Bounds) -> Sample:
    """Decode, resize and crop one picture.

    Raises:
        RefusedImageError: it cannot be used.
    """
    picture = read_rgb(entry.blob, bounds)
    array, crop = frame(picture, size, placement)
    original = (picture.height, picture.width)
    return Sample(to_tensor(array), entry.captions[0], original, crop, entry.name)


@final
class ImageStream(Stream[Sample]):
    """Give out images epoch after epoch; a process decodes its own rows alone.

    All rows of a global batch have one size. A sample whose pixels turn out broken is counted and
    replaced, by one that (seed, its place in the order, attempt) decides, so that no process has
    to know what another one met.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        pools: Sequence[Pool],
        refusals: Refusals,
        loading: Loading,
        *,
        seed: int,
        shuffle: bool,
    ) -> None:
        """Stand before the first sample.

        Args:
            entries: all samples, in file order.
            pools: index into `entries`; none is empty.
            refusals: what was left out before; broken samples are added.
            loading: how samples are made.
            seed: decides order, crops, mirrors and replacements.
            shuffle: False keeps the file order inside each pool.
        """
        self._entries = tuple(entries)
        self._refusals = refusals
        self._loading = loading
        self._order = Order(pools, seed=seed, shuffle=shuffle)
        self._ahead = Ahead(
            self._plan,
            self._make,
            self._go_to,
            tuple(self._order.drawn),
            workers=loading.workers,
            prefetch=loading.prefetch,
        )
        self._small: set[int] = set()

    @property
    def skipped(self) -> SkipReport:
        """What has been left out so far, by reason."""
        return self._refusals.log.report()

    def next(self, global_batch_size: int, start: int, stop: int) -> list[Sample]:
        """Advance by one global batch; see `Stream.next`. The next call is prepared alike.

        Raises:
            ValueError: the rows are not inside the batch, or no replacement of a broken sample
                can be decoded.
        """
        check_rows(global_batch_size, start, stop)
        return self._ahead.next((global_batch_size, start, stop), self._refusals)

    def state(self) -> dict[str, Any]:
        """Return how many rows each pool has given, and of how many samples."""
        pools = self._order.pools
        return {
            "images": {
                pool.key: {"drawn": drawn, "samples": len(pool.members)}
                for pool, drawn in zip(pools, self._ahead.place, strict=True)
            },
            "places": self._fingerprint,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken; nothing is read for it.

        Raises:
            ValueError: the samples are not those of then.
        """
        if state.keys() != {"images", "places"}:
            raise ValueError(
                f"{str(dict(state))[:80]} is no place in a stream of images; resume with the kind "
                "of data that the run was started with"
            )
        pools = state["images"]
        check_counts(self._order.pools, {key: pool["samples"] for key, pool in pools.items()})
        if state["places"] != self._fingerprint:
            raise ValueError(
                "cannot resume: there are as many samples as before, but others. Restore the "
                "files that the run was started with, or start a new run"
            )
        self._ahead.restore(tuple(pools[pool.key]["drawn"] for pool in self._order.pools))

    def _go_to(self, drawn: tuple[int, ...]) -> None:
        """Let the order stand where each pool has given so many rows."""
        self._order.drawn = list(drawn)

    def _plan(
        self, global_batch_size: int, start: int, stop: int
    ) -> tuple[list[Pick], tuple[int, ...]]:
        picks = self._order.take(global_batch_size)
        bucket = picks[0].bucket
        there = sum(len(members) for members in self._order.members(bucket))
        if there < global_batch_size and bucket not in self._small:
            self._small.add(bucket)
            height, width = self._order.sizes[bucket]
            _LOGGER.warning(
                "%d samples fall to %d x %d pixels, fewer than the global batch of %d, which "
                "repeats them; add images of this shape, or switch buckets off",
                *(there, height, width, global_batch_size),
            )
        return picks[start:stop], tuple(self._order.drawn)

    def _make(self, pick: Pick) -> Made[Sample]:
        """Decode a sample, or the first of its replacements that can be decoded."""
        return first_usable(self._tries(pick))

    def _tries(self, pick: Pick) -> Iterator[tuple[Entry, Callable[[], Sample]]]:
        size, loading = self._order.sizes[pick.bucket], self._loading
        for attempt in range(2 * ATTEMPTS + 1):
            entry = self._entries[self._candidate(pick, attempt)]
            seed = derive(pick.seed, "frame", attempt)
            placement = Placement.drawn(seed, random_crop=loading.random_crop, flip=loading.flip)
            yield entry, partial(make_sample, entry, size, placement, loading.bounds)

    def _candidate(self, pick: Pick, attempt: int) -> int:
        if attempt == 0:
            return pick.sample
        chance = derive(pick.seed, "replacement", attempt)
        if attempt > ATTEMPTS:
            return chance % len(self._entries)
        pools = tuple(self._order.members(pick.bucket))
        place = chance % sum(len(members) for members in pools)
        for members in pools:
            if place < len(members):
                return members[place]
            place -= len(members)
        raise AssertionError("the place lies inside the bucket")

    @cached_property
    def _fingerprint(self) -> str:
        text = "\0".join(f"{entry.container.name}/{entry.place}" for entry in self._entries)
        return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]
