"""Typed decoder of JSON records: files that Sfumato wrote and reads again.

A record is a dataclass. Each field is checked against its type; unknown keys are passed over.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from sfumato.files import parse_object, read_bytes, read_json

Record = TypeVar("Record")
# Numbers that any arithmetic bears; NaN is not among them.
Finite = Annotated[float, msgspec.Meta(ge=-1e100, le=1e100)]
Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
_SHOWN = 80  # characters of a value in messages
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")  # of a key such as $.samples[3].offset


def read_record(
    path: Path,
    kind: type[Record],
    advice: str,
    *,
    version: int | None = None,
    failure: type[ValueError] = ValueError,
) -> Record:
    """Return the record in a JSON file.

    Args:
        kind: the dataclass of the record, or dict for an object with any keys.
        advice: what to do about a bad file, such as "remove it and run the command again".
        version: what the key `format` has to hold; None does not look at that key.

    Raises:
        failure: the file is missing, unreadable or no JSON, or a field is missing or of another
            type; the message names file, key and value.
    """
    data = read_bytes(path, advice, failure=failure)
    try:
        if version is None or _decoder(_Versioned).decode(data).format == version:
            return _decoder(kind).decode(data)
    except (UnicodeError, RecursionError, msgspec.DecodeError):
        pass  # Python's own reader says more about damaged files, and reads NaN.
    content = read_json(path, advice, failure=failure)
    if version is not None and isinstance(content, dict) and content.get("format") != version:
        raise failure(
            f"{path} has format = {content.get('format')!r}, not {version}; another version of "
            f"Sfumato or another program wrote it; {advice}"
        )
    return convert(content, kind, str(path), advice, failure)


def read_rows(path: Path, kind: type[Record], advice: str) -> list[Record]:
    """Return the records in a file with one JSON object per line.

    Raises:
        ValueError: as `read_record` does; the message also names the line.
    """
    return [
        convert(parse_object(line), kind, f"{path} line {number}", advice)
        for number, line in enumerate(read_bytes(path, advice).splitlines(), 1)
    ]


class _Versioned(msgspec.Struct):
    format: Any = None


@lru_cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def convert(
    content: Any,
    kind: type[Record],
    name: str,
    advice: str,
    failure: type[ValueError] = ValueError,
) -> Record:
    """Return the record in a JSON value; `name` says where it stands.

    Raises:
        failure: as `read_record` does.
    """
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        reason, _, key = str(error).replace("`", "").partition(" - at $")
        shown = repr(_value_at(content, key))
        cut = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"
        key = key.removeprefix(".") or "the object"
        raise failure(f"{name} is damaged: {key} = {cut}: {reason}; {advice}") from error


def _value_at(content: Any, key: str) -> Any:
    """Return the value at a key such as .samples[3].offset, as far as the key names it."""
    position = 0
    while step := _STEP.match(key, position):
        content = content[step[1] if step[2] is None else int(step[2])]
        position = step.end()
    return content
