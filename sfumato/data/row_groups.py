"""Row groups of parquet files, of which a few are in memory at a time."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, final

from sfumato.data.entries import Blob
from sfumato.data.prepared.tars import LruCache
from sfumato.data.tables import UnreadableTableError, arrow_values


@final
class RowGroup:
    """Rows of a parquet file, in memory as they lie in the file."""

    def __init__(self, path: Path, number: int, columns: Sequence[str]) -> None:
        """Read some columns of a row group, from any thread.

        Raises:
            UnreadableTableError: the file is missing or damaged.
        """
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(path) as file:
                self._rows: Any = file.read_row_group(number, columns=list(columns))
        except (pyarrow.ArrowException, OSError) as error:
            raise UnreadableTableError(
                f"row group {number} of {path} cannot be read ({error}); write the file again"
            ) from None

    def __len__(self) -> int:
        return self._rows.num_rows

    def row(self, index: int) -> Mapping[str, Any]:
        """Return the fields of a row."""
        one = self._rows.slice(index, 1)
        return {name: arrow_values(one.column(name))[0] for name in one.column_names}


Groups: TypeAlias = LruCache[RowGroup]


@final
@dataclass(frozen=True, slots=True)
class RowBlob(Blob):
    """Bytes in a row group, which is read unless it is in memory.

    Attributes:
        path: of the file.
        number: of the row group.
        columns: that are read of it.
        row: in the row group.
        column: holds the bytes, or Hugging Face's pair of bytes and path.
    """

    path: Path
    number: int
    columns: tuple[str, ...]
    row: int
    column: str
    groups: Groups

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        value = self.groups.get(self.path, self.number, self.columns).row(self.row)[self.column]
        yield io.BytesIO((value["bytes"] if isinstance(value, Mapping) else value) or b"")


def group_sizes(path: Path) -> list[tuple[int, int]]:
    """Return rows and bytes of each row group of a parquet file."""
    from pyarrow import parquet

    about = parquet.read_metadata(path)
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    return [(group.num_rows, group.total_byte_size) for group in groups]
