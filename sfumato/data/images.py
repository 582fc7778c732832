"""Open images with captions for training, from several sources."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from sfumato.config import ImageDataConfig, ImageSourceConfig, check_values
from sfumato.data.buckets import assign, bucket_sizes, check_size
from sfumato.data.decode import Bounds, RefusedImageError, read_size
from sfumato.data.entries import Columns, Entry, Refusals
from sfumato.data.frame import Placement, Sample, Size
from sfumato.data.image_pools import SourceSamples, build_pools
from sfumato.data.image_stream import ImageStream, Loading, make_sample
from sfumato.data.left_out import SkipLog
from sfumato.data.sources import list_source

_HEADER_THREADS = 4  # they wait for files; more would wait for each other
_HEADERS_AT_ONCE = 1024


def open_images(
    config: ImageDataConfig, *, height: int, width: int, divisor: int, seed: int
) -> ImageStream:
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
    refusals = Refusals(log)
    entries: list[Entry] = []
    sources: list[SourceSamples] = []
    for name, source in named_sources(config).items():
        found = list(_usable(_list(source, log), _bounds(config), refusals))
        if not found:
            raise ValueError(
                f"{name} ({source.path}) has no image that can be used: {log.report().summary()}"
            )
        buckets = assign([original for _, original in found], sizes)
        sources.append(SourceSamples(name, len(entries), buckets, source.repeats, source.weight))
        entries += [entry for entry, _ in found]
    loading = Loading(
        config.crop == "random", config.flip, _bounds(config), config.workers, config.prefetch
    )
    pools = build_pools(sources, sizes)
    return ImageStream(entries, pools, refusals, loading, seed=seed, shuffle=config.shuffle)


def validation_samples(
    config: ImageDataConfig, count: int, *, height: int, width: int, warns: bool = True
) -> list[Sample]:
    """Decode the first `count` good samples in file order, all of one size.

    Crops are central and nothing is mirrored, whatever the settings say. Fewer are returned where
    there are no more.

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
    refusals = Refusals(log)
    for entry in (e for source in named_sources(config).values() for e in _list(source, log)):
        try:
            samples.append(make_sample(entry, (height, width), Placement(), _bounds(config)))
        except RefusedImageError as error:
            refusals.add(entry, str(error))
        if len(samples) == count:
            break
    if not samples:
        raise ValueError(f"no sample can be used for validation: {log.report().summary()}")
    return samples


def check_config(config: ImageDataConfig) -> None:
    """Refuse impossible settings with a ValueError that names the setting."""
    sources = named_sources(config)
    if not sources:
        raise ValueError("data.images.path is missing; name a folder, a table, tars or a dataset")
    check_values(config, "data.images.")
    for name, source in sources.items():
        _check_source(name, source, weights=_has_weights(config))


def named_sources(config: ImageDataConfig) -> dict[str, ImageSourceConfig]:
    """Return the sources by the names of their settings.

    Raises:
        ValueError: if there is a single one and several.
    """
    several = {f"data.images.sources.{name}": each for name, each in config.sources.items()}
    if config.path is None:
        return several
    if several:
        out = " ".join(f"{name}=null" for name in several)
        raise ValueError(
            f"data.images.path = {config.path!r} is given beside data.images.sources; take these "
            f"out ({out}), or give it as one more, data.images.sources.NAME.path=..."
        )
    return {"data.images": config}


def _check_source(key: str, source: ImageSourceConfig, *, weights: bool) -> None:
    if source.path is None:
        raise ValueError(f"{key}.path is missing; name a folder, a file or a pattern")
    if not weights:
        return
    if source.weight is None:
        raise ValueError(f"{key} has no weight, but others have; give all of them one, or none")
    if source.repeats != 1:
        raise ValueError(
            f"{key} has repeats={source.repeats} beside a weight, which alone says how often it "
            "is drawn; leave one of them out"
        )


def _has_weights(config: ImageDataConfig) -> bool:
    return any(source.weight is not None for source in named_sources(config).values())


def _bounds(config: ImageDataConfig) -> Bounds:
    return Bounds(config.min_size or 1, config.max_pixels)


def _list(source: ImageSourceConfig, log: SkipLog) -> list[Entry]:
    columns = Columns(source.image_column, source.caption_column)
    return list_source(str(source.path), source.base_path, columns, log)


def _usable(
    entries: Sequence[Entry], bounds: Bounds, refusals: Refusals
) -> Iterator[tuple[Entry, Size]]:
    """Yield the entries whose headers are good, with height and width; count the others."""
    measure = partial(_size_or_reason, bounds=bounds)
    with ThreadPoolExecutor(_HEADER_THREADS) as threads:
        for first in range(0, len(entries), _HEADERS_AT_ONCE):
            some = entries[first : first + _HEADERS_AT_ONCE]
            for entry, found in zip(some, threads.map(measure, some), strict=True):
                if isinstance(found, str):
                    refusals.add(entry, found)
                else:
                    yield entry, found


def _size_or_reason(entry: Entry, bounds: Bounds) -> Size | str:
    try:
        return read_size(entry.blob, bounds)
    except RefusedImageError as error:
        return str(error)
