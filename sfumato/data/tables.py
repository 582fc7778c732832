"""Reader of tables, row by row: .txt, .csv, .tsv, .json, .jsonl and .parquet.

A row that is broken is counted and passed over; so is each row that it took with it. A text may
hold lone surrogates, which stand for bytes that are not UTF-8: they spoil their own row only. A
text that begins with UTF-16's mark is read as UTF-16.
"""

import abc
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO, final

from sfumato.data.entries import choose_column, encoding_of, is_utf8
from sfumato.data.left_out import FileSkips, SkipLog
from sfumato.files import parse_object

TEXT = "text"  # the one column of a .txt file
Row = tuple[int | str, Mapping[str, Any]]  # a line number or "row N", and the fields
_PATH = re.compile(r"\S+\.\w{2,5}|\w+://\S+")  # in a column of paths or URLs


class UnreadableTableError(ValueError):
    """A table that cannot be read, or is damaged as a whole.

    Attributes:
        rows: how many rows are lost, as far as can be seen.
    """

    def __init__(self, message: str, rows: int = 1) -> None:
        super().__init__(message)
        self.rows = rows


class Table(abc.ABC):
    """Rows of one file, each with its fields by column."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: Iterator[str] | None = None
        self._known: dict[str, None] = {}
        self._header: Sequence[str] = ()  # of a table that has one

    def choose(self, columns: tuple[str, ...], holds: str) -> str:
        """Return the first of these columns that the table has; an empty table has any.

        Of several usual names, one is found in capitals too if none is there as it is. A column
        may be missing in some objects of a .json or .jsonl file.

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
        if len(columns) > 1 and not self._known.keys() & {*columns}:
            lower = {name.lower(): name for name in reversed(self._known)}
            if (name := next((name for name in columns if name in lower), None)) is not None:
                return lower[name]
        return choose_column(columns, self._known, self.path, holds)

    def names(self) -> list[str]:
        """Return the names of all columns, in their order.

        Raises:
            UnreadableTableError: the file cannot be read, or is damaged.
        """
        try:
            return list(dict.fromkeys(self._read_names()))
        except OSError as error:
            raise self._unreadable(error) from None

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
        if "\0" in text:
            raise ValueError(
                f"{self.path} line 1 holds zero bytes, as UTF-16 does; save the table as UTF-8"
            )
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

    def choose(self, columns: tuple[str, ...], holds: str) -> str:
        name = super().choose(columns, holds)
        if self._header.count(name) > 1:
            raise ValueError(
                f"{self.path} has {self._header.count(name)} columns of the name {name!r}; rename "
                "all but the one to read"
            )
        return name

    def _read_names(self) -> Iterator[str]:
        with _open_text(self.path, newline="") as file:
            rows = self._split(file, SkipLog(warns=False).begin(self.path))
            _, self._header, _ = next(rows, (0, list[str](), []))
        self._refuse_encoding("".join(self._header))
        yield from self._header

    def _read_rows(self, columns: Sequence[str], skips: FileSkips) -> Iterator[Row]:
        with _open_text(self.path, newline="") as file:
            rows = self._split(file, skips)
            _, header, _ = next(rows, (0, list[str](), []))
            positions = {name: position for position, name in enumerate(header)}
            pairs = [(name, positions.get(name, len(header))) for name in columns]
            for line, row, lines in rows:
                if len(lines) > 1 and self._swallowed(row, lines, len(header)):
                    last, count = line + len(lines) - 1, _count(lines)
                    skips.add("rows inside a quotation mark", line, rows=count, last=last)
                elif len(row) > len(header):
                    # An unquoted comma inside a caption would cut the caption short.
                    what = "tabs" if self._tabs else "commas"
                    skips.add(f"more fields than columns (quote captions that hold {what})", line)
                else:
                    size = len(row)
                    yield line, {name: row[i] if i < size else None for name, i in pairs}

    @property
    def _tabs(self) -> bool:
        return self.path.suffix.lower() == ".tsv"

    def _split(
        self, file: TextIO, skips: FileSkips
    ) -> Iterator[tuple[int, list[str], Sequence[str]]]:
        """Yield each row that is not empty, the line it starts on, and its lines.

        Broken rows are counted, and with them every line that their quotation marks took.
        """
        lines: list[str] = []

        def read() -> Iterator[str]:
            for text in file:
                lines.append(text)
                yield text

        rows = csv.reader(read(), strict=True, delimiter="\t" if self._tabs else ",")
        while True:
            lines.clear()
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                reason = f"not CSV ({error})" if "field limit" in str(error) else "not CSV"
                skips.add(reason, line, rows=_count(lines), last=rows.line_num)
                continue
            if row is None:
                return
            if row:
                yield line, row, lines

    def _swallowed(self, row: Sequence[str], lines: Sequence[str], columns: int) -> bool:
        """Tell whether a row of several lines holds other rows, for want of a quotation mark.

        A line that is another row has as many fields, and a path or URL where the row has one.
        """
        paths = [i for i, field in enumerate(row) if _PATH.fullmatch(field.strip())]
        others = csv.reader(
            lines[1:], delimiter="\t" if self._tabs else ",", quoting=csv.QUOTE_NONE
        )
        return any(
            len(other) == columns and any(_PATH.fullmatch(other[i].strip()) for i in paths)
            for other in others
            if len(other) > max(paths, default=len(other))
        )


