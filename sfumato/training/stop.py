"""Early stop of training: SIGTERM, Ctrl-C, or a limit of wall-clock time."""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final


def parse_duration(text: str) -> float:
    """Return the seconds of [[DD:]HH:]MM:SS.

    Raises:
        ValueError: if the text has another form.
    """
    parts = text.split(":")
    if not 2 <= len(parts) <= 4 or not all(re.fullmatch("[0-9]+", p) for p in parts):
        raise ValueError(f"training.max_time={text!r} is no duration; write [[DD:]HH:]MM:SS")
    units = (86_400, 3_600, 60, 1)[-len(parts) :]
    return float(sum(int(part) * unit for part, unit in zip(parts, units, strict=True)))


@final
class StopWatch:
    """Watch over the reasons to stop after the current step.

    Args:
        max_time: [[DD:]HH:]MM:SS of wall-clock time from now, loading included; or None.
    """

    def __init__(self, max_time: str | None) -> None:
        self._limit = None if max_time is None else parse_duration(max_time)
        self._started = time.monotonic()
        self._signal: str | None = None
        self._longest = 0.0

    def reason(self) -> str | None:
        """Say why to stop now, or None."""
        if self._signal:
            return self._signal
        elapsed = time.monotonic() - self._started
        if self._limit is not None and elapsed + self._longest > self._limit:
            return f"the time limit of {self._limit:.0f} s"
        return None

    def took(self, seconds: float) -> None:
        """Remember the longest step or validation: the next must fit before the limit."""
        self._longest = max(self._longest, seconds)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn SIGTERM and the first Ctrl-C into a clean stop; a second Ctrl-C stops at once."""

        def note(number: int, _: FrameType | None) -> None:
            name = signal.Signals(number).name
            if self._signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = name
            os.write(2, f"\n{name}: stopping after this step\n".encode())

        before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
