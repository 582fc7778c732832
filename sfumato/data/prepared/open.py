"""Streams of what `sfumato prepare` wrote: pictures out of tars, or a cache of their encodings."""

import bisect
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import final

from sfumato.config import ShardDataConfig, ShardSourceConfig
from sfumato.data.ahead import Forerunner
from sfumato.data.decode import Bounds
from sfumato.data.epochs import AHEAD, RowPick, ShardEpochs
from sfumato.data.left_out import SkipLog
from sfumato.data.order import Guard, Pool, PoolOrder
from sfumato.data.pools import SourceShare, build_pools
from sfumato.data.prepared.cache import CacheReader, find_caches
from sfumato.data.prepared.check import (
    check_caches,
    check_tars,
    count_cached,
    count_sorted,
    select,
)
from sfumato.data.prepared.format import CacheIdentity
from sfumato.data.prepared.tars import Selected, TarReader
from sfumato.data.sample import Choices, Sample
from sfumato.data.settings import checked_sources, choices_of
from sfumato.data.shard_cache import StoreError
from sfumato.data.stream import OrderedStream
from sfumato.files import digest

_DIGITS = 16  # of fingerprints
_FETCHERS = 8  # threads that wait for a store


@dataclass(frozen=True)
class _Source:
    """One prepared folder, opened.

    Attributes:
        share: how often it is drawn from.
        counts: samples of each bucket and shard.
        read: reads a row, by the index of the shard in this folder.
        load: has a shard at hand before it is read; None where it lies on a disk.
        fingerprint: a hash of its samples.
        need: bytes of the cache that are in use at once.
    """

    share: SourceShare
    counts: Sequence[Sequence[int]]
    read: Callable[[RowPick], Sample]
    load: Callable[[int], None] | None
    fingerprint: str
    need: int

    @property
    def shards(self) -> int:
        """How many shards the folder has."""
        return len(self.counts[0])


@final
class _Folders:
    """Folders whose shards are numbered through."""

    def __init__(self, sources: Sequence[_Source]) -> None:
        self._sources = sources
        self._firsts = [0, *accumulate(source.shards for source in sources)]

    def read(self, pick: RowPick) -> Sample:
        """Read a row."""
        source, shard = self._find(pick.shard)
        return source.read(replace(pick, shard=shard))

    def load(self, shard: int) -> None:
        """Have a shard at hand."""
        source, shard = self._find(shard)
        if source.load is not None:
            source.load(shard)

    def _find(self, shard: int) -> tuple[_Source, int]:
        source = bisect.bisect_right(self._firsts, shard) - 1
        return self._sources[source], shard - self._firsts[source]


def open_shards(
    config: ShardDataConfig,
    *,
    height: int,
    width: int,
    seed: int,
    divisor: int = 1,
    identity: CacheIdentity | None = None,
    verify: bool = False,
) -> OrderedStream[RowPick, Sample]:
    """Open prepared folders for training: endless, shuffled, resumable at the exact sample.

    Raw and cached rows come in the same order, with the same captions and mirrors, where the cache
    holds all that the selection keeps.

    Args:
        config: the folders, and what is done with their samples.
        height: of the images, in pixels; with buckets, height x width is their area.
        width: of the images.
        seed: decides order, crops, mirrors and captions.
        divisor: with buckets, sides are multiples of it.
        identity: with a cache, of the model that is trained and of the size.
        verify: compare each tar with its SHA-256 before it is read; shards of caches always are.

    Raises:
        ValueError: a setting is impossible, a folder is incomplete, a shard vanished or changed
            since it was indexed, or no cache fits.
    """
    named = checked_sources("data.shards", config)
    choices, log = choices_of(config, height, width, divisor), SkipLog()
    sources = [
        _open_source(name, source, config, choices, identity, log, verify=verify)
        for name, source in named.items()
    ]
    _check_room(config, sources)
    folders = _Folders([sources[index] for index in _repeated(sources)])
    early = None
    if config.workers and any(source.load is not None for source in sources):
        early = Forerunner(folders.load, _FETCHERS)
    order = _order(config, sources, choices, seed, early)
    return OrderedStream(order, folders.read, log, workers=config.workers, prefetch=config.prefetch)


def first_samples(
    config: ShardDataConfig,
    count: int,
    *,
    height: int,
    width: int,
    identity: CacheIdentity | None = None,
    verify: bool = False,
) -> list[Sample]:
    """Return the first samples in file order, at most all: one size, central crops, no mirrors.

    Raises:
        ValueError: as `open_shards`.
    """
    sources = {n: replace(s, repeats=1, weight=None) for n, s in config.sources.items()}
    once = replace(config, sources=sources, repeats=1, weight=None, buckets=False, workers=0)
    plain = replace(once, shuffle=False, crop="center", flip=False, captions="first")
    stream = open_shards(
        plain, height=height, width=width, seed=0, identity=identity, verify=verify
    )
    assert isinstance(stream.order, PoolOrder)
    count = min(count, stream.order.samples)
    return stream.next(count, 0, count)


def first_captions(config: ShardDataConfig, count: int) -> list[str]:
    """Return the main captions of the first samples in file order; at most all.

    Raises:
        ValueError: as `open_shards`, of the folders and their selections.
    """
    captions: list[str] = []
    for source in checked_sources("data.shards", config).values():
        selected = select(source, choices_of(config, 1, 1), config)
        for shard in selected.used:
            if len(captions) < count:
                record = selected.folder.tar_record(selected.tars[shard].name)
                (rows,) = selected.rows(shard, record)
                captions += [record.samples[row].captions[0] for row in rows]
    return captions[:count]


