"""A path told apart: image folder, metadata file, WebDataset tars, Hugging Face dataset."""

import os
from collections.abc import Iterator
from pathlib import Path

from sfumato.data.arrow import is_dataset, list_dataset
from sfumato.data.blobs import FileBlob
from sfumato.data.decode import SUFFIXES
from sfumato.data.entries import Columns, Entry, MissingColumnError, caption_of
from sfumato.data.image_tar import list_tar
from sfumato.data.metadata import METADATA_SUFFIXES, list_metadata
from sfumato.data.prompts import find_shards
from sfumato.data.skips import SkipLog, Tally

# What looks like an image but is not read; it is counted rather than passed over.
_OTHER_SUFFIXES = frozenset({".tif", ".tiff", ".gif", ".avif", ".heic", ".jxl"})
# Hugging Face's imagefolder, and what DiffSynth's examples have.
_FOLDER_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.json", "metadata.parquet")


def list_source(path: str, base_path: str | None, columns: Columns, log: SkipLog) -> list[Entry]:
    """List the pictures with captions that a path stands for, in file order.

    Args:
        path: one of
            - a folder of images with captions in `NAME.txt` beside them, subfolders included,
              hidden names not; with a `metadata.csv` (jsonl, json, parquet) in it, only that
              is read;
            - a `.csv`, `.json`, `.jsonl` or `.parquet` file with columns of paths and captions;
            - WebDataset `.tar` files: one, a folder of them, a glob or a brace pattern;
            - a folder written by `datasets.save_to_disk`.
        base_path: where the paths in a table begin; None is the table's own folder.
        columns: which columns are read.
        log: where rows, members and files without caption or image are counted.

    Raises:
        ValueError: nothing of the kind is there, or it cannot be read with these settings.
    """
    if not path.strip():
        raise ValueError("the path of an image source is empty; name a folder, a file or a pattern")
    whole = Path(path).expanduser()
    base = Path(base_path).expanduser() if base_path is not None else None
    if base is not None and not base.is_dir():
        raise ValueError(f"base_path={base_path!r} is no folder; give the one of the images")
    if _exists(whole) and whole.is_dir():
        return _list_folder(whole, base, columns, log)
    if whole.suffix.lower() in METADATA_SUFFIXES and whole.is_file():
        return list(list_metadata(whole, base or whole.parent, columns, log))
    if not _exists(whole) and not any(letter in path for letter in "*?[{"):
        raise ValueError(f"{path!r} does not exist; check the path of the image source")
    if whole.suffix.lower() != ".tar":
        raise ValueError(
            f"{path!r} has the suffix {whole.suffix!r}; images are read from a folder, "
            f"{', '.join(METADATA_SUFFIXES)} or .tar"
        )
    return _list_tars(path, base, columns, log)


def _exists(path: Path) -> bool:
    # A pattern can be longer than any file name, and then asking is an error.
    try:
        return path.exists()
    except OSError:
        return False


def _list_folder(folder: Path, base: Path | None, columns: Columns, log: SkipLog) -> list[Entry]:
    if is_dataset(folder):
        return list(list_dataset(folder, base or folder, columns, log))
    for name in _FOLDER_METADATA:
        if (folder / name).is_file():
            return list(list_metadata(folder / name, base or folder, columns, log))
    if any(path.suffix.lower() == ".tar" for path in folder.iterdir()):
        return _list_tars(str(folder), base, columns, log)
    for value, name in ((base, "base_path"), (columns.image, "image_column")):
        if value is not None:
            raise ValueError(
                f"{name}={str(value)!r} was given, but {folder} holds images and no table; leave "
                "it out, or give a metadata file"
            )
    return list(_walk(folder, log.begin(folder)))


def _list_tars(path: str, base: Path | None, columns: Columns, log: SkipLog) -> list[Entry]:
    if base is not None:
        raise ValueError(f"base_path={str(base)!r} was given, but {path!r} are tars; leave it out")
    entries: list[Entry] = []
    missing: list[MissingColumnError] = []
    for tar in find_shards(path):
        try:
            entries += list_tar(tar, columns, log)
        except MissingColumnError as error:  # its members are counted; others may have captions
            missing.append(error)
    if missing and not entries:
        raise missing[0]
    return entries


def _walk(folder: Path, tally: Tally) -> Iterator[Entry]:
    """Yield the images below a folder; every folder is entered once, whatever links lead to it."""
    entered: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        tally.add("unreadable folder", str(error.filename))

    for root, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        place = Path(root).relative_to(folder)
        status = os.stat(root)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in entered:
            tally.add("folder met before (symbolic link)", str(place))
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                continue
            if suffix in SUFFIXES:
                yield from _with_caption(folder, place / name, tally)
            elif suffix in _OTHER_SUFFIXES:
                tally.add(f"format {suffix} is not read", str(place / name))


def _with_caption(folder: Path, place: Path, tally: Tally) -> Iterator[Entry]:
    try:
        text: bytes | None = (folder / place).with_suffix(".txt").read_bytes()
    except OSError:
        text = None
    caption = caption_of(text, str(place), tally)
    if caption is not None:
        yield Entry(folder, place.as_posix(), (caption,), FileBlob(folder / place))
