"""Index of a prepared folder: one walk over the records of its tars, selections and caches.

The stage index stops at the first fault that the walk refuses; verify prints all faults.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, final

from sfumato.data.left_out import tally
from sfumato.data.prepared.folder import EMPTY, INDEX, PreparedFolder
from sfumato.data.prepared.format import (
    Index,
    IndexedShard,
    KeptRecord,
    PreparedError,
    TarRecord,
    is_of,
    write_record,
)
from sfumato.files import sha256_of
from sfumato.preparation import faults
from sfumato.preparation.download import DOWNLOAD, read_download

T = TypeVar("T")
Refuse = Callable[[str, str], None]  # takes a stage, and a fault with which there is no index
# Takes a stage and further faults. Finding those means reading every byte, unless nobody iterates.
Report = Callable[[str, Iterable[str]], None]


@dataclass
class Part:
    """Counts of one stage: samples that it kept of each tar, and the others by reason."""

    shards: list[IndexedShard] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    state: Any = field(default_factory=hashlib.sha256)  # of which samples a selection keeps
    covered: set[str] = field(default_factory=set)  # selections that are all in a cache

    @property
    def bins(self) -> dict[str, int]:
        return tally(sum(self.kept), [self.dropped])


@final
class Walk:
    """One walk over all records of a prepared folder, of which only counts stay in memory.

    Attributes:
        tars: counts of the tars; `selections` and `caches` by name.
    """

    def __init__(self, folder: PreparedFolder, refuse: Refuse, report: Report) -> None:
        self._folder, self._refuse, self._report = folder, refuse, report
        self.tars, self._samples = Part(), 0
        self.selections = {name: Part() for name in folder.selection_names()}
        self.caches = {name: Part(covered={*self.selections}) for name in folder.cache_names()}
        self._read("pack", folder.tar_names)
        for name in sorted(path.stem for path in folder.shards.glob("[!.]*.json")):
            tar = self._read("pack", partial(folder.tar_record, name))
            if tar is not None:
                self._visit(tar)
        names = {shard.name for shard in self.tars.shards}
        report("pack", faults.tars_without_record(folder.shards))
        for name in self.selections:
            report(f"filter {name}", faults.strangers(folder.selection(name), names))
        for name, part in self.caches.items():
            path = folder.cache(name)
            report(name, faults.of_manifest(folder, name))
            report(name, faults.strangers(path, names))
            if len(part.kept) == len(names) and not part.covered:
                fault = f"{path} lacks samples of every selection; run the stage precache again"
                report(name, [fault])

    @property
    def stages(self) -> dict[str, Part]:
        """The counts of tars, selections and caches, by the name of their stage."""
        selections = {f"filter {name}": part for name, part in self.selections.items()}
        return {"pack": self.tars, **selections, **self.caches}

    def index(self, downloaded: Mapping[str, int] | None) -> Index:
        """Return the index; caches that lack a tar are left out.

        Args:
            downloaded: the bins of the download, if there was one.
        """
        tars = tuple(self.tars.shards)
        whole = {name: part for name, part in self.caches.items() if len(part.shards) == len(tars)}
        left_out = self.caches.keys() - whole.keys()
        bins = {stage: part.bins for stage, part in self.stages.items() if stage not in left_out}
        return Index(
            tars,
            {name: tuple(part.kept) for name, part in self.selections.items()},
            {name: tuple(part.shards) for name, part in whole.items()},
            bins if downloaded is None else {"download": downloaded, **bins},
            {name: part.state.hexdigest() for name, part in self.selections.items()},
            {
                name: sha256_of(path)
                for name in whole
                if (path := self._folder.cache(name) / EMPTY).is_file()
            },
        )

    def _read(self, stage: str, read: Callable[[], T]) -> T | None:
        """Return a record; None if it cannot be read."""
        try:
            return read()
        except PreparedError as error:
            self._refuse(stage, str(error))
            return None

    def _visit(self, tar: TarRecord) -> None:
        path = self._folder.tar(tar.name)
        if fault := faults.wrong_size(path, tar.bytes):
            self._refuse("pack", fault)
        self._report("pack", faults.of_tar(path, tar, self._samples))
        self._samples += len(tar.samples)
        self.tars.shards.append(IndexedShard(tar.name, len(tar.samples), tar.bytes, tar.sha256))
        self.tars.kept.append(len(tar.samples))
        self.tars.dropped.update(tar.dropped)
        kept = {name: self._visit_selection(name, tar) for name in self.selections}
        for name in self.caches:
            self._visit_cache(name, tar, kept)

    def _visit_selection(self, name: str, tar: TarRecord) -> KeptRecord | None:
        stage, root = f"filter {name}", self._folder.selection(name)
        path, part = root / f"{tar.name}.json", self.selections[name]
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
        part.kept.append(len(record.kept))
        part.dropped.update(record.dropped)
        part.state.update(f"{tar.name} {record.kept}\n".encode())
        return record

    def _visit_cache(
        self, name: str, tar: TarRecord, selections: Mapping[str, KeptRecord | None]
    ) -> None:
        file, part = self._folder.tensors(name, tar.name), self.caches[name]
        path = file.with_suffix(".json")
        if not path.exists():
            self._report(name, [f"{path} is missing; run the stage precache again"])
            return
        record = self._read(name, partial(self._folder.cached_record, name, tar.name))
        if record is None:
            return
        fits = is_of(name, record, tar)
        fault = faults.wrong_size(file, record.bytes)
        if fits:
            if fault:
                self._refuse(name, fault)
            shard = IndexedShard(record.name, len(record.rows), record.bytes, record.sha256)
            part.shards.append(shard)
        else:
            another = f"{file} was made of another tar; run the stage precache again"
            self._report(name, filter(None, [another, fault]))
        self._report(name, faults.of_cached(file, record, tar))
        part.kept.append(len(record.rows))
        part.dropped.update(record.dropped)
        lost = sum(record.dropped.values())
        for selection, kept in selections.items():
            # Most often the two are equal, which is quick to see.
            if kept is None or (
                kept.kept != record.rows and len({*kept.kept}.difference(record.rows)) > lost
            ):
                part.covered.discard(selection)


def write_index(folder: Path) -> Index:
    """Write index.json, and return it.

    Raises:
        PreparedError: nothing is packed, a selection is not of these tars, or a file is missing.
    """

    def refuse(_: str, fault: str) -> None:
        raise PreparedError(fault)

    downloaded = read_download(folder)[0] if (folder / DOWNLOAD).is_dir() else None
    index = Walk(PreparedFolder(folder), refuse, lambda *_: None).index(downloaded)
    write_record(folder / INDEX, index)
    return index
