"""Look at one tar of a prepared folder, and at its shards of selections and caches."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, final

from sfumato.data.prepared.folder import PreparedFolder
from sfumato.data.prepared.format import (
    IndexedShard,
    KeptRecord,
    PreparedError,
    TarRecord,
    is_of,
)
from sfumato.preparation import faults
from sfumato.preparation.engine import Tick

T = TypeVar("T")


@dataclass(frozen=True)
class WalkJob:
    """What is looked at: selections and caches by name; `deep` reads every byte."""

    folder: PreparedFolder
    selections: tuple[str, ...]
    caches: tuple[str, ...]
    deep: bool


@dataclass(frozen=True)
class Fault:
    """A fault of a stage; with one that is refused there is no index."""

    stage: str
    text: str
    refused: bool = False


@dataclass(frozen=True)
class Kept:
    """How many samples of a tar a selection keeps, the others by reason, and which in a line."""

    count: int
    dropped: Mapping[str, int]
    line: bytes


@dataclass(frozen=True)
class Cached:
    """What a cache has of a tar.

    Attributes:
        shard: None if it was encoded from another tar.
        lacks: selections of which it lacks samples.
    """

    shard: IndexedShard | None
    count: int
    dropped: Mapping[str, int]
    lacks: frozenset[str]


@dataclass
class View:
    """What was seen of a tar.

    Attributes:
        tar: None if its record cannot be read.
        rows: as in its record.
        keys: of its samples, if every byte was read.
    """

    faults: list[Fault] = field(default_factory=list)
    tar: IndexedShard | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    rows: tuple[int, int] | None = None
    keys: tuple[str, ...] = ()
    selections: dict[str, Kept] = field(default_factory=dict)
    caches: dict[str, Cached] = field(default_factory=dict)


def look_at(job: WalkJob, name: str, tick: Tick) -> View:
    """Look at a tar."""
    view = _Look(job).at(name)
    tick(1)
    return view


@final
class _Look:
    """One look at a tar, which fills a view."""

    def __init__(self, job: WalkJob) -> None:
        self._job, self._folder, self._view = job, job.folder, View()

    def at(self, name: str) -> View:
        tar, view = self._read("pack", partial(self._folder.tar_record, name)), self._view
        if tar is None:
            return view
        path = self._folder.tar(name)
        if fault := faults.wrong_size(path, tar.bytes):
            self._refuse("pack", fault)
        self._report("pack", faults.of_tar(path, tar))
        view.tar = IndexedShard(tar.name, len(tar.samples), tar.bytes, tar.sha256)
        view.dropped, view.rows = tar.dropped, tar.rows
        view.keys = tuple(member.key for member in tar.samples) if self._job.deep else ()
        kept = {name: self._look_at_selection(name, tar) for name in self._job.selections}
        for cache in self._job.caches:
            self._look_at_cache(cache, tar, kept)
        return view

    def _refuse(self, stage: str, text: str) -> None:
        self._view.faults.append(Fault(stage, text, refused=True))

    def _report(self, stage: str, found: Iterable[str]) -> None:
        """Note further faults; finding them may mean reading every byte."""
        if self._job.deep:
            self._view.faults += [Fault(stage, text) for text in found]

    def _read(self, stage: str, read: Callable[[], T]) -> T | None:
        """Return a record; None if it cannot be read."""
        try:
            return read()
        except PreparedError as error:
            self._refuse(stage, str(error))
            return None

    def _look_at_selection(self, name: str, tar: TarRecord) -> KeptRecord | None:
        stage, root = f"filter {name}", self._folder.selection(name)
        path = root / f"{tar.name}.json"
        again = (
            f"run: sfumato prepare out={self._folder} stages=[filter,index] with "
            f"filter.name={name} and its bounds, or remove {root}"
        )
        if not path.exists():
            missing = f"{path} is missing: the selection {name!r} has no record of {tar.name}"
            self._refuse(stage, f"{missing}; {again}")
            return None
        record = self._read(stage, partial(self._folder.kept_record, name, tar.name))
        if record is None:
            return None
        if record.tar not in ("", tar.made_of):
            changed = f"{path} was made of another tar {tar.name}, which was packed again since"
            self._refuse(stage, f"{changed}; {again}")
        dropped, whole = sum(record.dropped.values()), len(tar.samples)
        if len(record.kept) + dropped != whole:
            counts = f"{len(record.kept) + dropped} samples in its bins, and the tar has {whole}"
            self._refuse(stage, f"{path} has {counts}; {again}")
        self._report(stage, faults.of_numbers(path, record.kept, whole))
        self._view.selections[name] = Kept(len(record.kept), record.dropped, record.line)
        return record

    def _look_at_cache(
        self, name: str, tar: TarRecord, selections: Mapping[str, KeptRecord | None]
    ) -> None:
        file = self._folder.tensors(name, tar.name)
        path = file.with_suffix(".json")
        if not path.exists():
            self._report(name, [f"{path} is missing; run the stage precache again"])
            return
        record = self._read(name, partial(self._folder.cached_record, name, tar.name))
        if record is None:
            return
        fault, shard = faults.wrong_size(file, record.bytes), None
        if is_of(name, record, tar):
            if fault:
                self._refuse(name, fault)
            shard = IndexedShard(record.name, len(record.rows), record.bytes, record.sha256)
        else:
            another = f"{file} was made of another tar; run the stage precache again"
            self._report(name, filter(None, [another, fault]))
        self._report(name, faults.of_cached(file, record, tar))
        lost = sum(record.dropped.values())
        lacks = frozenset(
            selection
            for selection, kept in selections.items()
            # Most often the two are equal, which is quick to see.
            if kept is None
            or (kept.kept != record.rows and len({*kept.kept}.difference(record.rows)) > lost)
        )
        self._view.caches[name] = Cached(shard, len(record.rows), record.dropped, lacks)
