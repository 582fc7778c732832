"""Stage pack: rows to uniform tars; every picture is decoded once, here.

Each tar covers a fixed range of N input rows, and holds the good ones among them. It depends on
these rows only, so any worker makes the same bytes, and an interrupted run recognises finished
tars.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, final

from sfumato.config import DownloadConfig, PackConfig
from sfumato.data.ahead import ahead
from sfumato.data.decode import Bounds, RefusedImageError, read_rgb, read_size
from sfumato.data.entries import Blob, Entry
from sfumato.data.left_out import KEPT
from sfumato.data.prepared.folder import UNFINISHED, PreparedFolder
from sfumato.data.prepared.format import Member, PreparedError, TarRecord, write_record
from sfumato.files import digest, new_file, sha256_of
from sfumato.parts import slice_of
from sfumato.preparation.engine import ALONE, Engine, Progress, Tick, map_shards
from sfumato.preparation.older import older_bins
from sfumato.preparation.pack_plan import COUNTED, PackShard, Plan, make_plan
from sfumato.preparation.sources import containers
from sfumato.preparation.tars import (
    Sample,
    claim,
    count_written,
    files_in,
    forget_others,
    is_ours,
    tidied,
    turn,
    unclaim,
    write_tar,
)
from sfumato.preparation.url_table import further_columns

_MADE_BY = 2  # raised when the same rows are to become other tars
_OURS = re.compile(r"\d{6,}\.(tar|json)")
_AHEAD = 4  # pictures in memory for each thread
# Bytes of a file in memory: those of a pixel at most, and of what stands beside the pixels.
_LARGEST_PIXEL, _BESIDE = 8, 2**27
_MAGIC = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"BM", "bmp"))


@final
@dataclass(frozen=True, slots=True)
class _BytesBlob(Blob):
    data: bytes

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        yield BytesIO(self.data)


@dataclass(frozen=True)
class PackJob:
    """What all tars of a packing share.

    Attributes:
        settings: that decide the bytes of a tar.
    """

    folder: PreparedFolder
    config: PackConfig
    settings: tuple[Any, ...]


@dataclass(frozen=True)
class Packed:
    """What became of the rows of a tar.

    Attributes:
        empty: the record of a tar without a sample, which is not written yet.
    """

    kept: int
    dropped: Mapping[str, int]
    empty: TarRecord | None = None


def pack(
    config: PackConfig,
    download: DownloadConfig,
    folder: Path,
    engine: Engine = ALONE,
    *,
    part: str | None = None,
) -> dict[str, int]:
    """Write the tars that are missing, and return the count of rows in each bin.

    Args:
        part: I/N makes every N-th tar from I, beside processes that make the others. A packing
            without a part then finishes.

    Raises:
        ValueError: the source cannot be read, or has no good picture.
        PreparedError: the disk is full, or an older version began to pack here.
    """
    # A download is packed with the columns that it has, without naming them again.
    further = download.columns or ([] if config.path else further_columns(folder))
    source = containers(config, further, folder)
    prepared = PreparedFolder(folder)
    shards = prepared.shards
    columns: list[Any] = [config.image_column, config.caption_column, config.captions,
                          config.columns, *further]  # fmt: skip
    if config.caption_lines != "first":
        columns.append(["caption_lines", config.caption_lines])
    job = PackJob(prepared, config, (config.samples_per_shard, config.max_pixels, *columns))
    with turn(shards) if part else nullcontext():
        _refuse_foreign(shards)
        if (bins := older_bins(prepared, source, job.settings)) is not None:
            return bins
        written = count_written(shards)
        plan = make_plan(source, digest(columns), config.samples_per_shard, shards, engine)
        claim(shards, plan.names)
    if part:
        return _make_part(job, plan, part, engine)
    empty = list[TarRecord]()
    with (
        tidied(shards),
        Progress("pack", plan.rows, "row") as progress,
        closing(
            map_shards(partial(make_tar, job), plan.shards(), engine, tick=progress.tick)
        ) as packed,
    ):
        for made in packed:
            progress.add(made.kept, made.dropped)
            if made.empty is not None:
                empty.append(made.empty)
            while progress.kept and empty:  # tars that were there stay if nothing can be packed
                record = empty.pop()
                _write(prepared, record.name, iter(()), lambda _, record=record: record)
    if not progress.kept:
        unclaim(shards, written)
        if not written:
            (shards / COUNTED).unlink(missing_ok=True)
        raise ValueError(_nothing(config, Counter({**plan.dropped, **progress.bins})))
    forget_others(shards, {*plan.names})
    (shards / UNFINISHED).unlink(missing_ok=True)
    return progress.bins


def _make_part(job: PackJob, plan: Plan, part: str, engine: Engine) -> dict[str, int]:
    own = slice_of(part)
    shards = islice(plan.shards(), own.start, None, own.step)
    with (
        Progress(f"pack {part}", None, "row", shards=len(plan.names[own])) as progress,
        closing(map_shards(partial(make_tar, job), shards, engine, tick=progress.tick)) as packed,
    ):
        for made in packed:
            progress.add(made.kept, made.dropped)
    return progress.bins


def make_tar(job: PackJob, shard: PackShard, tick: Tick) -> Packed:
    """Make a tar and its record, unless they exist and were made of the same rows."""
    record = _known(job, shard)
    if record is not None:
        tick(shard.rows[1] - shard.rows[0])
        return Packed(len(record.samples), record.dropped)
    dropped = Counter(shard.dropped)
    samples = _good(job.config, shard, dropped, tick)
    first = next(samples, None)
    if first is None:
        return Packed(0, dropped, _record(job, shard, dropped, ()))
    every, finish = chain([first], samples), partial(_record, job, shard, dropped)
    record = _write(job.folder, shard.name, every, finish)
    return Packed(len(record.samples), record.dropped)


def _known(job: PackJob, shard: PackShard) -> TarRecord | None:
    """Return the record of a tar that exists and was packed from the same rows."""
    try:
        record = job.folder.tar_record(shard.name)
    except PreparedError:
        return None
    tar = job.folder.tar(shard.name)
    written = tar.with_suffix(".json").stat().st_mtime_ns
    exists = tar.is_file() and tar.stat().st_size == record.bytes
    fresh = all(part.newest <= written for part in shard.parts)
    same = record.made_of == _made_of(job, shard, record.dropped, record.samples)
    return record if exists and fresh and same else None


def _good(
    config: PackConfig, shard: PackShard, dropped: Counter[str], tick: Tick
) -> Iterator[tuple[int, Sample]]:
    """Yield the good rows of a tar with their numbers; count the bad ones."""
    entries = chain.from_iterable(part.read() for part in shard.parts)
    rows = enumerate(entries, shard.rows[0])
    judge = partial(_judged, bounds=Bounds(1, config.max_pixels))
    # Rows come in order, whichever thread finishes first.
    for number, result in ahead(judge, rows, config.workers, _AHEAD * config.workers):
        tick(1)
        if isinstance(result, Sample):
            yield number, result
        else:
            dropped[result] += 1


def _write(
    folder: PreparedFolder,
    name: str,
    samples: Iterator[tuple[int, Sample]],
    finish: Callable[[Sequence[Member]], TarRecord],
) -> TarRecord:
    """Write a tar, and then its record, which `finish` makes."""
    tar = folder.tar(name)
    path = tar.with_suffix(".json")
    with new_file(tar, shared=True, failure=PreparedError) as beside:
        record = finish(write_tar(beside, samples))
        record = replace(record, bytes=beside.stat().st_size, sha256=sha256_of(beside))
        (tar.parent / UNFINISHED).touch()
        path.unlink(missing_ok=True)  # it may be the record of another tar of this name
    write_record(path, record)
    return record


def _record(
    job: PackJob, shard: PackShard, dropped: Mapping[str, int], samples: Sequence[Member]
) -> TarRecord:
    """Return the record of a tar whose bytes are not known yet."""
    bins = dict(sorted(dropped.items()))
    made_of = _made_of(job, shard, bins, samples)
    return TarRecord(shard.name, 0, "", made_of, tuple(samples), bins, shard.rows)


def _made_of(
    job: PackJob, shard: PackShard, dropped: Mapping[str, int], samples: Sequence[Member]
) -> str:
    parts = [(part.name, part.identity, part.first, part.last) for part in shard.parts]
    pictures = [member.sha256 for member in samples]
    lost = [dict(shard.dropped), dict(dropped)]
    return digest([[_MADE_BY, *job.settings], shard.rows, parts, pictures, lost])


def _nothing(config: PackConfig, bins: Counter[str]) -> str:
    reasons = [(reason, count) for reason, count in bins.most_common() if reason != KEPT]
    faults = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
    return (
        f"nothing of {config.path or 'what was downloaded'} can be packed: "
        f"{faults or 'there is no picture with a caption'}"
    )


def _judged(row: tuple[int, Entry], bounds: Bounds) -> tuple[int, Sample | str]:
    """Judge a row by its picture: return it decoded, or the reason to leave it out."""
    number, entry = row
    try:
        return number, _look_at(entry, bounds)
    except RefusedImageError as error:
        return number, str(error)
    except OSError:
        return number, "unreadable file"


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
    written, killed = count_written(shards), (shards / UNFINISHED).exists()
    foreign = [path for path in files_in(shards) if _is_foreign(path, written, killed=killed)]
    if foreign:
        raise PreparedError(
            f"{shards} holds {min(foreign).name}, which sfumato prepare did not write; give "
            "another out, or move it away"
        )


def _is_foreign(path: Path, written: int, *, killed: bool) -> bool:
    if path.name.startswith("."):
        return False
    if not _OURS.fullmatch(path.name):
        return True
    if path.suffix == ".json":
        return not is_ours(path, written)
    # A kill may leave a tar without its record.
    ours = int(path.stem) < written  # another part may be making it
    return not killed and not ours and not path.with_suffix(".json").exists()
