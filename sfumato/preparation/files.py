"""Files that take their place whole: written beside it, synced, and renamed into it."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sfumato.data.prepared.format import PreparedError

_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def placed(place: Path) -> Iterator[Path]:
    """Give the path of a file to write, which then takes `place`; a failure leaves no trace.

    Raises:
        PreparedError: if the disk is full.
    """
    beside = place.with_name(f".{place.name}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        _sync(beside)
        beside.replace(place)
        _sync(place.parent)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise PreparedError(
            f"{place} could not be written: {os.strerror(error.errno or errno.ENOSPC)}; nothing "
            "half-written is left, and what is finished stays. Free some space and run the same "
            "command again"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def write_text(place: Path, text: str) -> None:
    """Write a small file whole, or not at all."""
    with placed(place) as beside:
        beside.write_text(text, encoding="utf-8")


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(content: Any) -> str:
    """Return the SHA-256 of what JSON can hold: equal content, equal digest."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
