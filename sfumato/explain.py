"""Messages for errors of Hydra and OmegaConf: one line with key, value and remedy."""

import difflib
import re
from collections.abc import Collection, Sequence

from sfumato.catalog import CHOICES, keys_of, known_keys
from sfumato.config import COMMANDS, CONF

FOLDERS = (
    "those in ladder/ are for launch, those in prepare/ for prepare, the others for train and plan"
)
KINDS = {
    "Integer": "a whole number",
    "Float": "a number",
    "bool": "true or false",
    "list": "a list, such as [a, b]",
}


def explain(error: BaseException, command: str, typed: Sequence[str]) -> str:
    """Return the message of an error of Hydra or OmegaConf in one line.

    Args:
        typed: the overrides KEY=VALUE.
    """
    message, known = str(error), known_keys(command)
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["unreadable"]
    if match := re.search(r"Could not override '([^']+)'", message):
        given = any(text.lstrip("+").startswith(f"{match[1]}=") for text in typed)
        inner = [name for name in known if name.startswith(f"{match[1]}.")]
        if inner and (match[1] not in CHOICES or given):
            named = "; its name is a setting of sfumato train, not of this command"
            return (
                f"{match[1]} is a group of settings; give one of them, such as {inner[0]}=..."
                f"{named if match[1] in CHOICES else ''}"
            )
        if match[1] in CHOICES and match[1] not in known and not given:
            return f"the recipe chooses {match[1]}, and this command has none; choose: {FOLDERS}"
        return unknown_key(match[1], known)
    if match := re.search(r"Could not find '([^'/]+)/([^']*)'", message):
        return _unknown_choice(match[1], match[2], message)
    if match := re.search(r"Key '([^']+)' not in '(\w+)'", message):
        return _not_in(match[1], match[2])
    if "Config group override must be a string" in message:
        groups = " and ".join(f"{group} ({', '.join(CHOICES[group])})" for group in CHOICES)
        return f"a group of settings is chosen by one name: {groups}"
    if match := re.match(r"Error merging override ~(.+)", lines[0]):
        return f"~{match[1]}: settings cannot be removed; give KEY=VALUE"
    if match := re.match(r"Error merging override ([^=]+)=(.*)", lines[0]):
        return _wrong_value(match[1].lstrip("+"), match[2], str(error.__cause__), known)
    if match := re.search(r"Ambiguous value for argument '(.+)'", lines[0]):
        return (
            f"{match[1]} has several values; add -m to run one after the other, or write "
            f"{match[1].partition('=')[0]}=[...] for a list"
        )
    if match := re.search(r"Error parsing override '(.*)'", lines[0]):
        return f"{match[1]!r} is no setting; write KEY=VALUE"
    return " ".join(lines[:4])


def _not_in(key: str, owner: str) -> str:
    """Say that a recipe sets a key that a command, or the chosen one of a group, lacks."""
    for group, choices in CHOICES.items():
        for name, node in choices.items():
            if node.__name__ == owner:
                others = [other for other in choices if key in keys_of(choices[other])]
                whose = " or ".join(f"{group}={other}" for other in others)
                about = (node.__doc__ or "").splitlines()[0]
                return (
                    f"{group}={name} ({about}) does not go with this recipe, which sets "
                    f"{group}.{key} of {whose}; leave {group}={name} out, or choose another recipe"
                )
    name = owner.removesuffix("Config").lower()
    return f"the recipe sets {key}, which sfumato {name} does not have; choose: {FOLDERS}"


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Say that a key is unknown, and which known one is near in spelling."""
    group, _, rest = key.partition(".")
    owners = [name for name, node in CHOICES.get(group, {}).items() if rest in keys_of(node)]
    if key in known and owners:
        choices = " or ".join(f"{group}={name}" for name in owners)
        return f"{key} is a setting of {choices}; choose that, or leave {key} out"
    groups = {name.rpartition(".")[0] for name in known}
    names = [name for name in known if name not in groups] if rest else known
    leaf = key.rpartition(".")[2]
    near = (
        [name for name in names if name.startswith(key)]
        or [n for n in names if n.rpartition(".")[2] == leaf != "kind" and ("." in n or not rest)]
        or _near(key, names)
    )
    if near:
        return f"unknown key {key}: did you mean {near[0]}?"
    section = next((name for name in _sections(key) if name in groups), "")
    elsewhere = [name for name in COMMANDS if key in known_keys(name)]
    whose = f"it is a setting of sfumato {' and '.join(elsewhere)}, not of this command; "
    return (
        f"unknown key {key}: {whose if elsewhere else ''}run with --help {section}".rstrip()
        + " to see every key, or look into docs/settings.md"
    )


def _near(key: str, names: Sequence[str]) -> list[str]:
    """Return the name of the nearest spelling; in a known section, the ends are compared."""
    section, _, leaf = key.rpartition(".")
    inside = {n.rpartition(".")[2]: n for n in names if n.rpartition(".")[0] == section}
    if inside:
        return [inside[end] for end in difflib.get_close_matches(leaf, inside, 1, 0.65)]
    return difflib.get_close_matches(key, names, 1, 0.8)


def _sections(key: str) -> list[str]:
    """Return the sections that a key lies in, the innermost first."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _unknown_choice(group: str, choice: str, message: str) -> str:
    listed = re.findall(r"^\t([^=\n]+)$", message, re.MULTILINE)
    if group == "recipe":  # Hydra lists those that are in no folder
        recipes = CONF / "recipe"
        listed = [str(p.relative_to(recipes).with_suffix("")) for p in recipes.rglob("*.yaml")]
        inner = choice.rpartition("/")[0]
        listed = sorted(n for n in listed if n.rpartition("/")[0] == inner) or sorted(listed)
    return f"{group} = {choice} is unknown; {nearest(choice, listed)}"


def _wrong_value(key: str, value: str, cause: str, known: Sequence[str]) -> str:
    shown = f"{key} = {value}"
    inner = [name for name in known if name.startswith(f"{key}.")]
    if inner:
        return f"{shown}: {key} is a group of settings; give one of them, such as {inner[0]}=..."
    if "not Optional" in cause:
        return f"{shown} must have a value; run with --help {key} to see what it may be"
    match = re.search(r"Value '(.*?)' .*(Integer|Float|bool)|is not a ListConfig, (list)", cause)
    if match is None:
        return f"{shown}: {first_line(cause)}; run with --help {key} to see what it may be"
    wrong = f": {match[1]}" if match[1] not in (None, value) else ""
    return f"{shown}{wrong} is not {KINDS[match[2] or match[3]]}; give one"


def nearest(name: str, known: Collection[str]) -> str:
    """Return the advice for an unknown name: the nearest known one, and all."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? There are" if near else "choose one of"
    return f"{hint} {', '.join(known)}"


def unreadable_value(key: str, error: BaseException) -> str:
    """Return the message for a value that OmegaConf cannot convert."""
    return f"{key}: {first_line(str(error))}; give another value"


def first_line(message: str) -> str:
    """Return what a library's message begins with."""
    return next((line.strip() for line in message.splitlines() if line.strip()), "unreadable")
