"""Verification of a prepared folder in a store: every object that its index lists, byte by byte."""

import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from sfumato.config import ShardDataConfig
from sfumato.data.ahead import ahead
from sfumato.data.prepared.folder import EMPTY, PreparedFolder, open_folder
from sfumato.data.prepared.format import Index, IndexedShard, PreparedError
from sfumato.data.shard_cache import CacheError
from sfumato.data.store import check_address, home, is_address
from sfumato.files import sha256_of
from sfumato.preparation.engine import Progress, open_engine
from sfumato.preparation.verify import verify

_THREADS = 8  # that fetch objects
_SHOWN = 100  # faults that are printed


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


def verify_at(place: str, engine: str, workers: int | None, ray: str | None) -> None:
    """Verify a prepared folder by its path or address.

    Args:
        engine, workers, ray: as in `PrepareConfig`, for a folder on a disk.

    Raises:
        PreparedError: there are faults.
        ValueError: the address cannot be read, or the engine not be used.
    """
    if is_address(place):
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
    with tempfile.TemporaryDirectory(prefix="verify-", dir=home()) as place:
        _verify(address, open_folder(address, ShardDataConfig(address, cache_dir=place)), place)


def _verify(address: str, folder: PreparedFolder, place: str) -> None:
    index = folder.index()
    objects = list(_objects(index))
    largest = max((each.shard.bytes for each in objects), default=0)
    room = 4 * _THREADS * largest / 10**9 + 0.1
    folder = open_folder(address, ShardDataConfig(address, cache_dir=place, cache_gb=room))
    faults = 0
    with Progress("verify", len(objects), "object") as progress:
        looked = ahead(lambda each: _faults(folder, each), objects, _THREADS, 2 * _THREADS)
        for found in chain(looked, [_faults_of_empty(folder, index)]):
            progress.tick(1)
            for fault in found:
                faults += 1
                if faults <= _SHOWN:
                    print(f"  {fault}", flush=True)
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


def _faults(folder: PreparedFolder, each: _Object) -> list[str]:
    """Return what is wrong with an object and its record."""
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
        return [str(error)]
    found = []
    if same != (shard.bytes, shard.sha256, shard.samples):
        place = folder.cache(cache) if cache else folder.shards
        record_of = folder.shown(place / f"{shard.name}.json")
        found.append(f"{record_of} says another size, sum or count than the index")
    for selection, count in each.kept:
        try:
            kept = len(folder.kept_record(selection, shard.name).kept)
        except CacheError:
            raise
        except ValueError as error:
            found.append(str(error))
            continue
        if kept != count:
            found.append(
                f"selection {selection} keeps {kept:,} samples of {shard.name}, and the index says "
                f"{count:,}"
            )
    return found


def _faults_of_empty(folder: PreparedFolder, index: Index) -> list[str]:
    """Return what is wrong with the states of the empty prompt, of which old indices lack a sum."""
    found = []
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
