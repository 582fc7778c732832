"""Streams of what `sfumato prepare` wrote: pictures out of tars, or a cache of their encodings."""

import bisect
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from sfumato.config import ShardDataConfig, ShardSourceConfig
from sfumato.data.decode import Bounds
from sfumato.data.epochs import RowPick, ShardEpochs
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
from sfumato.data.stream import OrderedStream
from sfumato.files import digest

_DIGITS = 16  # of fingerprints


@dataclass(frozen=True)
class _Source:
    """One prepared folder, opened.

    Attributes:
        share: how often it is drawn from.
        counts: samples of each bucket and shard.
        read: reads a row, by the index of the shard in this folder.
        fingerprint: a hash of its samples.
    """

    share: SourceShare
    counts: Sequence[Sequence[int]]
    read: Callable[[RowPick], Sample]
    fingerprint: str

    @property
    def shards(self) -> int:
        """How many shards the folder has."""
        return len(self.counts[0])


def _reader(folders: Sequence[_Source]) -> Callable[[RowPick], Sample]:
    """Return a reader of folders whose shards are numbered through."""
    firsts = [0, *accumulate(folder.shards for folder in folders)]

    def read(pick: RowPick) -> Sample:
        folder = bisect.bisect_right(firsts, pick.shard) - 1
        return folders[folder].read(replace(pick, shard=pick.shard - firsts[folder]))

    return read


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
    order = _order(config, sources, choices, seed)
    read = _reader([sources[index] for index in _repeated(sources)])
    return OrderedStream(order, read, log, workers=config.workers, prefetch=config.prefetch)


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
        selected = select(source, choices_of(config, 1, 1))
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
    selected = select(source, choices)
    counts = count_sorted(selected, log)
    # While one window ends, prefetching is in the next: so no record is read twice.
    keep = 2 * (config.buffer + max(selected.counts))
    if config.cached:
        assert identity is not None, "whoever reads a cache says of what model"
        caches = find_caches(selected, identity, [any(bucket) for bucket in counts])
        check_caches(selected, caches)
        counts = count_cached(selected, caches, counts, log)
        read = CacheReader(selected, caches, counts, keep=keep).read
    else:
        check_tars(selected)
        read = TarReader(selected, counts, keep=keep, verify=verify).read
    share = SourceShare(name, [sum(bucket) for bucket in counts], source.repeats, source.weight)
    return _Source(share, counts, read, _fingerprint(selected, counts))


def _repeated(sources: Sequence[_Source]) -> list[int]:
    """List each source, by index, once for each time in an epoch: each time has its own draws."""
    return [index for index, source in enumerate(sources) for _ in range(source.share.repeats)]


def _order(
    config: ShardDataConfig, sources: Sequence[_Source], choices: Choices, seed: int
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
            counts, totals, key=key, seed=seed, shuffle=config.shuffle, buffer=config.buffer
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
