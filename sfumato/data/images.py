"""Streams of images with captions, from folders, tables, tars and saved datasets."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from sfumato.config import ImageDataConfig, ImageSourceConfig
from sfumato.data.ahead import ahead
from sfumato.data.decode import Bounds, RefusedImageError, read_header
from sfumato.data.encoded import Pictures
from sfumato.data.entries import Columns, Entry
from sfumato.data.epochs import ListEpochs, RowPick
from sfumato.data.left_out import SkipLog
from sfumato.data.order import Guard, PoolOrder
from sfumato.data.pools import SourceShare, build_pools, nearest
from sfumato.data.sample import Sample, Size
from sfumato.data.settings import checked_sources, choices_of
from sfumato.data.sources import list_source
from sfumato.data.stream import BrokenRowError, OrderedStream

_HEADER_THREADS = 4  # they wait for files; more would wait for each other
_HEADERS_AHEAD = 1024


def open_images(
    config: ImageDataConfig, *, height: int, width: int, divisor: int, seed: int
) -> OrderedStream[RowPick, Sample]:
    """Open images for training, as `open_pictures`; the stream alone."""
    return open_pictures(config, height=height, width=width, divisor=divisor, seed=seed)[0]


def open_pictures(
    config: ImageDataConfig, *, height: int, width: int, divisor: int, seed: int
) -> tuple[OrderedStream[RowPick, Sample], Pictures]:
    """Open images for training: a stream that is endless, shuffled, resumable at the exact sample.

    The header of every picture is read now, so that what cannot be used is known, counted and
    left out before training; only damaged pixels show later. What cannot be used is never fatal,
    as long as each source has a sample.

    Args:
        config: the sources and what is done to their pictures.
        height: of the images, in pixels; with buckets, height x width is their area.
        width: of the images.
        divisor: with buckets, sides are multiples of it; a small one makes many small buckets.
        seed: decides order, crops and mirrors.

    Returns:
        The stream, and the pictures that it reads, which may be given a cache.

    Raises:
        ValueError: a setting is impossible, a source cannot be read, or has no usable sample.
    """
    settings = checked_sources("data.images", config)
    choices, log = choices_of(config, height, width, divisor), SkipLog()
    entries: list[Entry] = []
    originals: list[Size] = []
    places: list[int] = []
    shares: list[SourceShare] = []
    members: list[list[list[int]]] = []  # of each source and bucket: numbers of entries
    for name, source in settings.items():
        buckets: list[list[int]] = [[] for _ in choices.sizes]
        listed = _list(name, source, log, config.caption_lines)
        for entry, original in _usable(listed, choices.bounds, log):
            places.append(nearest(original, choices.sizes))
            buckets[places[-1]].append(len(entries))
            entries.append(entry)
            originals.append(original)
        if not any(buckets):
            raise ValueError(
                f"{name} ({source.path}) has no image that can be used: {log.report().summary()}"
            )
        members.append(buckets)
        counts = [len(bucket) for bucket in buckets]
        shares.append(SourceShare(name, counts, source.repeats, source.weight))

    def rows(key: str, bucket: int, chosen: Sequence[int]) -> ListEpochs:
        pool = [i for s in chosen for i in members[s][bucket] * shares[s].repeats]
        return ListEpochs(pool, key=key, seed=seed, shuffle=config.shuffle)

    pools = build_pools(shares, choices.sizes, rows)
    guards = {"places": _guard(entries, places)}
    order = PoolOrder(pools, name="images", guards=guards, anywhere=len(entries))
    pictures = Pictures(entries, originals, places, choices)
    workers, prefetch = config.workers, config.prefetch
    return OrderedStream(order, pictures.read, log, workers=workers, prefetch=prefetch), pictures


def validation_samples(
    config: ImageDataConfig,
    count: int,
    *,
    height: int,
    width: int,
    key: str = "data.images",
    warns: bool = True,
) -> list[Sample]:
    """Decode the first `count` good samples in file order, all of one size.

    Crops are central, nothing is mirrored and captions are the first, whatever the settings say.
    Fewer are returned where there are no more.

    Args:
        key: of the settings, for messages.
        warns: False where the same images are opened for training, which warns of what is left out.

    Raises:
        ValueError: a setting is impossible, a source cannot be read, or no sample is good.
    """
    if count < 1:
        raise ValueError(f"{count} validation samples are too few; give 1 or more")
    settings = checked_sources(key, config)
    lines = "all" if config.caption_lines == "all" else "first"
    plain = replace(config, buckets=False, crop="center", flip=False, captions="first",
                    caption_lines=lines)  # fmt: skip
    choices, log = choices_of(plain, height, width), SkipLog(warns=warns)
    samples: list[Sample] = []
    sources = (_list(name, source, log, lines) for name, source in settings.items())
    for entry in chain.from_iterable(sources):
        try:
            samples.append(choices.sample(entry, bucket=0, seed=0))
        except BrokenRowError as error:
            log.refuse(entry.container, entry.position, error.reason)
        if len(samples) == count:
            break
    if not samples:
        raise ValueError(
            f"{key} has no sample that can be used for validation: {log.report().summary()}"
        )
    return samples


def _list(name: str, source: ImageSourceConfig, log: SkipLog, lines: str) -> list[Entry]:
    columns = Columns(source.image_column, source.caption_column, lines=lines)
    return list_source(str(source.path), source.base_path, columns, log, f"{name}.path")


def _guard(entries: Sequence[Entry], places: Sequence[int]) -> Guard:
    text = "\0".join(f"{entry.container.name}/{entry.position}" for entry in entries)
    if any(places):  # pictures of several shapes
        text += f"\0{places}"
    return Guard(
        hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16],
        "there are as many samples as before, but others, or of other shapes",
        "Restore the files that the run was started with",
    )


def _usable(entries: Sequence[Entry], bounds: Bounds, log: SkipLog) -> Iterator[tuple[Entry, Size]]:
    """Yield the entries whose headers are good, with height and width; count the others."""

    def measure(entry: Entry) -> tuple[Size, str] | str:
        try:
            return read_header(entry.blob, bounds)
        except RefusedImageError as error:
            return str(error)

    headers = ahead(measure, entries, _HEADER_THREADS, _HEADERS_AHEAD)
    for entry, header in zip(entries, headers, strict=True):
        if isinstance(header, str):
            log.refuse(entry.container, entry.position, header)
            continue
        size, remark = header
        if remark:
            log.refuse(entry.container, entry.position, remark, remark=True)
        yield entry, size
