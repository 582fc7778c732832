"""Help pages: commands, settings and recipes, read from config/ and conf/ without Hydra.

`python -m sfumato.help` prints docs/settings.md.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sfumato.catalog import CHOICES, RECIPES, choices_of, find_slot, folders_of, known_keys, walk
from sfumato.conditions import conditions_of, shown
from sfumato.config import COMMANDS, CONF, RewardConfig, Rule, rule_of
from sfumato.config.saved import MAY_CHANGE
from sfumato.explain import unknown_key

NOTES = """\
  KEY=VALUE        a text is taken as typed; null is none (a text null: KEY="'null'"); lists are
                   [a,b] and dictionaries {a: 1}, where a text may stand in quotes
  --help KEY       one setting, or all below a key; docs/settings.md has those of all commands.
                   "only with" says beside which others a setting is read; typed elsewhere, it is
                   refused
  --cfg job        print the settings as composed, and do nothing
  -m KEY=A,B       run once per value; a text with a comma then stands in quotes: KEY="'A,B',C"
  --config-dir DIR also take recipes from DIR/recipe/NAME.yaml"""
RESUME = """\
## What may change when a run goes on

The same command goes on with a run that was stopped. A setting may then be another one if neither
the weights nor what they are measured by depend on it; other changes are refused. Paths may be
others where the same files lie, and `allow_changed` names settings whose files may have changed.

A new run (another `name`) can start from the weights of a complete one, with any settings:
`model.lora.start=RUN/export/lora` for adapters, `model.pretrained=RUN/export/pipeline` for whole
weights, or `model.network.from_pretrained=RUN` beside `model.network.config`.

