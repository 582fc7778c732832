"""Checks and counts, before training begins, of what the index of a prepared folder promises."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from sfumato.config import ShardDataConfig, ShardSourceConfig
from sfumato.data.ahead import ahead
from sfumato.data.left_out import SkipLog
from sfumato.data.prepared.cache import Caches, cached_rows
from sfumato.data.prepared.folder import INDEX, PreparedFolder, open_folder
from sfumato.data.prepared.format import PreparedError
from sfumato.data.prepared.tars import Selected
from sfumato.data.sample import Choices

_THREADS = 16  # they wait for the file system
_AT_ONCE = 256
_NEARLY = 0.01  # of the shards
_FEW = 1000  # shards whose records are read at the start, whatever the index says

Item = TypeVar("Item")
Result = TypeVar("Result")


def select(source: ShardSourceConfig, choices: Choices, config: ShardDataConfig) -> Selected:
    """Return what is read of a prepared folder; `config` says where a store's shards are kept.

    Raises:
        StoreError: the folder lies in a store that does not give it.
        PreparedError: the folder has no index or no such selection, or the selection is empty.
    """
    folder, selection = open_folder(source.path or "", config), source.selection
    index = folder.index()
    counts = index.selections.get(selection)
    if counts is None:
        known = ", ".join(sorted(index.selections)) or "none"
        raise PreparedError(
            f"{folder} has no selection {selection!r}; there is {known}. Correct "
            f"data.shards.selection, or run: sfumato prepare out={folder} stages=[filter,index] "
            f"filter.name={selection}"
        )
    if len(counts) != len(index.tars):
        raise PreparedError(
            f"{folder.path / INDEX} is damaged: it has {len(index.tars)} tars and the counts of "
            f"{len(counts)}; run: sfumato prepare out={folder} stages=[index]"
        )
    if sum(counts) == 0:
        raise PreparedError(
            f"the selection {selection!r} of {folder} keeps no sample; loosen its filter, or "
            "correct data.shards.selection"
        )
    return Selected(folder, selection, index, choices)


def check_tars(selected: Selected) -> None:
    """Refuse tars of the selection that are missing or changed."""
    tars = [selected.tars[shard] for shard in selected.used]
    _check_files(selected.folder, [(selected.folder.tar(tar.name), tar.bytes) for tar in tars])


def check_caches(selected: Selected, caches: Caches) -> None:
    """Refuse a cache that lacks shards of the selection, or whose files changed."""
    folder, selection = selected.folder, selected.selection
    needed = [selected.tars[shard].name for shard in selected.used]
    for cache in caches.folders:
        stored = {shard.name: shard.bytes for shard in selected.index.caches[cache]}
        missing = [name for name in needed if name not in stored]
        if missing:
            raise PreparedError(
                f"the cache {cache} of {folder} lacks {len(missing)} of the {len(needed)} shards "
                f"of selection {selection!r}, the first is {missing[0]}; finish it: sfumato "
                f"prepare out={folder} stages=[precache,index] precache.selection={selection}"
            )
        _check_files(folder, [(folder.tensors(cache, name), stored[name]) for name in needed])


def count_sorted(selected: Selected, log: SkipLog) -> list[list[int]]:
    """Return how many samples of each bucket and shard are read of tars.

    Records are read if the shapes of pictures decide; pictures are not.

    Raises:
        PreparedError: no sample is inside the bounds.
    """
    if not selected.is_sorted:
        return [list(selected.counts)]
    counts = [[0] * len(selected.tars) for _ in selected.choices.sizes]
    _recount(counts, selected, selected.used)
    total, bounds = sum(selected.counts), selected.choices.bounds
    left_out = total - sum(map(sum, counts))
    if left_out == total:
        raise PreparedError(
            f"data.shards.min_size={bounds.smallest} and max_pixels={bounds.pixels} leave out all "
            f"{total} samples of selection {selected.selection!r} of {selected.folder}; loosen them"
        )
    if left_out:
        folder = selected.folder.shards
        reason = f"outside min_size={bounds.smallest} and max_pixels={bounds.pixels}"
        log.note(folder, reason, left_out, f"{folder} (selection {selected.selection!r})")
    return counts


def count_cached(
    selected: Selected, caches: Caches, counts: Sequence[Sequence[int]], log: SkipLog
) -> list[list[int]]:
    """Return how many samples of each bucket and shard are in both halves of the cache.

    If the three counts in the index agree for a shard, its samples are assumed to agree (the
    reader checks when it opens the shard). Records are read only for shards whose counts differ,
    or for all when more than 1 % differ, there are at most 1,000, or shapes decide.

    Args:
        counts: of `count_sorted`.

    Raises:
        PreparedError: no sample is in the cache.
    """
    stored = [{s.name: s.samples for s in selected.index.caches[name]} for name in caches.folders]
    read = selected.used
    names = [tar.name for tar in selected.tars]
    unclear = [s for s in read if any(part[names[s]] != selected.counts[s] for part in stored)]
    if selected.is_sorted or len(read) <= _FEW or len(unclear) > _NEARLY * len(read):
        unclear = read
    cached = [list(bucket) for bucket in counts]
    _recount(cached, selected, unclear, caches)
    before, after = (list(map(sum, zip(*each, strict=True))) for each in (counts, cached))
    lacking = [shard for shard in read if after[shard] < before[shard]]
    if lacking:
        folder = selected.folder.cache(caches.folders[0])
        reason = f"kept by selection {selected.selection!r}, but not in both halves of the cache"
        name = f"{folder} (of {len(lacking)} shards, the first is {names[lacking[0]]})"
        log.note(folder, reason, sum(before) - sum(after), name)
    if sum(after) == 0:
        raise PreparedError(
            f"no sample of selection {selected.selection!r} is in the cache "
            f"{' and '.join(caches.folders)} of {selected.folder}; run: sfumato prepare "
            f"out={selected.folder} stages=[precache,index] precache.selection={selected.selection}"
        )
    return cached


def _recount(
    counts: list[list[int]], selected: Selected, shards: Sequence[int], caches: Caches | None = None
) -> None:
    count = partial(_counts_of, selected, caches)
    for shard, by_bucket in zip(shards, _in_threads(count, shards), strict=True):
        for bucket, samples in zip(counts, by_bucket, strict=True):
            bucket[shard] = samples


def _counts_of(selected: Selected, caches: Caches | None, shard: int) -> list[int]:
    folder, name = selected.folder, selected.tars[shard].name
    rows: Sequence[Sequence[int]]
    if selected.is_sorted:
        rows = selected.rows(shard, folder.shapes(name))
    else:
        rows = [folder.kept_record(selected.selection, name).kept]
    if caches is None:
        return [len(bucket) for bucket in rows]
    return [len(bucket.samples) for bucket in cached_rows(folder, caches, name, rows)]


def _check_files(folder: PreparedFolder, files: Sequence[tuple[Path, int]]) -> None:
    size_of = _size_on_disk if folder.store is None else _sizes_in(folder, files)
    found = _in_threads(partial(_fault, size_of), files) if size_of is not None else ()
    # Nothing changes in a folder on the disk, whose name is its path.
    faults = [fault.replace(str(folder.path), str(folder)) for fault in found if fault is not None]
    if faults:
        more = f" (and {len(faults) - 1} more of {len(files)} files)" if len(faults) > 1 else ""
        raise PreparedError(
            f"{faults[0]}{more}. Bring back what was indexed, or prepare it again and end "
            f"with: sfumato prepare out={folder} stages=[index]"
        )


def _size_on_disk(path: Path) -> int:
    return os.stat(path).st_size  # noqa: PTH116, quicker by the million


def _sizes_in(
    folder: PreparedFolder, files: Sequence[tuple[Path, int]]
) -> Callable[[Path], int] | None:
    """Return what looks sizes up in a store's lists of its objects; None where it has no lists."""
    assert folder.store is not None, "who calls has seen to it"
    sizes: dict[Path, int] = {}
    for parent in dict.fromkeys(path.parent for path, _ in files):
        listed = folder.store.sizes(parent.relative_to(folder.path).as_posix())
        if listed is None:
            return None
        sizes |= {parent / name: size for name, size in listed.items()}

    def size_of(path: Path) -> int:
        if path not in sizes:
            raise FileNotFoundError
        return sizes[path]

    return size_of


def _fault(size_of: Callable[[Path], int], file: tuple[Path, int]) -> str | None:
    path, size = file
    try:
        actual = size_of(path)
    except FileNotFoundError:
        return f"{path} is missing, though {INDEX} lists it"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if actual != size:
        return f"{path} has {actual} bytes, and had {size} when it was indexed"
    return None


def _in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield the results in order; many items are one task, as a task costs more than an item."""

    def several(first: int) -> list[Result]:
        return [work(item) for item in items[first : first + _AT_ONCE]]

    for results in ahead(several, range(0, len(items), _AT_ONCE), _THREADS, 2 * _THREADS):
        yield from results
