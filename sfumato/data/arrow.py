"""Arrow's files: Hugging Face datasets as `save_to_disk` writes them, and tables in parquet.

Both are read with pyarrow alone; it is imported only when there is such a file.
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, final

from sfumato.data.blobs import Blob, FileBlob
from sfumato.data.entries import Columns, Entry, caption_of, choose_column, inside
from sfumato.data.skips import SkipLog, Tally

_END = bytes.fromhex("ffffffff00000000")  # of a stream


@final
@dataclass(frozen=True, slots=True)
class ArrowBlob(Blob):
    """One value of a column of bytes, read from the mapped file."""

    column: Any  # pyarrow's array
    row: int

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open the value; nothing else of the file is read."""
        yield io.BytesIO(self.column[self.row].as_buffer())


def is_dataset(folder: Path) -> bool:
    """Tell whether `datasets.save_to_disk` wrote a folder."""
    one = all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))
    return one or (folder / "dataset_dict.json").is_file()


def list_dataset(folder: Path, base: Path, columns: Columns, log: SkipLog) -> Iterator[Entry]:
    """Yield the entries of a dataset in its order.

    The image column holds bytes, or paths inside `base`, or Hugging Face's pair of both.

    Raises:
        ValueError: a column or a file is not there, or there are several splits.
    """
    pyarrow = _import_pyarrow(folder)
    folder = _split(folder)
    tally = log.begin(folder)
    row = 0
    for file in _data_files(folder):
        with pyarrow.memory_map(str(file)) as mapped:
            for batch in _batches(mapped, file, tally):
                yield from _rows(batch, row, folder, base, columns, tally)
                row += batch.num_rows


def parquet_rows(path: Path, columns: Columns) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Return the names of a parquet file's columns, and its rows with the columns of interest.

    Raises:
        ValueError: it is damaged, or holds the pictures themselves.
    """
    pyarrow = _import_pyarrow(path)
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file ({error}); write it again") from None
    names = list(file.schema_arrow.names)
    wanted = [name for name in names if name in (*columns.images, *columns.captions)]
    for name in wanted:
        kind = file.schema_arrow.field(name).type
        if name in columns.images and not _is_text(kind):
            raise ValueError(
                f"column {name!r} of {path} holds {kind}, not paths; pictures inside parquet "
                "cannot be read one by one: load the file with `datasets`, call save_to_disk, and "
                "give that folder"
            )
    return names, _row_dicts(file, wanted, path, pyarrow.ArrowException)


def _row_dicts(file: Any, wanted: list[str], path: Path, damage: type[Exception]) -> Iterator[Any]:
    try:
        for batch in file.iter_batches(columns=wanted):
            yield from batch.to_pylist()
    except (damage, OSError) as error:
        raise ValueError(f"{path} is a damaged parquet file ({error}); write it again") from None


def _import_pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError(
            f"{path} is read with pyarrow, which is not installed; pip install 'sfumato[datasets]'"
        ) from None
    return pyarrow


def _split(folder: Path) -> Path:
    splits = folder / "dataset_dict.json"
    if not splits.is_file():
        return folder
    names = _read_field(splits, "splits")
    if len(names) != 1:
        raise ValueError(
            f"{folder} holds the splits {', '.join(names) or 'none'}; give one of them as the "
            f"path, such as {folder / (names[0] if names else 'train')}"
        )
    return folder / names[0]


def _data_files(folder: Path) -> list[Path]:
    listed = _read_field(folder / "state.json", "_data_files")
    files = [folder / entry["filename"] for entry in listed]
    for file in files:
        if not file.is_file():
            raise ValueError(f"the dataset {folder} lacks its file {file.name}; copy it again")
    return files


def _read_field(file: Path, name: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error!r}); save the dataset again") from None


def _batches(mapped: Any, file: Path, tally: Tally) -> Iterator[Any]:
    """Yield the batches of one file; those behind damage are lost and counted as one."""
    import pyarrow

    # Arrow takes a stream that stops between two batches for a whole one.
    whole = bytes(mapped.read_at(len(_END), max(0, mapped.size() - len(_END)))) == _END
    try:
        yield from pyarrow.ipc.open_stream(mapped)
    except (pyarrow.ArrowInvalid, OSError):
        whole = False
    if not whole:
        tally.add("truncated or damaged Arrow file", f"({file.name})")


def _rows(
    batch: Any, first: int, folder: Path, base: Path, columns: Columns, tally: Tally
) -> Iterator[Entry]:
    names = list(batch.schema.names)
    image_column = choose_column(columns.images, names, folder, "images")
    images = batch.column(image_column)
    captions = batch.column(choose_column(columns.captions, names, folder, "captions")).to_pylist()
    data, paths = _parts(images, image_column, folder)
    for number, caption in enumerate(captions):
        place = f"row {first + number}"
        blob: Blob | None = None
        if data is not None and data[number].is_valid:
            blob = ArrowBlob(data, number)
        elif paths is not None and paths[number].is_valid:
            blob = FileBlob(inside(base, paths[number].as_py(), f"{folder} {place}"))
        if blob is None:
            tally.add(f"no image in column {image_column!r}", place)
            continue
        text = caption_of(caption, place, tally)
        if text is not None:
            yield Entry(folder, place, (text,), blob)


def _parts(images: Any, name: str, folder: Path) -> tuple[Any, Any]:
    """Return the bytes and the paths of a column of images, None for what it does not hold."""
    kind = images.type
    if _is_text(kind):
        return None, images
    if _is_bytes(kind):
        return images, None
    fields = [kind.field(i).name for i in range(kind.num_fields)]
    if "bytes" in fields and "path" in fields:
        # flatten, unlike field, carries a missing image over to its parts.
        parts = dict(zip(fields, images.flatten(), strict=True))
        return parts["bytes"], parts["path"]
    raise ValueError(
        f"column {name!r} of {folder} holds {kind}; give one of images, bytes or paths"
    )


def _is_text(kind: Any) -> bool:
    text = ("string", "large_string", "string_view")
    return str(kind).startswith((*text, *(f"dictionary<values={name}" for name in text)))


def _is_bytes(kind: Any) -> bool:
    return str(kind) in {"binary", "large_binary", "binary_view"}
