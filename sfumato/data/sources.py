"""Sources of images with captions: folder, table, WebDataset tars or Hugging Face dataset."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sfumato.data.copies import copy_of_folder, is_folder_address
from sfumato.data.decode import SUFFIXES
from sfumato.data.entries import (
    Blob,
    Columns,
    Entry,
    FileBlob,
    MissingColumnError,
    captions_of,
    inside,
)
from sfumato.data.left_out import FileSkips, SkipLog
from sfumato.data.paths import find_files, is_folder, is_tar
from sfumato.data.saved_dataset import SavedDataset, is_dataset
from sfumato.data.store import is_address
from sfumato.data.tables import WITH_COLUMNS, Table, is_text, open_table
from sfumato.data.webdataset import list_tar

_LEAVES = "link that leaves the folder (copy what it leads to instead)"
_LONGEST = 2**20  # bytes of a caption's file
# What lies beside pictures and is none; all other files are counted.
_SIDECARS = frozenset(
    {
        *(".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml"),
        *(".md", ".html", ".log", ".ini", ".cfg", ".db", ".py", ".sh", ".npz", ".npy"),
        *(".safetensors", ".lock"),
    }
)
_NOTICES = frozenset({"readme", "license", "licence", "notice", "makefile", "requirements"})
_REPEATED = re.compile(r"\d+_.+")  # kohya's trainers take 10_cat ten times
_IN_PARQUET = (
    "pictures inside parquet cannot be read one by one: load the file with `datasets`, call "
    "save_to_disk, and give that folder"
)
_NAMED = 5
# Hugging Face's imagefolder, and what DiffSynth's examples have.
FOLDER_TABLES = tuple(
    f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".json", ".parquet", ".tsv")
)


def list_source(
    path: str,
    base_path: str | None,
    columns: Columns,
    log: SkipLog,
    key: str = "path",
) -> list[Entry]:
    """List the pictures with captions that a path stands for, in file order.

    Args:
        path: one of
            - a folder of images with captions in `NAME.txt` beside them, subfolders included,
              hidden names not; with a `metadata.csv` (jsonl, json, parquet, tsv) in it, or in a
              subfolder if no image has a `NAME.txt`, only that is read;
            - a table (`WITH_COLUMNS`) with columns of paths and captions, or a pattern of them;
            - WebDataset `.tar` files: one, a folder of them, a glob or a brace pattern;
            - a folder written by `datasets.save_to_disk`;
            - such a folder, table or tar at an address in a store, copied whole to this machine.
        base_path: where the paths in a table begin; None is the table's own folder.
        columns: which columns are read.
        log: where rows, members and files without caption or image are counted.
        key: of the setting that holds the path, for messages.

    Raises:
        ValueError: nothing of the kind is there, or it cannot be read with these settings.
    """
    path = _here(path, key)
    folder, files = Path(path).expanduser(), find_files_of(path, key)
    base = Path(base_path).expanduser() if base_path is not None else None
    if base is not None and not base.is_dir():
        raise ValueError(f"base_path={base_path!r} is no folder; give the one of the images")
    if base is not None and any(is_tar(file) for file in files):
        raise ValueError(f"base_path={base_path!r} was given, but {path!r} are tars; leave it out")
    if files:
        if is_folder(folder) and is_tar(files[0]):
            _count_beside_tars(folder, log.begin(folder))
        entries = _list_files(files, base, columns, log)
        if base is None and is_address(path):
            _refuse_apart(path, key, entries)
        return entries
    if is_dataset(folder):
        dataset = SavedDataset(folder, base or folder)
        return list(_list_table(dataset, folder, columns, log))
    for value, name in (
        (base_path, "base_path"),
        (columns.image, "image_column"),
        (", ".join(columns.further) or None, "further captions or columns"),
    ):
        if value is not None:
            raise ValueError(
                f"{name}={value!r} was given, but {folder} holds images and no table; leave it "
                "out, or give a table"
            )
    return list(_walk(folder, columns, log.begin(folder)))


def find_files_of(path: str, key: str) -> tuple[Path, ...]:
    """List the tables and tars that a source of images stands for; none if it is another folder.

    Raises:
        ValueError: nothing is there, or a file has an unknown suffix.
    """
    path = _here(path, key)
    folder = Path(path).expanduser()
    if not path.strip() or not is_folder(folder):
        return find_files(path, key, (*WITH_COLUMNS, ".tar"))
    if is_dataset(folder):
        return ()
    tables = (folder / name for name in FOLDER_TABLES if (folder / name).is_file())
    if (table := next(tables, None)) is not None:
        return (table,)
    captioned, tables, parquet = _survey(folder)
    if any(is_tar(file) and not file.name.startswith(".") for file in folder.iterdir()):
        tars = find_files(path, key, (".tar",))
        if captioned is not None:
            raise ValueError(
                f"{key} = {path!r} holds both tars ({tars[0].name}) and pictures with captions "
                f"({captioned}); move one of them away, or give the tars as a pattern: {path}/*.tar"
            )
        return tars
    if captioned is not None:
        return ()
    if len(tables) > 1:
        named = ", ".join(str(table.relative_to(folder)) for table in tables[:_NAMED])
        raise ValueError(
            f"{key} = {path!r} holds a table of each split ({named}); give one of their folders"
        )
    if not tables and parquet is not None:
        raise ValueError(
            f"{key} = {path!r} holds parquet files such as {parquet}, and no pictures with "
            f"captions; {_IN_PARQUET}; or give a parquet table of paths itself"
        )
    return tuple(tables)


def _here(path: str, key: str) -> str:
    """Return a path; of a folder in a store that of its copy."""
    return str(copy_of_folder(path, key)) if is_folder_address(path) else path


def _refuse_apart(path: str, key: str, entries: Sequence[Entry]) -> None:
    """Refuse a table in a store whose pictures lie beside it: it alone was copied."""
    blob = entries[0].blob if entries else None
    if isinstance(blob, FileBlob) and not blob.path.exists():
        raise ValueError(
            f"{key} = {path} is a table in a store, and its pictures, such as {blob.path.name}, "
            "are not on this machine; copy them here and give base_path=FOLDER, or pack tars"
        )


def _survey(folder: Path) -> tuple[Path | None, list[Path], Path | None]:
    """Look for the first captioned picture of a folder.

    Returns:
        The picture; else the tables below the folder, one a folder, and the first parquet file.
    """
    tables: list[Path] = []
    parquet: Path | None = None
    for path, files in _folders(folder, SkipLog(warns=False).begin(folder)):
        names = set(files)
        if table := next((name for name in FOLDER_TABLES if name in names), None):
            tables.append(folder / path / table)
        for name in files:
            if _suffix(name) in SUFFIXES and f"{Path(name).stem}.txt" in names:
                return path / name, [], None
            if _suffix(name) == ".parquet" and parquet is None:
                parquet = path / name
    return None, tables, parquet


def _list_files(
    files: Sequence[Path], base: Path | None, columns: Columns, log: SkipLog
) -> list[Entry]:
    entries: list[Entry] = []
    missing: list[MissingColumnError] = []
    for file in files:
        if not is_tar(file):
            entries += _list_table(open_table(file), base or file.parent, columns, log)
            continue
        try:
            entries += list_tar(file, columns, log)
        except MissingColumnError as error:  # its members are counted; others may have captions
            missing.append(error)
    if missing and not entries:
        raise missing[0]
    return entries


def _list_table(table: Table, base: Path, columns: Columns, log: SkipLog) -> Iterator[Entry]:
    path, skips = table.path, log.begin(table.path)
    what = "image" if isinstance(table, SavedDataset) else "path"
    image = table.choose(columns.images, f"{what}s")
    caption = table.choose(columns.captions, "captions")
    for name in columns.further:
        table.choose((name,), "further captions or columns")
    kind = table.kind(image)
    if kind is not None and not is_text(kind):
        raise ValueError(f"column {image!r} of {path} holds {kind}, not paths; {_IN_PARQUET}")
    names = list(dict.fromkeys([image, caption, *columns.further]))
    for position, row in table.rows(names, skips):
        blob = row[image]
        if isinstance(blob, str) and blob.strip():
            line = f"line {position}" if isinstance(position, int) else position
            if "\0" in blob:
                skips.add(f"{what} with zero bytes", position)
                continue
            blob = FileBlob(inside(base, blob, f"{path} {line}"))
            name = os.path.relpath(blob.path, base)
        else:
            name = str(position)
        if not isinstance(blob, Blob):
            skips.add(f"no {what} in column {image!r}", position)
            continue
        captions = captions_of(row[caption], position, skips, columns.lines)
        if captions:
            yield Entry(path, name, captions, blob, columns.further_of(row))


def _home(folder: Path) -> Path:
    """Return the folder that links may not leave: the folder, or that of a hub's snapshots."""
    whole = folder.resolve()
    snapshots = next((path for path in whole.parents if path.name == "snapshots"), None)
    is_hub = snapshots is not None and (snapshots.parent / "blobs").is_dir()
    return snapshots.parent if snapshots is not None and is_hub else whole


