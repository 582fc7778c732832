"""What a source lists before any picture is opened: where each one lies and what it shows."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

from sfumato.data.blobs import Blob
from sfumato.data.skips import SkipLog, Tally
from sfumato.data.text_files import is_utf8

CAPTION_COLUMNS = ("caption", "text", "prompt")
IMAGE_COLUMNS = ("image", "file_name", "path")


@dataclass(frozen=True)
class Columns:
    """Which columns hold images and captions; None takes the first of the usual names."""

    image: str | None = None
    caption: str | None = None

    @property
    def images(self) -> tuple[str, ...]:
        """The names to look for."""
        return IMAGE_COLUMNS if self.image is None else (self.image,)

    @property
    def captions(self) -> tuple[str, ...]:
        """The names to look for."""
        return CAPTION_COLUMNS if self.caption is None else (self.caption,)


@dataclass(frozen=True, slots=True)
class Entry:
    """A picture with its captions.

    Attributes:
        container: the folder, metadata file, tar or dataset that lists it.
        place: which of it, the same wherever the container lies.
        captions: at least one, the main one first; none is blank or has white space around it.
        blob: the bytes of the picture.
    """

    container: Path
    place: str
    captions: tuple[str, ...]
    blob: Blob

    @property
    def name(self) -> str:
        """Where it lies, for messages."""
        # A name that is no UTF-8 could be neither printed nor logged.
        return f"{self.container} {self.place}".encode(errors="backslashreplace").decode()


@final
class Refusals:
    """Count entries whose pictures cannot be used, each once, however often it is met."""

    def __init__(self, log: SkipLog) -> None:
        self.log = log
        self._places: dict[tuple[Path, str], set[str]] = {}

    def add(self, entry: Entry, reason: str) -> None:
        """Count an entry; the first of its container and reason is warned about."""
        places = self._places.setdefault((entry.container, reason), set())
        places.add(entry.place)
        self.log.note(entry.container, reason, len(places), entry.name)


class MissingColumnError(ValueError):
    """A table or a tar without the column that was asked for."""


def choose_column(wanted: tuple[str, ...], there: list[str], where: Path, holds: str) -> str:
    """Return the first of the wanted columns that is there.

    Raises:
        MissingColumnError: none is; `holds` says what it should hold.
    """
    for name in wanted:
        if name in there:
            return name
    raise MissingColumnError(
        f"{where} has no column {' or '.join(map(repr, wanted))}; the columns there are "
        f"{', '.join(map(repr, there)) or 'none'}. Name the one that holds the {holds}"
    )


def caption_of(value: object, place: int | str, tally: Tally) -> str | None:
    """Return a caption stripped of white space, or count what is wrong with it."""
    if value is None:
        tally.add("no caption", place)
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig", errors="surrogateescape")
    if not isinstance(value, str):
        tally.add("caption that is no text", place)
        return None
    caption = value.strip()
    if not caption:
        tally.add("blank caption", place)
    elif not is_utf8(caption):
        tally.add("caption that is not UTF-8", place)
    else:
        return caption
    return None


def inside(base: Path, path: str, where: str) -> Path:
    """Return the place of a listed path; symbolic links below the base may lead anywhere.

    Raises:
        ValueError: it leaves the base path; `where` names the row.
    """
    folder = os.path.abspath(base)  # noqa: PTH100, Path keeps `..`
    whole = os.path.normpath(os.path.join(folder, path))  # noqa: PTH118
    if not Path(whole).is_relative_to(folder):
        raise ValueError(
            f"{where}: the image path {path!r} leaves the base path {folder}; correct the row, or "
            "set base_path to a folder that holds all images"
        )
    return Path(whole)
