"""Prompts of files: opened as a stream for training, or read in file order."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from sfumato.data.entries import text_or_fault
from sfumato.data.left_out import FileSkips, SkipLog
from sfumato.data.order import PromptOrder
from sfumato.data.paths import find_files, is_tar
from sfumato.data.stream import OrderedStream, Stream
from sfumato.data.tables import TEXT, WITH_COLUMNS, UnreadableTableError, open_table
from sfumato.data.webdataset import members

_COLUMNS = ("prompt", "caption", "text")
_SUFFIXES = (".txt", *WITH_COLUMNS, ".tar")


def open_prompts(
    path: str,
    *,
    key: str = "prompts",
    column: str | None = None,
    seed: int = 0,
    shuffle: bool = True,
    buffer: int = 10_000,
) -> Stream[str]:
    """Open prompts for training: endless, shuffled, resumable, in bounded memory.

    The suffix tells the format: `.txt` (one prompt a line), tables with columns (`.csv`, `.tsv`,
    `.json`, `.jsonl`, `.parquet`), and WebDataset `.tar` (members `KEY.txt`).

    Args:
        path: a file, a directory of `.tar` files, a glob (`shards/*.tar`, `**` for any depth) or
            a brace pattern (`shards/{000..012}.tar`).
        key: of the setting that holds the path, for messages.
        column: the column of a table; None takes the first of `prompt`, `caption` and `text`.
        seed: with the epoch, decides the order.
        shuffle: False keeps the file order in every epoch.
        buffer: the largest number of prompts held for shuffling.

    Raises:
        ValueError: a file or the column is missing, a suffix is unknown, or no prompt can be
            read. Only the beginnings of files are looked at, and a .jsonl up to its column.
    """
    files, columns, log = _open(path, key, column)
    read = partial(_read, columns=columns, log=log)
    order = PromptOrder(files, read, log, seed=seed, shuffle=shuffle, buffer=buffer)
    return OrderedStream(order, str, log)


def read_prompts(
    path: str, *, key: str = "prompts", column: str | None = None, limit: int | None = None
) -> list[str]:
    """Read the first prompts in file order, or all of them; see `open_prompts`.

    Raises:
        ValueError: as `open_prompts`; or `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} is too small; give 1 or more, or None for all")
    return list(islice(_chain(*_open(path, key, column)), limit))


def read_prompt_rows(
    path: str, *, key: str = "prompts", column: str | None = None
) -> dict[str, dict[str, Any]]:
    """Return what the tables have beside each prompt, its own column included.

    Columns of bytes, such as pictures, are left out. Equal prompts have the first one's row. All
    is held in memory; a .txt file or a .tar has no rows.

    Raises:
        ValueError: as `open_prompts`.
    """
    files, columns, _ = _open(path, key, column)
    found: dict[str, dict[str, Any]] = {}
    log = SkipLog(warns=False)  # the prompts' own reader says what is left out
    for file in (file for file in files if file in columns):
        table = open_table(file)
        names = [name for name in table.names() if "binary" not in (table.kind(name) or "")]
        with suppress(UnreadableTableError):
            for _, row in table.rows(names, log.begin(file)):
                value = row[columns[file]]
                for each in value if isinstance(value, list) else [value]:
                    prompt, fault = text_or_fault(each, "prompt")
                    if not fault:
                        found.setdefault(prompt, dict(row))
    return found


def _open(
    path: str, key: str, column: str | None
) -> tuple[Sequence[Path], Mapping[Path, str], SkipLog]:
    """Return the files, the columns of the tables among them, and a log.

    A missing column, or files without any prompt, fail now rather than hours into a run.
    """
    files, log = find_files(path, key, _SUFFIXES), SkipLog()
    tables = [file for file in files if file.suffix.lower() in WITH_COLUMNS]
    if column is not None and not tables:
        raise ValueError(
            f"column={column!r} was given, but {key} = {path!r} has no columns; leave the column "
            f"out, or give a table ({', '.join(WITH_COLUMNS)})"
        )
    names = _COLUMNS if column is None else (column,)
    columns = {file: open_table(file).choose(names, "prompts") for file in tables}
    if next(_chain(files, columns, log), None) is None:
        raise ValueError(f"no prompt can be read from {key} = {path!r}: {log.report().summary()}")
    return files, columns, log


def _chain(files: Sequence[Path], columns: Mapping[Path, str], log: SkipLog) -> Iterator[str]:
    for file in files:
        yield from _read(file, columns, log)


def _read(path: Path, columns: Mapping[Path, str], log: SkipLog) -> Iterator[str]:
    """Yield the prompts of one file; a row without one is counted, as is damage."""
    skips, empty = log.begin(path), True
    try:
        for position, value in _texts(path, columns.get(path, TEXT), skips):
            for each in value if isinstance(value, list) and value else [value]:
                prompt, fault = text_or_fault(each, "prompt")
                if fault:
                    skips.add(fault, position)
                else:
                    empty = False
                    yield prompt
    except OSError as error:
        skips.add("unreadable file", f"({error.strerror or error})")
    except UnreadableTableError as error:
        skips.add("unreadable file", f"({error})", rows=error.rows)
    if empty and not skips.any:
        skips.add("file without a prompt")


def _texts(path: Path, column: str, skips: FileSkips) -> Iterator[tuple[int | str, object]]:
    """Yield the values of a table's column, or the members that WebDataset calls `txt`."""
    if not is_tar(path):
        for position, row in open_table(path).rows([column], skips):
            yield position, row[column]
        return
    with path.open("rb") as file:
        for member in members(file, path, skips):
            if member.field == "txt" and not member.plain:
                skips.add("link in a tar", member.name)
            elif member.field == "txt":
                yield member.name, member.read(file)
            elif member.field.endswith(".txt"):
                skips.add("name with a second dot (WebDataset: not the field txt)", member.name)
