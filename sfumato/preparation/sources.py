"""What is packed: containers of rows, listed one at a time, without any picture in memory."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, final

from sfumato.config import PackConfig
from sfumato.data.blobs import FileBlob
from sfumato.data.entries import Columns, Entry, caption_of, choose_column, inside
from sfumato.data.image_sources import list_source
from sfumato.data.image_tar import list_tar
from sfumato.data.prepared.format import SHARDS, PreparedError
from sfumato.data.prompts import find_shards
from sfumato.data.skips import SkipLog
from sfumato.data.text_files import is_utf8
from sfumato.preparation.download import DOWNLOAD, download_bins, read_stats
from sfumato.preparation.files import digest
from sfumato.preparation.tables import SUFFIXES, column_names, read_rows
from sfumato.preparation.tar_objects import read_objects

# What a listing says of a file or of a member, where the rows behind it are counted otherwise.
_EVENTS = (
    "truncated or damaged tar",
    "not a tar",
    "unreadable file",
    "second member of the same name",
)
_TABLES = tuple(f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet"))


@dataclass(frozen=True, slots=True)
class Row:
    """An entry with what else its row holds: further captions, and columns fit for JSON."""

    entry: Entry
    captions: tuple[str, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """The rows of a container in their order, and those that ended before, by reason."""

    rows: Sequence[Row]
    dropped: Mapping[str, int]


@final
@dataclass(frozen=True)
class Container:
    """A tar, or a whole source of another kind.

    Attributes:
        name: the same wherever it lies.
        identity: another one if what it lists is.
        newest: when the newest of its files was changed, in ns.
        read: lists it.
    """

    name: str
    identity: str
    newest: int
    read: Callable[[], Listing]


def containers(config: PackConfig, further: Sequence[str], folder: Path) -> list[Container]:
    """Return what is packed, in order: `pack.path`, or what was downloaded.

    Args:
        further: columns that were downloaded beside the caption.

    Raises:
        ValueError: nothing is there, or it cannot be read with these settings.
    """
    if config.path is None:
        return _downloaded(config, further, folder)
    if (folder / DOWNLOAD).is_dir():
        raise ValueError(
            f"pack.path={config.path!r} was given, but {folder} holds a download, which is what is "
            "packed there; leave it out, or set out to another folder"
        )
    path = Path(config.path).expanduser()
    shards = (folder / SHARDS).resolve()
    if path.resolve() == shards or shards in path.resolve().parents:
        raise ValueError(
            f"pack.path={config.path!r} lies in {shards}, where the tars of out = {folder} are "
            "written; give another out"
        )
    if _is_tars(path):
        if config.base_path is not None:
            raise ValueError(
                f"pack.base_path={config.base_path!r} was given, but {config.path!r} are tars; "
                "leave it out"
            )
        tars = find_shards(config.path)
        return [_tar(tar, config, config.columns, in_order=True) for tar in tars]
    listing = _list_whole(config, path)
    files = [_stamp(row.entry) for row in listing.rows]
    content = [
        [row.entry.place, row.entry.captions[0], row.captions, row.columns, size]
        for row, (size, _) in zip(listing.rows, files, strict=True)
    ]
    newest = max([time for _, time in files], default=0)
    return [Container(path.name, digest([content, listing.dropped]), newest, lambda: listing)]


def _downloaded(config: PackConfig, further: Sequence[str], folder: Path) -> list[Container]:
    if not (folder / DOWNLOAD).is_dir():
        raise ValueError(
            f"there is nothing to pack: pack.path is not given, and {folder} holds no download; "
            "give pack.path=FOLDER, or download.table=TABLE"
        )
    download_bins(folder)
    columns = [
        *config.columns,
        *(n for n in further if n not in (*config.columns, *config.captions)),
    ]
    found = []
    for stats in read_stats(folder / DOWNLOAD):
        tar = folder / DOWNLOAD / f"{stats.number:05d}.tar"
        if not tar.is_file():
            raise PreparedError(f"{tar} is missing; run the stage download again, which fetches it")
        found.append(_tar(tar, config, columns, in_order=False, expected=stats.successes))
    return found


def _is_tars(path: Path) -> bool:
    if path.is_dir():
        tables = any((path / name).is_file() for name in (*_TABLES, "metadata.json", "state.json"))
        return not tables and any(file.suffix.lower() == ".tar" for file in path.iterdir())
    return path.suffix.lower() == ".tar"


def _tar(
    tar: Path,
    config: PackConfig,
    columns: Sequence[str],
    *,
    in_order: bool,
    expected: int | None = None,
) -> Container:
    status = tar.stat()
    read = partial(_list_one, tar, config, columns, in_order, expected)
    return Container(tar.name, str(status.st_size), status.st_mtime_ns, read)


def _list_one(
    tar: Path, config: PackConfig, columns: Sequence[str], in_order: bool, expected: int | None
) -> Listing:
    """List a tar.

    Args:
        in_order: as its members lie in it; False sorts them by key, where threads wrote them in
            the order in which they came.
        expected: how many samples it had when it was written.
    """
    log = SkipLog()
    entries = list(list_tar(tar, Columns(config.image_column, config.caption_column), log))
    dropped = _counts(log)
    inner = [entry for entry in entries if not _leaves(entry.place)]
    dropped["member that leaves its folder"] = len(entries) - len(inner)
    entries = inner
    if not in_order:
        entries.sort(key=lambda entry: (len(entry.place), entry.place))
    if expected is not None:
        for event in _EVENTS:
            dropped.pop(event, None)
        lost = expected - len(entries) - dropped.total()
        dropped["lost in a damaged tar"] = max(0, lost)
    objects: Mapping[str, Any] = {}
    if config.captions or columns:
        objects = read_objects(tar)
        there = {name: None for record in objects.values() for name in record}
        for name in (*config.captions, *columns) if entries else ():
            choose_column((name,), list(there), tar, "further captions or columns of pack")
    rows = [
        _row(entry, objects.get(_key(entry.place), {}), config.captions, columns)
        for entry in entries
    ]
    return Listing(rows, {reason: n for reason, n in sorted(dropped.items()) if n})


def _leaves(place: str) -> bool:
    return place.startswith("/") or ".." in PurePosixPath(place).parts


def _key(place: str) -> str:
    name = PurePosixPath(place)
    return str(name.with_name(name.name.partition(".")[0]))


def _list_whole(config: PackConfig, path: Path) -> Listing:
    log = SkipLog()
    if not (config.captions or config.columns):
        columns = Columns(config.image_column, config.caption_column)
        entries = list_source(str(config.path), config.base_path, columns, log)
        return Listing([Row(entry) for entry in entries], _counts(log))
    table = path
    if path.is_dir():
        table = next((path / name for name in _TABLES if (path / name).is_file()), path)
    if table.suffix.lower() not in SUFFIXES or not table.is_file():
        raise ValueError(
            "pack.captions and pack.columns are read from tars and from tables "
            f"({', '.join(SUFFIXES)}); {str(table)!r} is none: write it as one, or leave "
            "them out"
        )
    return Listing(list(_table_rows(table, config, log)), _counts(log))


def _table_rows(table: Path, config: PackConfig, log: SkipLog) -> Iterator[Row]:
    columns, names = Columns(config.image_column, config.caption_column), column_names(table)
    image = choose_column(columns.images, names, table, "image paths")
    caption = choose_column(columns.captions, names, table, "captions")
    base = Path(config.base_path).expanduser() if config.base_path else table.parent
    tally = log.begin(table)
    wanted = dict.fromkeys([image, caption, *config.captions, *config.columns])
    for place, row in read_rows(table, list(wanted), tally):
        name = row[image]
        if not isinstance(name, str) or not name.strip():
            tally.add(f"no path in column {image!r}", place)
            continue
        file = inside(base, name, f"{table} {place}")
        text = caption_of(row[caption], place, tally)
        if text is not None:
            entry = Entry(table, os.path.relpath(file, base), (text,), FileBlob(file))
            yield _row(entry, row, config.captions, config.columns)


def _row(
    entry: Entry, row: Mapping[str, Any], captions: Sequence[str], columns: Sequence[str]
) -> Row:
    texts = dict[str, None]()
    for name in captions:
        value = row.get(name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.strip() and is_utf8(text):
                texts[text.strip()] = None
    texts.pop(entry.captions[0], None)
    return Row(entry, tuple(texts), {name: _plain(row.get(name)) for name in columns})


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it; what it cannot hold becomes text, or null."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except TypeError:
        return str(value)
    except ValueError:
        return None
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, however deep
        return json.loads(text.encode(errors="replace"))
    return value


def _counts(log: SkipLog) -> Counter[str]:
    counts = Counter[str]()
    for skip in log.report().skips:
        counts[skip.reason] += skip.count
    return counts


def _stamp(entry: Entry) -> tuple[int, int]:
    """Return size and time of change of the file that an entry's picture lies in; -1 is none."""
    file = entry.blob.path if isinstance(entry.blob, FileBlob) else entry.container
    try:
        status = file.stat()
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns
