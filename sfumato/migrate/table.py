"""Table of what others call their settings: read for `sfumato migrate`, printed as a page of docs/.

`python -m sfumato.migrate NAME` prints docs/coming_from_NAME.md.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml

PAGES = ("nemo_aligner", "trl")
UNSAID = object()  # in place of a value


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        keys: theirs, with the value after `=`; a `*` stands for any letters.
        how: taken, none, missing, page, or the name of a function of changes.py.
        ours: keys of ours; of a page, also names.
    """

    keys: Mapping[str, Any]
    how: str
    ours: tuple[str, ...]
    note: str

    def find(self, key: str) -> str | None:
        """Return the key of the row that a key of a config matches."""
        return next((name for name in self.keys if fnmatchcase(key, name)), None)


@dataclass(frozen=True)
class Kind:
    """A config that is known.

    Attributes:
        needs: how a key begins that the config must have; empty for none.
        groups: what of ours it chooses.
        settings: of ours, what it means as a whole; ??? is to be given.
        give: what to give for them.
        rows: of its keys, patterns last.
    """

    name: str
    title: str
    command: str
    needs: str
    groups: Mapping[str, str]
    settings: Mapping[str, Any]
    give: Mapping[str, str]
    rows: Sequence[Row]

    def find(self, key: str) -> tuple[Row, Any] | None:
        """Return the row of a key, and the value that the row says of the key."""
        for row in self.rows:
            if (name := row.find(key)) is not None:
                return row, row.keys[name]
        return None


def kinds() -> dict[str, Kind]:
    """Return the configs that are known, by name."""
    return {
        name: _kind(name, entry, _content(page)["page"])
        for page in PAGES
        for name, entry in _content(page)["kinds"].items()
    }


def markdown(page: str) -> str:
    """Return a page of docs/."""
    content = _content(page)
    parts = []
    for section in content["page"]:
        if "text" in section:
            parts.append(section["text"].rstrip())
            continue
        head = f"| {content['theirs']} | Sfumato | note |\n|---|---|---|"
        parts.append("\n".join([f"## {section['title']}\n\n{head}", *map(_line, _rows(section))]))
    return "\n\n".join(parts) + "\n"


@cache
def _content(page: str) -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / f"{page}.yaml").read_text(encoding="utf-8"))


def _kind(name: str, entry: Mapping[str, Any], page: Sequence[Mapping[str, Any]]) -> Kind:
    rows = [
        row
        for section in page
        if "rows" in section and name in section.get("kinds", [name])
        for row in _rows(section)
        if row.how != "page"
    ]
    return Kind(
        name,
        entry["title"],
        entry.get("command", "train"),
        entry.get("needs", ""),
        entry.get("groups", {}),
        {**entry["settings"], **entry.get("more", {})},
        entry["give"],
        sorted(rows, key=lambda row: any("*" in key for key in row.keys)),
    )


def _rows(section: Mapping[str, Any]) -> Iterator[Row]:
    for line in section["rows"].splitlines():
        theirs, how, ours, note = (cell.strip() for cell in re.split(r" \|(?= |$)", line))
        keys = {theirs: UNSAID}
        if how != "page":
            named = (part.partition("=") for part in theirs.split(", "))
            keys = {key: yaml.safe_load(value) if sign else UNSAID for key, sign, value in named}
        yield Row(keys, how, tuple(filter(None, ours.split(", "))), note)


def _line(row: Row) -> str:
    theirs = ", ".join(row.keys if row.how == "page" else (f"`{key}`" for key in row.keys))
    ours = ", ".join(f"`{name}`" for name in row.ours if name != "none")
    known = "none" if row.how in ("none", "missing") and not ours else ours or "none"
    return f"| {theirs} | {known} | {row.note} |".replace("|  |", "| |")
