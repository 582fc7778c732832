"""Tables of preference pairs: two pictures of a caption, as bytes or files, and two labels.

Pairs are listed by shard: a row group of a parquet file that holds pictures, or any other table.
Of a row group only positions and labels are kept.
"""

import abc
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, final

import numpy as np

from sfumato.config import PairDataConfig
from sfumato.data.entries import Blob, Columns, Entry, FileBlob, captions_of, inside
from sfumato.data.left_out import FileSkips, SkipLog
from sfumato.data.paths import find_files, is_folder
from sfumato.data.row_groups import Groups, RowBlob, group_sizes
from sfumato.data.settings import check_pairs
from sfumato.data.sources import FOLDER_TABLES
from sfumato.data.store import check_address, is_address
from sfumato.data.stream import BrokenRowError
from sfumato.data.tables import WITH_COLUMNS, Table, is_text, open_table

EQUAL = "two equal pictures"
LARGEST_GROUP = 2**31  # bytes
_BYTES = ("binary", "large_binary", "binary_view", "fixed_size_binary")
_SHOWN = 20  # characters of a label


@final
@dataclass(frozen=True, slots=True)
class BytesBlob(Blob):
    """Bytes in memory."""

    data: bytes

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        yield io.BytesIO(self.data)


@dataclass(frozen=True, slots=True)
class _UsableRow:
    """A row with good labels and captions."""

    number: int  # in its table, from 0
    position: str
    fields: Mapping[str, Any]
    label: float
    captions: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """What is read of a table.

    Attributes:
        base: folder of the pictures that are paths.
        images: two columns.
        labels: two columns.
    """

    path: Path
    base: Path
    images: Sequence[str]
    labels: Sequence[str]
    caption: str

    def entries(
        self, row: Mapping[str, Any], position: str, captions: Sequence[str]
    ) -> list[Entry]:
        """Return both pictures of a row.

        Raises:
            BrokenRowError: one is missing, or both are the same file.
            ValueError: a path leaves the base.
        """
        where, entries = f"{self.path} {position}", list[Entry]()
        for name in self.images:
            blob = _blob(row[name], self.base, where)
            place = f"{position} {name}"
            if isinstance(blob, FileBlob):
                place = f"{place} {os.path.relpath(blob.path, self.base)}"
            entries.append(Entry(self.path, place, tuple(captions), blob or BytesBlob(b"")))
            if blob is None:
                raise BrokenRowError(entries[-1], "no picture")
        if entries[0].blob == entries[1].blob:
            raise BrokenRowError(entries[0], EQUAL)
        return entries


class PairShard(abc.ABC):
    """Pairs of a table, or of one row group of it.

    Attributes:
        source: the table.
        rows: which of the table's rows, from 0.
        total: rows that are read at once, usable or not.
        labels: probability that the first picture is preferred, for each row.
    """

    def __init__(self, source: _Source, rows: Sequence[int], labels: Sequence[float]) -> None:
        self.source = source
        self.rows = np.asarray(rows, np.int64)
        self.labels = np.asarray(labels, np.float64)
        self.total = len(rows)

    def __len__(self) -> int:
        return len(self.rows)

    @abc.abstractmethod
    def entries(self, row: int, groups: Groups) -> list[Entry]:
        """Return both pictures of a pair, by its number in the shard; from any thread.

        Args:
            groups: that are in memory.

        Raises:
            BrokenRowError: one is missing, or both are equal.
        """

    def lasting(self, row: int, groups: Groups) -> list[Entry]:
        """Return what `entries` does; bytes are not kept, but read whenever they are opened."""
        return self.entries(row, groups)


@final
class _Listed(PairShard):
    """Pairs of files."""

    def __init__(
        self,
        source: _Source,
        rows: Sequence[int],
        labels: Sequence[float],
        pairs: Sequence[list[Entry]],
    ) -> None:
        super().__init__(source, rows, labels)
        self._pairs = pairs

    def entries(self, row: int, groups: Groups) -> list[Entry]:
        return self._pairs[row]


@final
class _Group(PairShard):
    """Pairs whose pictures lie in a row group.

    Args:
        number: of the row group in its file, of `total` rows from `first` on.
    """

    def __init__(
        self,
        source: _Source,
        rows: Sequence[int],
        labels: Sequence[float],
        number: int,
        first: int,
        total: int,
    ) -> None:
        super().__init__(source, rows, labels)
        self._number, self._first, self.total = number, first, total

    def entries(self, row: int, groups: Groups) -> list[Entry]:
        source, number = self.source, int(self.rows[row])
        columns = (*source.images, source.caption)
        group = groups.get(source.path, self._number, columns)
        values, position = group.row(number - self._first), f"row {number}"
        quiet = SkipLog(warns=False).begin(source.path)  # it was checked when it was listed
        captions = captions_of(values[source.caption], position, quiet, "all")
        return source.entries(values, position, captions)

    def lasting(self, row: int, groups: Groups) -> list[Entry]:
        columns = (*self.source.images, self.source.caption)
        place = self.source.path, self._number, columns, int(self.rows[row]) - self._first
        return [
            replace(entry, blob=RowBlob(*place, name, groups))
            if isinstance(entry.blob, BytesBlob)
            else entry
            for name, entry in zip(self.source.images, self.entries(row, groups), strict=True)
        ]


