"""Rows of a cache: moments and states of single samples, by their place in mapped files.

No more than a few shards are open at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sfumato.data.cached import CachedSample, central_crop
from sfumato.data.decode import RefusedImageError
from sfumato.data.entries import Entry, SpanBlob
from sfumato.data.prepared import CACHE, Member, PreparedError, read_cached_record, read_kept_record
from sfumato.data.recent import Recent
from sfumato.data.shard_readers import Choices, Row, Selected, ShardReader

OPEN_SHARDS = 32  # each two files


@dataclass(frozen=True)
class CachePair:
    """Where moments and states lie: names of folders below cache/."""

    moments: str
    text: str


@dataclass(frozen=True)
class CachedRows:
    """The samples of a shard that are in both halves of a cache and in the selection.

    Attributes:
        samples: indices into the tar, ascending.
        moments: the row of each among the moments; `text` likewise.
        stored: how many rows the files of moments and of states hold.
    """

    samples: np.ndarray
    moments: np.ndarray
    text: np.ndarray
    stored: tuple[int, int]


def cached_rows(folder: Path, selection: str, caches: CachePair, name: str) -> CachedRows:
    """Read which samples of a shard can be had from a cache.

    Raises:
        PreparedError: a record is missing or damaged.
    """
    moments, text = (
        np.asarray(read_cached_record(folder, cache, name).rows, dtype=np.int64)
        for cache in (caches.moments, caches.text)
    )
    kept = np.asarray(read_kept_record(folder, selection, name).kept, dtype=np.int64)
    samples = _common(_common(kept, moments), text)
    places = (np.searchsorted(rows, samples) for rows in (moments, text))
    return CachedRows(samples, *places, stored=(len(moments), len(text)))


def _common(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return what two ascending lists share; most often they are one."""
    return some if np.array_equal(some, others) else np.intersect1d(some, others, True)


@dataclass(frozen=True)
class _Table:
    rows: CachedRows
    members: tuple[Member, ...]


@dataclass(frozen=True)
class _Files:
    """The open files of a shard; slices of them are read from the disk when they are copied."""

    moments: safe_open
    text: safe_open
    names: tuple[str, ...]
    offsets: Sequence[int]


@final
class CacheReader(ShardReader):
    """Read moments and states of single rows; the file behind them is never read whole."""

    def __init__(
        self,
        selected: Selected,
        caches: CachePair,
        empty: Mapping[str, Tensor],
        choices: Choices,
        *,
        keep: int,
    ) -> None:
        """Keep the records of shards with `keep` samples; `empty` is the empty prompt's states."""
        assert not choices.random_crop, "settings were checked"
        self._selected = selected
        self._caches = caches
        self._empty = empty
        self._choices = choices
        self._tables = Recent(self._load, lambda table: len(table.members), keep)
        self._files = Recent(self._open, lambda _: 1, OPEN_SHARDS)

    def prepare(self, shard: int, row: int, seed: int) -> tuple[Entry, Callable[[], Row]]:
        """Return the place of a row, and what reads it; see `ShardReader.prepare`."""
        member = self._tables.get(shard).members[row]
        caption = self._choices.caption_of(member, seed)
        picture = SpanBlob(self._selected.tar(shard), member.offset, member.size)
        entry = Entry(self._paths(shard)[0], member.key, (member.captions[caption],), picture)
        return entry, partial(self._read, entry, shard, row, caption, seed)

    def _read(self, entry: Entry, shard: int, row: int, caption: int, seed: int) -> CachedSample:
        table = self._tables.get(shard)
        files, member = self._files.get(shard), table.members[row]
        first, end = (files.offsets[int(table.rows.text[row]) + i] for i in (0, 1))
        if end - first != len(member.captions):
            raise RefusedImageError("cached states of other captions than the tar's")
        mirrored = self._choices.placement(seed).mirrored
        moments = files.moments.get_slice("mirrored" if mirrored else "moments")
        one = slice(first + caption, first + caption + 1)
        original = (member.height, member.width)
        return CachedSample(
            # A slice is a view of the mapped file until it is copied.
            moments=moments[int(table.rows.moments[row])].clone(),
            text={name: files.text.get_slice(name)[one].clone() for name in files.names},
            empty=self._empty,
            caption=entry.captions[0],
            size=self._choices.size,
            original=original,
            crop=central_crop(original, self._choices.size),
            name=entry.name,
        )

    def _paths(self, shard: int) -> tuple[Path, Path]:
        root, name = self._selected.folder / CACHE, self._selected.tars[shard].name
        moments, text = self._caches.moments, self._caches.text
        return root / moments / f"{name}.safetensors", root / text / f"{name}.safetensors"

    def _load(self, shard: int) -> _Table:
        selected = self._selected
        name = selected.tars[shard].name
        rows = cached_rows(selected.folder, selected.selection, self._caches, name)
        if len(rows.samples) != selected.counts[shard]:
            raise PreparedError(
                f"the cache of shard {name} of {selected.folder} has {len(rows.samples)} of the "
                f"{selected.counts[shard]} samples that the index promises for selection "
                f"{selected.selection!r}; run: sfumato prepare out={selected.folder} "
                f"stages=[precache,index] precache.selection={selected.selection}"
            )
        return _Table(rows, selected.members(shard, rows.samples.tolist()))

    def _open(self, shard: int) -> _Files:
        stored = self._tables.get(shard).rows.stored
        try:
            moments, text = (safe_open(path, framework="pt") for path in self._paths(shard))
            planes = ["mirrored", "moments"] if self._choices.flip else ["moments"]
            lengths = {len_of(moments, name) for name in planes}
            offsets = text.get_tensor("offsets").tolist()
            names = tuple(sorted(name for name in text.keys() if name != "offsets"))  # noqa: SIM118
            ends = {len_of(text, name) for name in names}
        except FileNotFoundError:
            raise RefusedImageError("missing cache shard") from None
        except (SafetensorError, OSError):
            raise RefusedImageError("unreadable or damaged cache shard") from None
        fits = lengths == {stored[0]} and len(offsets) == stored[1] + 1 and ends == {offsets[-1]}
        if not fits or set(names) != set(self._empty):
            raise RefusedImageError("cache shard that does not fit its record")
        return _Files(moments, text, names, offsets)


def len_of(file: safe_open, name: str) -> int:
    """Return the rows of a tensor in an open file."""
    return int(file.get_slice(name).get_shape()[0])
