"""Counter of what was left out: pictures, rows, members and files, by reason."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

_LOGGER = logging.getLogger(__name__)
_NAMED = 5
KEPT = "kept"
UNREADABLE = "unreadable file"  # the reason


@dataclass(frozen=True)
class Skip:
    """What was left out for one reason.

    Attributes:
        reason: what was wrong, such as "blank caption" or "truncated or damaged tar".
        count: rows, members or files left out in one pass over the data.
        files: in how many files.
        positions: the first row or member in each of these files, at most five of them.
    """

    reason: str
    count: int
    files: int
    positions: tuple[str, ...]

    def __str__(self) -> str:
        more = f", and {self.files - len(self.positions)} more files"
        named = ", ".join(self.positions) + (more if self.files > len(self.positions) else "")
        return f"{self.reason}: {self.count} ({named})"


@dataclass(frozen=True)
class SkipReport:
    """Everything left out so far, counted once however many epochs were read.

    Attributes:
        remarks: what was read, but not as it lies there, such as the first line of a caption.
    """

    skips: tuple[Skip, ...] = ()
    remarks: tuple[Skip, ...] = ()

    def __bool__(self) -> bool:
        """Tell whether there is anything to say."""
        return bool(self.skips or self.remarks)

    def __add__(self, other: "SkipReport") -> "SkipReport":
        """Return both reports as one."""
        return SkipReport(self.skips + other.skips, self.remarks + other.remarks)

    def summary(self) -> str:
        """Say in one line what was left out or changed, why and where."""
        skipped = "skipped " + "; ".join(map(str, self.skips))
        read = "read, with a remark: " + "; ".join(map(str, self.remarks))
        said = [skipped if self.skips else "nothing was skipped", *([read] if self.remarks else [])]
        return "; ".join(said)


@final
class SkipLog:
    """Collect what readers leave out; warn once per file and reason.

    Args:
        warns: False for a second look at files that another log warns of.
    """

    def __init__(self, *, warns: bool = True) -> None:
        self._warns = warns
        self._skips: dict[tuple[Path, str], Skip] = {}
        self._remarks: dict[tuple[Path, str], Skip] = {}
        self._refused: dict[tuple[Path, str], set[str]] = {}

    def begin(self, path: Path) -> "FileSkips":
        """Start one pass over a file."""
        return FileSkips(self, path)

    def refuse(self, path: Path, position: str, reason: str, *, remark: bool = False) -> None:
        """Count a picture that cannot be used; each is counted once, however often it is met.

        Args:
            remark: count a picture that is read, but with changes.
        """
        positions = self._refused.setdefault((path, reason), set())
        positions.add(position)
        where = printable(f"{path} {position}")
        self.note(path, reason, len(positions), where, remark=remark)

    def note(
        self,
        path: Path,
        reason: str,
        count: int,
        position: str,
        *,
        remark: bool = False,
        quiet: bool = False,
    ) -> None:
        """Record that one pass over `path` met `reason` for the `count`-th time, at `position`."""
        entries = self._remarks if remark else self._skips
        known = entries.get((path, reason))
        if known is None:
            entries[path, reason] = Skip(reason, count, 1, (position,))
            if self._warns and not quiet:
                fate = "" if remark else "left out, "
                message = "%s: %s; %sas are others like it in this file"
                _LOGGER.warning(message, position, reason, fate)
        elif count > known.count:
            entries[path, reason] = Skip(reason, count, 1, known.positions)

    def report(self) -> SkipReport:
        """Sum over files, reason by reason, in the order in which the reasons were first met."""
        return SkipReport(_sums(self._skips.values()), _sums(self._remarks.values()))

    def counts(self) -> Counter[str]:
        """Return how much was left out, by reason."""
        return Counter({skip.reason: skip.count for skip in self.report().skips})


@final
class FileSkips:
    """Count what one pass over one file leaves out."""

    def __init__(self, log: SkipLog, path: Path) -> None:
        self._log = log
        self._path = path
        self._counts: Counter[str] = Counter()
        self._remarks: Counter[str] = Counter()

    @property
    def any(self) -> bool:
        """Whether this pass has left out anything."""
        return bool(self._counts)

    def add(
        self,
        reason: str,
        position: int | str = "",
        *,
        rows: int = 1,
        last: int | None = None,
        quiet: bool = False,
    ) -> None:
        """Count one skip; `position` is a line number, a member's name or a remark.

        Args:
            rows: how many rows it took.
            last: number of the last line, if it took several.
            quiet: whether it is what the settings ask for, of which nobody is warned.
        """
        self._counts[reason] += rows
        where = f"line {position}" if isinstance(position, int) else position
        if last is not None and last != position:
            where = f"lines {position} to {last}"
        name = printable(f"{self._path} {where}".strip())
        self._log.note(self._path, reason, self._counts[reason], name, quiet=quiet)

    def remark(self, remark: str, position: int | str = "") -> None:
        """Count a row that is read, but not as it lies there."""
        self._remarks[remark] += 1
        where = f"line {position}" if isinstance(position, int) else position
        name = printable(f"{self._path} {where}".strip())
        self._log.note(self._path, remark, self._remarks[remark], name, remark=True)


def _sums(skips: Iterable[Skip]) -> tuple[Skip, ...]:
    by_reason: dict[str, list[Skip]] = {}
    for skip in skips:
        by_reason.setdefault(skip.reason, []).append(skip)
    return tuple(
        Skip(
            reason,
            sum(skip.count for skip in each),
            len(each),
            tuple(skip.positions[0] for skip in each[:_NAMED]),
        )
        for reason, each in by_reason.items()
    )


def printable(name: str) -> str:
    """Return a name that can be printed and logged; one that is not UTF-8 cannot."""
    return name.encode(errors="backslashreplace").decode()


def tally(kept: int, dropped: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sum up a stage's bins: what it kept, and what it dropped by reason, sorted and not 0."""
    total: Counter[str] = Counter()
    for reasons in dropped:
        total.update(reasons)
    assert KEPT not in total, "a reason to drop is not named kept"
    return {KEPT: kept, **{reason: total[reason] for reason in sorted(total) if total[reason]}}


def line(stage: str, bins: Mapping[str, int]) -> str:
    """Say in one line what became of all that went into a stage."""
    whole, kept = sum(bins.values()), bins.get(KEPT, 0)
    lost = sorted((count, reason) for reason, count in bins.items() if reason != KEPT)
    reasons = ", ".join(f"{count:,} {reason}" for count, reason in reversed(lost))
    return f"{stage}: {kept:,} of {whole:,} kept" + (f"; dropped {reasons}" if reasons else "")
