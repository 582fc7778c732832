"""Pictures of a run, read as pixels or out of the run's own cache of moments and states.

A shard of the cache holds `SHARD` pictures in the order in which they are listed: `cache_of` names
its folders, `made_of` what it was made of. Its format is that of a prepared folder's caches.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from sfumato.data.decode import RefusedImageError, read_rgb
from sfumato.data.entries import Entry, FileBlob, SpanBlob
from sfumato.data.epochs import RowPick
from sfumato.data.prepared.folder import EMPTY, PreparedFolder
from sfumato.data.prepared.format import CachedRecord, PreparedError, cache_key
from sfumato.data.prepared.tars import LruCache
from sfumato.data.prepared.tensors import BrokenFileError, ShardFiles, open_shard, read_empty
from sfumato.data.row_groups import RowBlob
from sfumato.data.sample import Choices, Sample, Size, central_crop
from sfumato.data.stream import BrokenRowError
from sfumato.files import digest

SHARD = 128  # pictures; at most so many are encoded again after a kill
OPEN_SHARDS = 128  # each two files
LOST = "picture that could not be read when the cache was made"


@final
@dataclass
class Pictures:
    """The pictures that a run reads, by their numbers.

    Attributes:
        entries: in the order in which they are listed.
        originals: height and width of each.
        buckets: index of the size that each is cropped to.
        choices: how samples are made of them.
        cache: in place of the pictures, once it is made.
        key: of the settings, for messages.
        per_caption: how many in a row share their captions, of which the first one's are encoded.
    """

    entries: Sequence[Entry]
    originals: Sequence[Size]
    buckets: Sequence[int]
    choices: Choices
    cache: "PictureCache | None" = None
    key: str = "data.images"
    per_caption: int = 1

    @property
    def used(self) -> list[int]:
        """The buckets that have pictures."""
        return sorted({*self.buckets})

    @property
    def shards(self) -> range:
        """The shards of a cache, by their numbers."""
        return range(-(-len(self.entries) // SHARD))

    def read(self, pick: RowPick) -> Sample:
        """Read a row; raises as `Choices.sample` or `PictureCache.read`."""
        if self.cache is not None:
            return self.cache.read(pick)
        return self.choices.sample(self.entries[pick.row], pick.bucket, pick.seed)

    def captions(self, number: int) -> tuple[str, ...]:
        """Return the captions that are encoded with a picture, as a row may take them."""
        if number % self.per_caption:
            return ()
        captions = self.entries[number].captions
        return captions if self.choices.random_caption else captions[:1]

    def rows(self, shard: int, bucket: int | None = None) -> list[int]:
        """Return the pictures of a shard, of one size or of all, from the shard's first on."""
        buckets = self.buckets[shard * SHARD : (shard + 1) * SHARD]
        return [i for i, each in enumerate(buckets) if bucket in (None, each)]

    @staticmethod
    def number(shard: int, row: int) -> int:
        """Return the number of a picture of a shard."""
        return shard * SHARD + row


@dataclass(frozen=True)
class CacheFolders:
    """Names and identities of the folders of a run's cache.

    Attributes:
        folder: the run folder.
        moments: identity of the moments of each bucket.
        text: identity of the states.
    """

    folder: PreparedFolder
    moments: Sequence[Mapping[str, Any]]
    text: Mapping[str, Any]

    @property
    def identities(self) -> dict[str, Mapping[str, Any]]:
        """The identity of each folder by its name."""
        buckets = (*range(len(self.moments)), None)
        return {self.of(b): self.text if b is None else self.moments[b] for b in buckets}

    def of(self, bucket: int | None) -> str:
        """Return the folder of a bucket's moments, or the folder of the states."""
        if bucket is None:
            return f"text-{cache_key(self.text)}"
        return f"moments-{cache_key(self.moments[bucket])}"

    def refuse_others(self) -> None:
        """Refuse caches of other weights, sizes or dtypes that lie in the run folder.

        Raises:
            PreparedError: naming a folder, and the values in which it differs.
        """
        for name in self.folder.cache_names():
            kind, found = self.folder.manifest(name)
            wanted = {n: i for n, i in self.identities.items() if n.startswith(f"{kind}-")}
            if name in wanted and name == f"{kind}-{cache_key(found)}":
                continue
            differing = [
                [
                    f"{field} ({found.get(field, 'nothing')} in the cache, "
                    f"{identity.get(field, 'nothing')} in the run)"
                    for field in sorted(identity.keys() | found.keys())
                    if identity.get(field) != found.get(field)
                ]
                for identity in wanted.values()
            ]
            fields = min(differing, key=len, default=["its kind"]) or ["its name"]
            raise PreparedError(
                f"{self.folder.cache(name)} is not a cache of this run: it differs in "
                f"{', '.join(fields)}. Remove that folder, or choose another name (name=...)"
            )


def shard_name(shard: int) -> str:
    """Return the name of a shard's files."""
    return f"{shard:06d}"


def made_of(cache: str, pictures: Pictures, shard: int, rows: Sequence[int]) -> str:
    """Return a hash of what decides a shard of a cache: pictures by size and time, and captions."""
    numbers = [pictures.number(shard, row) for row in rows]
    kind = pictures.captions if cache.startswith("text-") else lambda i: _state(pictures.entries[i])
    return digest([cache, [[pictures.entries[i].position, *kind(i)] for i in numbers]])


