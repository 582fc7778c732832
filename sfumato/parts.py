"""Parts of a command's work: processes share it, and each takes every N-th item."""

import re

EVERYTHING = slice(None)


def slice_of(part: str | None) -> slice:
    """Return the items that part=I/N takes: I, I + N, ...; None takes all.

    Raises:
        ValueError: the text is another, or I is not below N.
    """
    if part is None:
        return EVERYTHING
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", part, re.ASCII)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(f"part={part!r} is no part; give I/N with I from 0 to N - 1, as in 3/64")
    return slice(int(found[1]), None, int(found[2]))
