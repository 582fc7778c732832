"""Names of the tars, selections and caches in a prepared folder, and the tar of a cached shard."""

from collections.abc import Sequence, Set
from pathlib import Path

from sfumato.data.prepared.format import (
    CACHE,
    MANIFEST,
    SELECTIONS,
    SHARDS,
    UNFINISHED,
    CachedRecord,
    PreparedError,
    TarRecord,
)
from sfumato.files import digest

HALF = 32  # hex digits of each half of `made_of`


def tar_names(folder: Path) -> list[str]:
    """Return the names of the packed tars, in order.

    Raises:
        PreparedError: there is none, or not all of them.
    """
    if (folder / SHARDS / UNFINISHED).exists():
        raise PreparedError(
            f"packing into {folder} was not finished; run the same sfumato prepare with its stage "
            "pack, which resumes"
        )
    names = sorted(path.stem for path in (folder / SHARDS).glob("[!.]*.json"))
    if not names:
        raise PreparedError(
            f"{folder} holds no packed tars; run: sfumato prepare out={folder} stages=[pack] with "
            "pack.path=FOLDER or after a download"
        )
    return names


def selection_names(folder: Path) -> list[str]:
    """Return the names of the selections, sorted."""
    return sorted(path.name for path in (folder / SELECTIONS).glob("[!.]*") if path.is_dir())


def cache_names(folder: Path) -> list[str]:
    """Return the folders of the caches that have a manifest, sorted."""
    return sorted(path.parent.name for path in (folder / CACHE).glob(f"[!.]*/{MANIFEST}"))


def forget_others(folder: Path, names: Set[str]) -> None:
    """Remove tars and records of other names, and the unfinished files of a killed process."""
    for path in [*folder.glob("*.json"), *folder.glob("*.tar"), *folder.glob(".*.tmp")]:
        if path.stem not in names:
            path.unlink()


def made_of(cache: str, tar: TarRecord, samples: Sequence[int]) -> str:
    """Return a hash in two halves: of tar and cache, and of the encoded samples."""
    return digest([tar.sha256, cache])[:HALF] + digest(list(samples))[:HALF]


def is_of(cache: str, cached: CachedRecord, tar: TarRecord) -> bool:
    """Tell whether a shard of a cache was encoded from this very tar, whichever samples of it."""
    return cached.made_of[:HALF] == made_of(cache, tar, ())[:HALF]
