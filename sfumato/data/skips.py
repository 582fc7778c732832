"""What could not be read as a prompt, counted by reason and named by place."""

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import final

_LOGGER = logging.getLogger(__name__)
_NAMED_PLACES = 5


@dataclass(frozen=True)
class Skip:
    """What was left out for one reason.

    Attributes:
        reason: what was wrong, such as "blank" or "truncated tar".
        count: rows, members or files left out in one pass over the data.
        files: in how many files.
        places: the first place in each of these files, at most five of them.
    """

    reason: str
    count: int
    files: int
    places: tuple[str, ...]

    def __str__(self) -> str:
        more = f", and {self.files - len(self.places)} more files"
        named = ", ".join(self.places) + (more if self.files > len(self.places) else "")
        return f"{self.reason}: {self.count} ({named})"


@dataclass(frozen=True)
class SkipReport:
    """Everything left out so far, counted once however many epochs were read."""

    skips: tuple[Skip, ...] = ()

    def summary(self) -> str:
        """Say in one line what was left out, why and where."""
        if not self.skips:
            return "nothing was skipped"
        return "skipped " + "; ".join(str(skip) for skip in self.skips)


@dataclass(frozen=True)
class _Entry:
    count: int
    place: str


@final
class SkipLog:
    """Collect what readers leave out; warn once per file and reason.

    Args:
        warns: False for a second look at what another log warns of.
    """

    def __init__(self, *, warns: bool = True) -> None:
        self._warns = warns
        self._entries: dict[tuple[Path, str], _Entry] = {}

    def begin(self, path: Path) -> "Tally":
        """Start one pass over a file."""
        return Tally(self, path)

    def note(self, path: Path, reason: str, count: int, place: str) -> None:
        """Record that one pass over `path` met `reason` for the `count`-th time, at `place`."""
        known = self._entries.get((path, reason))
        if known is None:
            self._entries[path, reason] = _Entry(count, place)
            if self._warns:
                said = "%s: %s; left out, as are others like it in this file"
                _LOGGER.warning(said, place, reason)
        elif count > known.count:
            self._entries[path, reason] = _Entry(count, known.place)

    def report(self) -> SkipReport:
        """Sum over files, reason by reason, in the order in which the reasons were first met."""
        by_reason: dict[str, list[_Entry]] = {}
        for (_, reason), entry in self._entries.items():
            by_reason.setdefault(reason, []).append(entry)
        return SkipReport(
            tuple(
                Skip(
                    reason,
                    sum(entry.count for entry in entries),
                    len(entries),
                    tuple(entry.place for entry in entries[:_NAMED_PLACES]),
                )
                for reason, entries in by_reason.items()
            )
        )


@final
class Tally:
    """Count what one pass over one file leaves out."""

    def __init__(self, log: SkipLog, path: Path) -> None:
        self._log = log
        self._path = path
        self._counts: Counter[str] = Counter()

    @property
    def any(self) -> bool:
        """Whether this pass has left out anything."""
        return bool(self._counts)

    def add(self, reason: str, place: int | str = "") -> None:
        """Count one skip; `place` is a line number, a member's name or a remark."""
        self._counts[reason] += 1
        where = f"line {place}" if isinstance(place, int) else place
        named = f"{self._path} {where}".strip()
        # A name that is no UTF-8 could be neither printed nor logged.
        printable = named.encode(errors="backslashreplace").decode()
        self._log.note(self._path, reason, self._counts[reason], printable)
