"""Verification of a prepared folder, `sfumato prepare verify`: every record, count and byte."""

import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import final

from sfumato.data.left_out import line
from sfumato.data.prepared.folder import CACHE, EMPTY, INDEX, SHARDS, PreparedFolder
from sfumato.data.prepared.format import Index, PreparedError
from sfumato.preparation.download import DOWNLOAD, read_download
from sfumato.preparation.engine import ALONE, Engine
from sfumato.preparation.faults import DAMAGE
from sfumato.preparation.index import Walk
from sfumato.preparation.look import Fault


@final
class _Printer:
    """Print faults as they come, count them by stage, and note whether one was a refusal."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.refused = False

    def tell(self, fault: Fault) -> None:
        self.refused = self.refused or fault.refused
        self.report(fault.stage, [fault.text])

    def report(self, stage: str, faults: Iterable[str]) -> None:
        for fault in faults:
            print(f"  {fault}", flush=True)
            self.counts[stage] += 1

    def conclude(self, stage: str, text: str) -> None:
        count = self.counts[stage]
        print(f"{text}; faults: {count:,}" if count else text, flush=True)


def verify(folder: Path, engine: Engine = ALONE) -> None:
    """Check a prepared folder; print every fault, and a line for each stage.

    Raises:
        PreparedError: there are faults, or nothing is prepared there.
    """
    folder = folder.expanduser()
    prepared = PreparedFolder(folder)
    if not prepared.shards.is_dir() and not (folder / DOWNLOAD).is_dir():
        raise PreparedError(
            f"{folder} is no prepared folder: it has neither {DOWNLOAD}/ nor {SHARDS}/; give the "
            "out of sfumato prepare"
        )
    printer = _Printer()
    downloaded = _verify_download(folder, printer)
    walk = Walk(prepared, printer.tell, engine, deep=True)
    packed = sum(walk.tars.bins.values())
    if downloaded and not printer.counts["pack"] and downloaded["kept"] != packed:
        fault = f"{packed} rows were packed or dropped, and {downloaded['kept']} were downloaded"
        printer.report("pack", [f"{fault}; run the stage pack again"])
    for stage, part in walk.stages.items():
        tars = f": {len(part.shards):,} tars" if stage == "pack" else ""
        printer.conclude(stage, line(f"{stage}{tars}", part.bins))
    _verify_index(prepared, printer, walk, downloaded)
    if total := printer.counts.total():
        raise PreparedError(
            f"{folder} has faults, {total:,} in all, listed above; put back what was there, or "
            "remove what is damaged and run the same sfumato prepare again"
        )


def _verify_download(folder: Path, printer: _Printer) -> Mapping[str, int] | None:
    """Check the downloaded tars; return the bins of the download, None without one."""
    root = folder / DOWNLOAD
    if not root.is_dir():
        return None
    try:
        bins, stats = read_download(folder)
    except PreparedError as error:
        printer.tell(Fault("download", str(error), refused=True))
        printer.conclude("download", "download")
        return None
    for shard in stats:
        printer.report("download", _tar_faults(root / f"{shard.number:05d}.tar", shard.successes))
    printer.conclude("download", line("download", bins))
    return bins


def _tar_faults(tar: Path, expected: int) -> Iterator[str]:
    try:
        with tarfile.open(tar, "r:") as opened:
            images = sum(name.endswith(".txt") for name in opened.getnames())
    except FileNotFoundError:
        yield f"{tar} is missing"
    except DAMAGE as error:
        yield f"{tar} is damaged ({error})"
    else:
        if images != expected:
            yield f"{tar} has {images} images, and its statistics say {expected}"


def _verify_index(
    folder: PreparedFolder, printer: _Printer, walk: Walk, downloaded: Mapping[str, int] | None
) -> None:
    try:
        index = folder.index()
    except PreparedError as error:
        printer.report("index", [str(error)])
        printer.conclude("index", "index")
        return
    path, now = folder.path / INDEX, None if printer.refused else walk.index(downloaded)
    printer.report("index", _index_faults(path, index, now))
    samples = sum(tar.samples for tar in index.tars)
    printer.conclude("index", f"index: {len(index.tars):,} tars of {samples:,} samples")


def _index_faults(path: Path, index: Index, now: Index | None) -> Iterator[str]:
    """Compare the stored index with that of today, which a refusal leaves out."""
    if now is None:
        yield "the index cannot be made anew before the faults above are mended"
        return
    for kind in ("tars", "selections", "caches", "bins"):
        stored, today = (vars(each)[kind] for each in (index, now))
        if kind == "tars":
            stored, today = ({tar.name: tar for tar in each} for each in (stored, today))
        names = sorted(name for name in stored | today if stored.get(name) != today.get(name))
        if names:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            yield (
                f"{path} lists other {kind} than there are ({names[0]}{more}); run the stage index"
            )
    for name in index.empty.keys() & now.empty.keys():
        if index.empty[name] != now.empty[name]:
            empty = path.parent / CACHE / name / EMPTY
            yield (
                f"{empty} differs from its SHA-256 in {path.name}; remove it, and run the stages "
                "precache and index again"
            )
