"""WebDataset tars: members that share a key, by one walk over the headers."""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path, PurePosixPath
from typing import IO, Any, final

from sfumato.data.decode import SUFFIXES
from sfumato.data.entries import Columns, Entry, SpanBlob, captions_of, choose_column
from sfumato.data.left_out import UNREADABLE, FileSkips, SkipLog
from sfumato.files import parse_object

# What tarfile raises on damaged headers, beside its own errors: bad numbers and bad sizes.
TAR_DAMAGE = (tarfile.TarError, ValueError, OverflowError, EOFError)
_END = bytes(tarfile.BLOCKSIZE)
_TEXTS, _LARGEST = ("txt", "json"), 2**24  # read into memory; bytes of one of them, or of a header
# Headers that hold a long name, or notes, of the member behind them.
_NOTES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_IMAGE_FIELDS = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: a/000.seg.png has the key a/000 and the field seg.png.

    Attributes:
        plain: False for links and devices, which have no bytes.
    """

    name: str
    key: str
    field: str
    span: SpanBlob
    plain: bool = True

    def read(self, file: IO[bytes]) -> bytes:
        """Return the bytes, from the open tar."""
        file.seek(self.span.offset)
        return file.read(self.span.size)


@final
class _Headers(RawIOBase):
    """A tar as tarfile reads it: its headers, of which a damaged one may claim any size."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        """Return the next bytes.

        Raises:
            tarfile.ReadError: they are more than any header has.
        """
        if not 0 <= size <= _LARGEST:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to a position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()


_Groups = dict[str, dict[str, Member]]  # by key and by field


@dataclass
class Damage:
    """What a damaged tar lost: whether the last key's missing members are counted already."""

    takes_last: bool = False


def members(
    file: IO[bytes], path: Path, skips: FileSkips, damage: Damage | None = None
) -> Iterator[Member]:
    """Yield the members of a tar that are whole, in its order; their bytes are passed over unread.

    Args:
        file: the open tar, which may be read between two members.
        path: of the tar.
        skips: counts damage, at which the walk ends, by the keys that lie behind it.
        damage: is told what the damage took.
    """
    damage, seen = damage or Damage(), Counter[str]()
    size, whole, cut = file.seek(0, os.SEEK_END), True, None
    file.seek(0)
    try:
        tar = tarfile.open(fileobj=_Headers(file), mode="r:")  # noqa: SIM115
    except TAR_DAMAGE as error:
        skips.add("not a tar", f"({error})")
        return
    with tar:
        try:
            while (member := tar.next()) is not None:
                # tarfile remembers each member; nothing here goes back to one.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                name = PurePosixPath(member.name)
                stem, _, suffix = name.name.partition(".")
                if member.isdir() or not stem:
                    continue
                key, plain = str(name.with_name(stem)), member.isfile() and not member.issparse()
                whole = member.offset_data + member.size <= size
                if not whole:
                    cut = member.offset_data - tarfile.BLOCKSIZE
                    break
                span = SpanBlob(path, member.offset_data, member.size)
                yield Member(member.name, key, suffix.lower(), span, plain)
                seen = Counter({key: seen[key] + 1})  # of the last key only
        except TAR_DAMAGE:
            whole = False
        # tarfile takes a damaged or missing header for the end of the archive.
        end = max(0, min(tar.offset, size))
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if whole and block == _END:
            if behind := _keys(file, end):
                where = f"({next(iter(behind))} to {next(reversed(behind))})"
                skips.add("member behind the end of a tar", where, rows=len(behind))
            return
        rows, where = _lost(file, end if cut is None else cut, seen, damage)
        skips.add("truncated or damaged tar", f"(at byte {end}{where})", rows=rows)


def _lost(file: IO[bytes], start: int, seen: Counter[str], damage: Damage) -> tuple[int, str]:
    """Count the keys behind damage, as far as their headers can be read, and name them.

    A damaged header is of another key, or of the first key behind it if that lacks a member.

    Args:
        seen: the last key before the damage, and how many members it had.
    """
    file.seek(start)
    block = file.read(tarfile.BLOCKSIZE)
    sizes = _keys(file, start)
    behind = [key for key in sizes if key not in seen]
    own, valid = _key_of(block)
    unknown = bool(block) and own not in seen and own not in behind
    if unknown and behind:
        unknown = sizes[behind[0]] >= max([*seen.values(), *sizes.values()])
        damage.takes_last = unknown and not valid
    else:
        damage.takes_last = not valid if unknown else not behind
    where = f", before {' to '.join(dict.fromkeys([behind[0], behind[-1]]))}" if behind else ""
    return max(1, len(behind) + unknown), where


