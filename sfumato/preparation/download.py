"""Stage download: the program img2dataset fetches the images of a table into tars.

table/                       the rows that can be downloaded (url_table.py)
download/00000.tar           tars of img2dataset, whose samples are in another order each run
download/00000_stats.json    counts of a shard's rows by outcome; written last
img2dataset.log              the output of img2dataset
"""

import fcntl
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.config import DownloadConfig
from sfumato.data.left_out import tally
from sfumato.data.prepared.format import PreparedError
from sfumato.preparation.url_table import (
    RECORD,
    TABLE,
    TableRecord,
    read_table_record,
    refuse_others,
    write_table,
)
from sfumato.records import read_record

DOWNLOAD, LOG = "download", "img2dataset.log"
_SHARD = re.compile(r"(\d+)_stats\.json")
# Messages of img2dataset about a row, and the bin that the row falls into.
_REASONS = (
    (re.compile(r"HTTP Error (\d+)"), "HTTP {0}"),
    (re.compile(r"timed out", re.IGNORECASE), "timed out"),
    (re.compile(r"Image decoding error"), "not an image"),
    (re.compile(r"X-Robots-Tag"), "disallowed by X-Robots-Tag"),
    (re.compile(r"Name or service|nodename|name resolution|getaddrinfo"), "unknown host"),
    (re.compile(r"refused|unreachable|reset by peer|closed connection"), "no connection"),
    (re.compile(r"SSL|CERTIFICATE", re.IGNORECASE), "SSL error"),
    (re.compile(r"IncompleteRead"), "cut off"),
)


@dataclass(frozen=True)
class ShardStats:
    """Statistics of one shard of img2dataset: its number, and its rows by outcome."""

    number: int
    rows: int
    successes: int
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class _Stats:
    """The part of img2dataset's file of statistics that is read: its messages are counted."""

    count: int
    successes: int
    status_dict: Mapping[str, int]


def download(config: DownloadConfig, folder: Path) -> dict[str, int]:
    """Fetch the shards that are missing, and return the count of rows in each bin.

    Raises:
        ValueError: the table cannot be read, or img2dataset is not installed.
        PreparedError: img2dataset ended before all shards were done, or files of others are where
            it writes.
    """
    tars = folder / DOWNLOAD
    if not (folder / TABLE / RECORD).exists():  # no download was begun
        for path in sorted(path for path in tars.glob("[!.]*") if path.is_file()):
            raise PreparedError(_foreign(path))
    record = write_table(config, folder)
    if _unfinished(record, config.samples_per_shard, tars):
        refuse_others(folder, record)
        _run(config, folder)
        if left := _unfinished(record, config.samples_per_shard, tars):
            raise PreparedError(
                f"img2dataset ended, but {len(left)} of its shards are not done (the first is "
                f"{left[0]:05d}): {_last_words(folder / LOG)}. See {folder / LOG}; run the same "
                "command again to go on"
            )
    return read_download(folder)[0]


def read_download(folder: Path) -> tuple[dict[str, int], list[ShardStats]]:
    """Return the count of rows in each bin, and the statistics of the shards by number.

    Raises:
        PreparedError: records are missing or damaged, or do not sum up to the rows of the table.
    """
    record = read_table_record(folder)
    unsorted = [_read_stats(path) for path in (folder / DOWNLOAD).glob("*_stats.json")]
    stats = sorted(unsorted, key=lambda shard: shard.number)
    rows, expected = sum(shard.rows for shard in stats), sum(record.files)
    if rows != expected:
        raise PreparedError(
            f"{folder / DOWNLOAD} has statistics of {rows} rows, but {folder / TABLE} has "
            f"{expected}; run: sfumato prepare out={folder} stages=[download] with the settings "
            "that the download was started with"
        )
    kept = sum(shard.successes for shard in stats)
    return tally(kept, [record.dropped, *(shard.dropped for shard in stats)]), stats


def _read_stats(path: Path) -> ShardStats:
    advice = "run the download again, which replaces it"
    match = _SHARD.fullmatch(path.name)
    if match is None:
        raise PreparedError(_foreign(path))
    stats = read_record(path, _Stats, advice, failure=PreparedError)
    dropped = Counter[str]()
    for message, count in stats.status_dict.items():
        if message != "success":
            dropped[_reason(message)] += count
    # img2dataset lists a limited number of messages, and none for rows that it gave up.
    if lost := stats.count - stats.successes - dropped.total():
        dropped["failed for another reason"] += lost
    return ShardStats(int(match[1]), stats.count, stats.successes, dropped)


