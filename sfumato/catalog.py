"""Catalog of settings: which keys a command takes, and the type and rule of each."""

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from sfumato.config import (
    CLUSTERS,
    COMMANDS,
    GROUPS,
    ClusterConfig,
    ObjectiveConfig,
    RewardConfig,
    Rule,
    rule_of,
)

CHOICES: dict[str, Mapping[str, type]] = {**GROUPS, "cluster": CLUSTERS}
RECIPES = ("train", "prepare", "launch", "plan")  # the commands that have them
FOLDERS = {"recipe": RECIPES, "method": ("train", "plan")}
_BASES: dict[Any, Mapping[str, type]] = {
    ObjectiveConfig: CHOICES["objective"],
    RewardConfig: CHOICES["reward"],
    ClusterConfig: CHOICES["cluster"],
}
_hints = cache(get_type_hints)


@dataclass(frozen=True)
class Slot:
    """One key: the type and the rule of its value.

    Attributes:
        kind: the type, without None; Any where a script decides.
        optional: whether the value may be null.
        named: whether names that the user chose are in the key, or in the value.
    """

    kind: Any = Any
    rule: Rule = Rule()  # noqa: RUF009
    optional: bool = False
    named: bool = False

    @property
    def is_text(self) -> bool:
        """Whether the value is a text."""
        return self.kind is str or self.rule.entries is str

    @property
    def is_texts(self) -> bool:
        """Whether the value is a list of texts."""
        return get_origin(self.kind) is list and get_args(self.kind) == (str,)

    @property
    def has_entries(self) -> bool:
        """Whether the value is a dictionary of known settings or of texts."""
        return self.rule.entries is not None or is_dataclass(self.kind)

    def below(self, names: Sequence[str]) -> "Slot":
        """Return the slot of a key inside this one."""
        entries = self.rule.entries
        if not names:
            return self
        if entries is str:
            return Slot(dict, self.rule, optional=True, named=True)
        if entries is not None:
            return Slot(entries, named=True)._field(names[1:])
        if self.kind is dict or get_origin(self.kind) is dict:
            return Slot(named=True)
        return self._field(names)

    def _field(self, names: Sequence[str]) -> "Slot":
        if not names:
            return self
        for owner in (*_BASES.get(self.kind, {}).values(), self.kind):
            for item in fields(owner) if is_dataclass(owner) else ():
                if item.name == names[0]:
                    kind, optional = _without_none(_hints(owner)[item.name])
                    named = self.named or get_origin(kind) is dict
                    slot = Slot(kind, rule_of(item), optional, named)
                    return slot.below(names[1:])
        return Slot(named=self.named)


def find_slot(command: str, key: str) -> Slot:
    """Return the slot of a dotted key; one of any type if the key is unknown."""
    return Slot(COMMANDS[command]).below(key.split("."))


def folders_of(command: str) -> list[str]:
    """Return the folders of conf/ in which a command looks up names: recipe=NAME, method=NAME."""
    return [name for name, commands in FOLDERS.items() if command in commands]


def known_keys(command: str) -> list[str]:
    """Return the names of all that `sfumato COMMAND` takes as KEY=VALUE."""
    return [*keys_of(COMMANDS[command]), *folders_of(command)]


def keys_of(node: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings below a dataclass, of every group choice."""
    return sorted({entry.key for entry in walk(node, prefix)})


@dataclass(frozen=True)
class Entry:
    """One field below a dataclass."""

    key: str
    owner: type
    item: Any
    default: Any
    where: str  # the choice of a group that has the field, as GROUP=NAME


def walk(node: Any, prefix: str = "", where: str = "") -> Iterator[Entry]:
    """Yield the fields of a dataclass, each before those below it, and of every group choice.

    Args:
        node: a class, or an instance whose values are the defaults.
    """
    owner = node if isinstance(node, type) else type(node)
    for item in fields(owner):
        key = f"{prefix}{item.name}"
        default = item.default if item.default_factory is MISSING else item.default_factory()
        default = default if node is owner else vars(node)[item.name]
        yield Entry(key, owner, item, default, where)
        for name, choice in choices_of(owner, item).items():
            yield from walk(choice(), f"{key}.", f"{key}={name}")
        if is_dataclass(default):
            yield from walk(default, f"{key}.")


def choices_of(owner: type, item: Any) -> Mapping[str, type]:
    """Return the classes by name that a field can be, if it is a group of choices."""
    return _BASES.get(_without_none(_hints(owner)[item.name])[0], {})


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) not in (types.UnionType, Union):
        return hint, False
    (kind,) = [each for each in get_args(hint) if each is not types.NoneType]
    return kind, True