def _keys(file: IO[bytes], start: int) -> Counter[str]:
    """Return the keys of the members whose headers are whole, from a block of the tar on."""
    keys = Counter[str]()
    file.seek(start)
    while block := file.read(tarfile.BLOCKSIZE):
        key, valid = _key_of(block)
        if not valid:
            continue
        member = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
        if key and not member.isdir() and member.type not in _NOTES:
            keys[key] += 1
        if member.isfile() or member.type in _NOTES:
            blocks = -(-member.size // tarfile.BLOCKSIZE)
            file.seek(blocks * tarfile.BLOCKSIZE, os.SEEK_CUR)
    return keys


def _key_of(block: bytes) -> tuple[str, bool]:
    """Return the key that a block names if it is a header, and whether the header is whole."""
    if block[257:262] != b"ustar":
        return "", False
    try:
        name = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape").name
        valid = True
    except TAR_DAMAGE:
        name, valid = block[:100].split(b"\0")[0].decode(errors="surrogateescape"), False
    path = PurePosixPath(name)
    stem = path.name.partition(".")[0]
    return (str(path.with_name(stem)) if stem else ""), valid


def list_tar(path: Path, columns: Columns, log: SkipLog) -> Iterator[Entry]:
    """Yield the entries of a tar in its order; pictures are passed over unread.

    A key is a member's name up to the first dot of its last part. The picture is the member
    `KEY.jpg` (jpeg, png, webp, bmp), or `KEY.{columns.image}`. The caption is `KEY.txt`, or a
    column of the object in `KEY.json` where there is no text or a column is named. Further
    columns are those of `KEY.json`.

    Raises:
        MissingColumnError: there are objects, but no caption in any of their columns; or there
            are entries, but a further column is in no object.
    """
    skips = log.begin(path)
    try:
        with path.open("rb") as file:
            damage = Damage()
            groups = _groups(file, path, skips, damage)
            yield from _entries(groups, damage, file, path, columns, skips)
    except OSError as error:
        skips.add(UNREADABLE, f"({error.strerror or error})")


def _groups(file: IO[bytes], path: Path, skips: FileSkips, damage: Damage) -> _Groups:
    groups: _Groups = {}
    for member in members(file, path, skips, damage):
        group = groups.setdefault(member.key, {})
        if not member.plain:
            continue
        if member.field in _TEXTS and member.span.size > _LARGEST:
            skips.add(f"member .{member.field} above {_LARGEST:,} bytes", member.name)
        elif member.field in group:
            skips.add("second member of the same name", member.name)
        else:
            group[member.field] = member
    return groups


def _entries(
    groups: _Groups, damage: Damage, file: IO[bytes], path: Path, columns: Columns, skips: FileSkips
) -> Iterator[Entry]:
    captioned, listed = False, False
    names, caption_names = dict[str, None](), dict[str, None]()
    fields = _IMAGE_FIELDS if columns.image is None else (columns.image.lower(),)
    taken = next(reversed(groups), None) if damage.takes_last else None
    for key, group in groups.items():
        if key == taken and not _is_whole(group, fields):
            continue
        has_text = "txt" in group and columns.caption in {None, "txt"}
        record: dict[str, Any] | None = {}
        if "json" in group and (columns.further or not has_text):
            record = parse_object(group["json"].read(file))
            names |= dict.fromkeys(record or ())
        image = next((name for name in fields if name in group), None)
        if image is None:
            skips.add("no image with this key", key)
            continue
        if has_text:
            value: object = group["txt"].read(file)
        elif record is None:
            skips.add("not a JSON object", f"{key}.json")
            continue
        else:
            caption_names |= dict.fromkeys(record)
            name = next((name for name in columns.captions if name in record), None)
            captioned = captioned or name is not None
            value = record.get(name) if name is not None else None
        captions = captions_of(value, key, skips, columns.lines)
        if captions:
            listed = True
            blob, further = group[image].span, columns.further_of(record or {})
            yield Entry(path, f"{key}.{image}", captions, blob, further)
    if caption_names and not captioned and not listed:
        choose_column(columns.captions, caption_names, path, "captions")
    for name in columns.further if listed else ():
        choose_column((name,), names, path, "further captions or columns")


def _is_whole(group: Mapping[str, Member], fields: Sequence[str]) -> bool:
    """Tell whether a key has a picture and something that may hold its caption."""
    return any(name in group for name in fields) and ("txt" in group or "json" in group)
