"""WebDataset tars of images: members that share a key, found by one walk over the headers."""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from sfumato.data.blobs import SpanBlob
from sfumato.data.decode import SUFFIXES
from sfumato.data.entries import Columns, Entry, caption_of, choose_column
from sfumato.data.skips import SkipLog, Tally

# What tarfile raises on damaged headers, beside its own errors: bad numbers and bad sizes.
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, EOFError)
_END = bytes(tarfile.BLOCKSIZE)
_IMAGE_FIELDS = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)


@dataclass(frozen=True)
class _Group:
    """The members of one key: field (what follows the first dot) to its span."""

    key: str
    members: dict[str, SpanBlob] = field(default_factory=dict)


def list_tar(path: Path, columns: Columns, log: SkipLog) -> Iterator[Entry]:
    """Yield the entries of a tar in its order; pictures are passed over unread.

    A key is a member's name up to the first dot of its last part. The picture is the member
    `KEY.jpg` (jpeg, png, webp, bmp), or `KEY.{columns.image}`. The caption is `KEY.txt`, or a
    column of the object in `KEY.json` where there is no text or a column is named.

    Raises:
        MissingColumnError: there are objects, but no caption in any of their columns.
    """
    tally = log.begin(path)
    try:
        with path.open("rb") as file:
            groups = _groups(file, path, tally)
            yield from _entries(groups, file, path, columns, tally)
    except OSError as error:
        tally.add("unreadable file", f"({error.strerror or error})")


def _entries(
    groups: list[_Group], file: IO[bytes], path: Path, columns: Columns, tally: Tally
) -> Iterator[Entry]:
    found, there = False, dict[str, None]()
    fields = _IMAGE_FIELDS if columns.image is None else (columns.image.lower(),)
    for group in groups:
        image = next((name for name in fields if name in group.members), None)
        if image is None:
            tally.add("no image with this key", group.key)
            continue
        text: object = None
        if "txt" in group.members and columns.caption in {None, "txt"}:
            text = _content(group.members["txt"], file)
        elif "json" in group.members:
            record = _json_object(_content(group.members["json"], file))
            if record is None:
                tally.add("not a JSON object", f"{group.key}.json")
                continue
            there |= dict.fromkeys(record)
            name = next((name for name in columns.captions if name in record), None)
            found = found or name is not None
            text = record.get(name) if name is not None else None
        caption = caption_of(text, group.key, tally)
        if caption is not None:
            found = True
            yield Entry(path, f"{group.key}.{image}", (caption,), group.members[image])
    if there and not found:
        choose_column(columns.captions, list(there), path, "captions")


def _groups(file: IO[bytes], path: Path, tally: Tally) -> list[_Group]:
    """Collect whole members by key, up to the end or the first damage."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
    except _DAMAGE as error:
        tally.add("not a tar", f"({error})")
        return []
    groups: dict[str, _Group] = {}
    with tar:
        whole = _collect(tar, path, size, groups, tally)
        # tarfile takes a damaged or missing header for the end of the archive.
        end = max(0, min(tar.offset, size))
        file.seek(end)
        if not whole or file.read(tarfile.BLOCKSIZE) != _END:
            tally.add("truncated or damaged tar", f"(at byte {end})")
    return list(groups.values())


def _collect(
    tar: tarfile.TarFile, path: Path, size: int, groups: dict[str, _Group], tally: Tally
) -> bool:
    """Add the members that are whole; return whether no damage stopped it."""
    try:
        while (member := tar.next()) is not None:
            # tarfile remembers each member; nothing here goes back to one.
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            name = PurePosixPath(member.name)
            stem, _, suffix = name.name.partition(".")
            if not (member.isfile() and stem) or member.issparse():
                continue
            if member.offset_data + member.size > size:
                return False
            key = str(name.with_name(stem))
            group = groups.setdefault(key, _Group(key))
            if suffix.lower() in group.members:
                tally.add("second member of the same name", member.name)
            else:
                span = SpanBlob(path, member.offset_data, member.size)
                group.members[suffix.lower()] = span
    except _DAMAGE:
        return False
    return True


def _content(span: SpanBlob, file: IO[bytes]) -> bytes:
    file.seek(span.offset)
    return file.read(span.size)


def _json_object(data: bytes) -> dict[str, object] | None:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
