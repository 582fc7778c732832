"""Text files as people write them: bytes that are no UTF-8, broken CSV, lines that are no JSON."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from sfumato.data.skips import Tally


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a file so that a byte that is no UTF-8 spoils its own row only.

    The mark that Windows writes at the beginning is dropped.
    """
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def is_utf8(text: str) -> bool:
    """Tell text from undecodable bytes (kept as lone surrogates) and from UTF-16's zeros."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def csv_rows(file: TextIO, tally: Tally) -> Iterator[tuple[int, list[str]]]:
    """Yield each row with the line it starts on; count the rows that are no CSV."""
    rows = csv.reader(file, strict=True)
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error:
            tally.add("not CSV", line)
            continue
        if row is None:
            return
        yield line, row


def parse_json(text: str) -> Any:
    """Return what a line of JSON says, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
