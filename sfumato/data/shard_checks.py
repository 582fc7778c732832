"""Whether a prepared folder holds what its index promises, told before training begins."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from sfumato.data.cache_reader import CachePair, cached_rows
from sfumato.data.left_out import SkipLog
from sfumato.data.prepared import CACHE, INDEX, SHARDS, Index, PreparedError
from sfumato.data.shard_readers import Selected

_THREADS = 16  # they wait for the file system
_AT_ONCE = 256
_NEARLY = 0.01  # of the shards
_FEW = 1000  # shards whose records are read at the start, whatever the index says

Item = TypeVar("Item")
Result = TypeVar("Result")


def selected_counts(folder: Path, index: Index, selection: str) -> tuple[int, ...]:
    """Return how many samples of each tar a selection keeps."""
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
            f"{folder / INDEX} is damaged: it has {len(index.tars)} tars and the counts of "
            f"{len(counts)}; run: sfumato prepare out={folder} stages=[index]"
        )
    if sum(counts) == 0:
        raise PreparedError(
            f"the selection {selection!r} of {folder} keeps no sample; loosen its filter, or "
            "correct data.shards.selection"
        )
    return counts


def check_tars(selected: Selected) -> None:
    """Refuse tars of the selection that are missing or changed."""
    pairs = zip(selected.tars, selected.counts, strict=True)
    files = ((f"{tar.name}.tar", tar.bytes) for tar, count in pairs if count)
    _check_files(selected.folder, SHARDS, files)


def check_cached(selected: Selected, index: Index, caches: CachePair) -> None:
    """Refuse a cache that lacks shards of the selection, or whose files changed."""
    folder, selection = selected.folder, selected.selection
    pairs = zip(selected.tars, selected.counts, strict=True)
    wanted = [tar.name for tar, count in pairs if count]
    for cache in (caches.moments, caches.text):
        there = {shard.name: shard.bytes for shard in index.caches[cache]}
        missing = [name for name in wanted if name not in there]
        if missing:
            raise PreparedError(
                f"the cache {cache} of {folder} lacks {len(missing)} of the {len(wanted)} shards "
                f"of selection {selection!r}, the first is {missing[0]}; finish it: sfumato "
                f"prepare out={folder} stages=[precache,index] precache.selection={selection}"
            )
        files = ((f"{name}.safetensors", there[name]) for name in wanted)
        _check_files(folder, f"{CACHE}/{cache}", files)


def count_cached(
    selected: Selected, index: Index, caches: CachePair, log: SkipLog
) -> tuple[int, ...]:
    """Return how many samples of each shard are in both halves of the cache.

    Where the index has one number for selection, moments and states of nearly every shard, these
    are the same samples, and the records of the other shards tell; readers make sure of it when
    they meet a shard. Else, or if there are few shards, all records are read.
    """
    stored = [{s.name: s.samples for s in index.caches[c]} for c in (caches.moments, caches.text)]
    pairs = [(t.name, n) for t, n in zip(selected.tars, selected.counts, strict=True) if n]
    found = dict(pairs)
    unclear = [name for name, n in pairs if any(part[name] != n for part in stored)]
    if len(pairs) <= _FEW or len(unclear) > _NEARLY * len(pairs):
        unclear = list(found)
    found |= _in_threads(partial(_count, selected, caches), unclear)
    lacking = {name: n - found[name] for name, n in pairs if found[name] < n}
    if lacking:
        cache = selected.folder / CACHE / caches.moments
        reason = f"kept by selection {selected.selection!r}, but not in both halves of the cache"
        place = f"{cache} (of {len(lacking)} shards, the first is {next(iter(lacking))})"
        log.note(cache, reason, sum(lacking.values()), place)
    if sum(found.values()) == 0:
        raise PreparedError(
            f"no sample of selection {selected.selection!r} is in the cache {caches.moments} and "
            f"{caches.text} of {selected.folder}; run: sfumato prepare out={selected.folder} "
            f"stages=[precache,index] precache.selection={selected.selection}"
        )
    return tuple(found.get(tar.name, 0) for tar in selected.tars)


def _count(selected: Selected, caches: CachePair, name: str) -> tuple[str, int]:
    rows = cached_rows(selected.folder, selected.selection, caches, name)
    return name, len(rows.samples)


def _check_files(folder: Path, place: str, files: Iterator[tuple[str, int]]) -> None:
    """Refuse files that are missing, or of another size than was indexed."""
    root, listed = str(folder / place), list(files)
    faults = [fault for fault in _in_threads(partial(_fault, root), listed) if fault is not None]
    if faults:
        more = f" (and {len(faults) - 1} more of {len(listed)} files)" if len(faults) > 1 else ""
        raise PreparedError(
            f"{root}/{faults[0]}{more}. Bring back what was indexed, or prepare it again and end "
            f"with: sfumato prepare out={folder} stages=[index]"
        )


def _fault(root: str, listed: tuple[str, int]) -> str | None:
    name, size = listed
    try:
        found = os.stat(f"{root}/{name}").st_size  # noqa: PTH116, quicker by the million
    except FileNotFoundError:
        return f"{name} is missing, though {INDEX} lists it"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if found != size:
        return f"{name} has {found} bytes, and had {size} when it was indexed"
    return None


def _in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield the results in order; many items are one task, as a task costs more than an item."""

    def several(first: int) -> list[Result]:
        return [work(item) for item in items[first : first + _AT_ONCE]]

    with ThreadPoolExecutor(_THREADS) as threads:
        for results in threads.map(several, range(0, len(items), _AT_ONCE)):
            yield from results