@final
class _Objects(Table):
    """A .jsonl file, an object a line; or a .json file, a list of objects, held in memory."""

    def _read_names(self) -> Iterator[str]:
        empty = True
        for _, record in self._read_objects():
            if not isinstance(record, int):
                yield from record
                empty = False
        if empty:
            with _open_text(self.path) as file:
                self._refuse_encoding(file.readline())

    def _read_rows(self, columns: Sequence[str], skips: FileSkips) -> Iterator[Row]:
        for position, record in self._read_objects():
            if isinstance(record, int):
                skips.add("not a JSON object", position, rows=record)
            else:
                yield position, {name: record.get(name) for name in columns}

    def _read_objects(self) -> Iterator[tuple[int | str, dict[str, Any] | int]]:
        """Yield the objects, which may lack columns, by position; the rows of another value."""
        if self.path.suffix.lower() == ".json":
            for number, record in enumerate(self._list):
                rows = len(record) if isinstance(record, list) else 1
                yield f"row {number}", record if isinstance(record, dict) else max(1, rows)
            return
        with _open_text(self.path) as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    record = parse_object(text)
                    yield line, _count_objects(text) if record is None else record

    @cached_property
    def _list(self) -> list[Any]:
        with _open_text(self.path) as file:
            text = file.read()
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            self._refuse_encoding(text.partition("\n")[0])
            is_lines = parse_object(text.lstrip().partition("\n")[0]) is not None
            advice = "it has an object a line: name it .jsonl" if is_lines else "write it again"
            message = f"{self.path} is not JSON ({error}); {advice}"
            raise UnreadableTableError(message, _count_objects(text)) from None
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
            raise UnreadableTableError(message, file.metadata.num_rows - number) from None


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


def _count(lines: Sequence[str]) -> int:
    """Count the lines that are not empty; a broken row has one at least."""
    return max(1, sum(1 for text in lines if text.strip()))


def _count_objects(text: str) -> int:
    """Count the objects of a text that is not one, such as [{...}, {...}] or {...} {...."""
    decoder, count, position = json.JSONDecoder(), 0, 0
    while (start := text.find("{", position)) >= 0:
        count += 1
        try:
            _, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            break
    return max(1, count)


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a file; the mark that Windows writes at the beginning of a text is dropped."""
    with path.open("rb") as file:
        encoding, errors = encoding_of(file.read(2))
    return path.open(encoding=encoding, errors=errors, newline=newline)
