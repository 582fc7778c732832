"""`sfumato prepare verify`: recount and recheck all of a prepared folder, to the last byte."""

import hashlib
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from sfumato.data.prepared.format import (
    INDEX,
    SELECTIONS,
    SHARDS,
    UNFINISHED,
    Index,
    KeptRecord,
    PreparedError,
    TarRecord,
    read_index,
    read_kept_record,
    read_tar_record,
)
from sfumato.preparation.bins import line, tally
from sfumato.preparation.download import DOWNLOAD, download_bins, read_stats
from sfumato.preparation.files import sha256_of
from sfumato.preparation.index import build_index
from sfumato.preparation.listing import cache_names, selection_names
from sfumato.preparation.tars import texts
from sfumato.preparation.verify_cache import check_cache

_DAMAGE = (tarfile.TarError, ValueError, OverflowError, EOFError, OSError)


@dataclass
class _Found:
    """What has been verified of a folder: names alone, as their records may be very many."""

    folder: Path
    tars: set[str] = field(default_factory=set)
    selections: list[str] = field(default_factory=list)
    faults: int = 0

    def tell(self, said: str, faults: Sequence[str]) -> None:
        print(said if not faults else f"{said}; faults: {len(faults):,}")
        for fault in faults:
            print(f"  {fault}", flush=True)
        self.faults += len(faults)


def verify(folder: Path) -> None:
    """Check a prepared folder; print a line for each stage, and every fault.

    Raises:
        PreparedError: there are faults, or nothing is prepared there.
    """
    folder = folder.expanduser()
    if not (folder / SHARDS).is_dir() and not (folder / DOWNLOAD).is_dir():
        raise PreparedError(f"{folder} is no prepared folder: it has neither {DOWNLOAD}/ nor "
                            f"{SHARDS}/; give the out of sfumato prepare")  # fmt: skip
    found = _Found(folder)
    rows = _verify_download(found)
    _verify_tars(found, rows)
    for name in selection_names(folder):
        _verify_selection(found, name)
    for name in cache_names(folder):
        said, faults = check_cache(folder, name, found.tars, found.selections)
        found.tell(said, faults)
    _verify_index(found)
    if found.faults:
        raise PreparedError(
            f"{folder} has faults, {found.faults:,} in all, listed above; put back what was there, "
            "or remove what is damaged and run the same sfumato prepare again"
        )


def _verify_download(found: _Found) -> int | None:
    """Check what was downloaded; return how many images there are, None without a download."""
    place, faults = found.folder / DOWNLOAD, list[str]()
    if not place.is_dir():
        return None
    try:
        bins, stats = download_bins(found.folder), read_stats(place)
    except PreparedError as error:
        found.tell("download", [str(error)])
        return None
    for shard in stats:
        tar = place / f"{shard.number:05d}.tar"
        try:
            with tarfile.open(tar, "r:") as opened:
                images = sum(name.endswith(".txt") for name in opened.getnames())
        except FileNotFoundError:
            faults.append(f"{tar} is missing")
        except _DAMAGE as error:
            faults.append(f"{tar} is damaged ({error})")
        else:
            if images != shard.successes:
                said = f"{tar} has {images} images, and its statistics say {shard.successes}"
                faults.append(said)
    found.tell(line("download", bins), faults)
    return bins["kept"]


def _verify_tars(found: _Found, rows: int | None) -> None:
    shards, faults, first = found.folder / SHARDS, list[str](), 0
    if (shards / UNFINISHED).exists():
        faults.append(f"{shards} was not packed to the end; run the stage pack")
    dropped: list[Mapping[str, int]] = []
    names = {
        place.stem for pattern in ("[!.]*.tar", "[!.]*.json") for place in shards.glob(pattern)
    }
    for name in sorted(names):
        try:
            record = read_tar_record(found.folder, name)
        except PreparedError as error:
            faults.append(str(error))
            continue
        found.tars.add(name)
        dropped.append(record.dropped)
        faults += _tar_faults(shards / f"{name}.tar", record, first)
        first += len(record.samples)
    bins = tally(first, dropped)
    if rows is not None and not faults and rows != sum(bins.values()):
        faults.append(
            f"{sum(bins.values())} rows were packed or dropped, and {rows} were downloaded; run "
            "the stage pack again"
        )
    found.tell(line(f"pack: {len(found.tars):,} tars", bins), faults)


