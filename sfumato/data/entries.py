"""Entry: a picture in its container, and the captions and columns of its row."""

import abc
import codecs
import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, final

from PIL.ContainerIO import ContainerIO

from sfumato.data.left_out import FileSkips, printable

CAPTION_COLUMNS = ("caption", "text", "prompt")
IMAGE_COLUMNS = ("image", "file_name", "path")
# UTF-16 has no bytes that Python's surrogateescape could stand for.
_LONE = "sfumato.lone_surrogate"


def _lone_surrogate(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error(_LONE, _lone_surrogate)
_NO_COLUMNS: Mapping[str, Any] = MappingProxyType({})


class Blob(abc.ABC):
    """Bytes that can be read again and again, from any thread."""

    @abc.abstractmethod
    def open(self) -> AbstractContextManager[IO[bytes]]:
        """Open the bytes for reading at their beginning.

        Raises:
            OSError: they cannot be read; FileNotFoundError if the file is missing.
        """


@final
@dataclass(frozen=True, slots=True)
class FileBlob(Blob):
    """A whole file."""

    path: Path

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open the file; refuse what is no regular file, as reading a pipe would never end."""
        if not stat.S_ISREG(os.stat(self.path).st_mode):  # noqa: PTH116, quicker by the million
            raise OSError(errno.EINVAL, "not a regular file", str(self.path))
        with self.path.open("rb") as file:
            yield file


@final
@dataclass(frozen=True, slots=True)
class SpanBlob(Blob):
    """`size` bytes of a file from `offset` on, such as a member of a tar."""

    path: Path
    offset: int
    size: int

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open a view of the span; nothing before or after the span is read."""
        with self.path.open("rb") as file:
            yield ContainerIO(file, self.offset, self.size)


@dataclass(frozen=True)
class Columns:
    """Columns that are read.

    Attributes:
        image: holds the images, or their paths; None takes the first of the usual names.
        caption: holds a caption, or several in a list; None takes the first of the usual names.
        further: what an entry has beside its captions.
        lines: of a caption that has several: the first, all of them as one caption, or random,
            where each is a caption of its own.
    """

    image: str | None = None
    caption: str | None = None
    further: tuple[str, ...] = ()
    lines: str = "first"

    @property
    def images(self) -> tuple[str, ...]:
        """The names to look for."""
        return IMAGE_COLUMNS if self.image is None else (self.image,)

    @property
    def captions(self) -> tuple[str, ...]:
        """The names to look for."""
        return CAPTION_COLUMNS if self.caption is None else (self.caption,)

    def further_of(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the further columns of a row; None stands for a missing one."""
        return {name: row.get(name) for name in self.further} if self.further else _NO_COLUMNS


@dataclass(frozen=True, slots=True)
class Entry:
    """A picture with its captions.

    Attributes:
        container: the folder, table, tar or dataset that lists it.
        position: which of the container's pictures; the same wherever the container lies.
        captions: at least one, the main one first; none is blank or has white space around it.
        blob: the bytes of the picture.
        columns: further columns of its row, as read.
    """

    container: Path
    position: str
    captions: tuple[str, ...]
    blob: Blob
    columns: Mapping[str, Any] = field(default_factory=lambda: _NO_COLUMNS, compare=False)

    @property
    def name(self) -> str:
        """The container and the position, for messages."""
        return printable(f"{self.container} {self.position}")


class MissingColumnError(ValueError):
    """A table or a tar without the column that was asked for."""


def choose_column(
    columns: tuple[str, ...], names: Iterable[str], container: Path, holds: str
) -> str:
    """Return the first of some columns that is among the names.

    Raises:
        MissingColumnError: none is; `holds` says what the column should hold.
    """
    names = list(dict.fromkeys(names))
    for name in columns:
        if name in names:
            return name
    raise MissingColumnError(
        f"{container} has no column {' or '.join(map(repr, columns))}; its columns are "
        f"{', '.join(map(repr, names)) or 'none'}. Name the one that holds the {holds}"
    )


def captions_of(
    value: object, position: int | str, skips: FileSkips, lines: str = "first"
) -> tuple[str, ...]:
    """Return the captions that a value holds, or count why it holds none.

    Args:
        value: a text, its bytes, or a list of texts, of which the good ones are taken.
        position: of the row, for the count.
        skips: counts the row, or a remark on it.
        lines: as in `Columns`.
    """
    values = value if isinstance(value, list | tuple) else [value]
    texts = [text_or_fault(each, "caption") for each in values or [None]]
    good = [text for text, fault in texts if not fault]
    if not good:
        skips.add(texts[0][1], position)
        return ()
    if len(good) < len(texts):
        skips.remark("one of several captions left out", position)
    captions = [line for text in good for line in lines_of(text, lines)]
    if captions != good:
        taken = "the first is taken" if lines == "first" else "each is a caption"
        skips.remark(f"caption of several lines, of which {taken} (caption_lines)", position)
    return tuple(dict.fromkeys(captions))


def lines_of(text: str, lines: str) -> list[str]:
    """Return the captions that the lines of a text stand for; see `Columns`."""
    if lines == "all" or not ("\n" in text or "\r" in text):
        return [text]
    each = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return each[:1] if lines == "first" else each


def text_or_fault(value: object, kind: str) -> tuple[str, str]:
    """Return a text without the white space around it, and what is wrong with it, if anything.

    Args:
        value: a text, or its bytes.
        kind: what the text is, for the fault: caption or prompt.
    """
    if value is None:
        return "", f"no {kind}"
    if isinstance(value, bytes):
        value = value.decode(*encoding_of(value[:2]))
    if not isinstance(value, str):
        return "", f"{kind} that is no text"
    text = value.strip()
    if not text:
        return "", f"blank {kind}"
    if "\0" in text:
        return text, f"{kind} with zero bytes"
    return text, "" if is_utf8(text) else f"{kind} that is not UTF-8"


def encoding_of(beginning: bytes) -> tuple[str, str]:
    """Return encoding and error handler for a text with these first two bytes.

    The handlers turn what cannot be decoded into lone surrogates.
    """
    if beginning in {codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE}:
        return "utf-16", _LONE
    return "utf-8-sig", "surrogateescape"


def is_utf8(text: str) -> bool:
    """Tell text from undecodable bytes (lone surrogates) and from UTF-16's zeros."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def inside(base: Path, path: str, row: str) -> Path:
    """Return the file that a path in a table names; symbolic links below the base may lead away.

    Raises:
        ValueError: the path leaves the base; `row` names the row.
    """
    folder = os.path.abspath(base)  # noqa: PTH100, Path keeps `..`
    if "\\" in path and not os.path.lexists(os.path.join(folder, path)):  # noqa: PTH118
        path = path.replace("\\", "/")  # written on Windows
    whole = os.path.normpath(os.path.join(folder, path))  # noqa: PTH118
    if not Path(whole).is_relative_to(folder):
        raise ValueError(
            f"{row}: the image path {path!r} leaves the base path {folder}; correct the row, or "
            "set base_path to a folder that holds all images"
        )
    return Path(whole)