def _walk(folder: Path, columns: Columns, skips: FileSkips) -> Iterator[Entry]:
    """Yield the images below a folder; count its other files."""
    home = _home(folder)
    for path, names in _folders(folder, skips):
        stems = {Path(name).stem for name in names if _suffix(name) not in _SIDECARS}
        pictures = [name for name in names if _suffix(name) in SUFFIXES]
        if pictures and _REPEATED.fullmatch((folder / path).name):
            remark = "folder of NUMBER_NAME, as kohya repeats it, is read once (see repeats)"
            skips.remark(remark, str(path))
        for name in names:
            suffix, where = _suffix(name), str(path / name)
            if suffix in SUFFIXES and _leaves(home, folder / path / name):
                skips.add(_LEAVES, where)
            elif suffix in SUFFIXES:
                yield from _with_caption(folder, home, path / name, columns, skips)
            elif suffix not in _SIDECARS:
                _count_other(name, where, skips)
            elif suffix == ".txt" and Path(name).stem not in stems:
                if Path(name).stem.lower() not in _NOTICES:
                    skips.add("caption without an image", where)
            elif suffix in {".csv", ".tsv", ".jsonl"}:
                skips.remark("table that is not read (to read it, give its path)", where)


def _folders(folder: Path, skips: FileSkips) -> Iterator[tuple[Path, Sequence[str]]]:
    """Yield each folder below one, with its files but hidden ones, in order.

    Every folder is entered once, whatever links lead to it; links that leave are counted.
    """
    home, entered = _home(folder), set[tuple[int, int]]()

    def unreadable(error: OSError) -> None:
        skips.add("unreadable folder", str(error.filename))

    for root, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        path = Path(root).relative_to(folder)
        status = os.stat(root)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in entered:
            skips.add("folder met before (symbolic link)", str(path))
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [name for name in folders if _leaves(home, Path(root) / name)]:
            skips.add(_LEAVES, str(path / name))
            folders.remove(name)
        yield path, sorted(name for name in files if not name.startswith("."))


