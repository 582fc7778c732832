"""Writer of a recipe from a config of others, with what became of each of its keys."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args, get_origin

import yaml

from sfumato.catalog import find_slot, walk
from sfumato.check import check_train
from sfumato.compose import compose_command
from sfumato.conditions import shown, why_unread
from sfumato.config import COMMANDS, MISSING, TrainConfig
from sfumato.files import write_text
from sfumato.help import heads_in
from sfumato.migrate.changes import PROCESSES, change
from sfumato.migrate.read import Config, read_config
from sfumato.migrate.table import UNSAID, Kind, Row, kinds

HEADS = {
    "taken": "taken",
    "changed": "changed",
    "left out": "left out there, with the default of theirs",
    "none": "without meaning here",
    "missing": "missing here",
    "unknown": "unknown: no version of this config that is known has it",
}
NOTHING = (None, "", [], {}, [None])
STANDS_IN = {int: "512", float: "1e-4"}  # for what is to be given, while a recipe is checked
LONGEST = 60  # letters of a value that are shown


@dataclass(frozen=True)
class Verdict:
    """What became of one key: settings of ours, or the reason why there are none."""

    key: str
    value: Any
    how: str
    note: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def migrate(
    path: Path, *, into: Path, name: str | None = None, kind: str | None = None, processes: int = 1
) -> None:
    """Write INTO/recipe/NAME.yaml, and print what became of each key.

    Args:
        name: of the recipe; None is the file's.
        kind: of the config; None is the one whose keys it has.
        processes: that the config ran on, where its batches are of one.

    Raises:
        ValueError: if the config or the recipe's place cannot be used.
    """
    config = read_config(path)
    known = _find_kind(path, config, kind)
    verdicts = list(judge(config, known, processes))
    recipe = re.sub(r"[^\w.-]+", "_", name or path.stem).strip(".") or "recipe"
    if recipe in heads_in("recipe"):
        raise ValueError(
            f"a recipe named {recipe} ships with Sfumato, and recipe={recipe} would mean that one; "
            "give another name: --name NAME"
        )
    settings = {**known.settings}
    if known.command == "train":
        settings["name"] = recipe
    for verdict in verdicts:
        settings |= verdict.settings
    vain, refused = _tried(known, settings, recipe, processes)
    settings = {key: value for key, value in settings.items() if key not in vain}
    print(_page(path, known, [_without(verdict, vain) for verdict in verdicts]))
    file = into / "recipe" / f"{recipe}.yaml"
    _write(file, _text(known, settings, recipe))
    print(f"written: {file}")
    if refused:
        print(f"sfumato {known.command} would say: {refused}")
    given = [key for key, value in settings.items() if value == MISSING]
    if given:
        print("give, in the recipe or on the command line:")
    for key in given:
        print(f"  {key}=...  {known.give[key]}")
    print(f"then: sfumato {known.command} --config-dir {into} recipe={recipe} ... --cfg job")


def judge(config: Config, kind: Kind, processes: int) -> Iterator[Verdict]:
    """Yield what becomes of each key, and of those that are left out and have a default."""
    defaults = {
        key: value
        for row in kind.rows
        for key, value in row.keys.items()
        if row.how not in ("none", "missing") and value is not UNSAID
    }
    left_out = {key: value for key, value in defaults.items() if key not in config.values}
    values = {**config.values, **left_out, PROCESSES: processes}
    for key, value in (*config.values.items(), *left_out.items()):
        if (found := kind.find(key)) is None:
            yield Verdict(key, value, "unknown", _nearest(key, kind))
            continue
        row, said = found
        verdict = _verdict(key, value, row, said, values, config.open.get(key), kind.command)
        plain = key in left_out and verdict.settings
        yield replace(verdict, how="left out") if plain else verdict


def _verdict(
    key: str, value: Any, row: Row, said: Any, values: Mapping[str, Any], ref: str | None, to: str
) -> Verdict:
    ours = ", ".join(row.ours)
    if row.how in ("none", "missing"):
        if row.how == "missing" and value in NOTHING:
            return Verdict(key, value, "none", "nothing is given there")
        plain = row.how == "none" and (said is UNSAID or value == said)
        note = f"{ours}: {row.note}" if ours else row.note
        return Verdict(key, value, "none" if plain else "missing", note)
    if ref is not None or value == MISSING:
        reason = f"it refers to {ref}, which the file does not have" if ref else "it is to be given"
        return Verdict(key, value, "missing", f"{reason}; give {ours}")
    how = "taken" if row.how == "taken" else "changed"
    try:
        if how == "taken":
            found = {} if value in NOTHING else {ours.removeprefix(f"{to} "): value}
        else:
            found = change(row.how, value, values)
        if beside := next((v for v in found.values() if v == MISSING or "${" in str(v)), None):
            raise ValueError(f"it needs a value that the file does not have, {beside}")
        settings = {name: _fitted(to, name, each) for name, each in found.items()}
    except ValueError as error:
        return Verdict(key, value, "missing", f"{error}; {ours}: {row.note}")
    how = "taken" if list(settings.values()) == [value] else how
    return Verdict(key, value, how, row.note if how == "changed" else "", settings)


def _fitted(command: str, key: str, value: Any) -> Any:
    """Return a value as a setting of ours takes it.

    Raises:
        ValueError: if the setting cannot have the value.
    """
    slot = find_slot(command, key)
    if value is None:
        return value
    if get_origin(slot.kind) is list:
        kinds_of = get_args(slot.kind)[0]
        if not isinstance(value, list):
            raise ValueError(f"{key} is a list")
        fitted = [_number(key, kinds_of, one) for one in value]
    else:
        fitted = _number(key, slot.kind, value)
    for one in fitted if isinstance(fitted, list) else [fitted]:
        slot.rule.check(key, one)
    return fitted


def _number(key: str, kind: Any, value: Any) -> Any:
    """Return a value of a type; YAML reads 1e-4, without a point, as a text."""
    wrong = ValueError(f"{key} is {'true or false' if kind is bool else 'a number or a text'}")
    if kind is bool or isinstance(value, bool):
        if not (kind is bool and isinstance(value, bool)):
            raise wrong
        return value
    if kind is str and isinstance(value, str | int | float):
        return str(value)
    try:
        number = float(value)
        whole = int(number)
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong from error
    if kind is int and whole != number:
        raise ValueError(f"{key} is a whole number")
    return whole if kind is int else number


def _find_kind(path: Path, config: Config, name: str | None) -> Kind:
    every = kinds()
    name = name or config.kind
    if name is not None and name not in every:
        raise ValueError(f"{name} is no config that is known; there are {', '.join(every)}")
    if name is not None:
        return every[name]
    scores = {
        each.name: (sum(each.find(key) is not None for key in config.values), _meets(config, each))
        for each in every.values()
    }
    best = [name for name, score in scores.items() if score == max(scores.values())]
    kind, (found, meets) = every[best[0]], scores[best[0]]
    if not found or not meets:
        lacks = f", but no key {kind.needs}NAME" if found else ""
        raise ValueError(
            f"{path} is no config that is known: of its {len(config.values)} keys it has {found} "
            f"of {kind.title}{lacks}. Known are: {'; '.join(each.title for each in every.values())}"
        )
    if len(best) > 1:
        raise ValueError(
            f"{path} may be {' or '.join(every[name].title for name in best)}; say which: "
            f"--as {best[0]}"
        )
    return kind


def _meets(config: Config, kind: Kind) -> bool:
    return any(key.startswith(kind.needs) for key in config.values)


def _nearest(key: str, kind: Kind) -> str:
    names = [name for row in kind.rows for name in row.keys if "*" not in name]
    near = difflib.get_close_matches(key, names, 1, 0.8)
    return f"the nearest is {near[0]}" if near else ""


def _tried(
    kind: Kind, settings: Mapping[str, Any], recipe: str, processes: int
) -> tuple[Mapping[str, str], str]:
    """Compose a recipe; return the settings in vain with the reason, and what would be refused."""
    with TemporaryDirectory() as folder:
        score = Path(folder) / "score.py"
        score.write_text(
            "def score(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
        )
        write_text(Path(folder) / "recipe" / f"{recipe}.yaml", _text(kind, settings, recipe))
        overrides = [f"recipe={recipe}", f"hydra.searchpath=[file://{folder}]"]
        for key, value in settings.items():
            if value == MISSING:
                given = STANDS_IN.get(find_slot(kind.command, key).kind, "X")
                overrides.append(
                    f"{key}={score}:score" if key == "reward.path" else f"{key}={given}"
                )
        try:
            composed, _ = compose_command(kind.command, overrides)
            whys = {key: why_unread(composed, key) for key in settings}
            vain = {key: why[0] for key, why in whys.items() if why is not None}
            if isinstance(composed, TrainConfig):
                check_train(composed, processes)
        except ValueError as error:
            return {}, " ".join(str(error).split())
    return vain, ""


def _without(verdict: Verdict, vain: Mapping[str, str]) -> Verdict:
    """Return a verdict without the settings that would have no effect."""
    kept = {key: value for key, value in verdict.settings.items() if key not in vain}
    gone = [f"{key} has no effect {vain[key]}" for key in verdict.settings if key in vain]
    if not gone:
        return verdict
    how, note = verdict.how if kept else "none", "; ".join([*filter(None, [verdict.note]), *gone])
    return replace(verdict, how=how, note=note, settings=kept)


def _page(path: Path, kind: Kind, verdicts: Sequence[Verdict]) -> str:
    unknown = sum(each.how == "unknown" for each in verdicts)
    own = sum(each.how != "left out" for each in verdicts)
    lines = [f"{path}: taken for {kind.title}, of which it has {own - unknown} keys"]
    if unknown:
        lines[0] += f"; {unknown} others are of a version that is not known, and are not taken"
    for how, head in HEADS.items():
        chosen = [each for each in verdicts if each.how == how]
        if chosen:
            lines += ["", f"{head}:", *_lines(chosen, how)]
    return "\n".join([*lines, ""])


def _lines(verdicts: Sequence[Verdict], how: str) -> Iterator[str]:
    """Yield a line per key with its value; keys without meaning share the line of their reason."""
    verdicts = [replace(each, note=_plain(each.note)) for each in verdicts]
    if how == "none":
        for note in dict.fromkeys(each.note for each in verdicts):
            yield f"  {', '.join(_shown(v.key, 200) for v in verdicts if v.note == note)}: {note}"
        return
    for each in verdicts:
        ours = ", ".join(f"{key}={shown(value)}" for key, value in each.settings.items())
        nothing = "" if ours or how not in ("taken", "changed") else " -> nothing to set"
        note = f"  ({each.note})" if each.note else ""
        value = f"{_shown(each.key, 200)} = {_shown(shown(each.value))}"
        yield f"  {value}{f' -> {_shown(ours, 200)}' if ours else nothing}{note}"


def _plain(note: str) -> str:
    """Return a note of the table without Markdown."""
    return re.sub(r"\[(.+?)\]\(.+?\)", r"\1", note).replace("`", "")


def _shown(text: str, longest: int = LONGEST) -> str:
    """Return a text of a stranger in one short line."""
    text = " ".join(text.split())
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _text(kind: Kind, settings: Mapping[str, Any], recipe: str) -> str:
    """Return a recipe: settings in the order of config/."""
    order = {entry.key: i for i, entry in enumerate(walk(COMMANDS[kind.command]))}
    content: dict[str, Any] = {}
    if kind.groups:
        content["defaults"] = [{f"override /{key}": name} for key, name in kind.groups.items()]
    for key in sorted(settings, key=lambda key: order.get(key, len(order))):
        *sections, last = key.split(".")
        node = content
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = settings[key]
    give = [key for key, value in settings.items() if value == MISSING]
    head = ["# @package _global_", f"# {recipe}: from {kind.title}."]
    head += [f"# Give: {', '.join(give)}."] if give else []
    return "\n".join([*head, yaml.safe_dump(content, sort_keys=False, width=1000)])


def _write(file: Path, text: str) -> None:
    """Write a recipe where no other file is.

    Raises:
        ValueError: if there is one.
    """
    same = file.is_file() and not file.is_symlink() and file.read_bytes() == text.encode()
    if (file.is_symlink() or file.exists()) and not same:
        raise ValueError(
            f"{file} is there already, and is not replaced; move it away, or give another "
            "name: --name NAME"
        )
    write_text(file, text)
