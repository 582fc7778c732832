"""The JSON objects of a WebDataset tar, by key."""

import json
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any


def read_objects(path: Path) -> dict[str, dict[str, Any]]:
    """Return each key's `KEY.json`; the first of its name, up to the end or the first damage."""
    objects: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                name = PurePosixPath(member.name)
                stem, _, suffix = name.name.partition(".")
                if not member.isfile() or not stem or suffix.lower() != "json":
                    continue
                key, stream = str(name.with_name(stem)), tar.extractfile(member)
                if stream is not None and key not in objects:
                    objects[key] = _object(stream.read())
    except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError):
        return objects
    return objects


def _object(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
