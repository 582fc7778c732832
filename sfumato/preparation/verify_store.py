"""Verification of a prepared folder in a store: every object that its index lists, byte by byte."""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO

from sfumato.config import ShardDataConfig
from sfumato.data.ahead import ahead
from sfumato.data.prepared.folder import EMPTY, PreparedFolder, open_folder
from sfumato.data.prepared.format import Index, IndexedShard, PreparedError
from sfumato.data.shard_cache import CacheError
from sfumato.data.store import check_address, home, is_address
from sfumato.files import lock, sha256_of
from sfumato.preparation.engine import Progress, open_engine
from sfumato.preparation.verify import verify

_THREADS = 8  # that fetch objects
_SHOWN = 100  # faults that are printed
_PLACE = "verify-"
_JUST_MADE = 60  # seconds in which a verification surely holds its cache
_OTHER_DISK = "set XDG_CACHE_HOME to a folder on another disk"


@dataclass(frozen=True)
class _Object:
    """A file of the index, and where its record says the same.

    Attributes:
        cache: the folder of a cache; "" is a tar.
        kept: how many of a tar's samples each selection keeps.
    """

    shard: IndexedShard
    cache: str
    kept: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class _Seen:
    """What is wrong with an object, and what selections keep of a tar, for their hash."""

    faults: Sequence[str]
    lines: Mapping[str, bytes] = field(default_factory=dict)


def verify_at(place: str, engine: str, workers: int | None, ray: str | None) -> None:
    """Verify a prepared folder by its path or address.

    Args:
        engine, workers, ray: as in `PrepareConfig`, for a folder on a disk.

    Raises:
        PreparedError: there are faults.
        ValueError: the address cannot be read, or the engine not be used.
    """
    if is_address(place):
        check_address("sfumato prepare verify", place)
        if (engine, workers, ray) != ("local", None, None):
            raise ValueError(
                f"--engine, --workers and --ray are for a folder on a disk, and {place} is an "
                "address; leave them out"
            )
        verify_store(place)
        return
    with closing(open_engine(engine, workers, ray, Path(place))) as opened:
        verify(Path(place), opened)


def verify_store(address: str) -> None:
    """Fetch every object of a prepared folder and its record; print the first hundred faults.

    Objects pass through a cache of its own, which is removed: no copy from before is believed.

    Raises:
        PreparedError: there are faults.
        ValueError: the address cannot be read.
    """
    check_address("sfumato prepare verify", address)
    home().mkdir(parents=True, exist_ok=True)
    for left in home().glob(f"{_PLACE}*"):
        _remove_left(left)
    with tempfile.TemporaryDirectory(prefix=_PLACE, dir=home()) as place, _hold(Path(place)):
        cache = str(Path(place) / "shards")  # it has a lock of its own
        _verify(address, open_folder(address, ShardDataConfig(address, cache_dir=cache)), cache)


def _hold(place: Path) -> IO[str]:
    return lock(place, busy=f"{place} is in use", unmade=_OTHER_DISK, failure=PreparedError)


def _remove_left(place: Path) -> None:
    """Remove the cache of a verification that was killed."""
    with suppress(OSError, PreparedError):
        if time.time() - place.stat().st_mtime > _JUST_MADE:
            with _hold(place):
                shutil.rmtree(place)


def _verify(address: str, folder: PreparedFolder, place: str) -> None:
    index = folder.index()
    objects = list(_objects(index))
    largest = max((each.shard.bytes for each in objects), default=0)
    room = 4 * _THREADS * largest / 10**9 + 0.1
    folder = open_folder(address, ShardDataConfig(address, cache_dir=place, cache_gb=room))
    faults, hashes = 0, {name: hashlib.sha256() for name in index.kept}
    with Progress("verify", len(objects), "object") as progress:
        looked = ahead(lambda each: _look_at(folder, each), objects, _THREADS, 2 * _THREADS)
        for seen in chain(looked, [_Seen(_faults_of_caches(folder, index))]):
            progress.tick(1)
            for name, line in seen.lines.items():
                hashes.get(name, hashlib.sha256()).update(line)
            for fault in seen.faults:
                faults += 1
                if faults <= _SHOWN:
                    print(f"  {fault}", flush=True)
    if not faults:  # each record was read
        for name, found in hashes.items():
            if found.hexdigest() != index.kept[name]:
                faults += 1
                print(f"  selection {name} keeps other samples than the index says")
    samples = sum(tar.samples for tar in index.tars)
    print(f"{address}: {len(objects):,} objects of {samples:,} samples; faults: {faults:,}")
    if faults > _SHOWN:
        print(f"the first {_SHOWN} are shown")
    if faults:
        raise PreparedError(f"{address} has faults, {faults:,} in all; {folder.again}")


def _objects(index: Index) -> Iterator[_Object]:
    for number, tar in enumerate(index.tars):
        yield _Object(
            tar, "", tuple((name, each[number]) for name, each in index.selections.items())
        )
    for cache, shards in index.caches.items():
        yield from (_Object(shard, cache) for shard in shards)


def _look_at(folder: PreparedFolder, each: _Object) -> _Seen:
    """Look at an object and its record."""
    shard, cache = each.shard, each.cache
    try:
        if cache:
            folder.hold(folder.tensors(cache, shard.name), shard)
            record = folder.cached_record(cache, shard.name)
            same = (record.bytes, record.sha256, len(record.rows))
        else:
            folder.hold(folder.tar(shard.name), shard)
            record = folder.tar_record(shard.name)
            same = (record.bytes, record.sha256, len(record.samples))
    except CacheError:
        raise
    except ValueError as error:
        return _Seen([str(error)])
    found, lines = list[str](), dict[str, bytes]()
    if same != (shard.bytes, shard.sha256, shard.samples):
        place = folder.cache(cache) if cache else folder.shards
        record_of = folder.shown(place / f"{shard.name}.json")
        found.append(f"{record_of} says another size, sum or count than the index")
    for selection, count in each.kept:
        try:
            record = folder.kept_record(selection, shard.name)
        except CacheError:
            raise
        except ValueError as error:
            found.append(str(error))
            continue
        lines[selection] = record.line
        if len(record.kept) != count:
            found.append(
                f"selection {selection} keeps {len(record.kept):,} samples of {shard.name}, and "
                f"the index says {count:,}"
            )
    return _Seen(found, lines)


def _faults_of_caches(folder: PreparedFolder, index: Index) -> list[str]:
    """Return what is wrong with manifests, and with the states of the empty prompt.

    Old indices lack the sum of these states.
    """
    found = []
    for cache in index.caches:
        try:
            folder.manifest(cache)
        except CacheError:
            raise
        except ValueError as error:
            found.append(str(error))
    for cache in (name for name in index.caches if name.startswith("text-")):
        path = folder.cache(cache) / EMPTY
        try:
            held = folder.hold_record(path)
        except CacheError:
            raise
        except ValueError as error:
            found.append(str(error))
            continue
        if index.empty.get(cache, actual := sha256_of(held.path)) != actual:
            folder.forget_record(path)
            found.append(f"{folder.shown(path)} differs from its SHA-256 in the index")
    return found
