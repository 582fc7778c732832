"""Stage filter: keeps samples of the tars; each dropped sample has one named reason."""

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np

from sfumato.config import FilterConfig
from sfumato.data.prepared.folder import PreparedFolder
from sfumato.data.prepared.format import KeptRecord, Member, PreparedError, TarRecord, write_record
from sfumato.files import digest
from sfumato.preparation.engine import ALONE, Engine, Progress, Tick, map_shards
from sfumato.preparation.tars import claim, forget_others, tidied

_MADE_BY = 1  # raised when the same settings come to keep other samples


@dataclass(frozen=True)
class FilterJob:
    """What all records of a selection share.

    Attributes:
        settings: that decide which samples are kept, fit for JSON.
    """

    folder: PreparedFolder
    config: FilterConfig
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Filtered:
    """A record of a selection, and hashes of the samples that it keeps if duplicates count."""

    record: KeptRecord
    hashes: np.ndarray | None = None


def filter_samples(config: FilterConfig, folder: Path, engine: Engine = ALONE) -> dict[str, int]:
    """Write the missing records of a selection; return the samples in each bin.

    Raises:
        PreparedError: nothing is packed, or a record is damaged.
        ValueError: no sample has the score.
    """
    settings = {**asdict(config), "name": None, "made by": _MADE_BY}
    job = FilterJob(PreparedFolder(folder), config, settings)
    root, names = job.folder.selection(config.name), job.folder.tar_names()
    seen, before = _Seen(), ""
    claim(root, names)
    with (
        tidied(root),
        Progress(f"filter {config.name}", len(names), "tar") as progress,
        closing(map_shards(partial(judge_tar, job), names, engine, tick=progress.tick)) as judged,
    ):
        for each in judged:
            record = each.record
            if each.hashes is not None:
                # Whether a sample is a duplicate depends on all tars before its own.
                before = digest([settings, record.tar, before])
                repeated = seen.has(each.hashes)
                seen.add(each.hashes[~repeated])
                record = replace(_without(record, repeated), made_of=before)
                _write(job, record)
            progress.add(len(record.kept), record.dropped)
    forget_others(root, set(names))
    return progress.bins


def judge_tar(job: FilterJob, name: str, tick: Tick) -> Filtered:
    """Judge the samples of a tar by themselves, and write the record unless duplicates count."""
    tar = job.folder.tar_record(name)
    _check_score(job.config, tar)
    made_of = digest([job.settings, tar.made_of, ""])
    record = _known(job, name, made_of)
    tick(1)
    if record is not None and job.config.duplicates != "drop":
        return Filtered(record)
    record = _judge(job.config, tar, made_of)
    if job.config.duplicates == "drop":
        hashes = [int(tar.samples[number].sha256[:16], 16) for number in record.kept]
        return Filtered(record, np.array(hashes, np.uint64))
    _write(job, record)
    return Filtered(record)


def _check_score(config: FilterConfig, tar: TarRecord) -> None:
    columns = {name: None for member in tar.samples for name in member.columns}
    if config.score is not None and tar.samples and config.score not in columns:
        raise ValueError(
            f"filter.score={config.score!r} is no column of the packed tars, which have "
            f"{', '.join(map(repr, columns)) or 'none'}; name it in pack.columns and pack again"
        )


def _known(job: FilterJob, name: str, made_of: str) -> KeptRecord | None:
    try:
        record = job.folder.kept_record(job.config.name, name)
    except PreparedError:
        return None
    return record if record.made_of == made_of else None


def _write(job: FilterJob, record: KeptRecord) -> None:
    if _known(job, record.name, record.made_of) is None:
        write_record(job.folder.selection(job.config.name) / f"{record.name}.json", record)


def _judge(config: FilterConfig, tar: TarRecord, made_of: str) -> KeptRecord:
    kept, dropped, own = list[int](), Counter[str](), set[str]()
    for number, member in enumerate(tar.samples):
        reason = _reason(config, member)
        if reason is None and member.sha256 in own:
            reason = "duplicate"
        if reason is not None:
            dropped[reason] += 1
            continue
        kept.append(number)
        if config.duplicates == "drop":
            own.add(member.sha256)
    return KeptRecord(tar.name, made_of, tuple(kept), dict(sorted(dropped.items())), tar.made_of)


def _without(record: KeptRecord, repeated: np.ndarray) -> KeptRecord:
    """Return a record that drops more of its samples, as duplicates."""
    dropped = Counter(record.dropped)
    dropped.update({"duplicate": int(repeated.sum())})
    kept = tuple(number for number, drop in zip(record.kept, repeated, strict=True) if not drop)
    bins = {reason: count for reason, count in sorted(dropped.items()) if count}
    return replace(record, kept=kept, dropped=bins)


def _reason(config: FilterConfig, member: Member) -> str | None:
    """Return the first bound that a sample breaks."""
    sides = sorted((member.height, member.width))
    bounds: list[tuple[str, float, float | None, float | None]] = [
        ("smaller side", sides[0], config.min_size, None),
        ("larger side", sides[1], None, config.max_size),
        ("aspect", sides[1] / sides[0], None, config.max_aspect),
        ("caption", len(member.captions[0]), config.min_caption, config.max_caption),
    ]
    if config.score is not None:
        score = _number(member.columns.get(config.score))
        if score is None:
            return f"no score in {config.score}"
        bounds.append((config.score, score, config.min_score, config.max_score))
    for name, value, least, most in bounds:
        if least is not None and value < least:
            return f"{name} below {least:g}"
        if most is not None and value > most:
            return f"{name} above {most:g}"
    return None


def _number(value: Any) -> float | None:
    """Return a score as a number; tables of text hold numbers as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


@final
class _Seen:
    """Set of many hashes, by their first 8 bytes; takes no more memory than these.

    Two sorted stretches are merged once the last is more than half as long as the one before. So
    there are few stretches, and each hash is moved few times.
    """

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> None:
        """Add hashes, uint64."""
        self._sorted.append(np.sort(hashes))
        while len(self._sorted) > 1 and 2 * len(self._sorted[-1]) > len(self._sorted[-2]):
            last = self._sorted.pop()
            self._sorted[-1] = np.sort(np.concatenate([self._sorted[-1], last]), kind="stable")

    def has(self, hashes: np.ndarray) -> np.ndarray:
        """Return which of the hashes have been added, as bool."""
        known = np.zeros(len(hashes), bool)
        for stretch in self._sorted:
            position = np.searchsorted(stretch, hashes)
            inside = position < len(stretch)
            known[inside] |= stretch[position[inside]] == hashes[inside]
        return known
