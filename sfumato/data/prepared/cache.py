"""Reader of caches: moments and states of single samples, out of mapped files.

Few shards are open at a time, each compared with its SHA-256 when it is first opened. A run can
read the caches of its own encoders and sizes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from sfumato.data.entries import Entry, SpanBlob
from sfumato.data.epochs import RowPick
from sfumato.data.prepared.folder import MANIFEST, PreparedFolder
from sfumato.data.prepared.format import CacheIdentity, Member, PreparedError, cache_key
from sfumato.data.prepared.tars import LruCache, Selected
from sfumato.data.prepared.tensors import BrokenFileError, ShardFiles, open_shard, read_empty
from sfumato.data.sample import Sample, central_crop
from sfumato.data.shard_cache import LocalFile
from sfumato.data.stream import BrokenRowError

OPEN_SHARDS = 32  # each two files
# How tensors are stored decides nothing: any dtype will do, the most exact one first.
_DTYPES = ("float32", "float16", "bfloat16")
_STORED = {"dtype", "flip"}
_MISSING = object()


# What a cache holds


@dataclass(frozen=True)
class Caches:
    """Names of folders below cache/.

    Attributes:
        moments: one folder for each bucket; empty for a bucket without samples.
        text: the states of captions.
    """

    moments: Sequence[str]
    text: str

    @property
    def folders(self) -> list[str]:
        """All folders."""
        return [*filter(None, self.moments), self.text]


@dataclass(frozen=True)
class CachedRows:
    """The samples of a shard that are in a selection and in both halves of a cache.

    Attributes:
        samples: indices into the tar, ascending.
        moments: the row of each sample among the moments.
        text: the row of each sample among the states.
        stored: how many rows the files of moments and of states hold.
    """

    samples: np.ndarray
    moments: np.ndarray
    text: np.ndarray
    stored: tuple[int, int]


def cached_rows(
    folder: PreparedFolder, caches: Caches, name: str, buckets: Sequence[Sequence[int]]
) -> list[CachedRows]:
    """Read which samples of a shard a cache holds, by bucket.

    Args:
        buckets: the samples that are asked for: indices into the tar, ascending.

    Raises:
        PreparedError: a record is missing or damaged.
    """
    text = np.asarray(folder.cached_record(caches.text, name).rows, dtype=np.int64)
    rows = []
    for cache, asked in zip(caches.moments, buckets, strict=True):
        moments = np.empty(0, dtype=np.int64)
        if cache:
            moments = np.asarray(folder.cached_record(cache, name).rows, dtype=np.int64)
        samples = _common(_common(np.asarray(asked, dtype=np.int64), moments), text)
        positions = (np.searchsorted(stored, samples) for stored in (moments, text))
        rows.append(CachedRows(samples, *positions, stored=(len(moments), len(text))))
    return rows


def _common(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    # Most often the two are equal.
    return some if np.array_equal(some, others) else np.intersect1d(some, others, True)


# Reading


@dataclass(frozen=True)
class _Bucket:
    """Rows of one size in one shard, and where they lie."""

    path: Path  # of the moments
    tar: Path  # of the pictures
    files: Sequence[LocalFile]  # of moments and states
    rows: CachedRows
    members: Sequence[Member]


@final
class CacheReader:
    """Read moments and states of single rows; no file is read whole."""

    def __init__(
        self,
        selected: Selected,
        caches: Caches,
        counts: Sequence[Sequence[int]],
        *,
        keep: int,
    ) -> None:
        """Read the states of the empty prompt.

        Args:
            counts: cached samples of each bucket and shard.
            keep: the records of shards with so many samples stay in memory.

        Raises:
            PreparedError: the states of the empty prompt cannot be read.
        """
        assert not selected.choices.random_crop, "settings were checked"
        self._selected = selected
        self._caches = caches
        self._counts = counts
        index, folder = selected.index, selected.folder
        self._stored = {name: {s.name: s for s in index.caches[name]} for name in caches.folders}
        self._empty = read_empty(folder, caches.text, index.empty.get(caches.text))
        self._choices = selected.choices
        self._shards = LruCache(self._load, lambda all_: sum(len(b.members) for b in all_), keep)
        self._files = LruCache(self._open, lambda _: 1, OPEN_SHARDS)

    def load(self, shard: int) -> None:
        """Have a shard's records, and its files, at hand before they are asked for."""
        self._shards.get(shard)

    def read(self, pick: RowPick) -> Sample:
        """Read a row.

        Raises:
            BrokenRowError: the shard of the cache is missing, or does not fit its record.
            PreparedError: the shard's records are missing, damaged, or not those of the index; or
                the shard is another file than its SHA-256 says.
        """
        bucket = self._shards.get(pick.shard)[pick.bucket]
        member = bucket.members[pick.row]
        picture = SpanBlob(bucket.tar, member.offset, member.size)
        entry = Entry(bucket.path, member.key, member.captions, picture)
        try:
            files = self._files.get(pick.shard, pick.bucket)
        except BrokenFileError as error:
            raise BrokenRowError(entry, str(error)) from None
        return self._sample(entry, files, bucket.rows, member, pick)

    def _sample(
        self, entry: Entry, files: ShardFiles, rows: CachedRows, member: Member, pick: RowPick
    ) -> Sample:
        moments, text = int(rows.moments[pick.row]), int(rows.text[pick.row])
        if files.captions(text) != len(member.captions):
            raise BrokenRowError(entry, "cached states of other captions than the tar's")
        caption = self._choices.caption(member.captions, pick.seed)
        original, size = (member.height, member.width), self._choices.sizes[pick.bucket]
        encoded = files.read(
            (moments, text),
            caption,
            mirrored=self._choices.placement(pick.seed).mirrored,
            empty=self._empty,
            size=size,
        )
        crop = central_crop(original, size)
        return Sample(None, member.captions[caption], original, crop, entry.name, encoded)

    def _path(self, cache: str, shard: int) -> Path:
        return self._selected.folder.tensors(cache, self._selected.tars[shard].name)

    def _load(self, shard: int) -> list[_Bucket]:
        selected, name = self._selected, self._selected.tars[shard].name
        record = selected.folder.tar_record(name)
        buckets = cached_rows(selected.folder, self._caches, name, selected.rows(shard, record))
        samples = [rows.samples for rows in buckets]
        selected.check(shard, samples, self._counts, "precache,index")
        text = self._hold(self._caches.text, shard)
        return [
            _Bucket(
                self._path(moments, shard),
                selected.tar(shard),
                (self._hold(moments, shard), text) if moments else (),
                rows,
                [record.samples[i] for i in rows.samples],
            )
            for moments, rows in zip(self._caches.moments, buckets, strict=True)
        ]

    def _hold(self, cache: str, shard: int) -> LocalFile:
        name, folder = self._selected.tars[shard].name, self._selected.folder
        return folder.hold(folder.tensors(cache, name), self._stored[cache][name])

    def _open(self, shard: int, bucket: int) -> ShardFiles:
        name, opened = self._selected.tars[shard].name, self._shards.get(shard)[bucket]
        caches = (self._caches.moments[bucket], self._caches.text)
        sums = [self._stored[cache][name].sha256 for cache in caches]
        return open_shard(
            self._selected.folder,
            dict(zip((file.path for file in opened.files), sums, strict=True)),
            opened.rows.stored,
            flip=self._choices.flip,
            names=tuple(self._empty),
        )


