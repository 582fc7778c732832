"""The table that is downloaded: every usable row of the given one, in parquet of one layout.

table/000000.parquet   url, caption and further columns
table/table.json       TableRecord: what it was made of, and the rows that are not in it
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sfumato.config import DownloadConfig
from sfumato.data.entries import caption_of
from sfumato.data.prepared.format import FORMAT, PreparedError, read_fields
from sfumato.data.skips import SkipLog, Tally
from sfumato.preparation.files import digest, placed, sha256_of, write_text
from sfumato.preparation.tables import read_rows, table_files

TABLE, RECORD = "table", "table.json"
_ROWS = 1_000_000  # in a file, about
_INFERRED = 10_000  # rows whose values decide the types of .csv and .jsonl
_RESERVED = frozenset(
    {
        *("url", "caption", "key", "status", "error_message", "width", "height", "exif"),
        *("original_width", "original_height", "md5", "sha256", "sha512"),
    }
)


@dataclass(frozen=True)
class TableRecord:
    """What is in the folder of the table.

    Attributes:
        made_of: a hash of the given files' bytes and of the settings.
        stamps: name, bytes and time of change of each given file; if they are as they were, its
            bytes are not read again.
        digests: the SHA-256 of each given file.
        files: rows in each file of the folder.
        dropped: rows that are in none of them, by reason.
    """

    made_of: str
    stamps: tuple[tuple[str, int, int], ...]
    digests: tuple[str, ...]
    files: tuple[int, ...]
    dropped: Mapping[str, int]


def write_table(config: DownloadConfig, folder: Path) -> TableRecord:
    """Write the table of the rows that can be downloaded, unless it is there.

    Raises:
        ValueError: it cannot be read, or lacks a column.
        PreparedError: another table was begun in this folder.
    """
    assert config.table is not None
    if bad := sorted(_RESERVED.intersection(config.columns)):
        raise ValueError(
            f"download.columns has {', '.join(bad)}, which img2dataset writes itself; rename "
            "them in the table"
        )
    files = table_files(config.table)
    known = read_table_record(folder) if (folder / TABLE / RECORD).exists() else None
    stamps = tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    seen = known is not None and known.stamps == stamps
    digests = known.digests if known and seen else tuple(sha256_of(file) for file in files)
    made_of = digest([digests, config.url_column, config.caption_column, config.columns,
                      config.samples_per_shard, config.image_size])  # fmt: skip
    if known is not None and known.made_of == made_of:
        if not seen:
            _save(folder, replace(known, stamps=stamps))
        return known
    if known is not None:
        raise PreparedError(
            f"{folder} holds a download of another table, or with other columns, image_size or "
            f"samples_per_shard, than download.table={config.table!r}; set out to another "
            f"folder, or remove {folder / TABLE} and {folder / 'download'}"
        )
    log = SkipLog()
    rows = chain.from_iterable(_usable(file, config, log) for file in files)
    counts = tuple(_write(rows, config, folder / TABLE))
    dropped = Counter[str]()
    for skip in log.report().skips:
        dropped[skip.reason] += skip.count
    if not counts:
        raise ValueError(
            f"download.table={config.table!r} has no row that can be downloaded: "
            f"{log.report().summary()}"
        )
    record = TableRecord(made_of, stamps, digests, counts, dict(dropped))
    _save(folder, record)
    return record


def _save(folder: Path, record: TableRecord) -> None:
    write_text(folder / TABLE / RECORD, json.dumps({"format": FORMAT, **asdict(record)}) + "\n")


def read_table_record(folder: Path) -> TableRecord:
    """Read what is in the table of a prepared folder.

    Raises:
        PreparedError: the record is missing or damaged.
    """
    place = folder / TABLE / RECORD
    content = read_fields(place)
    try:
        return TableRecord(
            content["made_of"],
            tuple((name, size, time) for name, size, time in content["stamps"]),
            tuple(content["digests"]),
            tuple(content["files"]),
            content["dropped"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PreparedError(f"{place} is damaged ({error}); remove it and prepare again") from error


def further_columns(folder: Path) -> list[str]:
    """Return what the table of a prepared folder has beside URLs and captions; none without one."""
    file = folder / TABLE / "000000.parquet"
    if not file.exists():
        return []
    from pyarrow import parquet

    return parquet.read_schema(file).names[2:]


def _usable(file: Path, config: DownloadConfig, log: SkipLog) -> Iterator[dict[str, Any]]:
    tally = log.begin(file)
    wanted = [config.url_column, config.caption_column, *config.columns]
    for place, row in read_rows(file, wanted, tally):
        url = _url(row[config.url_column], place, tally)
        if url is None:
            continue
        caption = caption_of(row[config.caption_column], place, tally)
        if caption is not None:
            others = {name: _printable(row[name]) for name in config.columns}
            yield {"url": url, "caption": caption, **others}


def _url(value: Any, place: int | str, tally: Tally) -> str | None:
    url = value.strip() if isinstance(value, str) else ""
    if not url:
        tally.add("no URL", place)
    elif not url.isprintable() or "://" not in url:
        tally.add("not a URL", place)
    elif not url.lower().startswith(("http://", "https://")):
        # file:// would copy files of this machine into the data.
        tally.add("URL that is not of http or https", place)
    else:
        return url
    return None


def _printable(value: Any) -> Any:
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _write(rows: Iterator[dict[str, Any]], config: DownloadConfig, folder: Path) -> Iterator[int]:
    """Write files whose rows fill whole shards of img2dataset; yield how many each has."""
    import pyarrow
    from pyarrow import parquet

    for stale in folder.glob("*.parquet"):
        stale.unlink()
    whole = max(1, _ROWS // config.samples_per_shard) * config.samples_per_shard
    first = list(islice(rows, _INFERRED))
    if not first:
        return
    rows, number = chain(first, rows), 0
    try:
        schema = _schema(first, config)
        while some := list(islice(rows, whole)):
            table = pyarrow.Table.from_pylist(some, schema)
            with placed(folder / f"{number:06d}.parquet") as beside:
                parquet.write_table(table, beside)
            yield len(some)
            number += 1
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ValueError(
            f"a column of download.table={config.table!r} holds values of several kinds ({error}); "
            "make them of one, or leave the column out of download.columns"
        ) from None


def _schema(rows: Sequence[Mapping[str, Any]], config: DownloadConfig) -> Any:
    """Return the types of the columns, as the first rows have them."""
    import pyarrow

    untyped = not str(config.table).lower().endswith(".parquet")

    fields = [("url", pyarrow.string()), ("caption", pyarrow.string())]
    for name in config.columns:
        kind = pyarrow.array([row[name] for row in rows]).type
        if pyarrow.types.is_integer(kind) and untyped:
            kind = pyarrow.float64()  # a later number may be no integer
        fields.append((name, pyarrow.string() if pyarrow.types.is_null(kind) else kind))
    return pyarrow.schema(fields)