def _open_source(
    name: str,
    source: ShardSourceConfig,
    config: ShardDataConfig,
    choices: Choices,
    identity: CacheIdentity | None,
    log: SkipLog,
    *,
    verify: bool,
) -> _Source:
    selected = select(source, choices, config)
    counts, largest = count_sorted(selected, log), max(selected.counts)
    is_stored = selected.folder.store is not None
    # While one window ends, prefetching is in the next: so no record is read twice.
    keep = 2 * (config.buffer + largest)
    if is_stored:  # and the shards behind the next are fetched
        keep = 3 * (config.buffer + largest) + AHEAD * largest
    files = list(selected.tars)
    if config.cached:
        assert identity is not None, "whoever reads a cache says of what model"
        caches = find_caches(selected, identity, [any(bucket) for bucket in counts])
        check_caches(selected, caches)
        counts = count_cached(selected, caches, counts, log)
        reader = CacheReader(selected, caches, counts, keep=keep)
        files = [file for cache in caches.folders for file in selected.index.caches[cache]]
    else:
        check_tars(selected)
        reader = TarReader(selected, counts, keep=keep, verify=verify)
    share = SourceShare(name, [sum(bucket) for bucket in counts], source.repeats, source.weight)
    load = reader.load if is_stored else None
    part = min(1.0, keep / sum(selected.counts)) if is_stored else 0.0
    need = math.ceil(part * sum(file.bytes for file in files))
    return _Source(share, counts, reader.read, load, _fingerprint(selected, counts), need)


def _check_room(config: ShardDataConfig, sources: Sequence[_Source]) -> None:
    """Refuse a cache that is too small for what is read of it at once."""
    need, has = sum(source.need for source in sources), config.cache_gb * 10**9
    if need > has:
        raise StoreError(
            f"data.shards.cache_gb={config.cache_gb:g} is too small: some {need / 10**9:.2g} GB of "
            f"shards are in use at once with data.shards.buffer={config.buffer}; set "
            f"data.shards.cache_gb={math.ceil(need / 10**7) / 100:g} or more, or a smaller buffer "
            "in a new run"
        )


def _repeated(sources: Sequence[_Source]) -> list[int]:
    """List each source, by index, once for each time in an epoch: each time has its own draws."""
    return [index for index, source in enumerate(sources) for _ in range(source.share.repeats)]


def _order(
    config: ShardDataConfig,
    sources: Sequence[_Source],
    choices: Choices,
    seed: int,
    early: Forerunner[int] | None,
) -> PoolOrder:
    def rows(key: str | None, bucket: int, chosen: Sequence[int]) -> ShardEpochs:
        """List the samples of one bucket; a source that is not chosen counts as empty."""
        counts: list[int] = []
        totals: list[int] = []
        for index in _repeated(sources):
            source, none = sources[index], [0] * sources[index].shards
            counts += source.counts[bucket] if index in chosen else none
            totals += map(sum, zip(*source.counts, strict=True)) if index in chosen else none
        return ShardEpochs(
            counts,
            totals,
            key=key,
            seed=seed,
            shuffle=config.shuffle,
            buffer=config.buffer,
            ahead=None if early is None else partial(early.expect, key or ""),
        )

    guards = _guards(config, sources, seed)
    shares = [source.share for source in sources]
    if len(choices.sizes) == 1 and all(share.weight is None for share in shares):
        pool = Pool("", 0, rows(None, 0, range(len(sources))), 1.0)
        return PoolOrder([pool], guards=guards)
    return PoolOrder(build_pools(shares, choices.sizes, rows), name="pools", guards=guards)


def _guards(config: ShardDataConfig, sources: Sequence[_Source], seed: int) -> dict[str, Guard]:
    prints = [f"{source.fingerprint} {source.share.repeats}" for source in sources]
    single = len(sources) == 1 and sources[0].share.repeats == 1
    words = f"shuffled within {config.buffer} samples by seed {seed}"
    return {
        "shards": Guard(
            sources[0].fingerprint if single else digest(prints)[:_DIGITS],
            "the prepared folders, or what is read of them, have other samples than the run was "
            "started with",
            "Restore the folders, data.shards.selection and the cache",
        ),
        "order": Guard(
            words if config.shuffle else "file order",
            "samples of the epoch would be repeated and lost",
            "Restore data.shards.shuffle, data.shards.buffer and training.seed",
        ),
    }


def _fingerprint(selected: Selected, counts: Sequence[Sequence[int]]) -> str:
    """Return a hash of the samples that are read; raw and cached ones are the same samples."""
    kept_hash = selected.index.kept.get(selected.selection, "")
    bounds = selected.choices.bounds
    samples = hashlib.sha256(f"{selected.selection}\0{kept_hash}".encode())
    for tar, count in zip(selected.tars, map(sum, zip(*counts, strict=True)), strict=True):
        if count:
            samples.update(f"\0{tar.name}/{tar.sha256}/{count}".encode())
    if bounds != Bounds():
        samples.update(f"\0{bounds}".encode())
    return samples.hexdigest()[:_DIGITS]
