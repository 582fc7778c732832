"""Samples sorted into pools: by size, and by source where sources have weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sfumato.data.frame import Size
from sfumato.data.image_order import Pool


@dataclass(frozen=True)
class SourceSamples:
    """The usable samples of one source.

    Attributes:
        name: of the source.
        first: index of its first sample among those of all sources.
        buckets: which size each of its samples goes to.
        repeats: how often each comes in an epoch.
        weight: share of the rows; None is in proportion to samples x repeats.
    """

    name: str
    first: int
    buckets: Sequence[int]
    repeats: int
    weight: float | None


def build_pools(sources: Sequence[SourceSamples], sizes: Sequence[Size]) -> list[Pool]:
    """Return the pools that are not empty, by size; either all sources have a weight or none."""
    if all(source.weight is None for source in sources):
        return list(_together(sources, sizes))
    return list(_apart(sources, sizes))


def _together(sources: Sequence[SourceSamples], sizes: Sequence[Size]) -> Iterator[Pool]:
    for bucket, size in enumerate(sizes):
        parts = (_members(source, bucket) * source.repeats for source in sources)
        members = tuple(index for part in parts for index in part)
        if members:
            yield Pool(_key(size), size, members, share=float(len(members)))


def _apart(sources: Sequence[SourceSamples], sizes: Sequence[Size]) -> Iterator[Pool]:
    for bucket, size in enumerate(sizes):
        for source in sources:
            members = _members(source, bucket)
            if members:
                assert source.weight is not None, "settings were checked"
                share = source.weight * len(members) / len(source.buckets)
                yield Pool(f"{_key(size)} {source.name}", size, members, share)


def _members(source: SourceSamples, bucket: int) -> tuple[int, ...]:
    return tuple(source.first + index for index, own in enumerate(source.buckets) if own == bucket)


def _key(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
