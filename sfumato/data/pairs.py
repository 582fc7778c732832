"""Stream of preference pairs: both pictures with one size, crop and mirror.

A row group's pictures are in memory while a window of shuffled pairs reads them.
"""

import hashlib
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, chain
from typing import final

from sfumato.config import PairDataConfig
from sfumato.data.ahead import ahead
from sfumato.data.decode import Bounds, RefusedImageError, read_size
from sfumato.data.encoded import Pictures
from sfumato.data.entries import Blob, Entry
from sfumato.data.epochs import RowPick, ShardEpochs
from sfumato.data.left_out import SkipLog
from sfumato.data.order import Guard, Pool, PoolOrder
from sfumato.data.pair_tables import EQUAL, BytesBlob, PairShard, list_pairs
from sfumato.data.pools import check_size
from sfumato.data.prepared.tars import LruCache
from sfumato.data.row_groups import Groups, RowGroup
from sfumato.data.sample import Choices, Preference, Size
from sfumato.data.stream import BrokenRowError, OrderedStream

_THREADS, _AHEAD = 4, 256  # that read headers, and the pairs read ahead


def open_pairs(
    config: PairDataConfig, *, height: int, width: int, seed: int, key: str = "data.pairs"
) -> OrderedStream[RowPick, Preference]:
    """Open pairs for training, as `open_pictured_pairs`; the stream alone."""
    return open_pictured_pairs(config, height=height, width=width, seed=seed, key=key)[0]


def open_pictured_pairs(
    config: PairDataConfig, *, height: int, width: int, seed: int, key: str = "data.pairs"
) -> tuple[OrderedStream[RowPick, Preference], Pictures | None]:
    """Open pairs for training: endless, shuffled, resumable at the exact pair.

    Captions and labels are read now, so that rows without them are left out before training.
    Pictures are read when their row comes: a pair with one that is missing, damaged, too small or
    equal to the other is counted and replaced. Both pictures of a pair have the same size, crop
    and mirror; there are no buckets.

    Args:
        config: the tables, and what is done with their pictures.
        height: of the images, in pixels.
        width: of the images.
        seed: decides order, crops and mirrors.
        key: of the settings, for messages.

    Returns:
        The stream; with cache=auto also the pictures that it reads, which may be given a cache:
        number 2i and 2i + 1 of pair i. Their headers are read now.

    Raises:
        ValueError: a setting is impossible, a table cannot be read, or no pair is usable.
    """
    log, choices = SkipLog(), _choices(config, height, width)
    shards = list(list_pairs(config, key, log))
    if not shards:
        raise _nothing(config, key, log)
    counts, totals = [len(shard) for shard in shards], [shard.total for shard in shards]
    buffer = config.buffer
    epochs = ShardEpochs(counts, totals, seed=seed, shuffle=config.shuffle, buffer=buffer)
    # While one window ends, prefetching is in the next: so no row group is read twice.
    groups = LruCache(RowGroup, len, 2 * (buffer + max(totals)))
    order = PoolOrder([Pool("", 0, epochs, 1.0)], guards=_guards(config, shards, seed))
    pictures = _pictures(shards, groups, choices, key) if config.cache == "auto" else None
    read = _Reader(shards, groups, choices, pictures)
    stream = OrderedStream(order, read, log, workers=config.workers, prefetch=config.prefetch)
    return stream, pictures


@final
class _Reader:
    """Reader of pairs, out of the cache of their pictures once that is made."""

    def __init__(
        self,
        shards: Sequence[PairShard],
        groups: Groups,
        choices: Choices,
        pictures: Pictures | None,
    ) -> None:
        self._shards, self._groups, self._choices = shards, groups, choices
        self._pictures = pictures
        self._firsts = list(accumulate(map(len, shards), initial=0))

    def __call__(self, pick: RowPick) -> Preference:
        """Read a pair; raises as `_read`, or as `PictureCache.read`."""
        shard, cache = self._shards[pick.shard], self._pictures and self._pictures.cache
        if cache is None:
            return _read(shard, pick.row, self._groups, self._choices, pick.seed)
        number = 2 * (self._firsts[pick.shard] + pick.row)
        try:
            one, other = (cache.read(RowPick(0, number + i, pick.seed)) for i in range(2))
        except BrokenRowError:
            # It says why, as without a cache.
            _read(shard, pick.row, self._groups, self._choices, pick.seed)
            raise
        return Preference(one, other, float(shard.labels[pick.row]))


