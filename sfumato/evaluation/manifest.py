"""Manifests: what a number depends on, and the refusal of unlike numbers in one table.

The manifest of an evaluation is `settings` of its summary.json: prompts, seed, sampler, rewards,
SHA-256 of their files, format of the pictures, versions of libraries. A metric's own is beside it.
"""

from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import Any

import sfumato
from sfumato.config.saved import flatten
from sfumato.training.folder import LIBRARIES

PICTURES = "PNG, 8 bits"
LATER = ("format", "versions.")  # keys that manifests of older versions lack
_SHOWN, _BEFORE = 80, 20  # characters of a value in messages, and before the difference


def surroundings() -> dict[str, Any]:
    """Return what each manifest has of the format of pictures and of the versions in use."""
    found = {name: version(name).partition("+")[0] for name in (*LIBRARIES, "pillow")}
    return {"format": PICTURES, "versions": {"sfumato": sfumato.__version__, **found}}


def difference(a: Mapping[str, Any], b: Mapping[str, Any], but: Collection[str] = ()) -> str | None:
    """Return the first field in which two manifests differ, as "KEY: VALUE and VALUE".

    What a manifest of an older version lacks is not compared.

    Args:
        but: fields that may differ.
    """
    left, right = flatten(a), flatten(b)
    for key in {**left, **right}:
        unknown = key.startswith(LATER) and not (key in left and key in right)
        if left.get(key) != right.get(key) and key not in but and not unknown:
            return f"{key}: {_shown(left.get(key), right.get(key))}"
    return None


def check_alike(
    first: str,
    second: str,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    but: Collection[str] = (),
) -> None:
    """Refuse to put numbers of two manifests side by side, unless the manifests are alike.

    Args:
        first, second: what the numbers are of, for the message.
        but: fields that may differ, because the table shows them.

    Raises:
        ValueError: naming the field and both values.
    """
    if found := difference(a, b, but):
        raise ValueError(
            f"{first} and {second} were evaluated differently ({found}), so their numbers cannot "
            "be compared; evaluate both with the same settings, or report them separately"
        )


def _shown(a: Any, b: Any) -> str:
    """Return both values, where they are long from shortly before they differ."""
    texts = [str(a), str(b)]
    if max(map(len, texts)) > _SHOWN:
        pairs = enumerate(zip(*texts, strict=False))
        start = next((i for i, (one, other) in pairs if one != other), 0) - _BEFORE
        texts = [f"…{text[start:]}" if start > 0 else text for text in texts]
    return " and ".join(t if len(t) <= _SHOWN else f"{t[: _SHOWN - 1]}…" for t in texts)
