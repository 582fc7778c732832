"""Reader of tables, row by row: .txt, .csv, .tsv, .json, .jsonl and .parquet.

A row that is broken is counted and passed over. A text may hold lone surrogates, which stand for
bytes that are not UTF-8: they spoil their own row only.
"""

import abc
import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO, final

from sfumato.data.entries import choose_column, is_utf8
from sfumato.data.left_out import FileSkips, SkipLog
from sfumato.files import parse_object

TEXT = "text"  # the one column of a .txt file
Row = tuple[int | str, Mapping[str, Any]]  # a line number or "row N", and the fields


class UnreadableTableError(ValueError):
    """A table that cannot be read, or is damaged as a whole."""


class Table(abc.ABC):
    """Rows of one file, each with its fields by column."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: Iterator[str] | None = None
        self._known: dict[str, None] = {}

    def choose(self, columns: tuple[str, ...], holds: str) -> str:
        """Return the first of these columns that the table has; an empty table has any.

        A column may be missing in some objects of a .json or .jsonl file.

        Raises:
            MissingColumnError: the table has none; `holds` says what the column should hold.
            UnreadableTableError: the file cannot be read, or is damaged.
            ValueError: the names of the columns are not UTF-8.
        """
        try:
            if self._names is None:
                self._names = self._read_names()
            # The later objects of a large .jsonl are read only if the earlier ones lack a column.
            while columns[0] not in self._known:
                name = next(self._names, None)
                if name is None:
                    break
                self._known[name] = None
        except OSError as error:
            raise self._unreadable(error) from None
        if not self._known:
            return columns[0]
        return choose_column(columns, self._known, self.path, holds)

    def rows(self, columns: Sequence[str], skips: FileSkips) -> Iterator[Row]:
        """Yield the fields of each row that are in `columns`; None stands for a missing one.

        Raises:
            UnreadableTableError: the file cannot be read, or is damaged.
        """
        try:
            yield from self._read_rows(columns, skips)
        except OSError as error:
            raise self._unreadable(error) from None

    def kind(self, column: str) -> str | None:
        """Return the type of a column's values, None where each may have another."""
        del column

    @abc.abstractmethod
    def _read_names(self) -> Iterator[str]:
        """Yield the names of the columns, some of them repeatedly."""

    @abc.abstractmethod
    def _read_rows(self, columns: Sequence[str], skips: FileSkips) -> Iterator[Row]:
        """Yield the rows."""

    def _unreadable(self, error: OSError) -> UnreadableTableError:
        return UnreadableTableError(f"{self.path} cannot be read: {error.strerror or error}")

    def _refuse_encoding(self, text: str) -> None:
        if not is_utf8(text):
            raise ValueError(f"{self.path} line 1 is not UTF-8; save the table as UTF-8")


@final
class _Lines(Table):
    """A .txt file: a text a line."""

    def _read_names(self) -> Iterator[str]:
        yield TEXT

    def _read_rows(self, columns: Sequence[str], skips: FileSkips) -> Iterator[Row]:
        with _open_text(self.path) as file:
            yield from ((number, {TEXT: text}) for number, text in enumerate(file, 1))


@final
class _Csv(Table):
    """A .csv or .tsv file with a header."""

    def _read_names(self) -> Iterator[str]:
        with _open_text(self.path, newline="") as file:
            rows = self._split(file, SkipLog(warns=False).begin(self.path))
            _, header = next(rows, (0, list[str]()))
        self._refuse_encoding("".join(header))
        yield from header

    def _read_rows(self, columns: Sequence[str], skips: FileSkips) -> Iterator[Row]:
        with _open_text(self.path, newline="") as file:
            rows = self._split(file, skips)
            _, header = next(rows, (0, list[str]()))
            positions = {name: position for position, name in enumerate(header)}
            pairs = [(name, positions.get(name, len(header))) for name in columns]
            for line, row in rows:
                if len(row) > len(header):
                    # An unquoted comma inside a caption would cut the caption short.
                    what = "tabs" if self._tabs else "commas"
                    skips.add(f"more fields than columns (quote captions that hold {what})", line)
                else:
                    size = len(row)
                    yield line, {name: row[i] if i < size else None for name, i in pairs}

    @property
    def _tabs(self) -> bool:
        return self.path.suffix.lower() == ".tsv"

    def _split(self, file: TextIO, skips: FileSkips) -> Iterator[tuple[int, list[str]]]:
        """Yield each row that is not empty with the line it starts on; count broken rows."""
        rows = csv.reader(file, strict=True, delimiter="\t" if self._tabs else ",")
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error:
                skips.add("not CSV", line)
                continue
            if row is None:
                return
            if row:
                yield line, row


