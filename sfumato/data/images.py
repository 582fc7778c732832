"""Streams of images with captions, from folders, tables, tars and saved datasets."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import final

from sfumato.config import ImageDataConfig, ImageSourceConfig
from sfumato.data.decode import Bounds, RefusedImageError, read_size
from sfumato.data.entries import Columns, Entry
from sfumato.data.epochs import ListEpochs, RowPick
from sfumato.data.left_out import SkipLog
from sfumato.data.order import Guard, PoolOrder
from sfumato.data.pools import SourceShare, bucket_sizes, build_pools, check_size, nearest
from sfumato.data.sample import Choices, Placement, Sample, Size, make_sample
from sfumato.data.settings import bounds_of, check_reading, choices_of, named_sources
from sfumato.data.sources import list_source
from sfumato.data.stream import BrokenRowError, OrderedStream, Reader

_HEADER_THREADS = 4  # they wait for files; more would wait for each other
_HEADERS_AT_ONCE = 1024


@dataclass(frozen=True)
class _Sorted:
    """The usable entries of one source, by number, in each bucket."""

    share: SourceShare
    members: Sequence[list[int]]


@final
class ImageReader(Reader[RowPick, Sample]):
    """Decode pictures of a list of entries."""

    def __init__(self, entries: Sequence[Entry], choices: Choices) -> None:
        self._entries = entries
        self._choices = choices

    def read(self, pick: RowPick) -> Sample:
        """Decode a picture; see `Reader.read`."""
        return self._choices.sample(self._entries[pick.row], pick.bucket, pick.seed)


def open_images(
    config: ImageDataConfig, *, height: int, width: int, divisor: int, seed: int
) -> OrderedStream[RowPick, Sample]:
    """Open images for training: endless, shuffled, resumable at the exact sample.

    The header of every picture is read now, so that what cannot be used is known, counted and
    left out before training; only damaged pixels show later. What cannot be used is never fatal,
    as long as each source has a sample.

    Args:
        config: the sources and what is done to their pictures.
        height: of the images, in pixels; with buckets, height x width is their area.
        width: of the images.
        divisor: with buckets, sides are multiples of it; a small one makes many small buckets.
        seed: decides order, crops and mirrors.

    Raises:
        ValueError: a setting is impossible, a source cannot be read, or has no usable sample.
    """
    check_config(config)
    check_size(height, width, divisor)
    sizes = bucket_sizes(height, width, divisor) if config.buckets else ((height, width),)
    log = SkipLog()
    entries: list[Entry] = []
    sources: list[_Sorted] = []
    for name, source in named_sources("data.images", config, config.sources).items():
        usable = list(_usable(_list(source, log), bounds_of(config), log))
        if not usable:
            raise ValueError(
                f"{name} ({source.path}) has no image that can be used: {log.report().summary()}"
            )
        sources.append(_sort(name, source, usable, len(entries), sizes))
        entries += [entry for entry, _ in usable]

    def rows(key: str, bucket: int, chosen: Sequence[int]) -> ListEpochs:
        members = [i for s in chosen for i in sources[s].members[bucket] * sources[s].share.repeats]
        return ListEpochs(members, key=key, seed=seed, shuffle=config.shuffle)

    pools = build_pools([source.share for source in sources], sizes, rows)
    guards = {"places": _guard(entries)}
    order = PoolOrder(pools, name="images", guards=guards, anywhere=len(entries))
    reader = ImageReader(entries, choices_of(config, sizes))
    return OrderedStream(order, reader, log, workers=config.workers, prefetch=config.prefetch)


def validation_samples(
    config: ImageDataConfig, count: int, *, height: int, width: int, warns: bool = True
) -> list[Sample]:
    """Decode the first `count` good samples in file order, all of one size.

    Crops are central, nothing is mirrored and captions are the first, whatever the settings say.
    Fewer are returned where there are no more.

    Args:
        warns: False where the same images are opened for training, which warns of what is left out.

    Raises:
        ValueError: a setting is impossible, a source cannot be read, or no sample is good.
    """
    if count < 1:
        raise ValueError(f"{count} validation samples would be none; give 1 or more")
    check_config(config)
    check_size(height, width, 1)
    log = SkipLog(warns=warns)
    samples: list[Sample] = []
    size, bounds = (height, width), bounds_of(config)
    sources = named_sources("data.images", config, config.sources).values()
    for entry in (entry for source in sources for entry in _list(source, log)):
        try:
            samples.append(make_sample(entry, entry.captions[0], size, Placement(), bounds))
        except BrokenRowError as error:
            log.refuse(entry.container, entry.place, error.reason)
        if len(samples) == count:
            break
    if not samples:
        raise ValueError(f"no sample can be used for validation: {log.report().summary()}")
    return samples


def check_config(config: ImageDataConfig) -> None:
    """Refuse impossible settings with a ValueError that names the setting."""
    sources = named_sources("data.images", config, config.sources)
    check_reading("data.images", config, sources)


def _sort(
    name: str,
    source: ImageSourceConfig,
    usable: Sequence[tuple[Entry, Size]],
    first: int,
    sizes: tuple[Size, ...],
) -> _Sorted:
    """Sort the entries of a source, of which the first has the number `first`, into buckets."""
    members: list[list[int]] = [[] for _ in sizes]
    for number, (_, original) in enumerate(usable, first):
        members[nearest(original, sizes)].append(number)
    counts = [len(bucket) for bucket in members]
    return _Sorted(SourceShare(name, counts, source.repeats, source.weight), members)


def _list(source: ImageSourceConfig, log: SkipLog) -> list[Entry]:
    columns = Columns(source.image_column, source.caption_column)
    return list_source(str(source.path), source.base_path, columns, log)


def _guard(entries: Sequence[Entry]) -> Guard:
    text = "\0".join(f"{entry.container.name}/{entry.place}" for entry in entries)
    return Guard(
        hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16],
        "there are as many samples as before, but others",
        "Restore the files that the run was started with",
    )


def _usable(entries: Sequence[Entry], bounds: Bounds, log: SkipLog) -> Iterator[tuple[Entry, Size]]:
    """Yield the entries whose headers are good, with height and width; count the others."""
    measure = partial(_size_or_reason, bounds=bounds)
    with ThreadPoolExecutor(_HEADER_THREADS) as threads:
        for first in range(0, len(entries), _HEADERS_AT_ONCE):
            some = entries[first : first + _HEADERS_AT_ONCE]
            for entry, size in zip(some, threads.map(measure, some), strict=True):
                if isinstance(size, str):
                    log.refuse(entry.container, entry.place, size)
                else:
                    yield entry, size


def _size_or_reason(entry: Entry, bounds: Bounds) -> Size | str:
    try:
        return read_size(entry.blob, bounds)
    except RefusedImageError as error:
        return str(error)