def _state(entry: Entry) -> tuple[int | str, ...]:
    """Return what changes when the bytes of a picture do, without reading files of their own."""
    blob = entry.blob
    with suppress(OSError):
        if isinstance(blob, FileBlob | SpanBlob | RowBlob):
            about = os.stat(blob.path)  # noqa: PTH116, quicker by the million
            span = (blob.offset, blob.size) if isinstance(blob, SpanBlob) else ()
            return about.st_size, about.st_mtime_ns, *span
        with blob.open() as file:
            return (hashlib.sha256(file.read()).hexdigest(),)
    return ()


@final
class PictureCache:
    """Read moments and states of a run's pictures; no picture is decoded."""

    def __init__(self, pictures: Pictures, folders: CacheFolders) -> None:
        """Read the records of all shards.

        Raises:
            PreparedError: a record is missing or damaged.
        """
        assert not pictures.choices.random_crop, "such pictures have no cache"
        self._pictures, self._folders = pictures, folders
        folder, text = folders.folder, folders.of(None)
        about = folder.cached_record(text, Path(EMPTY).stem)
        self._empty = read_empty(folder, text, about.sha256)
        self._records: dict[str, Mapping[int, CachedRecord]] = {}
        self._rows = np.full(len(pictures.entries), -1)  # of each picture among its moments
        for cache, shard, bucket in _files(pictures, folders):
            record = folder.cached_record(cache, shard_name(shard))
            self._records[cache] = {**self._records.get(cache, {}), shard: record}
            if bucket is not None:
                self._rows[np.asarray(record.rows, int) + shard * SHARD] = range(len(record.rows))
        self._files = LruCache(self._open, lambda _: 1, OPEN_SHARDS)

    def __len__(self) -> int:
        return int((self._rows >= 0).sum())

    def lost(self, bucket: int) -> float:
        """Return which share of the pictures of a size could not be read."""
        return float((self._rows[np.asarray(self._pictures.buckets) == bucket] < 0).mean())

    def read(self, pick: RowPick) -> Sample:
        """Read a row.

        Raises:
            BrokenRowError: the picture could not be read when the cache was made.
            PreparedError: a file of the cache is missing or damaged.
        """
        pictures, number, choices = self._pictures, pick.row, self._pictures.choices
        entry, row = pictures.entries[number], int(self._rows[number])
        if row < 0 or pictures.buckets[number] != pick.bucket:
            raise BrokenRowError(entry, self._reason(entry))
        shard, index = divmod(number, SHARD)
        caption, size = choices.caption(entry.captions, pick.seed), choices.sizes[pick.bucket]
        encoded = self._files.get(shard, pick.bucket).read(
            (row, index - number % pictures.per_caption),
            caption,
            mirrored=choices.placement(pick.seed).mirrored,
            empty=self._empty,
            size=size,
        )
        original = pictures.originals[number]
        crop = central_crop(original, size)
        return Sample(None, entry.captions[caption], original, crop, entry.name, encoded)

    def _reason(self, entry: Entry) -> str:
        """Return why a picture is not in the cache: what reading it says, as without a cache."""
        try:
            read_rgb(entry.blob, self._pictures.choices.bounds)
        except RefusedImageError as error:
            return str(error)
        return LOST

    def _open(self, shard: int, bucket: int) -> ShardFiles:
        folder, name = self._folders.folder, shard_name(shard)
        caches = [self._folders.of(bucket), self._folders.of(None)]
        records = [self._records[cache][shard] for cache in caches]
        paths = [folder.tensors(cache, name) for cache in caches]
        try:
            return open_shard(
                folder,
                {path: each.sha256 for path, each in zip(paths, records, strict=True)},
                (len(records[0].rows), len(records[1].rows)),
                flip=self._pictures.choices.flip,
                names=tuple(self._empty),
            )
        except BrokenFileError as error:
            raise PreparedError(
                f"{' or '.join(map(str, paths))} is a {error}; remove the two, and {folder.again}"
            ) from None


def lacking(pictures: Pictures, folders: CacheFolders, shard: int) -> list[tuple[str, int | None]]:
    """Return the folders, with their buckets, that lack a shard of just these pictures."""
    folder, name = folders.folder, shard_name(shard)
    lacks = []
    for cache, _, bucket in _files(pictures, folders, shard):
        path = folder.tensors(cache, name)
        there = path.exists() and path.with_suffix(".json").exists()
        now = made_of(cache, pictures, shard, pictures.rows(shard, bucket))
        if not there or folder.cached_record(cache, name).made_of != now:
            lacks.append((cache, bucket))
    return lacks


def _files(
    pictures: Pictures, folders: CacheFolders, shard: int | None = None
) -> list[tuple[str, int, int | None]]:
    """List the shards of all folders, or the given one: folder, number, and bucket of moments."""
    numbers = pictures.shards if shard is None else [shard]
    files: list[tuple[str, int, int | None]] = [(folders.of(None), i, None) for i in numbers]
    for number in numbers:
        here = dict.fromkeys(pictures.buckets[number * SHARD : (number + 1) * SHARD])
        files += [(folders.of(bucket), number, bucket) for bucket in sorted(here)]
    return files