@final
class _Objects(Table):
    """A .jsonl file, an object a line; or a .json file, a list of objects, held in memory."""

    def _read_names(self) -> Iterator[str]:
        empty = True
        for _, record in self._read_objects():
            yield from record or ()
            empty = empty and record is None
        if empty:
            with _open_text(self.path) as file:
                self._refuse_encoding(file.readline())

    def _read_rows(self, columns: Sequence[str], skips: FileSkips) -> Iterator[Row]:
        for position, record in self._read_objects():
            if record is None:
                skips.add("not a JSON object", position)
            else:
                yield position, {name: record.get(name) for name in columns}

    def _read_objects(self) -> Iterator[tuple[int | str, dict[str, Any] | None]]:
        """Yield the objects, which may lack columns, by position; None for another value."""
        if self.path.suffix.lower() == ".json":
            for number, record in enumerate(self._list):
                yield f"row {number}", record if isinstance(record, dict) else None
            return
        with _open_text(self.path) as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, parse_object(text)

    @cached_property
    def _list(self) -> list[Any]:
        with _open_text(self.path) as file:
            text = file.read()
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            self._refuse_encoding(text.partition("\n")[0])
            message = f"{self.path} is not JSON ({error}); write it again"
            raise UnreadableTableError(message) from None
        if isinstance(records, list):
            return records
        raise UnreadableTableError(
            f"{self.path} holds a JSON {type(records).__name__}; give a list of objects, "
            "or one object a line in a .jsonl file"
        )


@final
class _Parquet(Table):
    """A .parquet file."""

    @cached_property
    def _file(self) -> Any:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise ValueError(
                f"{self.path} is read with pyarrow, which is not installed; "
                "pip install 'sfumato[datasets]'"
            ) from None
        try:
            return parquet.ParquetFile(self.path)
        except pyarrow.ArrowInvalid as error:
            message = f"{self.path} is not a parquet file ({error}); write it again"
            raise UnreadableTableError(message) from None

    def kind(self, column: str) -> str | None:
        schema = self._file.schema_arrow
        return str(schema.field(column).type) if column in schema.names else None

    def _read_names(self) -> Iterator[str]:
        yield from self._file.schema_arrow.names

    def _read_rows(self, columns: Sequence[str], skips: FileSkips) -> Iterator[Row]:
        file, number = self._file, 0
        import pyarrow

        try:
            for batch in file.iter_batches(columns=list(columns)):
                values = [arrow_values(batch.column(name)) for name in columns]
                for row in zip(*values, strict=True):
                    yield f"row {number}", dict(zip(columns, row, strict=True))
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            message = f"{self.path} is a damaged parquet file ({error}); write it again"
            raise UnreadableTableError(message) from None


_KINDS: Mapping[str, Callable[[Path], Table]] = MappingProxyType(
    {
        ".txt": _Lines,
        ".csv": _Csv,
        ".tsv": _Csv,
        ".json": _Objects,
        ".jsonl": _Objects,
        ".parquet": _Parquet,
    }
)
WITH_COLUMNS = tuple(suffix for suffix in _KINDS if suffix != ".txt")


def open_table(path: Path) -> Table:
    """Return the table in a file, whose suffix is .txt or one of `WITH_COLUMNS`."""
    return _KINDS[path.suffix.lower()](path)


def is_text(kind: str) -> bool:
    """Tell whether an Arrow type is that of texts."""
    text = ("string", "large_string", "string_view")
    return kind.startswith((*text, *(f"dictionary<values={name}" for name in text)))


def arrow_values(column: Any) -> list[Any]:
    """Return the values of an Arrow column; bytes that are not UTF-8 become lone surrogates."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # Arrow checks no text, and Python refuses all rows for a bad one
        return [_arrow_value(scalar) for scalar in column]


def _arrow_value(scalar: Any) -> Any:
    import pyarrow

    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if isinstance(scalar, pyarrow.ListScalar | pyarrow.LargeListScalar):
            return [_arrow_value(each) for each in scalar]
        if isinstance(scalar, pyarrow.StructScalar):
            return {name: _arrow_value(each) for name, each in scalar.items()}
        if isinstance(scalar, pyarrow.DictionaryScalar):
            return _arrow_value(scalar.value)
        return scalar.as_buffer().to_pybytes().decode(errors="surrogateescape")


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a file; the mark that Windows writes at the beginning of a text is dropped."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)
