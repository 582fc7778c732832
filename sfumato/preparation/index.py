"""Index of a prepared folder: one walk over the records of its tars, selections and caches.

The stage index stops at the first fault that forbids an index; verify prints all faults. An engine
looks at tars; what it sees of each is put together in their order.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

from sfumato.data.left_out import tally
from sfumato.data.prepared.folder import EMPTY, INDEX, PreparedFolder
from sfumato.data.prepared.format import Index, IndexedShard, PreparedError, write_record
from sfumato.files import sha256_of
from sfumato.preparation import faults
from sfumato.preparation.download import DOWNLOAD, read_download
from sfumato.preparation.engine import ALONE, Engine, Progress, map_shards
from sfumato.preparation.look import Fault, View, WalkJob, look_at

Tell = Callable[[Fault], None]


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

    def __init__(self, folder: PreparedFolder, tell: Tell, engine: Engine, *, deep: bool) -> None:
        """Walk.

        Args:
            tell: is told of each fault.
            deep: read every byte; else only faults that forbid an index are looked for.
        """
        self._folder, self._tell, self._deep = folder, tell, deep
        self.tars, self._rows = Part(), 0
        self.selections = {name: Part() for name in folder.selection_names()}
        self.caches = {name: Part(covered={*self.selections}) for name in folder.cache_names()}
        try:
            folder.tar_names()
        except PreparedError as error:
            tell(Fault("pack", str(error), refused=True))
        names = sorted(path.stem for path in folder.shards.glob("[!.]*.json"))
        job = WalkJob(folder, tuple(self.selections), tuple(self.caches), deep)
        with Progress("verify" if deep else "index", len(names), "tar") as progress:
            for view in map_shards(partial(look_at, job), names, engine, tick=progress.tick):
                self._add(view)
        if deep:
            self._look_at_folders()

    def _look_at_folders(self) -> None:
        """Look for files of tars that do not exist, and at the manifests of caches."""
        folder, names = self._folder, {shard.name for shard in self.tars.shards}
        self._report("pack", faults.tars_without_record(folder.shards))
        for name in self.selections:
            self._report(f"filter {name}", faults.strangers(folder.selection(name), names))
        for name, part in self.caches.items():
            path = folder.cache(name)
            self._report(name, faults.of_manifest(folder, name))
            self._report(name, faults.strangers(path, names))
            if len(part.kept) == len(names) and not part.covered:
                fault = f"{path} lacks samples of every selection; run the stage precache again"
                self._report(name, [fault])

    def _report(self, stage: str, found: Iterable[str]) -> None:
        for text in found:
            self._tell(Fault(stage, text))

    def _add(self, view: View) -> None:
        """Add what was seen of a tar, the next in order."""
        for fault in view.faults:
            self._tell(fault)
        if view.tar is None:
            return
        if self._deep:
            path = self._folder.tar(view.tar.name)
            self._report("pack", faults.of_numbering(path, view.rows, view.keys, self._rows))
        self._rows = self._rows + len(view.keys) if view.rows is None else view.rows[1]
        self.tars.shards.append(view.tar)
        self.tars.kept.append(view.tar.samples)
        self.tars.dropped.update(view.dropped)
        for name, kept in view.selections.items():
            part = self.selections[name]
            part.kept.append(kept.count)
            part.dropped.update(kept.dropped)
            part.state.update(kept.line)
        for name, cached in view.caches.items():
            part = self.caches[name]
            part.shards += [cached.shard] if cached.shard else []
            part.kept.append(cached.count)
            part.dropped.update(cached.dropped)
            part.covered -= cached.lacks

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


def write_index(folder: Path, engine: Engine = ALONE) -> Index:
    """Write index.json, and return it.

    Raises:
        PreparedError: nothing is packed, a selection is not of these tars, or a file is missing.
    """

    def refuse(fault: Fault) -> None:
        raise PreparedError(fault.text)

    downloaded = read_download(folder)[0] if (folder / DOWNLOAD).is_dir() else None
    index = Walk(PreparedFolder(folder), refuse, engine, deep=False).index(downloaded)
    write_record(folder / INDEX, index, shared=False)
    return index
