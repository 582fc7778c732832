"""Streams of the command line that no state of the terminal can break."""

import io
import os
import sys
from pathlib import Path
from typing import Any, final


def mend_streams() -> None:
    """Let nothing that becomes of the terminal end the work.

    A stream that the caller closed leads nowhere, and so does one whose reader goes, such as
    `| head -1`. Letters that a terminal has not are written as numbers.
    """
    sys.stdout, sys.stderr = _mended(sys.stdout, 1), _mended(sys.stderr, 2)


def _mended(stream: Any, number: int) -> Any:
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    if stream not in (sys.__stdout__, sys.__stderr__):
        stream.reconfigure(errors="backslashreplace")
        return stream
    raw = _Lasting(number, "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


@final
class _Lasting(io.FileIO):
    """A stream that leads nowhere once its reader has gone."""

    def write(self, data: Any, /) -> int:
        """Write bytes, or drop them."""
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)
