"""Tables of URLs or of images, row by row, with any of their columns: parquet, csv, jsonl."""

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.data.entries import MissingColumnError
from sfumato.data.skips import SkipLog, Tally
from sfumato.data.text_files import csv_rows, is_utf8, open_text, parse_json

SUFFIXES = (".parquet", ".csv", ".jsonl")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Row = tuple[int | str, Mapping[str, Any]]  # line or "row N", and its fields


def table_files(table: str) -> list[Path]:
    """List the files that a table stands for: one, a folder of them, a glob, or a hub data set's.

    Raises:
        ValueError: there are none, or they are of several kinds.
    """
    whole = Path(table).expanduser()
    if whole.is_file():
        files = [whole]
    elif whole.is_dir():
        files = _in_folder(whole)
    elif glob.has_magic(table):
        files = sorted(Path(name) for name in glob.glob(str(whole)))  # noqa: PTH207, absolute too
    elif _HUB_ID.fullmatch(table) and whole.suffix.lower() not in SUFFIXES:
        files = _in_folder(_from_hub(table))
    else:
        raise ValueError(f"download.table={table!r} does not exist; check the path")
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) != 1 or kinds[0] not in SUFFIXES:
        raise ValueError(
            f"download.table={table!r} stands for {len(files)} files with the suffixes "
            f"{', '.join(map(repr, kinds)) or 'none'}; give files of one kind of "
            + ", ".join(SUFFIXES)
        )
    return files


def column_names(file: Path) -> list[str]:
    """Return the columns of a table; of .jsonl those of all its objects.

    Raises:
        ValueError: it cannot be read, or is not UTF-8 in its first line.
    """
    if file.suffix.lower() == ".parquet":
        return list(_open_parquet(file).schema_arrow.names)
    names: list[str] = []
    with open_text(file, newline="") as stream:
        if file.suffix.lower() == ".csv":
            rows = csv_rows(stream, SkipLog(warns=False).begin(file))
            names = next((row for _, row in rows if row), [])
        else:
            records = (parse_json(line) for line in stream if line.strip())
            objects = (record for record in records if isinstance(record, dict))
            names = list(dict.fromkeys(name for each in objects for name in each))
        stream.seek(0)
        if not is_utf8("".join(names) or stream.readline()):
            raise ValueError(f"{file} line 1 is not UTF-8; save the table as UTF-8")
    return names


def read_rows(file: Path, columns: Sequence[str], tally: Tally) -> Iterator[Row]:
    """Yield the fields of each row, those of `columns` alone; a row that is none is counted.

    Text may hold lone surrogates, for bytes that are no UTF-8.

    Raises:
        MissingColumnError: a column is not there.
        ValueError: the file cannot be read.
    """
    names = column_names(file)
    for name in columns:
        if name not in names:
            raise MissingColumnError(
                f"{file} has no column {name!r}; the columns there are "
                f"{', '.join(map(repr, names)) or 'none'}"
            )
    if file.suffix.lower() == ".parquet":
        rows = _parquet(file, columns)
    elif file.suffix.lower() == ".csv":
        rows = _csv(file, columns, tally)
    else:
        rows = _jsonl(file, columns, tally)
    yield from rows


def _in_folder(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{folder} holds no table; there is no file of {', '.join(SUFFIXES)}")
    return [path for path in found if not path.name.startswith(".")]


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=["*.parquet"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"download.table={name!r} is no file or folder here, and as a data set of the Hugging "
            f"Face hub it cannot be had ({said}); check the name, and that the hub can be reached"
        ) from error


def _csv(file: Path, columns: Sequence[str], tally: Tally) -> Iterator[Row]:
    with open_text(file, newline="") as stream:
        rows = ((line, row) for line, row in csv_rows(stream, tally) if row)
        _, header = next(rows, (0, list[str]()))
        for line, row in rows:
            if len(row) > len(header):
                # An unquoted comma inside a caption would cut the caption short.
                tally.add("more fields than columns (quote captions that hold commas)", line)
            else:
                fields = dict(zip(header, row, strict=False))
                yield line, {name: fields.get(name) for name in columns}


def _jsonl(file: Path, columns: Sequence[str], tally: Tally) -> Iterator[Row]:
    with open_text(file) as stream:
        for line, text in enumerate(stream, 1):
            if not text.strip():
                continue
            record = parse_json(text)
            if isinstance(record, dict):
                yield line, {name: record.get(name) for name in columns}
            else:
                tally.add("not a JSON object", line)


def _parquet(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow

    number = 0
    try:
        for batch in _open_parquet(file).iter_batches(columns=list(columns)):
            values = [_values(batch.column(name)) for name in columns]
            for row in zip(*values, strict=True):
                yield f"row {number}", dict(zip(columns, row, strict=True))
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is a damaged parquet file ({error}); write it again") from None


def _values(column: Any) -> list[Any]:
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    # Arrow checks no text, and Python would refuse the whole batch for one bad row.
    if types.is_string(column.type):
        column = column.cast(pyarrow.binary())
    elif types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    else:
        return column.to_pylist()
    return [
        value if value is None else value.decode(errors="surrogateescape")
        for value in column.to_pylist()
    ]


def _open_parquet(file: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{file} is read with pyarrow, which is not installed; pip install 'sfumato[datasets]'"
        ) from None
    try:
        return parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is no parquet file ({error}); write it again") from None
