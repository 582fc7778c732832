"""Which caches of a prepared folder a run can read: those of its own encoders and resolution."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfumato.data.cache_reader import CachePair
from sfumato.data.cached import MANIFEST, CacheIdentity, cache_key
from sfumato.data.prepared import CACHE, Index, PreparedError, read_record
from sfumato.data.shard_readers import Selected

# How tensors are stored, not what they are of: any will do, the most exact first.
_DTYPES = ("float32", "float16", "bfloat16")
_STORED = {"dtype", "flip"}
_MISSING = object()


def find_caches(
    selected: Selected, index: Index, identity: CacheIdentity, *, flip: bool
) -> CachePair:
    """Return the folders of moments and of states that fit.

    Their dtype may be another, and there may be mirrored moments that nobody asks for. The one
    that has most of the selection comes first; of equals, that of just this identity.

    Raises:
        PreparedError: there is none; it says which fields differ from those of each cache there.
    """
    return CachePair(
        _find(selected, index, "moments", identity.moments, flip=flip),
        _find(selected, index, "text", identity.text, flip=False),
    )


def _find(
    selected: Selected, index: Index, kind: str, wanted: Mapping[str, Any], *, flip: bool
) -> str:
    folder, exact = selected.folder, f"{kind}-{cache_key(wanted)}"
    manifests = dict(_manifests(folder, index, kind))
    fitting = [
        name
        for name, found in manifests.items()
        if not _differing(wanted, found) and (found.get("flip", False) or not flip)
    ]
    if fitting:

        def order(name: str) -> tuple[int, bool, int, str]:
            return (-_held(selected, index, name), name != exact, _rank(manifests[name]), name)

        return min(fitting, key=order)
    said = [
        f"{name} differs in {_say(wanted, found, flip=flip)}" for name, found in manifests.items()
    ]
    if exact not in manifests and (folder / CACHE / exact / MANIFEST).exists():
        said.append(f"{exact} is there, but was not whole when the folder was indexed")
    there = "; ".join(said) or "no cache of this kind is there"
    raise PreparedError(
        f"{folder} has no cache of {kind} for this run ({exact}): {there}. Precache with the "
        f"model and size of the run (sfumato prepare out={folder} stages=[precache,index], and "
        "precache.flip=true for data.shards.flip=true), or correct the settings of the run"
    )


def _manifests(folder: Path, index: Index, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the identity of each cache of a kind that the index lists."""
    for name in sorted(index.caches):
        if not name.startswith(f"{kind}-"):
            continue
        place = folder / CACHE / name / MANIFEST
        content = read_record(place)
        if content.pop("kind", None) != kind or name != f"{kind}-{cache_key(content)}":
            raise PreparedError(
                f"{place} does not belong to its folder, whose name is made of what it says; one "
                "of them was changed. Remove the folder and precache again"
            )
        yield name, content


def _differing(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    fields = sorted((wanted.keys() | found.keys()) - _STORED)
    return [field for field in fields if wanted.get(field, _MISSING) != found.get(field, _MISSING)]


def _say(wanted: Mapping[str, Any], found: Mapping[str, Any], *, flip: bool) -> str:
    said = [
        f"{field} ({found.get(field, 'not stated')} there, {wanted.get(field, 'not stated')} here)"
        for field in _differing(wanted, found)
    ]
    if flip and not found.get("flip", False):
        said.append("flip (no mirrored moments there, data.shards.flip=true here)")
    return ", ".join(said)


def _held(selected: Selected, index: Index, cache: str) -> int:
    """Return how many samples of the selection a cache may hold, by the numbers of its shards."""
    stored = {shard.name: shard.samples for shard in index.caches[cache]}
    pairs = zip(selected.tars, selected.counts, strict=True)
    return sum(min(stored.get(tar.name, 0), count) for tar, count in pairs)


def _rank(found: Mapping[str, Any]) -> int:
    dtype = found.get("dtype")
    return _DTYPES.index(dtype) if dtype in _DTYPES else len(_DTYPES)
