"""Choices and bounds of settings: stated at the fields of dataclasses, checked by one walk."""

import math
import re
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

Number = int | float
MISSING: Any = "???"  # a value that the user must give
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Rule:
    """What one setting may be.

    Attributes:
        blank: whether a text may be empty.
        folder: whether a text is the name of a folder.
        regex: whether a text is a regular expression.
        filled: whether a list has at least one value.
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
    regex: bool = False
    filled: bool = False
    entries: type | None = None
    interpolated: bool = False

    def __str__(self) -> str:
        """Return the rule in words: "0 or more, less than 1"; empty without a rule."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.regex:
            return "regular expressions"
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
        if self.regex:
            try:
                re.compile(str(value))
            except re.error as error:
                raise ValueError(
                    f"{key}={value!r} is no regular expression ({error}); correct it"
                ) from error
            if re.search(r"[+*}]\)+[+*{]", str(value)):
                raise ValueError(
                    f"{key}={value!r} repeats a repetition, which can take for ever; repeat once"
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


COUNT = Rule(least=1)  # of things
FEW = Rule(least=1, most=1_000_000)  # of things that are held in memory, or made one by one
SIDE = Rule(least=1, most=16_384)  # pixels of an image that a model makes
POSITIVE = Rule(above=0)
NOT_NEGATIVE = Rule(least=0)
UNIT = Rule(least=0, most=1)
SHARE = Rule(above=0, most=1)  # of a whole
FRACTION = Rule(least=0, below=1)
FILLED = Rule(filled=True)
FOLDER = Rule(folder=True)  # the name of one


def setting(default: Any, rule: Rule) -> Any:
    """Return a field with a default and a rule; None and lists of allowed values are allowed."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata={"rule": rule})
    return field(default=default, metadata={"rule": rule})


def choice(default: str, *others: str) -> Any:
    """Return a field for one of several texts."""
    return setting(default, Rule(choices=(default, *others)))


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
        if value == [] and rule_of(item).filled:
            raise ValueError(f"{key}=[] is empty; give one or more, or leave {key} out")
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                rule_of(item).check(key, one)
        named = value.items() if isinstance(value, dict) else [("", value)]
        for name, inner in named:
            if is_dataclass(inner):
                check_values(inner, f"{key}.{name}." if name else f"{key}.")
