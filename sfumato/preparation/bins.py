"""Counted bins: what went into a stage is what it kept, and what it dropped by reason."""

from collections import Counter
from collections.abc import Iterable, Mapping

KEPT = "kept"


def tally(kept: int, dropped: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sum up bins; those of what was dropped are in alphabetical order, none is empty."""
    total: Counter[str] = Counter()
    for reasons in dropped:
        total.update(reasons)
    assert KEPT not in total, "a reason to drop is not named kept"
    return {KEPT: kept, **{reason: total[reason] for reason in sorted(total) if total[reason]}}


def line(stage: str, bins: Mapping[str, int]) -> str:
    """Say in one line what became of all that went into a stage."""
    whole, kept = sum(bins.values()), bins.get(KEPT, 0)
    lost = sorted((n, reason) for reason, n in bins.items() if reason != KEPT)
    said = ", ".join(f"{n:,} {reason}" for n, reason in reversed(lost))
    return f"{stage}: {kept:,} of {whole:,} kept" + (f"; dropped {said}" if said else "")
