"""Typed decoder of JSON records: files that Sfumato wrote and reads again.

A record is a dataclass. Each field is checked against its type; unknown keys are passed over.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sfumato.files import parse_object, read_json

Record = TypeVar("Record")
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
    try:
        data = path.read_bytes()
        if version is not None:
            _check(path, _decoder(_Versioned).decode(data).format, version, advice, failure)
        return _decoder(kind).decode(data)
    except (OSError, UnicodeError, RecursionError, msgspec.DecodeError):
        # Python's own reader says more about damaged files, and reads NaN.
        content = read_json(path, advice, failure=failure)
    if version is not None and isinstance(content, dict):
        _check(path, content.get("format"), version, advice, failure)
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        fault = _fault(content, str(error))
        raise failure(f"{path} is damaged: {fault}; {advice}") from error


def read_rows(path: Path, kind: type[Record], advice: str) -> list[Record]:
    """Return the records in a file with one JSON object per line.

    Raises:
        ValueError: as `read_record` does; the message also names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {advice}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        content = parse_object(line)
        try:
            rows.append(msgspec.convert(content, kind))
        except msgspec.ValidationError as error:
            fault = _fault(content, str(error))
            raise ValueError(f"{path} is damaged: line {number}, {fault}; {advice}") from error
    return rows


class _Versioned(msgspec.Struct):
    format: Any = None


@lru_cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def _check(path: Path, found: Any, version: int, advice: str, failure: type[ValueError]) -> None:
    if found != version:
        raise failure(
            f"{path} has format = {found!r}, not {version}; another version of Sfumato or another "
            f"program wrote it; {advice}"
        )


def _fault(content: Any, reason: str) -> str:
    """Return key, value and what is wrong with it, from a message of msgspec."""
    reason, _, key = reason.replace("`", "").partition(" - at $")
    shown = repr(_value_at(content, key))
    cut = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"
    return f"{key.removeprefix('.') or 'the object'} = {cut}: {reason}"


def _value_at(content: Any, key: str) -> Any:
    """Return the value at a key such as .samples[3].offset, as far as the key names it."""
    position = 0
    while step := _STEP.match(key, position):
        content = content[step[1] if step[2] is None else int(step[2])]
        position = step.end()
    return content