def _reason(message: str) -> str:
    for pattern, reason in _REASONS:
        if match := pattern.search(message):
            return reason.format(*match.groups())
    return "failed for another reason"


def _unfinished(record: TableRecord, size: int, tars: Path) -> list[int]:
    """Return the numbers of the shards to fetch; remove what a kill or a full disk spoiled.

    Raises:
        PreparedError: img2dataset would take a file of others for a finished shard.
    """
    number = sum(math.ceil(rows / size) for rows in record.files)
    shards = {f"{shard:05d}_stats.json": shard for shard in range(number)}
    left, others = set(shards.values()), list[Path]()
    for path in sorted(tars.glob("*.json")):
        if path.name not in shards:
            others.append(path)
        elif _is_whole(path) and (tars / f"{shards[path.name]:05d}.tar").is_file():
            left.discard(shards[path.name])
        else:
            path.unlink()  # img2dataset would take the shard for finished
    if left and others:
        raise PreparedError(_foreign(others[0]))
    return sorted(left)


def _is_whole(stats: Path) -> bool:
    try:
        _read_stats(stats)
    except PreparedError:
        return False
    return True


def _foreign(path: Path) -> str:
    return (
        f"{path} is where img2dataset writes, and it is not of this download; move it away, or "
        "give another out"
    )


def _run(config: DownloadConfig, folder: Path) -> None:
    tars = folder / DOWNLOAD
    command = [*_program(), *_arguments(config, folder)]
    tars.mkdir(parents=True, exist_ok=True)
    print(f"download: img2dataset writes to {tars}; it reports in {folder / LOG}", flush=True)
    quiet = {"NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONUNBUFFERED": "1"}
    with (folder / LOG).open("ab") as log:
        try:
            # img2dataset inherits the lock with its output, even if this process is killed.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PreparedError(
                f"an img2dataset that was started before still writes to {tars}; wait for it, or "
                "end it, and run the same command again"
            ) from None
        log.truncate(0)
        result = subprocess.run(
            command, stdout=log, stderr=log, env={**os.environ, **quiet}, check=False
        )
    if result.returncode != 0:
        raise PreparedError(
            f"img2dataset failed with code {result.returncode}: {_last_words(folder / LOG)}. See "
            f"{folder / LOG}; run the same command again to go on"
        )


def _program() -> list[str]:
    beside = Path(sys.executable).with_name("img2dataset")
    if path := shutil.which("img2dataset"):
        return [path]
    if beside.is_file():
        return [str(beside)]
    if importlib.util.find_spec("img2dataset") is not None:
        return [sys.executable, "-m", "img2dataset.main"]
    raise ValueError(
        "download.table needs the program img2dataset, which is not on the PATH; pip install "
        "img2dataset, in an environment of its own if its pins collide, and put it on the PATH"
    )


def _arguments(config: DownloadConfig, folder: Path) -> list[str]:
    settings: dict[str, Any] = {
        "url_list": (folder / TABLE).absolute(),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": (folder / DOWNLOAD).absolute(),
        "output_format": "webdataset",
        "number_sample_per_shard": config.samples_per_shard,
        "processes_count": config.processes,
        "thread_count": config.threads,
        "timeout": config.timeout,
        "retries": config.retries,
        "extract_exif": False,
        "compute_hash": None,
        "enable_wandb": False,
        "incremental_mode": "incremental",
    }
    if config.columns:
        settings["save_additional_columns"] = json.dumps(config.columns)
    if config.image_size is None:
        settings["disable_all_reencoding"] = True
    else:
        settings |= {
            "image_size": config.image_size,
            "resize_mode": "keep_ratio",
            "resize_only_if_bigger": True,
            "skip_reencode": True,
        }
    return [f"--{name}={value}" for name, value in settings.items()]


def _last_words(log: Path) -> str:
    if not log.exists():
        return "it wrote nothing"
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
        text = file.read().decode(errors="replace")
    if "No space left on device" in text:
        return "no space left on the disk"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it wrote nothing"
