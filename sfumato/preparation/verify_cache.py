"""What is wrong with a cache: its shards against their records, tars and selections."""

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from sfumato.data.prepared.format import (
    CACHE,
    EMPTY,
    MANIFEST,
    CachedRecord,
    PreparedError,
    TarRecord,
    cache_key,
    read_cached_record,
    read_fields,
    read_kept_record,
    read_tar_record,
)
from sfumato.preparation.bins import line, tally
from sfumato.preparation.files import sha256_of
from sfumato.preparation.listing import is_of


def check_cache(
    folder: Path, cache: str, tars: Set[str], selections: Sequence[str]
) -> tuple[str, list[str]]:
    """Return a line about a cache, and its faults.

    Args:
        tars: the names of those whose records can be read.
    """
    place = folder / CACHE / cache
    faults = [*_manifest_faults(place)]
    held, dropped, covered = list[int](), list[Mapping[str, int]](), set(selections)
    names = {file.stem for file in place.glob("[!.]*.safetensors") if file.name != EMPTY}
    names |= {file.stem for file in place.glob("[!.]*.json") if file.name != MANIFEST}
    for name in sorted(names | tars):
        if name not in tars:
            faults.append(f"{place / name} is of a tar that is not there")
            continue
        try:
            record = read_cached_record(folder, cache, name)
        except PreparedError as error:
            faults.append(str(error))
            continue
        tar = read_tar_record(folder, name)
        faults += _shard_faults(place / f"{name}.safetensors", record, tar)
        held.append(len(record.rows))
        dropped.append(record.dropped)
        covered = {each for each in covered if _covers(record, folder, each)}
    if len(held) == len(tars) and not covered:
        faults.append(f"{place} lacks samples of every selection; run the stage precache again")
    return line(cache, tally(sum(held), dropped)), faults


def _manifest_faults(place: Path) -> Iterator[str]:
    try:
        content = read_fields(place / MANIFEST)
    except PreparedError as error:
        yield str(error)
        return
    kind = content.pop("kind", None)
    if place.name != f"{kind}-{cache_key(content)}":
        yield f"{place / MANIFEST} says what belongs into {kind}-{cache_key(content)}"
    if kind == "text" and not (place / EMPTY).is_file():
        yield f"{place / EMPTY} is missing"


def _shard_faults(file: Path, record: CachedRecord, tar: TarRecord) -> Iterator[str]:
    whole, rows = len(tar.samples), len(record.rows)
    if list(record.rows) != sorted({row for row in record.rows if 0 <= row < whole}):
        yield f"the record of {file} has rows that are not ascending numbers below {whole}"
        return
    if rows + sum(record.dropped.values()) > whole:
        yield f"the record of {file} has more samples in its bins than the {whole} of the tar"
    if not is_of(file.parent.name, record, tar):
        yield f"{file} was made of another tar; run the stage precache again"
    if not file.is_file():
        yield f"{file} is missing"
    elif file.stat().st_size != record.bytes:
        yield f"{file} has {file.stat().st_size} bytes, and its record says {record.bytes}"
    elif sha256_of(file) != record.sha256:
        yield f"{file} differs from the SHA-256 of its record"
    else:
        captions = sum(len(tar.samples[row].captions) for row in record.rows)
        lengths = {"moments": rows, "mirrored": rows, "offsets": rows + 1}
        for name, found in _lengths(file).items():
            expected = lengths.get(name, captions)
            if found != expected:
                yield f"{file} has {found} rows of {name}, and {expected} belong there"


def _lengths(file: Path) -> dict[str, int]:
    """Return the first axis of each tensor, from the head of a safetensors file."""
    with file.open("rb") as stream:
        head: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: info["shape"][0] for name, info in head.items() if name != "__metadata__"}


def _covers(record: CachedRecord, folder: Path, selection: str) -> bool:
    """Say whether all that a selection keeps of a tar is in its shard, or was dropped by it."""
    try:
        kept = read_kept_record(folder, selection, record.name).kept
    except PreparedError:
        return False
    return len({*kept}.difference(record.rows)) <= sum(record.dropped.values())
