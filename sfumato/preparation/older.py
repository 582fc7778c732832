"""Tars of an older version: each has N samples, and ends before the good row behind its N-th."""

from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.data.left_out import tally
from sfumato.data.prepared.folder import UNFINISHED, PreparedFolder
from sfumato.data.prepared.format import PreparedError, TarRecord
from sfumato.files import digest
from sfumato.preparation.sources import Container

_MADE_BY = 1


def older_bins(
    folder: PreparedFolder, source: Sequence[Container], settings: Sequence[Any]
) -> dict[str, int] | None:
    """Return the bins of tars that an older version packed to the end from the same rows.

    Args:
        settings: that decide the bytes of a tar.

    Returns:
        None if the folder holds no such tars, or of other rows; then it is packed anew.

    Raises:
        PreparedError: an older version began to pack here, and did not come to the end.
    """
    first = _record(folder, 0)
    if first is None or first.rows is not None:
        return None
    if (folder.shards / UNFINISHED).exists():
        raise PreparedError(
            f"an older version of Sfumato began to pack into {folder}, and cuts tars at other rows "
            f"than this one; end it with that version, or remove {folder.shards} and pack again"
        )
    start, samples, dropped = (0, 0), 0, list[Mapping[str, int]]()
    while start[0] < len(source):
        record = _record(folder, len(dropped))
        if record is None or not _is_same(folder, record, source, settings, start, samples):
            return None
        assert record.ends is not None
        start, samples = record.ends, samples + len(record.samples)
        dropped.append(record.dropped)
    return tally(samples, dropped)


def _record(folder: PreparedFolder, number: int) -> TarRecord | None:
    try:
        return folder.tar_record(f"{number:06d}")
    except PreparedError:
        return None


def _is_same(
    folder: PreparedFolder,
    record: TarRecord,
    source: Sequence[Container],
    settings: Sequence[Any],
    start: tuple[int, int],
    first: int,
) -> bool:
    tar = folder.tar(record.name)
    if record.ends is None or record.ends <= start or not tar.is_file():
        return False
    written = tar.with_suffix(".json").stat().st_mtime_ns
    parts = source[start[0] : record.ends[0] + 1]
    position = [first, start, record.ends, record.ends == (len(source), 0)]
    names = [(each.name, each.identity) for each in parts]
    pictures = [member.sha256 for member in record.samples]
    made_of = digest([[_MADE_BY, *settings], position, names, pictures, dict(record.dropped)])
    whole = tar.stat().st_size == record.bytes
    return whole and record.made_of == made_of and all(each.newest <= written for each in parts)
