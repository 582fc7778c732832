"""Writer of uniform tars: the same samples give the same bytes.

KEY.jpg     the picture's own bytes, under the suffix of their format
KEY.json    all captions, height, width, sha256 and columns
KEY.txt     the main caption
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path

from sfumato.data.prepared.folder import UNFINISHED
from sfumato.data.prepared.format import FORMAT, Member, PreparedError
from sfumato.files import write_text
from sfumato.records import read_record

_WRITTEN = ".written"  # in a folder: how many numbered files are of sfumato prepare
_UNFINISHED = re.compile(r"\.\d{6,}\.(tar|json)\.tmp")


@dataclass(frozen=True)
class _Record:
    """The part of a record by which an older version's files are known."""

    name: str
    made_of: str


@dataclass(frozen=True)
class Sample:
    """The bytes of a decoded picture, and its record before it has a key and an offset."""

    data: bytes
    member: Member


def write_tar(path: Path, first: int, samples: Iterator[Sample]) -> list[Member]:
    """Write a tar of all the samples; keys count from `first`.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    members: list[Member] = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, sample in enumerate(samples, first):
            key = f"{number:09d}"
            # Each member begins with one block of header.
            member = replace(sample.member, key=key, offset=tar.offset + tarfile.BLOCKSIZE)
            _add(tar, f"{key}.{member.suffix}", sample.data)
            for suffix, text in texts(member).items():
                _add(tar, f"{key}.{suffix}", text)
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            members.append(member)
    return members


def texts(member: Member) -> dict[str, bytes]:
    """Return the texts beside a picture in a tar, by suffix."""
    content = {
        "captions": member.captions,
        "height": member.height,
        "width": member.width,
        "sha256": member.sha256,
        "columns": dict(member.columns),
    }
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return {"json": text.encode(), "txt": member.captions[0].encode()}


def claim(record: Path) -> None:
    """Count the record of a tar, and the tar beside it, as files of sfumato prepare.

    Raises:
        PreparedError: one of them is there, and of others.
    """
    written = count_written(record.parent)
    if int(record.stem) < written:
        return
    there = [path for path in (record, record.with_suffix(".tar")) if path.exists()]
    # An older version counted nothing, and a kill could leave a tar without its record.
    killed = record not in there and (record.parent / UNFINISHED).exists()
    if there and not killed and not is_ours(record, written):
        raise PreparedError(
            f"{there[0]} is where sfumato prepare writes, and it did not write this file; move it "
            "away, or give another out"
        )
    write_text(record.parent / _WRITTEN, f"{int(record.stem) + 1}\n", failure=PreparedError)


def forget_others(folder: Path, names: Set[str]) -> None:
    """Remove our tars and records of other names, and the unfinished files of a killed process."""
    written = count_written(folder)
    every = [*folder.glob("*.json"), *folder.glob("*.tar")]
    for path in [path for path in every if is_ours(path.with_suffix(".json"), written)]:
        if path.stem not in names:
            path.unlink()
    for path in folder.glob(".*.tmp"):
        if _UNFINISHED.fullmatch(path.name):
            path.unlink()
    if written != len(names):
        write_text(folder / _WRITTEN, f"{len(names)}\n", failure=PreparedError)


def count_written(folder: Path) -> int:
    """Return how many numbered files, from 0, sfumato prepare wrote to a folder."""
    file = folder / _WRITTEN
    text = file.read_text(errors="replace").strip() if file.is_file() else ""
    return int(text) if text.isdecimal() else 0


def is_ours(record: Path, written: int) -> bool:
    """Say whether sfumato prepare wrote a record: it was counted, or holds what records hold."""
    if record.stem.isdecimal() and int(record.stem) < written:
        return True
    try:
        return read_record(record, _Record, "", version=FORMAT).name == record.stem
    except ValueError:
        return False


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(data))
