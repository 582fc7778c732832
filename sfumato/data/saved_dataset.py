"""Datasets that Hugging Face `datasets` saved to disk."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, final

from sfumato.data.entries import Blob, FileBlob, inside
from sfumato.data.left_out import FileSkips
from sfumato.data.tables import Row, Table, arrow_values

_END = bytes.fromhex("ffffffff00000000")  # of an Arrow stream
_AT_ONCE = 1000  # rows


@final
@dataclass(frozen=True, slots=True)
class _RowBlob(Blob):
    """The bytes of the image in one row of a dataset; its files are mapped into memory."""

    images: Any  # a datasets.Dataset of one column that gives Arrow's tables
    row: int

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open the value; no other row is read."""
        data, _ = self.images[self.row].column(0).chunk(0).flatten()
        yield io.BytesIO(data[0].as_buffer())


def is_dataset(folder: Path) -> bool:
    """Tell whether `datasets.save_to_disk` wrote a folder."""
    one = all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))
    return one or (folder / "dataset_dict.json").is_file()


@final
class SavedDataset(Table):
    """A dataset; the first column that is read holds images, whose values are blobs.

    An image is bytes, or a path inside `base`, or Hugging Face's pair of both.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        super().__init__(folder)
        self._base = base

    @cached_property
    def _dataset(self) -> Any:
        return _load(self.path)

    def _read_names(self) -> Iterator[str]:
        yield from self._dataset.column_names

    def _read_rows(self, columns: Sequence[str], skips: FileSkips) -> Iterator[Row]:
        image, *others = columns
        undecoded = _undecoded(self._dataset, image, self.path)
        rows = undecoded.select_columns(list(columns)).with_format("arrow")
        images, number = rows.select_columns([image]), 0
        for table in rows.iter(_AT_ONCE):
            for batch in table.to_batches():
                blobs = self._blobs(batch.column(image), images, number)
                further = [arrow_values(batch.column(name)) for name in others]
                for row in zip(blobs, *further, strict=True):
                    yield f"row {number}", dict(zip(columns, row, strict=True))
                    number += 1

    def _blobs(self, column: Any, images: Any, first: int) -> Iterator[Blob | None]:
        # flatten, unlike field, carries a missing image over to its parts.
        data, paths = column.flatten()
        for index in range(len(column)):
            if data[index].is_valid:
                yield _RowBlob(images, first + index)
            elif paths[index].is_valid:
                row = f"{self.path} row {first + index}"
                yield FileBlob(inside(self._base, paths[index].as_py(), row))
            else:
                yield None


def _load(folder: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{folder} is read with Hugging Face datasets, which is not installed; pip install "
            "'sfumato[datasets]'"
        ) from None
    _refuse_truncated(folder)
    try:
        dataset = datasets.load_from_disk(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the dataset {folder} cannot be read ({error}); copy it again, or save it again"
        ) from error
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    splits = [str(name) for name in dataset]
    if len(splits) != 1:
        raise ValueError(
            f"{folder} holds the splits {', '.join(splits) or 'none'}; give one of them as the "
            f"path, such as {folder / (splits or ['train'])[0]}"
        )
    return next(iter(dataset.values()))


def _refuse_truncated(folder: Path) -> None:
    """Refuse a file that was cut off: Arrow takes one that stops between two batches for whole."""
    for path in sorted(folder.rglob("*.arrow")):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - len(_END)))
            if file.read() != _END:
                raise ValueError(f"{path} is truncated or damaged; copy the dataset again")


def _undecoded(dataset: Any, image: str, folder: Path) -> Any:
    """Return the dataset with its images as pairs of bytes and path."""
    import datasets
    import pyarrow

    try:
        return dataset.cast_column(image, datasets.Image(decode=False))
    except (TypeError, ValueError, pyarrow.ArrowException):
        raise ValueError(
            f"column {image!r} of {folder} holds {dataset.features[image]}; give one of images, "
            "bytes or paths"
        ) from None
