"""Early stop of training: SIGTERM, Ctrl-C, or a limit of wall-clock time."""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final


def parse_duration(key: str, text: str, sign: str = ":") -> int:
    """Return the seconds of [[DD:]HH:]MM:SS.

    Args:
        key: the setting that holds the text, for messages.
        sign: what stands after DD.

    Raises:
        ValueError: if the text has another form, or the duration is 0.
    """
    form = f"[[DD{sign}]HH:]MM:SS"
    match = re.fullmatch(rf"(?:(?:(\d+){sign})?(\d+):)?(\d+):(\d+)", text, re.ASCII)
    if match is None:
        raise ValueError(f"{key}={text!r} is no duration; write {form}")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    if seconds > 59 or (match[2] and minutes > 59) or (match[1] and hours > 23):
        raise ValueError(
            f"{key}={text!r} has a part that is too large: seconds and minutes go up to 59, hours "
            f"after days up to 23; write {form}"
        )
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise ValueError(f"{key}={text!r} leaves no time; give a second or more as {form}")
    return total


@final
class StopWatch:
    """Watch over the reasons to stop after the current step.

    Args:
        max_time: [[DD:]HH:]MM:SS of wall-clock time from now, loading included; or None.
    """

    def __init__(self, max_time: str | None) -> None:
        self._limit = None if max_time is None else parse_duration("training.max_time", max_time)
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
