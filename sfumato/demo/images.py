"""Pictures that the demo is fine-tuned on: emoji whose names the base model never met."""

import json
import random
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

NEW_NAMES = ("avocado", "frog", "octopus", "tulip")
TRAINED, HELD_OUT = 6, 2  # pictures of each new emoji in each style
OLD = 160  # pictures of names that the base model knows
Row = Mapping[str, str]


def write_images(folder: Path, parts: Path, _count: int) -> None:
    """Write the folders `new` and `new_held_out`, of NEW_NAMES, and `old`, of known emoji.

    Each has PNG files and metadata.jsonl with the caption of each, out of the pictures that
    `sfumato demo --pictures` rendered.
    """
    pictures = parts.parent / "pictures"
    rng = random.Random("images")
    drawn = defaultdict[tuple[str, str], list[Row]](list)
    for row in read_rows(pictures / "new_things"):
        drawn[row["style"], row["name"]].append(row)
    new, held_out = list[Row](), list[Row]()
    for (_, name), rows in drawn.items():
        if name in NEW_NAMES:
            rng.shuffle(rows)
            new += rows[:TRAINED]
            held_out += rows[TRAINED : TRAINED + HELD_OUT]
    known = read_rows(pictures / "things")
    _copy(pictures / "new_things", folder / "new", new)
    _copy(pictures / "new_things", folder / "new_held_out", held_out)
    _copy(pictures / "things", folder / "old", rng.sample(known, min(OLD, len(known))))


def read_rows(folder: Path) -> list[Row]:
    """Return the rows of metadata.jsonl in a folder of pictures."""
    text = (folder / "metadata.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _copy(source: Path, folder: Path, rows: Sequence[Row]) -> None:
    folder.mkdir()
    for row in rows:
        shutil.copyfile(source / row["file_name"], folder / row["file_name"])
    lines = [json.dumps({key: row[key] for key in ("file_name", "text")}) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