def _tar_faults(tar: Path, record: TarRecord, first: int) -> Iterator[str]:
    if not tar.is_file():
        yield f"{tar} is missing"
        return
    if tar.stat().st_size != record.bytes:
        yield f"{tar} has {tar.stat().st_size} bytes, and its record says {record.bytes}"
    elif sha256_of(tar) != record.sha256:
        yield f"{tar} differs from the SHA-256 of its record"
    for number, member in enumerate(record.samples, first):
        if member.key != f"{number:09d}":
            yield f"{tar}: sample {number} has the key {member.key}, which breaks the numbering"
    try:
        yield from _member_faults(tar, record)
    except _DAMAGE as error:
        yield f"{tar} is no whole tar ({error})"


def _member_faults(tar: Path, record: TarRecord) -> Iterator[str]:
    """Compare each member with the record, in order."""
    expected = [
        (member, suffix) for member in record.samples for suffix in (member.suffix, *texts(member))
    ]
    with tarfile.open(tar, "r:") as opened:
        for wanted, there in zip_longest(expected, opened):
            if wanted is None:
                yield f"{tar}: {there.name} is not in its record"
                continue
            member, suffix = wanted
            if there is None:
                yield f"{tar}: {member.key}.{suffix} is missing"
                continue
            if there.name != f"{member.key}.{suffix}":
                yield f"{tar}: {there.name} stands where {member.key}.{suffix} should"
                continue
            stream = opened.extractfile(there)
            data = b"" if stream is None else stream.read()
            if suffix != member.suffix:
                same = data == texts(member)[suffix]
            else:
                same = (there.offset_data, there.size) == (member.offset, member.size)
                same = same and hashlib.sha256(data).hexdigest() == member.sha256
            if not same:
                yield f"{tar}: {there.name} is not what its record says"


def _verify_selection(found: _Found, selection: str) -> None:
    faults, kept, dropped = list[str](), 0, list[Mapping[str, int]]()
    found.selections.append(selection)
    place = found.folder / SELECTIONS / selection
    names = {file.stem for file in place.glob("[!.]*.json")}
    for name in sorted(names | found.tars):
        if name not in found.tars:
            faults.append(f"{place / name}.json is of a tar that is not there")
            continue
        try:
            record = read_kept_record(found.folder, selection, name)
        except PreparedError as error:
            faults.append(str(error))
            continue
        kept += len(record.kept)
        dropped.append(record.dropped)
        tar = read_tar_record(found.folder, name)
        faults += _kept_faults(f"{place / name}.json", record, tar)
    found.tell(line(f"filter {selection}", tally(kept, dropped)), faults)


def _kept_faults(place: str, record: KeptRecord, tar: TarRecord) -> Iterator[str]:
    whole = len(tar.samples)
    if list(record.kept) != sorted({index for index in record.kept if 0 <= index < whole}):
        yield f"{place} keeps samples that are not ascending numbers below {whole}"
    if record.tar not in ("", tar.made_of):
        yield f"{place} was made of another tar; run the stage filter again"
    total = len(record.kept) + sum(record.dropped.values())
    if total != whole:
        yield f"{place} has {total} samples in its bins, and the tar has {whole}"


def _verify_index(found: _Found) -> None:
    place = found.folder / INDEX
    if not place.exists():
        found.tell("index", [f"{place} is missing; run the stage index"])
        return
    try:
        index = read_index(found.folder)
    except PreparedError as error:
        found.tell("index", [str(error)])
        return
    faults = list(_vanished(found, index))
    try:
        now = build_index(found.folder)
    except PreparedError as error:
        faults.append(f"the index cannot be made anew: {error}")
    else:
        for name, then, today in (
            ("tars", index.tars, now.tars),
            ("selections", index.selections, now.selections),
            ("caches", index.caches, now.caches),
            ("bins", index.bins, now.bins),
        ):
            if then != today:
                faults.append(f"{place} lists other {name} than are there; run the stage index")
    samples = sum(tar.samples for tar in index.tars)
    found.tell(f"index: {len(index.tars):,} tars of {samples:,} samples", faults)


def _vanished(found: _Found, index: Index) -> Iterator[str]:
    for tar in index.tars:
        if tar.name not in found.tars:
            yield f"the tar {tar.name} that the index lists has no record any more"
    for name in index.selections:
        if name not in found.selections:
            yield f"the selection {name} that the index lists is not there any more"
    there = cache_names(found.folder)
    for name in index.caches:
        if name not in there:
            yield f"the cache {name} that the index lists is not there any more"
