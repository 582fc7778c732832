"""Containers of rows to pack, listed one at a time, without any picture in memory.

What a worker packs of a container is a part of its rows, which can be pickled.
"""

import abc
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, final

from sfumato.config import PackConfig
from sfumato.data.copies import version_of
from sfumato.data.entries import Columns, Entry, FileBlob, is_utf8, lines_of
from sfumato.data.left_out import SkipLog
from sfumato.data.paths import is_tar
from sfumato.data.prepared.folder import SHARDS
from sfumato.data.prepared.format import PreparedError
from sfumato.data.sources import find_files_of, list_source
from sfumato.data.webdataset import list_tar
from sfumato.files import digest
from sfumato.preparation.download import DOWNLOAD, read_download

# Reasons that count a file or a member of a download, whose lost rows are counted otherwise.
_EVENTS = (
    "truncated or damaged tar",
    "member behind the end of a tar",
    "not a tar",
    "unreadable file",
    "second member of the same name",
)


@dataclass(frozen=True)
class Listing:
    """The rows of a container, with columns fit for JSON, and what was left out, by reason."""

    rows: Sequence[Entry]
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class Part:
    """Some rows of a container.

    Attributes:
        name: of the container, as its `identity`.
        first: number of the first row in the container.
        last: number of the row behind the last.
        newest: when the newest of the container's files was changed, in ns.
        read: lists the rows.
    """

    name: str
    identity: str
    first: int
    last: int
    newest: int
    read: Callable[[], Sequence[Entry]]


class Container(abc.ABC):
    """A tar, or a whole source of another kind.

    Attributes:
        name: the same wherever the container lies.
        identity: changes when the rows that it lists change.
        newest: when the newest of its files was changed, in ns.
    """

    name: str
    identity: str
    newest: int

    @abc.abstractmethod
    def listed(self) -> Listing:
        """Return all rows."""

    @abc.abstractmethod
    def part(self, first: int, last: int) -> Part:
        """Return rows of the listing."""


@final
@dataclass(frozen=True)
class Whole(Container):
    """A source that was listed at once, and stays in memory."""

    name: str
    identity: str
    newest: int
    listing: Listing

    def listed(self) -> Listing:
        return self.listing

    def part(self, first: int, last: int) -> Part:
        read = partial(tuple, self.listing.rows[first:last])
        return Part(self.name, self.identity, first, last, self.newest, read)


@final
@dataclass(frozen=True)
class Tar(Container):
    """A tar, listed when it is asked for.

    Attributes:
        expected: how many samples a downloaded tar had when it was written. Its entries are
            sorted by key, as threads wrote them in the order in which they came.
    """

    name: str
    identity: str
    newest: int
    path: Path
    config: PackConfig
    expected: int | None = None

    def listed(self) -> Listing:
        return _list_one(self.path, self.config, self.expected, SkipLog())

    def part(self, first: int, last: int) -> Part:
        read = partial(self._rows, first, last)
        return Part(self.name, self.identity, first, last, self.newest, read)

    def _rows(self, first: int, last: int) -> Sequence[Entry]:
        """Return some rows; nobody is warned again of what is left out.

        Raises:
            PreparedError: they are not there, as on a machine that does not see the tar.
        """
        if not _listed or _listed[0][0] != self:  # shards of one tar come one after another
            log = SkipLog(warns=False)
            _listed[:] = [(self, _list_one(self.path, self.config, self.expected, log).rows)]
        rows = _listed[0][1][first:last]
        if len(rows) != last - first:
            _listed.clear()
            raise PreparedError(
                f"{self.path} gave {len(rows)} of its rows {first} to {last - 1} on "
                f"{socket.gethostname()}, and all when it was listed; check that each machine can "
                "read it, and run the same command again"
            )
        return rows


_listed: list[tuple[Tar, Sequence[Entry]]] = []  # the last tar, with its rows


def containers(config: PackConfig, further: Sequence[str], folder: Path) -> list[Container]:
    """Return the containers to pack, in order: those of `pack.path`, or of the download.

    Args:
        config: the source, and its columns.
        further: columns that were downloaded beside the caption.
        folder: the prepared folder.

    Raises:
        ValueError: nothing is there, or it cannot be read with these settings.
    """
    if config.path is None:
        return _downloaded(config, further, folder)
    if (folder / DOWNLOAD).is_dir():
        raise ValueError(
            f"pack.path={config.path!r} was given, but {folder} holds a download, which is packed "
            "instead; leave pack.path out, or set out to another folder"
        )
    path, shards = Path(config.path).expanduser(), (folder / SHARDS).resolve()
    if path.resolve() == shards or shards in path.resolve().parents:
        raise ValueError(
            f"pack.path={config.path!r} lies in {shards}, where the tars of out = {folder} are "
            "written; give another out"
        )
    files = find_files_of(config.path, "pack.path")
    if files and all(is_tar(file) for file in files) and config.base_path is None:
        return [_tar(tar, config) for tar in files]
    return [_whole(config, path.name)]


