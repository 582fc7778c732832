"""Choices and bounds of settings: stated at the fields of dataclasses, checked by one walk."""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

Number = int | float


@dataclass(frozen=True)
class Rule:
    """What one setting may be.

    Attributes:
        blank: whether a text may be empty.
        folder: whether a text is the name of a folder.
        entries: the class of each value of a dictionary; str for texts.
        interpolated: whether texts read other settings as ${KEY}.
    """

    choices: tuple[str, ...] = ()
    least: Number | None = None
    above: Number | None = None
    most: Number | None = None
    below: Number | None = None
    blank: bool = False
    folder: bool = False
    entries: type | None = None
    interpolated: bool = False

    def __str__(self) -> str:
        """Return the rule in words: "0 or more, less than 1"; empty without a rule."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return ", ".join(advice for _, _, advice in self._bounds(0))

    def check(self, key: str, value: Any) -> None:
        """Raise a ValueError that names key, value and bound, unless the value is allowed."""
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value} must be finite; give {str(self) or 'a number'}")
        if self.choices and value not in self.choices:
            raise ValueError(f"{key}={value!r} is unknown; choose {self}")
        if isinstance(value, str) and not (value.strip() or self.blank):
            raise ValueError(f"{key}={value!r} is empty; give a text, or leave {key} out")
        if self.folder and (value == ".." or Path(str(value)).name != value):
            raise ValueError(
                f"{key}={value!r} is not the name of a folder; give it without slashes"
            )
        for broken, size, advice in self._bounds(value):
            if broken:
                raise ValueError(f"{key}={value} is too {size}; give {advice}")

    def _bounds(self, value: Any) -> Iterator[tuple[bool, str, str]]:
        if self.least is not None:
            yield value < self.least, "small", f"{self.least} or more"
        if self.above is not None:
            yield value <= self.above, "small", f"more than {self.above}"
        if self.most is not None:
            yield value > self.most, "large", f"{self.most} or less"
        if self.below is not None:
            yield value >= self.below, "large", f"less than {self.below}"


def setting(default: Any, rule: Rule) -> Any:
    """Return a field with a default and a rule; None and lists of allowed values are allowed."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata={"rule": rule})
    return field(default=default, metadata={"rule": rule})


def choice(default: str, *others: str) -> Any:
    """Return a field for one of several texts."""
    return setting(default, Rule(choices=(default, *others)))


def count(default: int | None) -> Any:
    """Return a field for a number of things, 1 or more."""
    return setting(default, Rule(least=1))


def positive(default: Number | None) -> Any:
    """Return a field for a number above 0."""
    return setting(default, Rule(above=0))


def not_negative(default: Number | None) -> Any:
    """Return a field for a number that is 0 or more."""
    return setting(default, Rule(least=0))


def fraction(default: Number | list[float] | None) -> Any:
    """Return a field for a number in [0, 1), or a list of them."""
    return setting(default, Rule(least=0, below=1))


def folder_name(default: str) -> Any:
    """Return a field for the name of a folder."""
    return setting(default, Rule(folder=True))


def entries(kind: type) -> Any:
    """Return a field for a dictionary from names to settings of one class, or to texts."""
    return setting({}, Rule(entries=kind))


def rule_of(item: Any) -> Rule:
    """Return the rule of a dataclass field."""
    return item.metadata.get("rule", Rule())


def check_values(settings: Any, prefix: str = "") -> None:
    """Check every field of a dataclass, and of those in it, against its rule.

    Args:
        prefix: of the keys, in messages.

    Raises:
        ValueError: naming key, value and what to give.
    """
    for item in fields(settings):
        key, value = f"{prefix}{item.name}", vars(settings)[item.name]
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                rule_of(item).check(key, one)
        named = value.items() if isinstance(value, dict) else [("", value)]
        for name, inner in named:
            if is_dataclass(inner):
                check_values(inner, f"{key}.{name}." if name else f"{key}.")
