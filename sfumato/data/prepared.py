"""What `sfumato prepare` leaves in a folder: tars, selections of their samples, and caches.

shards/000000.tar            uniform WebDataset tars
shards/000000.json           TarRecord: what is in it, and where
selections/NAME/000000.json  KeptRecord: which of its samples a filter keeps
cache/moments-KEY/000000.safetensors (and .json)   latents' moments of the kept samples
cache/text-KEY/000000.safetensors (and .json)      their captions' states
index.json                   Index: what training opens, and every sample's bin
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHARDS, SELECTIONS, CACHE, INDEX = "shards", "selections", "cache", "index.json"
UNFINISHED = ".unfinished"  # in shards/, while they are packed
FORMAT = 1


class PreparedError(ValueError):
    """A prepared folder that is incomplete, damaged, or of another format."""


@dataclass(frozen=True)
class Member:
    """One sample of a tar.

    Attributes:
        key: what its members' names begin with.
        suffix: of the picture's member, such as jpg.
        offset: of the picture's bytes in the tar; `size` of them.
        captions: the first is the main one.
        height: of the picture, upright, in pixels; `width` likewise.
        sha256: of the picture's bytes.
        columns: further columns of its row, such as scores.
    """

    key: str
    suffix: str
    offset: int
    size: int
    captions: tuple[str, ...]
    height: int
    width: int
    sha256: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TarRecord:
    """What is in one tar.

    Attributes:
        name: of the shard, such as 000000.
        bytes: of the tar; `sha256` of all of them.
        made_of: a hash of all that it was made of: equal hashes, equal bytes.
        samples: in the tar's order.
        dropped: input rows that ended in no sample, by reason.
        ends: where the next tar begins: a container of what was packed, and a row of it.
    """

    name: str
    bytes: int
    sha256: str
    made_of: str
    samples: tuple[Member, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    ends: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class KeptRecord:
    """What a selection keeps of one tar.

    Attributes:
        name: of the shard.
        made_of: a hash of the tar's record and of the filter.
        kept: indices of its samples, ascending.
        dropped: the others, by reason.
        tar: `made_of` of the tar; empty is unknown.
    """

    name: str
    made_of: str
    kept: tuple[int, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    tar: str = ""


@dataclass(frozen=True)
class CachedRecord:
    """What one shard of a cache holds.

    Attributes:
        name: of the shard.
        made_of: a hash of the tar, of what is kept of it, and of the cache's identity.
        bytes: of the file; `sha256` of all of them.
        rows: indices of the tar's samples, ascending: a row of each tensor for each.
        dropped: kept samples that could not be encoded, by reason.
    """

    name: str
    made_of: str
    bytes: int
    sha256: str
    rows: tuple[int, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class IndexedShard:
    """One shard in the index: how many samples, and the file that holds them."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What training opens.

    Attributes:
        tars: of the folder, by name, ascending.
        selections: NAME to the number of samples kept of each tar, in the order of `tars`.
        caches: FOLDER of a cache (moments-KEY, text-KEY) to its shards.
        bins: stage to bin to count; in each stage they sum up to what went in.
        kept: NAME of a selection to the SHA-256 of which samples it keeps.
    """

    tars: tuple[IndexedShard, ...]
    selections: Mapping[str, tuple[int, ...]]
    caches: Mapping[str, tuple[IndexedShard, ...]]
    bins: Mapping[str, Mapping[str, int]]
    kept: Mapping[str, str] = field(default_factory=dict)


def read_index(folder: Path) -> Index:
    """Read index.json of a prepared folder.

    Raises:
        PreparedError: if there is none, or it is damaged.
    """
    place = folder / INDEX
    if not place.exists():
        raise PreparedError(
            f"{folder} has no {INDEX}, so it is no prepared folder, or not prepared to the end; "
            f"run: sfumato prepare out={folder} stages=[index]"
        )
    content = read_record(place)
    try:
        return Index(
            tars=tuple(IndexedShard(**shard) for shard in content["tars"]),
            selections={name: tuple(kept) for name, kept in content["selections"].items()},
            caches={
                name: tuple(IndexedShard(**shard) for shard in shards)
                for name, shards in content["caches"].items()
            },
            bins=content["bins"],
            kept=content.get("kept", {}),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(place, error) from error


def read_tar_record(folder: Path, name: str) -> TarRecord:
    """Read what is in one tar of a prepared folder.

    Raises:
        PreparedError: if the record is missing or damaged.
    """
    place = folder / SHARDS / f"{name}.json"
    content = read_record(place)
    try:
        samples = tuple(
            Member(**(sample | {"captions": tuple(sample["captions"])}))
            for sample in content.pop("samples")
        )
        container, row = content.pop("ends", (0, 0))
        return TarRecord(samples=samples, ends=(container, row), **content)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(place, error) from error


def read_kept_record(folder: Path, selection: str, name: str) -> KeptRecord:
    """Read what a selection keeps of one tar.

    Raises:
        PreparedError: if the record is missing or damaged.
    """
    place = folder / SELECTIONS / selection / f"{name}.json"
    content = read_record(place)
    try:
        return KeptRecord(kept=_indices(content.pop("kept")), **content)
    except (KeyError, TypeError) as error:
        raise _damaged(place, error) from error


def read_cached_record(folder: Path, cache: str, name: str) -> CachedRecord:
    """Read what one shard of a cache (moments-KEY or text-KEY) holds.

    Raises:
        PreparedError: if the record is missing or damaged.
    """
    place = folder / CACHE / cache / f"{name}.json"
    content = read_record(place)
    try:
        return CachedRecord(rows=_indices(content.pop("rows")), **content)
    except (KeyError, TypeError) as error:
        raise _damaged(place, error) from error


def read_record(place: Path) -> dict[str, Any]:
    """Return the object in a record's file, without its format.

    Raises:
        PreparedError: if it is missing, damaged or of another format.
    """
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PreparedError(
            f"{place} is missing; run the same sfumato prepare again, which makes it anew"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(place, error) from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise PreparedError(
            f"{place} is not of format {FORMAT}; it was written by another version of Sfumato, or "
            "by another program. Remove it and prepare again"
        )
    return content


def record_text(record: TarRecord | KeptRecord | CachedRecord | Index) -> str:
    """Return a record as the text of its file: the same record is the same text."""
    content = {"format": FORMAT, **asdict(record)}
    return json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n"


def _indices(values: Sequence[object]) -> tuple[int, ...]:
    indices = tuple(value for value in values if isinstance(value, int))
    if len(indices) < len(values):
        raise TypeError("an index is no whole number")
    return indices


def _damaged(place: Path, error: BaseException) -> PreparedError:
    return PreparedError(
        f"{place} is damaged ({error}); remove it and run the same sfumato prepare again"
    )