# Finding


def find_caches(selected: Selected, identity: CacheIdentity, buckets: Sequence[bool]) -> Caches:
    """Return the folders of moments and of states that a run can read.

    A cache of another dtype, or with mirrored moments that the run does not use, also fits. Of
    several, the one that covers most of the selection is taken; exact identity breaks ties.

    Args:
        identity: of the model that is trained; the sizes of buckets replace its own.
        buckets: whether there is a sample of each size.

    Raises:
        PreparedError: no cache fits; the message names the fields in which each cache differs.
    """
    moments = []
    for (height, width), used in zip(selected.choices.sizes, buckets, strict=True):
        of_size = {**identity.moments, "height": height, "width": width}
        flip = selected.choices.flip
        moments.append(_find(selected, "moments", of_size, flip=flip) if used else "")
    return Caches(moments, _find(selected, "text", identity.text, flip=False))


def _find(selected: Selected, kind: str, identity: Mapping[str, Any], *, flip: bool) -> str:
    folder, exact = selected.folder, f"{kind}-{cache_key(identity)}"
    manifests = dict(_manifests(selected, kind))
    differences = {name: _differences(identity, m, flip=flip) for name, m in manifests.items()}
    fitting = [name for name, fields in differences.items() if not fields]
    if fitting:

        def order(name: str) -> tuple[int, bool, int, str]:
            dtype = manifests[name].get("dtype")
            rank = _DTYPES.index(dtype) if dtype in _DTYPES else len(_DTYPES)
            return (-_held(selected, name), name != exact, rank, name)

        return min(fitting, key=order)
    reasons = [f"{name} differs in {', '.join(fields)}" for name, fields in differences.items()]
    if exact not in manifests and (folder.cache(exact) / MANIFEST).exists():
        reasons.append(f"{exact} exists, but was incomplete when the folder was indexed")
    size = "".join(f", {key}={identity[key]}" for key in ("height", "width") if key in identity)
    raise PreparedError(
        f"{folder} has no cache of {kind} for this run ({exact}{size}): "
        f"{'; '.join(reasons) or 'no such cache was indexed'}. Precache with the model and "
        f"the size of the run (sfumato prepare out={folder} stages=[precache,index], "
        "precache.flip=true for data.shards.flip=true, and precache.height and precache.width of "
        "each bucket for data.shards.buckets=true), or correct the settings of the run"
    )


def _manifests(selected: Selected, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the identity of each cache of a kind that the index lists."""
    for name in sorted(selected.index.caches):
        if not name.startswith(f"{kind}-"):
            continue
        stored, identity = selected.folder.manifest(name)
        if stored != kind or name != f"{kind}-{cache_key(identity)}":
            path = selected.folder.shown(selected.folder.cache(name) / MANIFEST)
            raise PreparedError(
                f"{path} does not belong to its folder, whose name is a hash of it; one of them "
                "was changed. Remove the folder and precache again"
            )
        yield name, identity


def _differences(
    identity: Mapping[str, Any], manifest: Mapping[str, Any], *, flip: bool
) -> list[str]:
    """Return the fields in which a cache differs from what a run needs, with both values."""
    differences = [
        f"{field} ({manifest.get(field, 'nothing')} in the cache, "
        f"{identity.get(field, 'nothing')} in the run)"
        for field in sorted((identity.keys() | manifest.keys()) - _STORED)
        if identity.get(field, _MISSING) != manifest.get(field, _MISSING)
    ]
    if flip and not manifest.get("flip", False):
        differences.append("flip (no mirrored moments in the cache, data.shards.flip=true)")
    return differences


def _held(selected: Selected, cache: str) -> int:
    """Return how many samples of the selection a cache may hold, by the numbers of its shards."""
    stored = {shard.name: shard.samples for shard in selected.index.caches[cache]}
    pairs = zip(selected.tars, selected.counts, strict=True)
    return sum(min(stored.get(tar.name, 0), count) for tar, count in pairs)
