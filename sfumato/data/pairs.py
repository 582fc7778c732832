"""Stream of preference pairs: both pictures with one size, crop and mirror.

A row group's pictures are in memory while a window of shuffled pairs reads them.
"""

import hashlib
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from sfumato.config import PairDataConfig
from sfumato.data.decode import Bounds
from sfumato.data.entries import Blob
from sfumato.data.epochs import RowPick, ShardEpochs
from sfumato.data.left_out import SkipLog
from sfumato.data.order import Guard, Pool, PoolOrder
from sfumato.data.pair_tables import EQUAL, Groups, PairShard, list_pairs
from sfumato.data.pools import check_size
from sfumato.data.prepared.tars import LruCache
from sfumato.data.row_groups import RowGroup
from sfumato.data.sample import Choices, Preference
from sfumato.data.stream import BrokenRowError, OrderedStream


def open_pairs(
    config: PairDataConfig, *, height: int, width: int, seed: int, key: str = "data.pairs"
) -> OrderedStream[RowPick, Preference]:
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

    def read(pick: RowPick) -> Preference:
        return _read(shards[pick.shard], pick.row, groups, choices, pick.seed)

    return OrderedStream(order, read, log, workers=config.workers, prefetch=config.prefetch)


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
    first, second = shard.entries(row, groups)
    if _same_bytes(first.blob, second.blob):
        raise BrokenRowError(first, EQUAL)
    one, other = (choices.sample(entry, 0, seed) for entry in (first, second))
    return Preference(one, other, float(shard.labels[row]))


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
