"""Reader of pictures out of prepared tars, and the sums of what is read.

The records of a shard are read when it is first met, and stay in memory for its window.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar, final

from sfumato.data.decode import Bounds
from sfumato.data.entries import Entry, SpanBlob
from sfumato.data.epochs import RowPick
from sfumato.data.pools import nearest
from sfumato.data.prepared.folder import PreparedFolder
from sfumato.data.prepared.format import (
    Index,
    IndexedShard,
    Member,
    PreparedError,
    Shapes,
    TarRecord,
)
from sfumato.data.sample import Choices, Sample
from sfumato.data.shard_cache import LocalFile
from sfumato.files import sha256_of

Value = TypeVar("Value")
_LOCKS = 16  # threads that load different keys rarely wait for each other
_REMEMBERED = 1_000_000  # sums of files


@dataclass(frozen=True)
class Selected:
    """The shards of a prepared folder, and what is read of them.

    Attributes:
        folder: that was prepared.
        selection: its name.
        index: of the folder.
        choices: how samples are made: in which sizes, and of which pictures.
    """

    folder: PreparedFolder
    selection: str
    index: Index
    choices: Choices

    @property
    def tars(self) -> Sequence[IndexedShard]:
        """The tars as the index lists them."""
        return self.index.tars

    @property
    def counts(self) -> Sequence[int]:
        """How many samples of each tar the selection keeps."""
        return self.index.selections[self.selection]

    @property
    def used(self) -> list[int]:
        """Shards of which the selection keeps a sample."""
        return [shard for shard, count in enumerate(self.counts) if count]

    @property
    def is_sorted(self) -> bool:
        """Whether the shapes of pictures decide what is read of them, and in which bucket."""
        return len(self.choices.sizes) > 1 or self.choices.bounds != Bounds()

    def tar(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder.tar(self.tars[shard].name)

    def rows(self, shard: int, record: TarRecord | Shapes) -> list[list[int]]:
        """Return which samples of a shard are read, by bucket: indices into its tar.

        Raises:
            PreparedError: the records are missing, damaged, or not those that were indexed.
        """
        tar, samples = self.tars[shard], record.samples
        indices = self.folder.kept_record(self.selection, tar.name).kept
        inside = all(0 <= index < len(samples) for index in indices)
        if record.sha256 != tar.sha256 or len(indices) != self.counts[shard] or not inside:
            self.folder.forget_records(self.selection, tar.name)
            raise PreparedError(
                f"shard {tar.name} of {self.folder} is not the one that was indexed: the selection "
                f"{self.selection!r} keeps {len(indices)} of its {len(samples)} samples, not "
                f"{self.counts[shard]}, or its records were written again; "
                f"{self.folder.anew('index')}, and start a new run"
            )
        if not self.is_sorted:
            return [list(indices)]
        sizes, bounds = self.choices.sizes, self.choices.bounds
        buckets: list[list[int]] = [[] for _ in sizes]
        for index in indices:
            height, width = samples[index].height, samples[index].width
            if min(height, width) >= bounds.smallest and height * width <= bounds.pixels:
                buckets[nearest((height, width), sizes)].append(index)
        return buckets

    def check(
        self, shard: int, rows: Sequence[Sized], counts: Sequence[Sequence[int]], stages: str
    ) -> None:
        """Refuse a shard with other samples than were counted, by bucket, when it was opened.

        Raises:
            PreparedError: naming the stages that may mend it.
        """
        for bucket, bucket_counts in zip(rows, counts, strict=True):
            if len(bucket) != bucket_counts[shard]:
                self.folder.forget_records(self.selection, self.tars[shard].name)
                raise PreparedError(
                    f"shard {self.tars[shard].name} of {self.folder} has {len(bucket)} of the "
                    f"{bucket_counts[shard]} samples that were counted for selection "
                    f"{self.selection!r}; {self.folder.anew(stages)} with the settings of this "
                    "selection"
                )


@dataclass(frozen=True)
class _Tar:
    """A tar on this machine, and its samples by bucket."""

    file: LocalFile
    members: Sequence[Sequence[Member]]


@final
class TarReader:
    """Decode pictures of a prepared folder."""

    def __init__(
        self,
        selected: Selected,
        counts: Sequence[Sequence[int]],
        *,
        keep: int,
        verify: bool = False,
    ) -> None:
        """Keep the records of shards with `keep` samples; `counts` are by bucket and shard.

        Args:
            verify: compare each tar with its SHA-256 before the first picture is read of it.
        """
        self._selected = selected
        self._counts = counts
        self._verify = verify
        self._tars = LruCache(self._load, lambda tar: sum(map(len, tar.members)), keep)

    def load(self, shard: int) -> None:
        """Have a shard's records, and its file, at hand before they are asked for."""
        self._tars.get(shard)

    def read(self, pick: RowPick) -> Sample:
        """Decode a picture.

        Raises:
            BrokenRowError: the picture cannot be used.
            PreparedError: the shard's records are missing, damaged, or not those of the index; or
                the tar is another file than its SHA-256 says.
        """
        tar = self._tars.get(pick.shard)
        member = tar.members[pick.bucket][pick.row]
        blob = SpanBlob(tar.file.path, member.offset, member.size)
        entry = Entry(
            self._selected.tar(pick.shard), f"{member.key}.{member.suffix}", member.captions, blob
        )
        return self._selected.choices.sample(entry, pick.bucket, pick.seed)

    def _load(self, shard: int) -> _Tar:
        record = self._selected.folder.tar_record(self._selected.tars[shard].name)
        rows = self._selected.rows(shard, record)
        self._selected.check(shard, rows, self._counts, "index")
        tar, folder = self._selected.tar(shard), self._selected.folder
        if self._verify and folder.store is None:  # a store's files always are
            check_sum(tar, self._selected.tars[shard].sha256, folder)
        members = [[record.samples[index] for index in bucket] for bucket in rows]
        return _Tar(folder.hold(tar, self._selected.tars[shard]), members)