def _count_beside_tars(folder: Path, skips: FileSkips) -> None:
    """Count the files of a folder of tars that are neither tars in it nor sidecars."""
    for path, names in _folders(folder, skips):
        for name in names:
            if _suffix(name) in SUFFIXES:
                skips.add("picture beside tars", str(path / name))
            elif _suffix(name) == ".tar" and path != Path():
                skips.add("tar in a subfolder", str(path / name))
            elif _suffix(name) not in {*_SIDECARS, ".tar"}:
                _count_other(name, str(path / name), skips)


def _count_other(name: str, where: str, skips: FileSkips) -> None:
    suffix = _suffix(name)
    if suffix or name.lower() not in _NOTICES:
        reason = f"format {suffix} is not read" if suffix else "file without a suffix is not read"
        skips.add(reason, where)


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _leaves(home: Path, file: Path) -> bool:
    """Say whether a file is a link that leads out of its source; loops are unreadable files."""
    try:
        target = file.resolve(strict=True) if file.is_symlink() else None
        homes = (home, file.parent.resolve())  # the folder itself may be a link
        return target is not None and not any(map(target.is_relative_to, homes))
    except (OSError, RuntimeError):
        return False


def _with_caption(
    folder: Path, home: Path, path: Path, columns: Columns, skips: FileSkips
) -> Iterator[Entry]:
    file, text = (folder / path).with_suffix(".txt"), None
    if _leaves(home, file):
        skips.add(f"caption: {_LEAVES}", str(path))
        return
    try:
        with FileBlob(file).open() as stream:
            text = stream.read(_LONGEST + 1)
    except FileNotFoundError:
        pass
    except OSError:
        skips.add("unreadable caption", str(path))
        return
    if text is not None and len(text) > _LONGEST:
        skips.add(f"caption above {_LONGEST:,} bytes", str(path))
        return
    if text is None and (folder / path).with_suffix(".caption").exists():
        skips.remark("captions in .caption are not read (rename them to .txt)", str(path))
    captions = captions_of(text, str(path), skips, columns.lines)
    if captions:
        yield Entry(folder, path.as_posix(), captions, FileBlob(folder / path))
