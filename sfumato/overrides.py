"""Overrides KEY=VALUE, rewritten for Hydra's grammar by the type of the setting.

A text is taken as typed, whatever it looks like: 1.10, true, ${x}, a comma or a quote. Only `null`
is None, where a setting may be None; 'null' in quotes is the text. Texts inside a list or a
dictionary may stand in quotes. In a sweep commas separate values, except in quotes and brackets.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from sfumato.catalog import Slot, find_slot

MISSING = "???"


def rewritten(command: str, arguments: Sequence[str], *, sweep: bool = False) -> list[str]:
    """Return the overrides that Hydra reads as `sfumato COMMAND` means them.

    Args:
        sweep: whether commas separate the values of a sweep.
    """
    return [_rewritten(command, argument, sweep) for argument in arguments]


def _rewritten(command: str, argument: str, sweep: bool) -> str:
    match = re.fullmatch(r"(\+*)([^\s=~+][^\s=]*)=(.*)", argument, re.DOTALL)
    if match is None:
        return argument
    plus, key, value = match.groups()
    slot = find_slot(command, key)
    if slot.kind is float and value.lower() in ("true", "false"):  # OmegaConf would read 1.0
        raise ValueError(f"{key} = {value} is not a number; give one")
    plus = "++" if slot.named else plus  # a new name needs no +
    return f"{plus}{key}={_swept(slot, value) if sweep else _written(slot, value)}"


def _swept(slot: Slot, value: str) -> str:
    """Return the values of a sweep; numbers are left to Hydra, which also knows range()."""
    choice = re.fullmatch(r"choice\((.*)\)", value, re.DOTALL)
    parts = split(choice[1] if choice else value)
    typed = slot.is_text or slot.is_texts or slot.has_entries
    if not typed or (choice is None and "," not in value):
        return _written(slot, value)
    return ",".join(_element(slot, part) for part in parts)  # Hydra's choice() would drop quotes


def _written(slot: Slot, value: str) -> str:
    if value == MISSING:
        return value
    if (pairs := _pairs(slot, value)) is not None:
        inner = (f"{name}: {_element(slot.below([name]), part)}" for name, part in pairs)
        return f"{{{','.join(inner)}}}"
    if slot.is_texts and value[:1] == "[" and value[-1:] == "]":
        text = Slot(str, slot.rule)
        return f"[{','.join(_element(text, part) for part in split(value[1:-1]))}]"
    if not slot.is_text:
        return value if _is_readable(value) else quoted(value)
    if slot.optional and value == "null":
        return value
    if slot.optional and value in ("'null'", '"null"'):
        value = "null"
    return _text(slot, value)


def _element(slot: Slot, part: str) -> str:
    """Return an element of a list, a dictionary or a sweep, which may stand in quotes."""
    if slot.is_text and part[:1] in ("'", '"') and part[-1:] == part[:1] and len(part) > 1:
        return _text(slot, _unquoted(part))
    return _written(slot, part)


def _text(slot: Slot, value: str) -> str:
    return quoted(value if slot.rule.interpolated else escaped(value))


def _pairs(slot: Slot, value: str) -> list[tuple[str, str]] | None:
    """Return names and values of a dictionary with typed entries, in Hydra's grammar or JSON."""
    if not slot.has_entries or value[:1] != "{" or value[-1:] != "}":
        return None
    with suppress(ValueError):
        value = _in_grammar(json.loads(value))
    pairs = []
    for part in split(value[1:-1]):
        match = re.fullmatch(r"([\"']?)([^\"':]+)\1\s*:\s*(.*)", part, re.DOTALL)
        if match is None:
            return None
        pairs.append((match[2].strip(), match[3]))
    return pairs


def split(text: str) -> list[str]:
    """Return the parts between commas that are in no quotes and no brackets."""
    parts, depth, quote, start = [], 0, "", 0
    for i, letter in enumerate(text):
        if quote:
            backslashes = len(text[:i]) - len(text[:i].rstrip("\\"))
            quote = "" if letter == quote and backslashes % 2 == 0 else quote
        elif letter in "'\"" and text[:i].rstrip()[-1:] in ("", *",[{(:"):
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if parts or last else []


def quoted(text: str) -> str:
    """Return a text in quotes of Hydra's grammar, where backslashes escape before quotes only."""
    inner = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    inner = re.sub(r"\\+$", lambda match: match[0] * 2, inner)
    return f"'{inner}'"


def escaped(text: str) -> str:
    """Return a text in which OmegaConf reads ${ as these two letters."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def _unquoted(text: str) -> str:
    quote = text[0]
    return re.sub(rf"(\\+)(?={quote}|$)", lambda match: "\\" * (len(match[1]) // 2), text[1:-1])


def _in_grammar(value: Any) -> str:
    match value:
        case dict():
            return f"{{{','.join(f'{key}: {_in_grammar(item)}' for key, item in value.items())}}}"
        case list():
            return f"[{','.join(map(_in_grammar, value))}]"
        case str():
            return quoted(value)
        case _:
            return json.dumps(value)


def _is_readable(value: str) -> bool:
    if re.fullmatch(r"[\w.+-]+", value):
        return True
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return False
    return True
