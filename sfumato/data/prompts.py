"""Prompts of files: opened as a stream for training, or read in file order."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from sfumato.data.entries import text_or_fault
from sfumato.data.left_out import FileSkips, SkipLog
from sfumato.data.order import PromptOrder
from sfumato.data.paths import find_files
from sfumato.data.stream import OrderedStream, Stream
from sfumato.data.tables import TEXT, WITH_COLUMNS, UnreadableTableError, open_table
from sfumato.data.webdataset import members

_COLUMNS = ("prompt", "caption", "text")
_SUFFIXES = (".txt", *WITH_COLUMNS, ".tar")
_SETTING = "the path of the prompts"


def open_prompts(
    path: str,
    *,
    column: str | None = None,
    seed: int = 0,
    shuffle: bool = True,
    buffer: int = 10_000,
) -> Stream[str]:
    """Open prompts for training: endless, shuffled, resumable, in bounded memory.

    Formats are told by suffix: `.txt` (one prompt a line), tables with columns (`.csv`, `.tsv`,
    `.json`, `.jsonl`, `.parquet`), and WebDataset `.tar` (members `KEY.txt`).

    Args:
        path: a file, a directory of `.tar` files, a glob (`shards/*.tar`, `**` for any depth) or
            a brace pattern (`shards/{000..012}.tar`).
        column: the column of a table; None takes the first of `prompt`, `caption` and `text`
            that is there.
        seed: with the epoch, decides the order.
        shuffle: False keeps the file order in every epoch.
        buffer: the largest number of prompts held for shuffling.

    Raises:
        ValueError: a file is missing, its suffix unknown, the column not there, or no prompt can
            be read. Only the beginnings of files are looked at, and a .jsonl up to its column.
    """
    files, columns, log = _open(path, column)
    read = partial(_read, columns=columns, log=log)
    order = PromptOrder(files, read, log, seed=seed, shuffle=shuffle, buffer=buffer)
    return OrderedStream(order, str, log)


def read_prompts(path: str, *, column: str | None = None, limit: int | None = None) -> list[str]:
    """Read prompts in file order, at most `limit` of them; path, column, errors: `open_prompts`.

    Raises:
        ValueError: also, `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} prompts would be none; give 1 or more, or None for all")
    return list(islice(_chain(*_open(path, column)), limit))


def _open(path: str, column: str | None) -> tuple[Sequence[Path], Mapping[Path, str], SkipLog]:
    """Return the files, the columns of the tables among them, and a log.

    Fail now rather than hours into a run: every column is there, one prompt can be read.
    """
    files, log = find_files(path, _SETTING, _SUFFIXES), SkipLog()
    tables = [file for file in files if file.suffix.lower() in WITH_COLUMNS]
    if column is not None and not tables:
        raise ValueError(
            f"column={column!r} was given, but {path!r} has no columns; leave it out, or give "
            f"a table ({', '.join(WITH_COLUMNS)})"
        )
    wanted = _COLUMNS if column is None else (column,)
    columns = {file: open_table(file).choose(wanted, "prompts") for file in tables}
    if next(_chain(files, columns, log), None) is None:
        raise ValueError(f"no prompt can be read from {path!r}: {log.report().summary()}")
    return files, columns, log


def _chain(files: Sequence[Path], columns: Mapping[Path, str], log: SkipLog) -> Iterator[str]:
    for file in files:
        yield from _read(file, columns, log)


def _read(path: Path, columns: Mapping[Path, str], log: SkipLog) -> Iterator[str]:
    """Yield the prompts of one file; a row without one is counted, as is damage."""
    skips, empty = log.begin(path), True
    try:
        is_tar = path.suffix.lower() == ".tar"
        rows = _tar_texts(path, skips) if is_tar else _table_texts(path, columns, skips)
        for place, value in rows:
            prompt, fault = text_or_fault(value, "prompt")
            if fault:
                skips.add(fault, place)
            else:
                empty = False
                yield prompt
    except OSError as error:
        skips.add("unreadable file", f"({error.strerror or error})")
    except UnreadableTableError as error:
        skips.add("unreadable file", f"({error})")
    if empty and not skips.any:
        skips.add("file without a prompt")


def _table_texts(
    path: Path, columns: Mapping[Path, str], skips: FileSkips
) -> Iterator[tuple[int | str, object]]:
    column = columns.get(path, TEXT)
    for place, row in open_table(path).rows([column], skips):
        yield place, row[column]


def _tar_texts(path: Path, skips: FileSkips) -> Iterator[tuple[str, bytes]]:
    """Yield the members that WebDataset calls `txt`."""
    with path.open("rb") as file:
        for member in members(file, path, skips):
            if member.field == "txt":
                yield member.name, member.read(file)
            elif member.field.endswith(".txt"):
                skips.add("name with a second dot (WebDataset: not the field txt)", member.name)
