"""Choice of cases: some are tested at every run, and the others by make nightly."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def nightly_but(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Return all cases as parameters of a test; those that are not quick are marked nightly.

    Args:
        cases: each a value, or a tuple of the values of several arguments.
    """
    cases = list(cases)
    assert all(case in cases for case in quick), "a quick case is none of the cases"
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*row, marks=[] if case in quick else pytest.mark.nightly)
        for row, case in zip(rows, cases, strict=True)
    ]
