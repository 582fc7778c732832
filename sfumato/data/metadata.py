"""Images named in a table: .csv, .json, .jsonl or .parquet beside a base path."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.data.arrow import parquet_rows
from sfumato.data.blobs import FileBlob
from sfumato.data.entries import Columns, Entry, caption_of, choose_column, inside
from sfumato.data.skips import SkipLog, Tally
from sfumato.data.text_files import csv_rows, is_utf8, open_text, parse_json

METADATA_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")

_Row = tuple[int | str, Mapping[str, Any]]  # line or "row N", and its fields


@dataclass(frozen=True)
class _Table:
    columns: list[str]
    rows: Iterator[_Row]


def list_metadata(path: Path, base: Path, columns: Columns, log: SkipLog) -> Iterator[Entry]:
    """Yield the entries of a table in its order.

    Args:
        path: the table; its suffix is one of `METADATA_SUFFIXES`.
        base: the folder that image paths are relative to.
        columns: which of its columns are read.
        log: where rows without path or caption are counted.

    Raises:
        ValueError: a column is not there, a path leaves the base, or the file cannot be read.
    """
    tally = log.begin(path)
    try:
        table = _read(path, columns, tally)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    if not table.columns:
        return
    image = choose_column(columns.images, table.columns, path, "image paths")
    caption = choose_column(columns.captions, table.columns, path, "captions")
    for place, row in table.rows:
        name = row.get(image)
        if not isinstance(name, str) or not name.strip():
            tally.add(f"no path in column {image!r}", place)
            continue
        where = f"{path} line {place}" if isinstance(place, int) else f"{path} {place}"
        file = inside(base, name, where)
        text = caption_of(row.get(caption), place, tally)
        if text is not None:
            yield Entry(path, os.path.relpath(file, base), (text,), FileBlob(file))


def _read(path: Path, columns: Columns, tally: Tally) -> _Table:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return _read_csv(path, tally)
    if suffix == ".parquet":
        names, rows = parquet_rows(path, columns)
        return _Table(names, ((f"row {number}", row) for number, row in enumerate(rows)))
    rows = _read_json(path, tally) if suffix == ".json" else _read_jsonl(path, tally)
    names = dict.fromkeys(name for _, row in rows for name in row)
    return _Table(list(names), iter(rows))


def _read_csv(path: Path, tally: Tally) -> _Table:
    with open_text(path, newline="") as file:
        lines = list(csv_rows(file, tally))
    header = next((row for _, row in lines if row), [])
    if not is_utf8("".join(header)):
        raise ValueError(f"{path} line 1 is not UTF-8; save the table as UTF-8")
    return _Table(header, _csv_fields(header, lines, tally))


def _csv_fields(
    header: list[str], lines: list[tuple[int, list[str]]], tally: Tally
) -> Iterator[_Row]:
    rows = ((line, row) for line, row in lines if row)
    next(rows, None)
    for line, row in rows:
        if len(row) > len(header):
            # An unquoted comma inside a caption would cut the caption short.
            tally.add("more fields than columns (quote captions that hold commas)", line)
        else:
            yield line, dict(zip(header, row, strict=False))


def _read_json(path: Path, tally: Tally) -> list[_Row]:
    try:
        with open_text(path) as file:
            records = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); write it again") from None
    if not isinstance(records, list):
        raise ValueError(
            f"{path} holds a JSON {type(records).__name__}; give a list of objects, "
            "or one object a line in a .jsonl file"
        )
    return _objects(((f"row {i}", record) for i, record in enumerate(records)), tally)


def _read_jsonl(path: Path, tally: Tally) -> list[_Row]:
    with open_text(path) as file:
        lines = [(line, text) for line, text in enumerate(file, 1) if text.strip()]
    return _objects(((line, parse_json(text)) for line, text in lines), tally)


def _objects(records: Iterator[tuple[int | str, Any]], tally: Tally) -> list[_Row]:
    rows: list[_Row] = []
    for place, record in records:
        if isinstance(record, dict):
            rows.append((place, record))
        else:
            tally.add("not a JSON object", place)
    return rows
