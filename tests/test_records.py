"""The typed decoder of records: what is wrong is told by file, key and value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sfumato.records import read_record


@dataclass(frozen=True)
class Part:
    name: str
    captions: tuple[str, ...]
    size: int = 0


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    counts: Mapping[str, float] = field(default_factory=dict)
    ends: tuple[int, int] = (0, 0)


class DamagedError(ValueError):
    pass


def read(folder: Path, content: bytes | str, version: int | None = None) -> Whole:
    file = folder / "whole.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_record(file, Whole, "do it again", version=version, failure=DamagedError)


def test_a_record_has_the_types_of_its_fields(tmp_path: Path) -> None:
    content = '{"parts": [{"name": "é", "captions": ["a", "b"]}], "ends": [1, 2], "other": 3}'
    assert read(tmp_path, content) == Whole((Part("é", ("a", "b")),), {}, (1, 2))
    assert read(tmp_path, '{"parts": [], "format": 2}', version=2) == Whole(())
    # What json.dumps writes of a loss that diverged.
    assert str(read(tmp_path, '{"parts": [], "counts": {"a": NaN}}').counts["a"]) == "nan"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{}", "parts"),
        ('{"parts": null}', "parts = None"),
        ('{"parts": [{"name": 3, "captions": []}]}', r"parts\[0\].name = 3: .*str"),
        ('{"parts": [{"name": "a", "captions": "b"}]}', r"parts\[0\].captions = 'b': .*array"),
        ('{"parts": [{"name": "a", "captions": [], "size": true}]}', r"size = True: .*int"),
        ('{"parts": [], "ends": [1]}', r"ends = \[1\]"),
        ('{"parts": [], "counts": {"a": "b"}}', r"counts\[...\] = {'a': 'b'}: .*float"),
        ("[]", "array"),
        ('{"parts": [', "JSON"),
        (b'{"parts": ["\xff"]}', "utf-8"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: bytes | str, fault: str) -> None:
    with pytest.raises(DamagedError, match=rf"whole\.json is damaged: .*{fault}.*; do it again"):
        read(tmp_path, content)


def test_another_format_is_refused(tmp_path: Path) -> None:
    for content in ('{"parts": [], "format": 2}', '{"parts": []}', '{"counts": {"a": NaN}}'):
        with pytest.raises(DamagedError, match=r"whole\.json has format = .*, not 1.*do it again"):
            read(tmp_path, content, version=1)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"nowhere\.json is missing; do it again"):
        read_record(tmp_path / "nowhere.json", Whole, "do it again", failure=DamagedError)
