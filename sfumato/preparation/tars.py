"""Writer of uniform tars: the same samples give the same bytes.

KEY.jpg     the picture's own bytes, under the suffix of their format
KEY.json    all captions, height, width, sha256 and columns
KEY.txt     the main caption
"""

import io
import json
import tarfile
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path

from sfumato.data.prepared.format import Member


@dataclass(frozen=True)
class Sample:
    """The bytes of a decoded picture, and its record before it has a key and an offset."""

    data: bytes
    member: Member


def write_tar(path: Path, first: int, samples: Iterator[Sample]) -> list[Member]:
    """Write a tar of all the samples; keys count from `first`.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    members: list[Member] = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, sample in enumerate(samples, first):
            key = f"{number:09d}"
            # Each member begins with one block of header.
            member = replace(sample.member, key=key, offset=tar.offset + tarfile.BLOCKSIZE)
            _add(tar, f"{key}.{member.suffix}", sample.data)
            for suffix, text in texts(member).items():
                _add(tar, f"{key}.{suffix}", text)
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            members.append(member)
    return members


def texts(member: Member) -> dict[str, bytes]:
    """Return the texts beside a picture in a tar, by suffix."""
    content = {
        "captions": member.captions,
        "height": member.height,
        "width": member.width,
        "sha256": member.sha256,
        "columns": dict(member.columns),
    }
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return {"json": text.encode(), "txt": member.captions[0].encode()}


def forget_others(folder: Path, names: Set[str]) -> None:
    """Remove tars and records of other names, and the unfinished files of a killed process."""
    for path in [*folder.glob("*.json"), *folder.glob("*.tar"), *folder.glob(".*.tmp")]:
        if path.stem not in names:
            path.unlink()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(data))