These may change (`training.max_steps` only under `optimizer.schedule=constant`; the other schedules
fall towards it):
"""
TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text"}
FOLDERS = {"prepare": "prepare/", "launch": "ladder/"}  # of recipes


@dataclass(frozen=True)
class Setting:
    """One setting of a command, in words."""

    key: str
    owner: type
    kind: str
    default: str
    rule: str
    comment: str

    def __str__(self) -> str:
        """Return one line."""
        notes = "; ".join(text for text in (self.rule, self.comment) if text)
        return f"{self.key} = {self.default}".ljust(46) + f"  {notes}".rstrip()


def settings_of(command: str) -> list[Setting]:
    """Return every setting of a command, in the order of config/."""
    owner = COMMANDS[command]
    files = [
        Setting(name, owner, "text", "null", "", f"a {name}; `sfumato recipes` lists them")
        for name in folders_of(command)
    ]
    return [*_settings(command, owner), *files]


def command_page(command: str, key: str | None = None) -> str:
    """Return the help of a command, or of one key and those below it.

    Raises:
        ValueError: if the command has no such key.
    """
    settings = settings_of(command)
    if key is None:
        head = [f"usage: sfumato {command} [KEY=VALUE ...]", "", _summary(COMMANDS[command])]
        recipes = ["", "`sfumato recipes` lists recipes."] if command in RECIPES else []
        notes = NOTES if recipes else NOTES.rpartition("\n")[0]  # the last is of recipes
        return "\n".join([*head, *recipes, "", notes, "", *map(str, settings)])
    chosen = [each for each in settings if re.fullmatch(rf"{re.escape(key)}(\..*)?", each.key)]
    if not chosen:
        raise ValueError(unknown_key(key, known_keys(command)))
    if len(chosen) > 1:
        return "\n".join(map(str, chosen))
    (one,) = chosen
    resume = "may change when a run goes on" if one.key in MAY_CHANGE and command == "train" else ""
    lines = {"type": one.kind, "default": one.default, "give": one.rule, "": one.comment}
    lines |= {"resume": resume}
    return "\n".join([one.key, *(f"  {name:8} {text}" for name, text in lines.items() if text)])


def recipes_page() -> str:
    """Return the recipes of every command, each with the first line of its head."""
    heads = heads_in("recipe")
    lines = []
    for title, inside in (("train and plan", ""), *FOLDERS.items()):
        lines += [f"sfumato {title}:"]
        for name, head in heads.items():
            folder = next((each for each in FOLDERS.values() if name.startswith(each)), "")
            if folder == inside:
                lines.append(f"  recipe={name:48} {head}")
    lines += ["ways to learn from a reward, for a recipe NAME_reward:"]
    lines += [f"  method={name:48} {head}" for name, head in heads_in("method").items()]
    return "\n".join(lines)


def heads_in(folder: str) -> dict[str, str]:
    """Return what each recipe or method is, in one sentence."""
    root = CONF / folder
    heads = {}
    for path in sorted(root.rglob("*.yaml")):
        with path.open(encoding="utf-8") as file:
            next(file)  # @package
            heads[path.relative_to(root).with_suffix("").as_posix()] = next(file).strip("# \n")
    return heads


def markdown() -> str:
    """Return docs/settings.md."""
    lines = ["# Settings", "", "Made from `sfumato/config/` by `python -m sfumato.help`.", ""]
    lines += ["```", NOTES, "```", ""]
    seen: dict[type, str] = {}
    for command, owner in COMMANDS.items():
        settings = settings_of(command)
        lines += [f"## sfumato {command}", "", _summary(owner), ""]
        if command == "plan":
            lines += ["All settings of `sfumato train`, and:", ""]
            inherited = {each.key for each in settings_of("train")}
            settings = [each for each in settings if each.key not in inherited]
        lines += ["| setting | type | default | give | |", "| --- | --- | --- | --- | --- |"]
        lines += [*_rows(command, settings, seen), ""]
    return "\n".join([*lines, RESUME, *(f"* `{key}`" for key in MAY_CHANGE), ""])


def _rows(command: str, settings: Sequence[Setting], seen: dict[type, str]) -> Iterator[str]:
    """Return a row per setting, and one row for all settings of a class that has rows already."""
    repeated = "\0"
    for each in settings:
        prefix = each.key.rpartition(".")[0]
        rows_at = f"`{prefix}.*` of `sfumato {command}`"
        if each.key.startswith(repeated) and seen.get(each.owner, rows_at) != rows_at:
            continue
        if seen.setdefault(each.owner, rows_at) == rows_at:
            cells = (f"`{each.key}`", each.kind, f"`{each.default}`", each.rule, each.comment)
            yield "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"
        else:
            repeated = f"{prefix}."
            yield f"| `{prefix}.*` | | | | as {seen[each.owner]} |"


def _settings(command: str, node: Any, prefix: str = "") -> Iterator[Setting]:
    for entry in walk(node, prefix):
        key, item, rule = entry.key, entry.item, rule_of(entry.item)
        if choices_of(entry.owner, item):
            yield _group(command, key, entry.owner, item.type)
        elif not (is_dataclass(entry.default) or (item.name == "kind" and not rule.choices)):
            bases = (
                each for each in entry.owner.__mro__ if item.name in vars(each)["__annotations__"]
            )
            comment = comments()[next(bases).__name__].get(item.name, "")
            comment = ": ".join(text for text in (entry.where, comment) if text)
            comment = "; ".join(text for text in (comment, _only(command, key)) if text)
            kind = _type_words(command, key, rule)
            yield Setting(key, entry.owner, kind, shown(entry.default), str(rule), comment)
        if is_dataclass(rule.entries) and rule.entries is not RewardConfig:
            yield from _settings(command, rule.entries, f"{key}.NAME.")


def _only(command: str, key: str) -> str:
    """Say in words under which conditions a command reads a setting."""
    words = [condition.replace("|", " or ") for condition in conditions_of(command, key)]
    never = [text.partition(": ")[2] for text in words if text.startswith("never: ")]
    return f"not read: {never[0]}" if never else f"only with {' and '.join(words)}" if words else ""


def _group(command: str, key: str, owner: type, base: Any) -> Setting:
    text = (CONF / f"{command}.yaml").read_text(encoding="utf-8")
    chosen = re.search(rf"- {key}: (\w+)", text)
    default = chosen[1] if chosen else "???"
    own = () if default in (*CHOICES[key], "???") else (default,)  # of one command alone
    choices = Rule(choices=(*own, *CHOICES[key]))
    comment = comments()[owner.__name__].get(key) or _summary(base)
    return Setting(key, owner, "group", default, str(choices), comment)


def _type_words(command: str, key: str, rule: Rule) -> str:
    slot = find_slot(command, key)
    if rule.choices and slot.kind is str:
        words = "choice"
    elif slot.is_texts:
        words = "list of texts"
    else:
        origin = next((kind for kind in TYPES if slot.kind is kind), None)
        lists = {list[int]: "list of whole numbers", list[float]: "list of numbers"}
        words = TYPES[origin] if origin is not None else lists.get(slot.kind, "dictionary")
    return f"{words} or null" if slot.optional else words


def _summary(owner: Any) -> str:
    return (owner.__doc__ or "").strip().splitlines()[0]


@cache
def comments() -> Mapping[str, Mapping[str, str]]:
    """Return the comment of each field of each class of config/."""
    result: dict[str, dict[str, str]] = {}
    for path in sorted((Path(__file__).parent / "config").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        texts = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                result[node.name] = dict(_comments_of(node, texts))
    return result


def _comments_of(node: ast.ClassDef, texts: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            numbers: Sequence[int] = range(line.lineno, (line.end_lineno or line.lineno) + 1)
            comment = " ".join(texts[number] for number in numbers if number in texts)
            yield line.target.id, re.sub(r"^# *(noqa: \w+ *)?", "", comment)


if __name__ == "__main__":
    print(markdown(), end="")
