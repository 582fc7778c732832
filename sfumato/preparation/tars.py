"""Writer of uniform tars: the same samples give the same bytes.

KEY.jpg     the picture's own bytes, under the suffix of their format
KEY.json    all captions, height, width, sha256 and columns
KEY.txt     the main caption
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from sfumato.data.prepared.folder import UNFINISHED
from sfumato.data.prepared.format import FORMAT, Member, PreparedError
from sfumato.files import lock, write_text
from sfumato.records import read_record

_WRITTEN = ".written"  # in a folder: how many numbered files are of sfumato prepare
_UNFINISHED = re.compile(
    r"\.(\d{5,}\.(tar|json|safetensors)|(empty|manifest)\.(safetensors|json))\.tmp(-[0-9a-f]{8})?"
)


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


def write_tar(path: Path, samples: Iterator[tuple[int, Sample]]) -> list[Member]:
    """Write a tar of samples, whose keys are their numbers.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    members: list[Member] = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, sample in samples:
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


def claim(folder: Path, names: Sequence[str]) -> None:
    """Count the records of tars, and the tars beside them, as files of sfumato prepare.

    Args:
        names: of all tars, ascending.

    Raises:
        PreparedError: one of them is there, and of others.
    """
    written = count_written(folder)
    unfinished = (folder / UNFINISHED).exists()
    for name in names:
        if int(name) < written:
            continue
        record = folder / f"{name}.json"
        there = [path for path in (record, record.with_suffix(".tar")) if path.exists()]
        # An older version counted nothing, and a kill could leave a tar without its record.
        killed = record not in there and unfinished
        if there and not killed and not is_ours(record, written):
            raise PreparedError(
                f"{there[0]} is where sfumato prepare writes, and it did not write this file; move "
                "it away, or give another out"
            )
    if names and written <= int(names[-1]):
        write_text(folder / _WRITTEN, f"{int(names[-1]) + 1}\n", failure=PreparedError)


def unclaim(folder: Path, written: int) -> None:
    """Count again as many files as before a packing that came to nothing."""
    if written:
        write_text(folder / _WRITTEN, f"{written}\n", failure=PreparedError)
    else:
        (folder / _WRITTEN).unlink(missing_ok=True)


def forget_others(folder: Path, names: Set[str]) -> None:
    """Remove our tars and records of other names, and the unfinished files of a killed process."""
    written = count_written(folder)
    stale = [
        path
        for path in files_in(folder)
        if path.suffix in (".json", ".tar")
        and path.stem not in names
        and is_ours(path.with_suffix(".json"), written)
    ]
    for path in sorted(stale, key=lambda path: (path.suffix, path.name)):
        path.unlink()
    clear_unfinished(folder)
    if written != len(names):
        write_text(folder / _WRITTEN, f"{len(names)}\n", failure=PreparedError)


def clear_unfinished(folder: Path) -> None:
    """Remove the unfinished files of killed processes."""
    for path in [path for path in files_in(folder) if _UNFINISHED.fullmatch(path.name)]:
        path.unlink(missing_ok=True)


def turn(folder: Path) -> IO[str]:
    """Wait until no other part of a stage begins in a folder; hold it until the file is closed."""
    return lock(folder, busy="", unmade="give another out", wait=True, failure=PreparedError)


@contextmanager
def tidied(*folders: Path) -> Iterator[None]:
    """Remove in the end what workers left unfinished that were killed, or ended by an error."""
    try:
        yield
    finally:
        for folder in folders:
            clear_unfinished(folder)


def files_in(folder: Path) -> Iterator[Path]:
    """Yield what lies in a folder, one at a time; nothing if it is not there."""
    if folder.is_dir():
        with os.scandir(folder) as every:
            for each in every:
                yield folder / each.name


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