def list_pairs(config: PairDataConfig, key: str, log: SkipLog) -> Iterator[PairShard]:
    """Yield the shards that have usable pairs, in file order."""
    check_pairs(key, config)
    base = Path(config.base_path).expanduser() if config.base_path is not None else None
    if config.base_path is not None and is_address(config.base_path):
        check_address(f"{key}.base_path", config.base_path)
    if base is not None and not base.is_dir():
        raise ValueError(f"{key}.base_path={config.base_path!r} is no folder; give the images' own")
    for file in _files(str(config.path), key):
        table = open_table(file)
        source = _source(table, base or file.parent, config, key)
        skips, ties = log.begin(file), config.ties == "keep"
        held = [_holds_bytes(table, name, key) for name in source.images]
        if any(held):
            yield from _list_groups(source, _usable(table, source, (), skips, ties=ties))
        elif base is None and is_address(str(config.path)):
            raise ValueError(
                f"{key}.path={config.path} is a table in a store that names pictures, and these "
                f"are not on this machine; copy them here and give {key}.base_path=FOLDER"
            )
        else:
            rows = _usable(table, source, source.images, skips, ties=ties)
            yield from _list_files(source, rows, skips)


def _files(path: str, key: str) -> Sequence[Path]:
    folder = Path(path).expanduser()
    if not is_folder(folder):
        return find_files(path, f"{key}.path", WITH_COLUMNS)
    tables = [folder / name for name in FOLDER_TABLES if (folder / name).is_file()]
    if not tables:
        raise ValueError(
            f"{key}.path={path!r} holds no {', '.join(FOLDER_TABLES)}; give a table of pairs, or a "
            f"pattern of one split's files, such as {folder}/train-*.parquet"
        )
    return tables[:1]


def _source(table: Table, base: Path, config: PairDataConfig, key: str) -> _Source:
    def choose(columns: Sequence[str], setting: str, holds: str) -> list[str]:
        return [table.choose((name,), f"{holds} (set {key}.{setting})") for name in columns]

    images = choose(config.image_columns, "image_columns", "pictures")
    labels = choose(config.label_columns, "label_columns", "labels")
    wanted = Columns(caption=config.caption_column).captions
    caption = table.choose(wanted, f"captions (set {key}.caption_column)")
    return _Source(table.path, base, images, labels, caption)


def _holds_bytes(table: Table, column: str, key: str) -> bool:
    kind = table.kind(column)
    if kind is None or is_text(kind):
        return False
    if not kind.startswith(_BYTES) and not (kind.startswith("struct<") and "bytes: " in kind):
        raise ValueError(
            f"column {column!r} of {table.path} holds {kind}; name columns of bytes, of paths, or "
            f"of both in {key}.image_columns"
        )
    return True


def _list_files(
    source: _Source, rows: Iterator[_UsableRow], skips: FileSkips
) -> Iterator[PairShard]:
    numbers: list[int] = []
    labels: list[float] = []
    pairs: list[list[Entry]] = []
    for row in rows:
        try:
            pairs.append(source.entries(row.fields, row.position, row.captions))
        except BrokenRowError as error:
            skips.add(error.reason, error.entry.position)
            continue
        numbers.append(row.number)
        labels.append(row.label)
    if pairs:
        yield _Listed(source, numbers, labels, pairs)


def _list_groups(source: _Source, rows: Iterator[_UsableRow]) -> Iterator[PairShard]:
    sizes = group_sizes(source.path)
    for number, (_, size) in enumerate(sizes):
        if size > LARGEST_GROUP:
            raise ValueError(
                f"row group {number} of {source.path} has {size:,} bytes, which are read at "
                "once; write the file again with fewer rows in each, such as row_group_size=100"
            )
    ends = list(accumulate(count for count, _ in sizes))
    numbers: list[list[int]] = [[] for _ in sizes]
    labels: list[list[float]] = [[] for _ in sizes]
    group = 0
    for row in rows:
        while row.number >= ends[group]:
            group += 1
        numbers[group].append(row.number)
        labels[group].append(row.label)
    for group, (end, (count, _)) in enumerate(zip(ends, sizes, strict=True)):
        if numbers[group]:
            yield _Group(source, numbers[group], labels[group], group, end - count, count)


def _usable(
    table: Table, source: _Source, images: Sequence[str], skips: FileSkips, *, ties: bool
) -> Iterator[_UsableRow]:
    """Yield the rows that have good labels and captions; ties only if they are kept."""
    names = list(dict.fromkeys((*images, *source.labels, source.caption)))
    for number, (position, row) in enumerate(table.rows(names, skips)):
        where = f"line {position}" if isinstance(position, int) else position
        values = [row[name] for name in source.labels]
        label, fault = _label(values)
        if not fault and label == 0.5 and not ties:
            skips.add("tie (ties=keep keeps it)", where, quiet=True)
        elif fault:
            shown = zip(source.labels, (repr(value)[:_SHOWN] for value in values), strict=True)
            skips.add(fault, f"{where} ({', '.join(f'{n}={v}' for n, v in shown)})")
        elif captions := captions_of(row[source.caption], where, skips, "all"):
            yield _UsableRow(number, where, row, label, captions)


def _label(values: Sequence[Any]) -> tuple[float, str]:
    """Return the probability that the first picture is preferred, and what is wrong with it."""
    try:
        first, second = map(float, values)
    except (TypeError, ValueError, OverflowError):
        return 0.0, "labels that are no numbers"
    if not (0 <= first <= 1 and 0 <= second <= 1):
        return 0.0, "labels outside 0 to 1"
    if not math.isclose(first + second, 1, abs_tol=1e-3):
        return 0.0, "labels that do not sum to 1"
    return first, ""


def _blob(value: object, base: Path, where: str) -> Blob | None:
    """Return a picture: of bytes, a path, or Hugging Face's pair of both."""
    if isinstance(value, Mapping):
        data = value.get("bytes")
        value = value.get("path") if data is None else data
    if isinstance(value, bytes):
        return BytesBlob(value)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return None
    return FileBlob(inside(base, value, where))
