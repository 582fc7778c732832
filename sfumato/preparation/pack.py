"""Stage pack: rows to uniform tars of N samples; every picture is decoded once, here.

Each tar covers a contiguous range of rows: from the end of the previous tar to just before the
good row after its N-th. It depends on the rows only, so an interrupted run recognises finished
tars.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, final

from sfumato.config import DownloadConfig, PackConfig
from sfumato.data.ahead import ahead
from sfumato.data.decode import Bounds, RefusedImageError, read_rgb, read_size
from sfumato.data.entries import Blob, Entry
from sfumato.data.left_out import tally
from sfumato.data.prepared.folder import UNFINISHED, PreparedFolder
from sfumato.data.prepared.format import Member, PreparedError, TarRecord, write_record
from sfumato.files import digest, new_file, sha256_of
from sfumato.preparation.sources import Container, containers
from sfumato.preparation.tars import (
    Sample,
    claim,
    count_written,
    forget_others,
    is_ours,
    write_tar,
)
from sfumato.preparation.url_table import further_columns

_MADE_BY = 1  # raised when the same rows are to become other tars
_OURS = re.compile(r"\d{6,}\.(tar|json)")
_AHEAD = 4  # pictures in memory for each thread
# Bytes of a file in memory: those of a pixel at most, and of what stands beside the pixels.
_LARGEST_PIXEL, _BESIDE = 8, 2**27
_MAGIC = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"BM", "bmp"))

# A container and a row of it, from 1; row 0 stands for what listing the container left out.
Position = tuple[int, int]
# What became of a row: a decoded picture, or reasons with their counts.
Judged = tuple[Position, Sample | Mapping[str, int]]


@final
@dataclass(frozen=True, slots=True)
class _BytesBlob(Blob):
    data: bytes

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        yield BytesIO(self.data)


def pack(config: PackConfig, download: DownloadConfig, folder: Path) -> dict[str, int]:
    """Write the tars that are missing, and return the count of rows in each bin.

    Raises:
        ValueError: the source cannot be read, or has no good picture.
        PreparedError: the disk is full.
    """
    # A download is packed with the columns that it has, without naming them again.
    further = download.columns or ([] if config.path else further_columns(folder))
    source = containers(config, further, folder)
    prepared = PreparedFolder(folder)
    _refuse_foreign(prepared.shards)
    names: set[str] = set()
    bins: list[Mapping[str, int]] = []
    start, first = (0, 0), 0
    packer = _Packer(config, source, prepared, further)
    while start[0] < len(source):
        name = f"{len(names):06d}"
        record = packer.known(name, start, first) or packer.make(name, start, first)
        names.add(name)
        bins.append(record.dropped)
        start, first = record.ends, first + len(record.samples)
    forget_others(prepared.shards, names)
    (prepared.shards / UNFINISHED).unlink(missing_ok=True)
    return tally(first, bins)


@final
class _Packer:
    """Make tars one after another; rows are judged ahead of the one that is written."""

    def __init__(
        self,
        config: PackConfig,
        source: Sequence[Container],
        folder: PreparedFolder,
        further: Sequence[str],
    ) -> None:
        self._config, self._source, self._folder = config, source, folder
        self._settings = [_MADE_BY, config.samples_per_shard, config.max_pixels,
                          config.image_column, config.caption_column, config.captions,
                          config.columns, *further]  # fmt: skip
        if config.caption_lines != "first":
            self._settings.append(["caption_lines", config.caption_lines])
        self._judged: Iterator[Judged] = iter(())
        self._next: Judged | None = None  # a good row, which begins the next tar
        self._end: Position = (len(source), 0)

    def known(self, name: str, start: Position, first: int) -> TarRecord | None:
        """Return the record of a tar that exists and was packed from the same rows."""
        try:
            record = self._folder.tar_record(name)
        except PreparedError:
            return None
        tar = self._folder.tar(name)
        written = tar.with_suffix(".json").stat().st_mtime_ns
        exists = tar.is_file() and tar.stat().st_size == record.bytes
        fresh = all(each.newest <= written for each in self._range(start, record.ends))
        same = record.made_of == self._made_of(record, start, first)
        return record if exists and fresh and same else None

    def make(self, name: str, start: Position, first: int) -> TarRecord:
        """Write a tar, and then its record.

        Raises:
            ValueError: no row is good.
        """
        if self._next is None or self._next[0] != start:
            # Rows come in order, whichever thread finishes first.
            judge = partial(_judged, bounds=Bounds(1, self._config.max_pixels))
            workers = self._config.workers
            self._judged = ahead(judge, self._rows(start), workers, _AHEAD * workers)
            self._next = None
        tar = self._folder.tar(name)
        path, dropped = tar.with_suffix(".json"), Counter[str]()
        with new_file(tar, failure=PreparedError) as beside:
            members = write_tar(beside, first, self._take(dropped))
            if not members:
                faults = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())
                raise ValueError(
                    f"nothing of {self._config.path or 'what was downloaded'} can be packed: "
                    f"{faults or 'there is no picture with a caption'}"
                )
            size, sha256 = beside.stat().st_size, sha256_of(beside)
            claim(path)
            (tar.parent / UNFINISHED).touch()
            path.unlink(missing_ok=True)  # it may be the record of another tar of this name
        ends = self._end if self._next is None else self._next[0]
        bins = dict(sorted(dropped.items()))
        record = TarRecord(name, size, sha256, "", tuple(members), bins, ends)
        record = replace(record, made_of=self._made_of(record, start, first))
        write_record(path, record)
        return record

    def _take(self, dropped: Counter[str]) -> Iterator[Sample]:
        """Yield the next N good rows; count the bad ones up to the good row after the N-th."""
        taken = 0
        while judged := self._next or next(self._judged, None):
            self._next = None
            _, result = judged
            if not isinstance(result, Sample):
                dropped.update(result)
                continue
            if taken == self._config.samples_per_shard:
                self._next = judged
                return
            taken += 1
            yield result

    def _rows(self, start: Position) -> Iterator[tuple[Position, Entry | Mapping[str, int]]]:
        """Yield the rows from a position on, and what listing a container left out."""
        for number in range(start[0], len(self._source)):
            listing = self._source[number].read()
            begin = start[1] if number == start[0] else 0
            if begin == 0 and listing.dropped:
                yield (number, 0), listing.dropped
            for row in range(max(1, begin), len(listing.rows) + 1):
                yield (number, row), listing.rows[row - 1]

    def _range(self, start: Position, ends: Position) -> Sequence[Container]:
        return self._source[start[0] : ends[0] + 1]

    def _made_of(self, record: TarRecord, start: Position, first: int) -> str:
        parts = [(each.name, each.identity) for each in self._range(start, record.ends)]
        pictures = [member.sha256 for member in record.samples]
        # Rows may have been added after the row that was the last.
        position = [first, start, record.ends, record.ends == self._end]
        return digest([self._settings, position, parts, pictures, dict(record.dropped)])


def _judged(row: tuple[Position, Entry | Mapping[str, int]], bounds: Bounds) -> Judged:
    """Judge a row by its picture; what a listing left out is judged already."""
    position, entry = row
    if not isinstance(entry, Entry):
        return position, entry
    try:
        return position, _look_at(entry, bounds)
    except RefusedImageError as error:
        return position, {str(error): 1}
    except OSError:
        return position, {"unreadable file": 1}


def _look_at(entry: Entry, bounds: Bounds) -> Sample:
    """Decode a picture, for its size and to know that it is whole; keep its bytes."""
    height, width = read_size(entry.blob, bounds)
    most = _LARGEST_PIXEL * height * width + _BESIDE
    with entry.blob.open() as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise RefusedImageError("file far larger than its picture")
    picture = read_rgb(_BytesBlob(data), bounds)
    suffix = next(suffix for magic, suffix in _MAGIC if data.startswith(magic))
    sha256, columns = hashlib.sha256(data).hexdigest(), dict(entry.columns)
    size = (picture.height, picture.width)
    return Sample(data, Member("", suffix, 0, len(data), entry.captions, *size, sha256, columns))


def _refuse_foreign(shards: Path) -> None:
    """Refuse a folder with files that no packing wrote: packing could replace them."""
    paths = sorted(shards.glob("[!.]*"))
    foreign = [path for path in paths if not _OURS.fullmatch(path.name)]
    written = count_written(shards)
    foreign += [p for p in paths if p.suffix == ".json" and not is_ours(p, written)]
    if not (shards / UNFINISHED).exists():  # a kill may leave a tar without its record
        foreign += [p for p in paths if p.suffix == ".tar" and not p.with_suffix(".json").exists()]
    if foreign:
        raise PreparedError(
            f"{shards} holds {foreign[0].name}, which sfumato prepare did not write; give another "
            "out, or move it away"
        )