@final
class LruCache(Generic[Value]):
    """Load values by key and keep the latest; one thread loads while others wait for it."""

    def __init__(
        self, load: Callable[..., Value], weigh: Callable[[Value], int], limit: int
    ) -> None:
        """Keep values whose weights sum up to `limit` at most, and the latest in any case.

        Args:
            load: called with the parts of a key.
        """
        self._load = load
        self._weigh = weigh
        self._limit = limit
        self._weight = 0
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = tuple(threading.Lock() for _ in range(_LOCKS))

    def get(self, *key: Hashable) -> Value:
        """Return the value of a key; an error of loading is raised, and nothing is stored."""
        held = self._look(key)
        if held is not None:
            return held[0]
        with self._loading[hash(key) % _LOCKS]:
            held = self._look(key)
            if held is not None:
                return held[0]
            value = self._load(*key)
            self._keep(key, value)
            return value

    def _look(self, key: Hashable) -> tuple[Value] | None:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return (self._values[key],)

    def _keep(self, key: Hashable, value: Value) -> None:
        with self._lock:
            self._values[key] = value
            self._weight += self._weigh(value)
            while self._weight > self._limit and len(self._values) > 1:
                self._weight -= self._weigh(self._values.popitem(last=False)[1])


# By path, size, time and inode: a process reads a file once for its sum, whoever asks.
_sums = LruCache(lambda path, *_: sha256_of(Path(path)), lambda _: 1, _REMEMBERED)


def check_sum(path: Path, expected: str, folder: PreparedFolder) -> None:
    """Compare a file with its SHA-256 in the index, once in this process.

    Raises:
        FileNotFoundError: it is missing.
        PreparedError: it is another file, naming both sums; or it cannot be read.
    """
    try:
        about = path.stat()
        found = _sums.get(str(path), about.st_size, about.st_mtime_ns, about.st_ino)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PreparedError(f"{path} cannot be read ({error.strerror})") from error
    if found != expected:
        lists = f"run: sfumato prepare verify {folder}, which lists all that is damaged, remove "
        raise PreparedError(
            f"{path} is damaged or was changed: its SHA-256 is {found}, and {expected} when it was "
            f"{'written' if folder.of_run else 'indexed'}. Put back a copy; or "
            f"{'remove it' if folder.of_run else f'{lists}those files'} and {folder.again}"
        )
