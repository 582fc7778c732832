"""What Hydra refuses, in one line that says which key, which value and what to do."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass

from sfumato.config import GROUPS

KINDS = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}


def explain(error: BaseException, known: Sequence[str]) -> str:
    """Return the message of an error of Hydra or OmegaConf in one line.

    Args:
        known: the names of all settings of the command; see `keys_of`.
    """
    message = str(error)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if match := re.search(r"Could not override '([^']+)'", message):
        return unknown_key(match[1], known)
    if match := re.search(r"Could not find '([^']+)/([^']+)'", message):
        return _unknown_choice(match[1], match[2], message)
    if match := re.match(r"Error merging override ([^=]+)=(.*)", lines[0]):
        return _wrong_value(match[1].lstrip("+"), match[2], str(error.__cause__), known)
    if match := re.search(r"Ambiguous value for argument '(.+)'", lines[0]):
        return (
            f"{match[1]} has several values; add -m to run one after the other, or write "
            f"{match[1].partition('=')[0]}=[...] for a list"
        )
    if match := re.search(r"Error parsing override '(.*)'", lines[0]):
        return f"{match[1]!r} is no setting; write KEY=VALUE"
    return " ".join(lines[:2])


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Say that a key is unknown, and which known one is near."""
    group, _, rest = key.partition(".")
    owners = [name for name, node in GROUPS.get(group, {}).items() if rest in keys_of(node)]
    if key in known and owners:
        choices = " or ".join(f"{group}={name}" for name in owners)
        return f"{key} is a setting of {choices}, and another {group} was chosen"
    if key.startswith("reward.parts.") and "reward.parts" in known:
        name = key.split(".")[2]
        return f"{key}: write reward=weighted '+reward.parts.{name}={{kind: ..., weight: ...}}'"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:  # a right name in the wrong place
        leaf = key.rpartition(".")[2]
        near = [name for name in known if name.rpartition(".")[2] == leaf][:1]
    hint = f"did you mean {near[0]}?" if near else "run with --cfg job to see every key"
    return f"unknown key {key}: {hint}"


def keys_of(node: type, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings below a dataclass, of every group choice."""
    names = []
    for item in fields(node):
        name = f"{prefix}{item.name}"
        names.append(name)
        choices = list(GROUPS.get(item.name, {}).values())
        inner = choices or ([item.type] if is_dataclass(item.type) else [])
        for kind in inner:
            assert isinstance(kind, type)
            names += keys_of(kind, f"{name}.")
    return sorted(set(names))


def _unknown_choice(group: str, choice: str, message: str) -> str:
    listed = message.partition("Available options")[2].splitlines()[1:]
    names = [line.strip() for line in listed if line.startswith("\t")]
    near = difflib.get_close_matches(choice, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{group} = {choice!r} is unknown; {hint}There are {', '.join(names)}"


def _wrong_value(key: str, value: str, cause: str, known: Sequence[str]) -> str:
    inner = [name for name in known if name.startswith(f"{key}.")]
    if inner:
        return f"{key} = {value!r}: {key} is a group of settings; give one of them ({inner[0]}=...)"
    match = re.search(r"could not be converted to (\w+)", cause)
    if match and match[1] in KINDS:
        return f"{key} = {value!r} must be {KINDS[match[1]]}"
    if "is not a ListConfig" in cause:
        return f"{key} = {value!r} must be a list, such as [1, 2]"
    if "not Optional" in cause:
        return f"{key} = {value!r} must have a value"
    return f"{key} = {value!r}: {first_line(cause)}"


def first_line(message: str) -> str:
    """Return what a library's message begins with."""
    return next((line.strip() for line in message.splitlines() if line.strip()), "unreadable")
