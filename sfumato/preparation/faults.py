"""Faults of single files in a prepared folder: tars, records and shards of caches."""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence, Set
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sfumato.data.prepared.folder import EMPTY, MANIFEST, PreparedFolder
from sfumato.data.prepared.format import CachedRecord, PreparedError, TarRecord, cache_key
from sfumato.data.webdataset import TAR_DAMAGE
from sfumato.files import sha256_of
from sfumato.preparation.tars import texts

DAMAGE = (*TAR_DAMAGE, OSError)


def wrong_size(file: Path, expected: int) -> str | None:
    """Return the fault of a file that is missing or not as large as its record says."""
    size = file.stat().st_size if file.is_file() else None
    if size == expected:
        return None
    return (
        f"{file} {'is missing' if size is None else f'has {size} bytes'}, and its record says "
        f"{expected} bytes; put it back, or run the same sfumato prepare again, which makes it anew"
    )


def of_numbers(path: Path, numbers: Sequence[int], whole: int) -> Iterator[str]:
    """Find numbers in a record that are not ascending numbers of a tar's samples."""
    if list(numbers) != sorted({number for number in numbers if 0 <= number < whole}):
        yield f"{path} has rows that are not ascending numbers below {whole}"


def strangers(folder: Path, tars: Set[str]) -> Iterator[str]:
    """Find files of a selection or a cache whose tar does not exist."""
    files = [path for path in folder.glob("[!.]*") if path.name not in (MANIFEST, EMPTY)]
    names = {path.stem for path in files if path.suffix in (".json", ".safetensors")}
    for name in sorted(names - tars):
        yield f"{folder / name} is of a tar that does not exist; remove it"


def tars_without_record(folder: Path) -> Iterator[str]:
    """Find tars without a record."""
    for tar in sorted(folder.glob("[!.]*.tar")):
        record = tar.with_suffix(".json")
        if not record.exists():
            yield f"{record} is missing; run the same sfumato prepare again, which makes it anew"


def of_tar(tar: Path, record: TarRecord) -> Iterator[str]:
    """Find what differs between a tar and its record."""
    if record.rows is not None:
        covered, dropped = record.rows[1] - record.rows[0], sum(record.dropped.values())
        if len(record.samples) + dropped < covered:
            yield (
                f"the record of {tar} has {len(record.samples)} samples and {dropped} rows that "
                f"were left out, and covers {covered} rows"
            )
    if not tar.is_file():
        return
    if tar.stat().st_size == record.bytes and sha256_of(tar) != record.sha256:
        yield f"{tar} differs from the SHA-256 of its record"
    try:
        yield from _of_members(tar, record)
    except DAMAGE as error:
        yield f"{tar} is no whole tar ({error})"


def of_numbering(
    tar: Path, rows: tuple[int, int] | None, keys: Sequence[str], first: int
) -> Iterator[str]:
    """Find keys that are not the numbers of the tar's rows.

    Args:
        rows: that the tar covers; None in a tar of an older version, whose samples are numbered.
        first: the number behind those of the tars before it.
    """
    if rows is None:
        for number, key in enumerate(keys, first):
            if key != f"{number:09d}":
                yield f"{tar}: sample {number} has the key {key}, which breaks the numbering"
        return
    if rows[0] != first:
        yield f"{tar} begins at row {rows[0]}, and the tar before it ends before row {first}"
    before = rows[0] - 1
    for key in keys:
        number = int(key) if key.isdecimal() else -1
        if key != f"{number:09d}" or not before < number < rows[1]:
            yield f"{tar}: a sample has the key {key}, which breaks the numbering"
        before = max(before, number)


def _of_members(tar: Path, record: TarRecord) -> Iterator[str]:
    """Compare each member with the record, in order."""
    expected = (
        (member, suffix) for member in record.samples for suffix in (member.suffix, *texts(member))
    )
    with tarfile.open(tar, "r:") as opened:
        for pair, info in zip_longest(expected, opened):
            if pair is None:
                yield f"{tar}: {info.name} is not in its record"
                continue
            member, suffix = pair
            name = f"{member.key}.{suffix}"
            if info is None:
                yield f"{tar}: {name} is missing"
                continue
            if info.name != name:
                yield f"{tar}: {info.name} stands where {name} should"
                continue
            stream = opened.extractfile(info)
            data = b"" if stream is None else stream.read()
            if suffix != member.suffix:
                same = data == texts(member)[suffix]
            else:
                same = (info.offset_data, info.size) == (member.offset, member.size)
                same = same and hashlib.sha256(data).hexdigest() == member.sha256
            if not same:
                yield f"{tar}: {name} is not what its record says"


def of_manifest(folder: PreparedFolder, name: str) -> Iterator[str]:
    """Find a cache whose name does not follow from its manifest, or without an empty prompt."""
    try:
        kind, identity = folder.manifest(name)
    except PreparedError as error:
        yield str(error)
        return
    cache, expected = folder.cache(name), f"{kind}-{cache_key(identity)}"
    if name != expected:
        yield f"{cache / MANIFEST} belongs into {expected}; remove the folder"
    if kind == "text" and not (cache / EMPTY).is_file():
        yield f"{cache / EMPTY} is missing; run the stage precache again"


def of_cached(file: Path, record: CachedRecord, tar: TarRecord) -> Iterator[str]:
    """Find what differs between a shard of a cache, its record and its tar."""
    whole, rows = len(tar.samples), len(record.rows)
    wrong = list(of_numbers(file.with_suffix(".json"), record.rows, whole))
    if wrong:
        yield from wrong
        return
    if rows + sum(record.dropped.values()) > whole:
        yield f"the record of {file} has more samples in its bins than the {whole} of the tar"
    if wrong_size(file, record.bytes):
        return
    if sha256_of(file) != record.sha256:
        yield f"{file} differs from the SHA-256 of its record"
        return
    captions = sum(len(tar.samples[row].captions) for row in record.rows)
    lengths = {"moments": rows, "mirrored": rows, "offsets": rows + 1}
    for name, length in _lengths(file).items():
        expected = lengths.get(name, captions)
        if length != expected:
            yield f"{file} has {length} rows of {name}, and {expected} belong there"


def _lengths(file: Path) -> dict[str, int]:
    """Return the first axis of each tensor, from the header of a safetensors file."""
    with file.open("rb") as stream:
        header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: info["shape"][0] for name, info in header.items() if name != "__metadata__"}
