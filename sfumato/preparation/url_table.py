"""Table of what is downloaded: each usable row of download.table, in parquet of one layout.

table/000000.parquet   url, caption and further columns
table/table.json       TableRecord: what download.table was, and the rows that are left out
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sfumato.config import DownloadConfig
from sfumato.data.entries import captions_of
from sfumato.data.left_out import FileSkips, SkipLog
from sfumato.data.paths import find_files, is_file, is_folder
from sfumato.data.prepared.format import FORMAT, PreparedError
from sfumato.data.tables import WITH_COLUMNS, open_table
from sfumato.files import digest, new_folder, sha256_of, write_text
from sfumato.hub import fetch
from sfumato.records import read_record

TABLE, RECORD = "table", "table.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A folder of tables often has other files of JSON beside them.
_IN_FOLDER = tuple(suffix for suffix in WITH_COLUMNS if suffix != ".json")
_ROWS = 1_000_000  # in a file, about
_INFERRED = 10_000  # rows whose values decide the types of untyped columns
_RESERVED = frozenset(
    {
        *("url", "caption", "key", "status", "error_message", "width", "height", "exif"),
        *("original_width", "original_height", "md5", "sha256", "sha512"),
    }
)


@dataclass(frozen=True)
class TableRecord:
    """What the folder of the table holds.

    Attributes:
        made_of: a hash of the input files' bytes and of the settings.
        stamps: name, bytes and time of change of each input file; while they stay the same, the
            file's bytes are not read again.
        digests: the SHA-256 of each input file.
        files: rows in each file of the folder.
        dropped: rows that are in none of them, by reason.
    """

    made_of: str
    stamps: tuple[tuple[str, int, int], ...]
    digests: tuple[str, ...]
    files: tuple[int, ...]
    dropped: Mapping[str, int]


def write_table(config: DownloadConfig, folder: Path) -> TableRecord:
    """Write the table of the rows that can be downloaded, unless it exists.

    Raises:
        ValueError: download.table cannot be read, or lacks a column.
        PreparedError: another table was begun in this folder.
    """
    assert config.table is not None
    if bad := sorted(_RESERVED.intersection(config.columns)):
        raise ValueError(
            f"download.columns has {', '.join(bad)}, which img2dataset writes itself; rename "
            "them in the table"
        )
    files = _table_files(config.table)
    known = read_table_record(folder) if (folder / TABLE / RECORD).exists() else None
    stamps = tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    seen = known is not None and known.stamps == stamps
    digests = known.digests if known and seen else tuple(sha256_of(file) for file in files)
    made_of = digest([digests, config.url_column, config.caption_column, config.columns,
                      config.samples_per_shard, config.image_size])  # fmt: skip
    if known is not None and known.made_of == made_of:
        if not seen:
            _save(folder / TABLE, replace(known, stamps=stamps))
        return known
    if known is not None:
        raise PreparedError(
            f"{folder} holds a download of another table, or with other columns, image_size or "
            f"samples_per_shard, than download.table={config.table!r}; set out to another "
            f"folder, or remove {folder / TABLE} and {folder / 'download'}"
        )
    log = SkipLog()
    rows = chain.from_iterable(_usable(file, config, log) for file in files)
    refuse_others(folder)
    with new_folder(folder / TABLE, failure=PreparedError) as beside:
        counts = tuple(_write(rows, config, beside))
        if not counts:
            raise ValueError(
                f"download.table={config.table!r} has no row that can be downloaded: "
                f"{log.report().summary()}"
            )
        record = TableRecord(made_of, stamps, digests, counts, dict(log.counts()))
        _save(beside, record)
    return record


def refuse_others(folder: Path, record: TableRecord | None = None) -> None:
    """Refuse a table's folder with parquet of others, which img2dataset would read as well.

    Raises:
        PreparedError: naming the first.
    """
    own = {_file(number) for number in range(len(record.files))} if record else ()
    for path in sorted((folder / TABLE).glob("*.parquet")):
        if path.name not in own:
            raise PreparedError(
                f"{path} is where sfumato prepare writes its own table, and sfumato did not write "
                "it; move it away, or give another out"
            )


def _file(number: int) -> str:
    return f"{number:06d}.parquet"


def _save(folder: Path, record: TableRecord) -> None:
    text = json.dumps({"format": FORMAT, **asdict(record)}) + "\n"
    write_text(folder / RECORD, text, failure=PreparedError)


def read_table_record(folder: Path) -> TableRecord:
    """Read the record of the table in a prepared folder.

    Raises:
        PreparedError: the record is missing or damaged.
    """
    advice = "remove it and prepare again"
    return read_record(
        folder / TABLE / RECORD, TableRecord, advice, version=FORMAT, failure=PreparedError
    )


def further_columns(folder: Path) -> list[str]:
    """Return the columns of a downloaded table beside URLs and captions; none without a table."""
    file = folder / TABLE / _file(0)
    if not file.exists():
        return []
    from pyarrow import parquet

    return parquet.read_schema(file).names[2:]


def _table_files(table: str) -> list[Path]:
    """List the files of a path (see `find_files`), of a folder, or of a hub data set."""
    folder = Path(table).expanduser()
    is_id = _HUB_ID.fullmatch(table) and folder.suffix.lower() not in WITH_COLUMNS
    if is_id and not is_folder(folder) and not is_file(folder):
        # A cache that a kill left half-filled must not be taken for the whole data set.
        folder = fetch(
            table, "download.table", ["*.parquet"], kind="dataset", complete=lambda _: False
        )
    if is_folder(folder):
        files = [path for path in folder.rglob("[!.]*") if path.suffix.lower() in _IN_FOLDER]
    else:
        files = find_files(table, "download.table", WITH_COLUMNS)
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) != 1:
        raise ValueError(
            f"download.table={table!r} stands for {len(files)} files with the suffixes "
            f"{', '.join(map(repr, kinds)) or 'none'}; give files of one kind of "
            + ", ".join(_IN_FOLDER)
        )
    return sorted(files)


def _usable(file: Path, config: DownloadConfig, log: SkipLog) -> Iterator[dict[str, Any]]:
    table, skips = open_table(file), log.begin(file)
    columns = [config.url_column, config.caption_column, *config.columns]
    for name in columns:
        table.choose((name,), "URLs, captions or download.columns")
    for position, row in table.rows(columns, skips):
        url = _url(row[config.url_column], position, skips)
        # All lines: the stage pack chooses among them.
        value = row[config.caption_column]
        captions = captions_of(value, position, skips, "all") if url else ()
        if captions:
            yield {"url": url, "caption": captions[0]} | {
                name: value.encode(errors="replace").decode() if isinstance(value, str) else value
                for name, value in ((name, row[name]) for name in config.columns)
            }


def _url(value: Any, position: int | str, skips: FileSkips) -> str | None:
    url = value.strip() if isinstance(value, str) else ""
    if not url:
        skips.add("no URL", position)
    elif not url.isprintable() or "://" not in url:
        skips.add("not a URL", position)
    elif not url.lower().startswith(("http://", "https://")):
        # file:// would copy files of this machine into the data.
        skips.add("URL that is not of http or https", position)
    else:
        return url
    return None


def _write(rows: Iterator[dict[str, Any]], config: DownloadConfig, folder: Path) -> Iterator[int]:
    """Write files whose rows fill whole shards of img2dataset; yield how many each has."""
    import pyarrow
    from pyarrow import parquet

    whole = max(1, _ROWS // config.samples_per_shard) * config.samples_per_shard
    first = list(islice(rows, _INFERRED))
    if not first:
        return
    rows, number = chain(first, rows), 0
    try:
        schema = _schema(first, config)
        while some := list(islice(rows, whole)):
            table = pyarrow.Table.from_pylist(some, schema)
            parquet.write_table(table, folder / _file(number))
            yield len(some)
            number += 1
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ValueError(
            f"a column of download.table={config.table!r} holds values of several kinds ({error}); "
            "make them of one kind, or leave the column out of download.columns"
        ) from None


def _schema(rows: Sequence[Mapping[str, Any]], config: DownloadConfig) -> Any:
    import pyarrow

    untyped = not str(config.table).lower().endswith(".parquet")
    fields = [("url", pyarrow.string()), ("caption", pyarrow.string())]
    for name in config.columns:
        kind = pyarrow.array([row[name] for row in rows]).type
        if pyarrow.types.is_integer(kind) and untyped:
            kind = pyarrow.float64()  # a later number may not be an integer
        fields.append((name, pyarrow.string() if pyarrow.types.is_null(kind) else kind))
    return pyarrow.schema(fields)
