"""Read the prompts of one file, in file order: .txt, .csv, .jsonl or a WebDataset .tar.

A row that cannot be used is counted and passed over; a column that is not there is an error.
"""

import os
import tarfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from sfumato.data.skips import SkipLog, Tally
from sfumato.data.text_files import csv_rows, is_utf8, open_text, parse_json

DEFAULT_COLUMNS = ("prompt", "caption", "text")
COLUMN_SUFFIXES = frozenset({".csv", ".jsonl"})

# What tarfile raises on damaged headers, beside its own errors: bad numbers and bad sizes.
_TAR_DAMAGE = (tarfile.TarError, ValueError, OverflowError, EOFError)
_TAR_END = bytes(tarfile.BLOCKSIZE)

# A line number or a member's name, and the text found there.
_Row = tuple[int | str, str]


def read_shard(path: Path, column: str | None, log: SkipLog) -> Iterator[str]:
    """Yield the prompts of one file, stripped of surrounding white space.

    Args:
        path: a file whose suffix is a key of `READERS`.
        column: the column of a .csv or .jsonl file; None takes the first of `DEFAULT_COLUMNS`
            that is there.
        log: where blank, damaged and unreadable parts are counted.

    Raises:
        ValueError: the column is not in the header (.csv) or the first object (.jsonl).
    """
    tally = log.begin(path)
    found = False
    try:
        for place, text in READERS[path.suffix.lower()](path, column, tally):
            prompt = text.strip()
            if not prompt:
                tally.add("blank", place)
            elif not is_utf8(prompt):
                tally.add("not UTF-8", place)
            else:
                found = True
                yield prompt
    except OSError as error:
        tally.add("unreadable file", f"({error.strerror or error})")
    if not found and not tally.any:
        tally.add("file without a prompt")


def _choose_column(wanted: str | None, names: Sequence[str], path: Path) -> str:
    candidates = DEFAULT_COLUMNS if wanted is None else (wanted,)
    for name in candidates:
        if name in names:
            return name
    missing = " or ".join(repr(name) for name in candidates)
    there = ", ".join(repr(name) for name in names) or "none"
    raise ValueError(
        f"{path} has no column {missing}; the columns there are {there}. Name the one that "
        "holds the prompts"
    )


def _read_txt(path: Path, column: str | None, tally: Tally) -> Iterator[_Row]:
    with open_text(path) as file:
        yield from enumerate(file, 1)


def _read_csv(path: Path, column: str | None, tally: Tally) -> Iterator[_Row]:
    with open_text(path, newline="") as file:
        rows = csv_rows(file, tally)
        header = next((row for _, row in rows if row), None)
        if header is None:
            return
        index = header.index(_choose_column(column, header, path))
        for line, row in rows:
            if len(row) > len(header):
                # An unquoted comma inside a prompt would cut the prompt short.
                tally.add("more fields than columns (quote prompts that hold commas)", line)
            else:
                yield line, row[index] if index < len(row) else ""


def _read_jsonl(path: Path, column: str | None, tally: Tally) -> Iterator[_Row]:
    chosen: str | None = None
    with open_text(path) as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                yield line, text
                continue
            record = parse_json(text)
            if not isinstance(record, dict):
                tally.add("not a JSON object", line)
                continue
            if chosen is None:
                chosen = _choose_column(column, tuple(record), path)
            value = record.get(chosen)
            if isinstance(value, str):
                yield line, value
            else:
                tally.add(f"no text in column {chosen!r}", line)


def _read_tar(path: Path, column: str | None, tally: Tally) -> Iterator[_Row]:
    with path.open("rb") as file:
        try:
            # Sequential like "r|", but images beside the captions are passed over unread.
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
        except _TAR_DAMAGE as error:
            tally.add("not a tar", f"({error})")
            return
        with tar:
            whole = yield from _tar_rows(tar, tally)
            # tarfile takes a damaged or missing header for the end of the archive.
            end = max(0, min(tar.offset, file.seek(0, os.SEEK_END)))
            file.seek(end)
            if not whole or file.read(tarfile.BLOCKSIZE) != _TAR_END:
                tally.add("truncated or damaged tar", f"(at byte {end})")


def _tar_rows(tar: tarfile.TarFile, tally: Tally) -> Generator[_Row, None, bool]:
    """Yield the members that WebDataset calls `txt`; return whether no damage stopped it."""
    try:
        while (member := tar.next()) is not None:
            # tarfile remembers each member; nothing here goes back to one.
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            key, _, field = PurePosixPath(member.name).name.lower().partition(".")
            if not (member.isfile() and key):
                continue
            if field == "txt":
                yield member.name, _member_text(tar, member)
            elif field.endswith(".txt"):
                tally.add("name with a second dot (WebDataset: not the field txt)", member.name)
    except _TAR_DAMAGE:
        return False
    return True


def _member_text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    assert file is not None, "only regular members come here"
    return file.read().decode("utf-8-sig", errors="surrogateescape")


READERS: Mapping[str, Callable[[Path, str | None, Tally], Iterator[_Row]]] = MappingProxyType(
    {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl, ".tar": _read_tar}
)