def _whole(config: PackConfig, name: str) -> Container:
    """List a source that is no set of tars at once; its identity is all that was listed."""
    log, columns = SkipLog(), _columns(config)
    entries = list_source(str(config.path), config.base_path, columns, log, "pack.path")
    listing = Listing([_row(entry, config) for entry in entries], log.counts())
    files = [_stamp(row) for row in listing.rows]
    content = [
        [row.position, row.captions[0], row.captions[1:], row.columns, size]
        for row, (size, _) in zip(listing.rows, files, strict=True)
    ]
    newest = max([time for _, time in files], default=0)
    return Whole(name, digest([content, listing.dropped]), newest, listing)


def _downloaded(config: PackConfig, further: Sequence[str], folder: Path) -> list[Container]:
    if not (folder / DOWNLOAD).is_dir():
        raise ValueError(
            f"there is nothing to pack: pack.path is not given, and {folder} holds no download; "
            "give pack.path=FOLDER, or download.table=TABLE"
        )
    known = {*config.columns, *config.captions}
    columns = [*config.columns, *(name for name in further if name not in known)]
    config = replace(config, columns=columns)
    tars = []
    for stats in read_download(folder)[1]:
        tar = folder / DOWNLOAD / f"{stats.number:05d}.tar"
        if not tar.is_file():
            raise PreparedError(f"{tar} is missing; run the stage download again, which fetches it")
        tars.append(_tar(tar, config, stats.successes))
    return tars


def _tar(tar: Path, config: PackConfig, expected: int | None = None) -> Tar:
    status = tar.stat()
    identity = f"{status.st_size}{version_of(tar)}"
    return Tar(tar.name, identity, _changed(status), tar, config, expected)


def _list_one(tar: Path, config: PackConfig, expected: int | None, log: SkipLog) -> Listing:
    every = list(list_tar(tar, _columns(config), log))
    paths = ((entry, PurePosixPath(entry.position)) for entry in every)
    entries = [entry for entry, path in paths if not path.is_absolute() and ".." not in path.parts]
    dropped = log.counts()
    dropped["member that leaves its folder"] = len(every) - len(entries)
    if expected is not None:
        entries.sort(key=lambda entry: (len(entry.position), entry.position))
        for event in _EVENTS:
            dropped.pop(event, None)
        lost = expected - len(entries) - dropped.total()
        dropped["lost in a damaged tar"] = max(0, lost)
    rows = [_row(entry, config) for entry in entries]
    return Listing(rows, {reason: n for reason, n in sorted(dropped.items()) if n})


def _columns(config: PackConfig) -> Columns:
    further = tuple(dict.fromkeys([*config.captions, *config.columns]))
    return Columns(config.image_column, config.caption_column, further, config.caption_lines)


def _row(entry: Entry, config: PackConfig) -> Entry:
    """Return an entry with all its captions, and columns fit for JSON."""
    captions = dict.fromkeys(entry.captions)
    for name in config.captions:
        value = entry.columns.get(name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.strip() and is_utf8(text):
                captions |= dict.fromkeys(lines_of(text.strip(), config.caption_lines))
    fields = {name: _plain(entry.columns.get(name)) for name in config.columns}
    return replace(entry, captions=tuple(captions), columns=fields)


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


def _stamp(entry: Entry) -> tuple[int | str, int]:
    """Return size, with version, and time of change of a picture's file; -1 is a missing file."""
    file = entry.blob.path if isinstance(entry.blob, FileBlob) else entry.container
    try:
        status, version = file.stat(), version_of(file)
    except (OSError, ValueError):  # ValueError is a NUL in the path
        return -1, 0
    return f"{status.st_size}{version}" if version else status.st_size, _changed(status)


def _changed(status: os.stat_result) -> int:
    """Return when a file was changed, in ns: a time that was set to the future does not count."""
    return min(status.st_mtime_ns, status.st_ctime_ns)
