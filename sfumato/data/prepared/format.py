"""Format of a prepared folder: tars, selections of their samples, caches, and their records.

shards/000000.tar            uniform WebDataset tars
shards/000000.json           TarRecord: what is in it, and where
selections/NAME/000000.json  KeptRecord: which of its samples a filter keeps
cache/moments-KEY/000000.safetensors (and .json)   latents' moments of the kept samples
cache/moments-KEY/manifest.json     {"format": 1, "kind": "moments", ...identity}
cache/text-KEY/000000.safetensors (and .json)      their captions' states
cache/text-KEY/manifest.json        {"format": 1, "kind": "text", ...identity}
cache/text-KEY/empty.safetensors    the states of the empty prompt, one row
index.json                   Index: what training opens, and every sample's bin

KEY is the first 16 hex digits of the SHA-256 of the identity as sorted, compact JSON.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sfumato.files import digest
from sfumato.records import read_record

Record = TypeVar("Record")
SHARDS, SELECTIONS, CACHE, INDEX = "shards", "selections", "cache", "index.json"
MANIFEST, EMPTY = "manifest.json", "empty.safetensors"
UNFINISHED = ".unfinished"  # in shards/, while they are packed
FORMAT = 1
_KEY_DIGITS = 16


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
        height: of the picture, upright, in pixels.
        width: of the picture.
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
        made_of: a hash of all that decides the bytes of the tar.
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
class Shape:
    """Height and width of a picture, upright, in pixels."""

    height: int
    width: int


@dataclass(frozen=True)
class Shapes:
    """What buckets ask of a tar's record: its samples' shapes, in the tar's order."""

    sha256: str
    samples: tuple[Shape, ...]


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


@dataclass(frozen=True)
class CacheIdentity:
    """What the tensors of a cache depend on; the folders of a cache are named after it.

    Attributes:
        moments: autoencoder, height, width, crop, resize, flip, dtype; fit for JSON.
        text: text encoders, tokenizers, dtype; fit for JSON.
    """

    moments: Mapping[str, Any]
    text: Mapping[str, Any]

    @property
    def moments_folder(self) -> str:
        """The name of the folder of moments, below cache/."""
        return f"moments-{cache_key(self.moments)}"

    @property
    def text_folder(self) -> str:
        """The name of the folder of captions' states, below cache/."""
        return f"text-{cache_key(self.text)}"


# Readers; each raises a PreparedError where the file is missing, damaged or of another format


def read_index(folder: Path) -> Index:
    """Read index.json of a prepared folder."""
    if not (folder / INDEX).exists():
        raise PreparedError(
            f"{folder} has no {INDEX}, so it is no prepared folder, or not prepared to the end; "
            f"run: sfumato prepare out={folder} stages=[index]"
        )
    return _read(folder / INDEX, Index)


def read_tar_record(folder: Path, name: str) -> TarRecord:
    """Read what is in one tar of a prepared folder."""
    return _read(folder / SHARDS / f"{name}.json", TarRecord)


def read_shapes(folder: Path, name: str) -> Shapes:
    """Read height and width of each sample of a tar, and nothing else."""
    return _read(folder / SHARDS / f"{name}.json", Shapes)


def read_kept_record(folder: Path, selection: str, name: str) -> KeptRecord:
    """Read what a selection keeps of one tar."""
    return _read(folder / SELECTIONS / selection / f"{name}.json", KeptRecord)


def read_cached_record(folder: Path, cache: str, name: str) -> CachedRecord:
    """Read what one shard of a cache (moments-KEY or text-KEY) holds."""
    return _read(folder / CACHE / cache / f"{name}.json", CachedRecord)


def read_fields(path: Path) -> dict[str, Any]:
    """Return the object in a record's file, without its format; such as a cache's manifest."""
    fields: dict[str, Any] = _read(path, dict)
    return {key: value for key, value in fields.items() if key != "format"}


def record_text(record: TarRecord | KeptRecord | CachedRecord | Index) -> str:
    """Return a record as the text of its file: the same record is the same text."""
    content = {"format": FORMAT, **asdict(record)}
    return json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n"


def cache_key(identity: Mapping[str, Any]) -> str:
    """Return the hash that a cache's folder is named after."""
    return digest(identity)[:_KEY_DIGITS]


def _read(path: Path, kind: type[Record]) -> Record:
    advice = "remove it, if it is there, and run the same sfumato prepare again"
    return read_record(path, kind, advice, version=FORMAT, failure=PreparedError)
