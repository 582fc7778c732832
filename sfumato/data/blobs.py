"""Where the bytes of one picture lie: a file, or a span of one."""

import abc
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, final

from PIL.ContainerIO import ContainerIO


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
        """Open the file; refuse what is no regular file, as a pipe would be waited for forever."""
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
        """Open a view of the span; nothing before or behind it is read."""
        with self.path.open("rb") as file:
            yield ContainerIO(file, self.offset, self.size)