def first_pairs(
    config: PairDataConfig,
    count: int,
    *,
    height: int,
    width: int,
    key: str = "data.pairs",
    warns: bool = True,
) -> list[Preference]:
    """Decode the first `count` good pairs in file order, from their centres, not mirrored.

    Fewer are returned where there are no more.

    Args:
        key: of the settings, for messages.
        warns: False where the same pairs are opened for training, which warns of what is left out.

    Raises:
        ValueError: as `open_pairs`.
    """
    log, groups = SkipLog(warns=warns), LruCache(RowGroup, len, 1)
    choices = _choices(replace(config, crop="center", flip=False), height, width)
    pairs: list[Preference] = []
    for shard in list_pairs(config, key, log):
        for row in range(len(shard)):
            try:
                pairs.append(_read(shard, row, groups, choices, 0))
            except BrokenRowError as error:
                log.refuse(error.entry.container, error.entry.position, error.reason)
            if len(pairs) == count:
                return pairs
    if not pairs:
        raise _nothing(config, key, log)
    return pairs


def pair_captions(config: PairDataConfig, count: int, key: str = "data.pairs") -> list[str]:
    """Return the captions of the first pairs in file order, at most all, each caption once.

    Raises:
        ValueError: as `open_pairs`.
    """
    log, groups = SkipLog(warns=False), LruCache(RowGroup, len, 1)
    captions: dict[str, None] = {}
    for shard in list_pairs(config, key, log):
        for row in range(len(shard)):
            with suppress(BrokenRowError):
                captions[shard.entries(row, groups)[0].captions[0]] = None
            if len(captions) == count:
                return list(captions)
    if not captions:
        raise _nothing(config, key, log)
    return list(captions)


def _choices(config: PairDataConfig, height: int, width: int) -> Choices:
    check_size(height, width, 1)
    bounds = Bounds(config.min_size or 1, config.max_pixels)
    return Choices(
        ((height, width),), random_crop=config.crop == "random", flip=config.flip, bounds=bounds
    )


def _nothing(config: PairDataConfig, key: str, log: SkipLog) -> ValueError:
    return ValueError(
        f"{key}.path={config.path!r} has no pair that can be used: {log.report().summary()}; give "
        "rows with two different pictures, a caption, and labels of 1 and 0"
    )


def _read(shard: PairShard, row: int, groups: Groups, choices: Choices, seed: int) -> Preference:
    entries = _different(shard.entries(row, groups))
    one, other = (choices.sample(entry, 0, seed) for entry in entries)
    return Preference(one, other, float(shard.labels[row]))


def _pictures(shards: Sequence[PairShard], groups: Groups, choices: Choices, key: str) -> Pictures:
    """List both pictures of each pair with their sizes; those of a broken pair have no bytes."""

    def measure(place: tuple[PairShard, int]) -> list[tuple[Entry, Size]]:
        shard, row = place
        try:
            pair = _different(shard.lasting(row, groups))
            return [(entry, _size(entry, choices.bounds)) for entry in pair]
        except BrokenRowError as error:
            return [(replace(error.entry, blob=BytesBlob(b"")), (1, 1))] * 2

    places = ((shard, row) for shard in shards for row in range(len(shard)))
    found = list(chain.from_iterable(ahead(measure, places, _THREADS, _AHEAD)))
    entries, originals = [entry for entry, _ in found], [size for _, size in found]
    return Pictures(entries, originals, [0] * len(found), choices, key=key, per_caption=2)


def _size(entry: Entry, bounds: Bounds) -> Size:
    try:
        return read_size(entry.blob, bounds)
    except RefusedImageError as error:
        raise BrokenRowError(entry, str(error)) from None


def _different(pair: Sequence[Entry]) -> Sequence[Entry]:
    """Return both pictures of a pair, unless they have the same bytes."""
    if _same_bytes(pair[0].blob, pair[1].blob):
        raise BrokenRowError(pair[0], EQUAL)
    return pair


def _same_bytes(first: Blob, second: Blob) -> bool:
    """Say whether both have the same bytes; what cannot be read has none."""
    with suppress(OSError), first.open() as one, second.open() as other:
        if one.seek(0, io.SEEK_END) != other.seek(0, io.SEEK_END):
            return False
        one.seek(0)
        other.seek(0)
        return one.read() == other.read()
    return False


def _guards(config: PairDataConfig, shards: Sequence[PairShard], seed: int) -> dict[str, Guard]:
    found = hashlib.sha256()
    for shard in shards:
        found.update(f"{shard.source.path.name}\0".encode(errors="backslashreplace"))
        found.update(shard.rows.astype("<i8").tobytes() + shard.labels.astype("<f8").tobytes())
    words = f"shuffled within {config.buffer} pairs by seed {seed}"
    return {
        "pairs": Guard(
            found.hexdigest()[:16],
            "the tables have other pairs or labels than the run was started with",
            "Restore the files and data.pairs.ties",
        ),
        "order": Guard(
            words if config.shuffle else "file order",
            "pairs of the epoch would be repeated and lost",
            "Restore data.pairs.shuffle, data.pairs.buffer and training.seed",
        ),
    }
