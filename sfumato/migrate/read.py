"""Reader of others' configs: YAML, JSON, or a call in a Python file, which is never run."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.config.saved import read_yaml
from sfumato.files import parse_object, read_bytes

LARGEST = 2**20  # bytes
CALLS = {"AlignPropConfig": "alignprop", "DDPOConfig": "ddpo"}
ADVICE = "give a config of NeMo-Aligner, NeMo or TRL, as .yaml, .yml, .json or .py"
DEEPEST = 32  # levels
LONGEST = 4096  # letters of a text whose ${KEY} are replaced


@dataclass(frozen=True)
class Config:
    """A config of others: its values by dotted key, in the order of the file.

    Attributes:
        kind: its name, if the file says so.
        open: what a value refers to that the file does not have, by key.
    """

    values: Mapping[str, Any]
    kind: str | None
    open: Mapping[str, str]


def read_config(path: Path) -> Config:
    """Read a config.

    Raises:
        ValueError: if the file is missing, too large, no text, or holds something else.
    """
    kind = None
    match path.suffix:
        case ".py":
            kind, content = _read_call(path)
        case ".json":
            content = parse_object(read_bytes(path, ADVICE, most=LARGEST))
            if content is None:
                raise ValueError(f"{path} holds no JSON object; {ADVICE}")
        case ".yaml" | ".yml":
            content = read_yaml(path, ADVICE)
        case suffix:
            raise ValueError(f"{path} has the suffix {suffix!r}, which is not read; {ADVICE}")
    values = dict(_leaves(path, content))
    found: dict[str, Any] = {}
    for key in values:
        _resolve(key, values, found)
    unknown = {
        key: re.search(r"\$\{[^}]*\}?", value)
        for key, value in found.items()
        if isinstance(value, str)
    }
    return Config(found, kind, {key: match[0] for key, match in unknown.items() if match})


def _leaves(path: Path, content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield values by dotted key; an empty dictionary is a value, and so is a list of values."""
    if prefix.count(".") > DEEPEST:
        raise ValueError(f"{path}: {prefix[:40]}... has more than {DEEPEST} levels; {ADVICE}")
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for name, value in pairs:
        nested = isinstance(value, list | tuple) and any(isinstance(v, dict | list) for v in value)
        if value and (isinstance(value, dict) or nested):
            yield from _leaves(path, value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _resolve(key: str, values: Mapping[str, Any], found: dict[str, Any]) -> Any:
    """Add a value to `found`, with ${KEY} and ${.NAME} replaced where the file has them."""
    if key in found:  # or in a circle, which stays as it is
        return found[key]
    found[key] = value = values[key]
    if not isinstance(value, str) or "${" not in value:
        return value
    parts = re.split(r"(\$\{[\w.]+\})", value)
    for i in range(1, len(parts), 2):
        name = parts[i][2:-1].removeprefix("training.")  # where NeMo's launcher puts a stage
        name = f"{key.rpartition('.')[0]}{name}" if name.startswith(".") else name
        if name in values:
            parts[i] = _resolve(name, values, found)
    whole = len(parts) == 3 and not parts[0] + parts[2]
    text = parts[1] if whole else "".join(map(str, parts))
    found[key] = text if len(str(text)) <= LONGEST else value
    return found[key]


def _read_call(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the kind of the config that a file calls, and its keywords, which are plain values."""
    text = read_bytes(path, ADVICE, most=LARGEST)
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path} is no Python that can be read ({error}); {ADVICE}") from error
    named = {node: _name(node.func) for node in nodes if isinstance(node, ast.Call)}
    calls = [(node, name) for node, name in named.items() if name in CALLS]
    if len(calls) != 1:
        lines = ", ".join(str(node.lineno) for node, _ in calls)
        raise ValueError(
            f"{path} calls {' or '.join(CALLS)} {len(calls)} times{' in lines ' if lines else ''}"
            f"{lines}; give a file with one call"
        )
    call, name = calls[0]
    values: dict[str, Any] = {}
    unread = [f"a value without its name, in line {node.lineno}" for node in call.args]
    for keyword in call.keywords:
        try:
            if keyword.arg is None:
                raise ValueError("a dictionary of keywords")
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            shown = f"{keyword.arg or '**'}={ast.unparse(keyword.value)}"[:60]
            unread.append(f"{shown}, in line {keyword.value.lineno}")
    if unread:
        raise ValueError(
            f"{path}: {name} has {'; '.join(unread)}. Sfumato runs no code: write each as "
            "NAME=VALUE, with the number or text itself"
        )
    return CALLS[name], values


def _name(node: ast.expr) -> str:
    match node:
        case ast.Name(name) | ast.Attribute(attr=name):
            return name
        case _:
            return ""
