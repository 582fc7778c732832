"""An endless, resumable order of images with captions, decoded ahead by threads."""

import hashlib
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

from sfumato.data.decode import Bounds, RefusedImageError, read_rgb
from sfumato.data.entries import Entry, Refusals
from sfumato.data.frame import Placement, Sample, Size, frame, to_tensor
from sfumato.data.image_order import Order, Pick, Pool, check_counts
from sfumato.data.skips import SkipReport
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


@dataclass(frozen=True)
class _Made:
    sample: Sample
    broken: tuple[tuple[Entry, str], ...]  # tried before it, and why they were left


@dataclass(frozen=True)
class _Batch:
    """What is under way, and how many rows each pool has given once it is handed out."""

    rows: tuple[Future[_Made], ...]
    drawn: tuple[int, ...]


def make_sample(entry: Entry, size: Size, placement: Placement, bounds: Bounds) -> Sample:
    """Decode, resize and crop one picture.

    Raises:
        RefusedImageError: it cannot be used.
    """
    picture = read_rgb(entry.blob, bounds)
    array, crop = frame(picture, size, placement)
    original = (picture.height, picture.width)
    return Sample(to_tensor(array), entry.caption, original, crop, entry.name)


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
        self._drawn = tuple(self._order.drawn)
        self._executor = ThreadPoolExecutor(loading.workers) if loading.workers else None
        self._call: tuple[int, int, int] | None = None
        self._ahead: deque[_Batch] = deque()
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
        call = (global_batch_size, start, stop)
        if call != self._call:
            self._drop_prefetched()
            self._call = call
        if self._executor is None:
            made = [self._make(pick) for pick in self._plan(global_batch_size)[start:stop]]
            drawn = tuple(self._order.drawn)
        else:
            while len(self._ahead) <= self._loading.prefetch:
                self._ahead.append(self._submit(self._executor, global_batch_size, start, stop))
            batch = self._ahead.popleft()
            made, drawn = [row.result() for row in batch.rows], batch.drawn
        self._drawn = drawn
        for entry, reason in (broken for row in made for broken in row.broken):
            self._refusals.add(entry, reason)
        return [row.sample for row in made]

    def state(self) -> dict[str, Any]:
        """Return how many rows each pool has given, and of how many samples."""
        pools = self._order.pools
        return {
            "images": {
                pool.key: {"drawn": drawn, "samples": len(pool.members)}
                for pool, drawn in zip(pools, self._drawn, strict=True)
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
        self._drawn = tuple(pools[pool.key]["drawn"] for pool in self._order.pools)
        self._drop_prefetched()

    def _drop_prefetched(self) -> None:
        for batch in self._ahead:
            for row in batch.rows:
                row.cancel()
        self._ahead.clear()
        self._order.drawn = list(self._drawn)

    def _submit(
        self, executor: ThreadPoolExecutor, global_batch_size: int, start: int, stop: int
    ) -> _Batch:
        picks = self._plan(global_batch_size)[start:stop]
        rows = tuple(executor.submit(self._make, pick) for pick in picks)
        return _Batch(rows, tuple(self._order.drawn))

    def _plan(self, global_batch_size: int) -> list[Pick]:
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
        return picks

    def _make(self, pick: Pick) -> _Made:
        """Decode a sample, or the first of its replacements that can be decoded."""
        size, loading = self._order.sizes[pick.bucket], self._loading
        broken: list[tuple[Entry, str]] = []
        for attempt in range(2 * ATTEMPTS + 1):
            entry = self._entries[self._candidate(pick, attempt)]
            seed = derive(pick.seed, "frame", attempt)
            placement = Placement.drawn(seed, random_crop=loading.random_crop, flip=loading.flip)
            try:
                sample = make_sample(entry, size, placement, loading.bounds)
            except RefusedImageError as error:
                broken.append((entry, str(error)))
                continue
            return _Made(sample, tuple(broken))
        raise ValueError(
            f"{len(broken)} samples in a row cannot be decoded, the last is {broken[-1][0].name} "
            f"({broken[-1][1]}); check that the files are still there and whole"
        )

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
