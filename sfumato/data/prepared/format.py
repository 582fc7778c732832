"""Records of a prepared folder; folder.py says where each lies."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sfumato.files import digest, write_text

FORMAT = 1
_KEY_DIGITS = 16
_HALF = 32  # hex digits of each half of `made_of` of a shard of a cache


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
        rows: number of the first input row that the tar covers, and of the one behind the last;
            None in a tar of an older version, which has a fixed number of samples.
        ends: in an older version, a container of what was packed, and a row of it: there the next
            tar begins.
    """

    name: str
    bytes: int
    sha256: str
    made_of: str
    samples: tuple[Member, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    rows: tuple[int, int] | None = None
    ends: tuple[int, int] | None = None


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

    @property
    def line(self) -> bytes:
        """What the hash of a selection, in the index, has of the tar."""
        return f"{self.name} {self.kept}\n".encode()


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
        empty: FOLDER of a cache (text-KEY) to the SHA-256 of the states of the empty prompt.
    """

    tars: tuple[IndexedShard, ...]
    selections: Mapping[str, tuple[int, ...]]
    caches: Mapping[str, tuple[IndexedShard, ...]]
    bins: Mapping[str, Mapping[str, int]]
    kept: Mapping[str, str] = field(default_factory=dict)
    empty: Mapping[str, str] = field(default_factory=dict)


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


def record_text(record: TarRecord | KeptRecord | CachedRecord | Index) -> str:
    """Return a record as the text of its file: the same record is the same text."""
    content = {"format": FORMAT, **asdict(record)}
    return json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n"


def write_record(
    path: Path, record: TarRecord | KeptRecord | CachedRecord | Index, *, shared: bool = True
) -> None:
    """Write a record whole, or raise a PreparedError.

    Args:
        shared: as in `new_file`.
    """
    write_text(path, record_text(record), shared=shared, failure=PreparedError)


def made_of(cache: str, tar: TarRecord, samples: Sequence[int]) -> str:
    """Return a hash in two halves: of tar and cache, and of the encoded samples."""
    return digest([tar.sha256, cache])[:_HALF] + digest(list(samples))[:_HALF]


def is_of(cache: str, cached: CachedRecord, tar: TarRecord) -> bool:
    """Tell whether a shard of a cache was encoded from this very tar, whichever samples of it."""
    return cached.made_of[:_HALF] == made_of(cache, tar, ())[:_HALF]


def cache_key(identity: Mapping[str, Any]) -> str:
    """Return the hash that a cache's folder is named after."""
    return digest(identity)[:_KEY_DIGITS]
