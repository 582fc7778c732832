"""Stage index: what training opens, counted anew from the records of all that is there."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from sfumato.data.prepared.format import (
    CACHE,
    INDEX,
    SELECTIONS,
    SHARDS,
    CachedRecord,
    Index,
    IndexedShard,
    KeptRecord,
    PreparedError,
    TarRecord,
    read_cached_record,
    read_kept_record,
    read_tar_record,
    record_text,
)
from sfumato.preparation.bins import tally
from sfumato.preparation.download import DOWNLOAD, download_bins
from sfumato.preparation.files import write_text
from sfumato.preparation.listing import cache_names, is_of, selection_names, tar_names


def write_index(folder: Path) -> Index:
    """Write index.json, and return it.

    Raises:
        PreparedError: nothing is packed, a selection is not of these tars, or a file is missing.
    """
    index = build_index(folder)
    write_text(folder / INDEX, record_text(index))
    return index


def build_index(folder: Path) -> Index:
    """Return what there is to open; caches that lack a tar are left out.

    Raises:
        PreparedError: as `write_index`.
    """
    tars: list[IndexedShard] = []
    bins: dict[str, Mapping[str, int]] = {}
    if (folder / DOWNLOAD).is_dir():
        bins["download"] = download_bins(folder)
    selections: dict[str, list[int]] = {name: [] for name in selection_names(folder)}
    caches: dict[str, list[IndexedShard]] = {name: [] for name in cache_names(folder)}
    dropped: dict[str, list[Mapping[str, int]]] = defaultdict(list)
    hashes = {name: hashlib.sha256() for name in selections}
    for name in tar_names(folder):
        # Of each record the counts alone are kept: there may be many, and each has many rows.
        record = read_tar_record(folder, name)
        _check_size(folder / SHARDS / f"{name}.tar", record.bytes)
        tars.append(IndexedShard(name, len(record.samples), record.bytes, record.sha256))
        dropped["pack"].append(record.dropped)
        for selection, counts in selections.items():
            kept = _kept(folder, selection, record)
            counts.append(len(kept.kept))
            hashes[selection].update(f"{name} {kept.kept}\n".encode())
            dropped[f"filter {selection}"].append(kept.dropped)
        for cache, shards in caches.items():
            for cached in _cached(folder, cache, record):
                shards.append(_indexed(cached))
                dropped[cache].append(cached.dropped)
    whole = {name: tuple(shards) for name, shards in caches.items() if len(shards) == len(tars)}
    bins["pack"] = tally(sum(tar.samples for tar in tars), dropped["pack"])
    for name, counts in selections.items():
        bins[f"filter {name}"] = tally(sum(counts), dropped[f"filter {name}"])
    for name, shards in whole.items():
        bins[name] = tally(sum(shard.samples for shard in shards), dropped[name])
    return Index(
        tuple(tars),
        {name: tuple(counts) for name, counts in selections.items()},
        whole,
        bins,
        {name: digest.hexdigest() for name, digest in hashes.items()},
    )


def _kept(folder: Path, selection: str, tar: TarRecord) -> KeptRecord:
    place = folder / SELECTIONS / selection
    again = (
        f"run: sfumato prepare out={folder} stages=[filter,index] with filter.name={selection} and "
        f"its bounds, or remove {place}"
    )
    if not (place / f"{tar.name}.json").exists():
        raise PreparedError(f"the selection {selection!r} has no record of {tar.name}; {again}")
    record = read_kept_record(folder, selection, tar.name)
    if record.tar not in ("", tar.made_of):
        raise PreparedError(
            f"the selection {selection!r} was made of another tar {tar.name}, which has been "
            f"packed again since; {again}"
        )
    if len(record.kept) + sum(record.dropped.values()) != len(tar.samples):
        raise PreparedError(
            f"the selection {selection!r} keeps {len(record.kept)} samples of {tar.name} and drops "
            f"{sum(record.dropped.values())}, which is not all of {len(tar.samples)}; {again}"
        )
    return record


def _cached(folder: Path, cache: str, tar: TarRecord) -> Iterator[CachedRecord]:
    place = folder / CACHE / cache
    if (place / f"{tar.name}.json").exists():
        record = read_cached_record(folder, cache, tar.name)
        if is_of(cache, record, tar):
            _check_size(place / f"{tar.name}.safetensors", record.bytes)
            yield record


def _indexed(record: CachedRecord) -> IndexedShard:
    return IndexedShard(record.name, len(record.rows), record.bytes, record.sha256)


def _check_size(file: Path, expected: int) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found != expected:
        raise PreparedError(
            f"{file} {'is missing' if found is None else f'has {found} bytes'}, and its record "
            f"says {expected} bytes; put it back, or run the same sfumato prepare again, which "
            "makes it anew"
        )
