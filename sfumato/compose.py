"""Composer of settings: recipes and command-line overrides become checked dataclasses."""

import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sfumato.catalog import CHOICES, keys_of
from sfumato.check import check_train
from sfumato.conditions import refuse_unread
from sfumato.config import (
    COMMANDS,
    CONF,
    GROUPS,
    MISSING,
    REWARDS,
    JobConfig,
    LaunchConfig,
    OwnConfig,
    PlanConfig,
    RewardConfig,
    RewardFiles,
    TrainConfig,
    WeightedPartConfig,
    WeightedRewardConfig,
    check_values,
    rule_of,
)
from sfumato.config.saved import read_saved
from sfumato.explain import explain, first_line, unknown_key, unreadable_value
from sfumato.overrides import escaped, rewritten

DEMO_MODELS = Path(__file__).parent / "demo" / "model"
DEMO_IMAGES = Path(__file__).parent / "demo" / "images"
DEMO_NETWORKS = Path(__file__).parent / "demo" / "networks"
QUOTES = "'\""
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)


@cache
def register(command: str) -> None:
    """Make dataclasses known to Hydra, once: the root of a command, and one node per group choice.

    `${demo:base}` in a recipe is the folder of a shipped model, `${demo_images:new}` one of
    shipped images; `${demo_images:prompts.txt}` has the prompts of `sfumato demo`, and
    `${demo_networks:unet.json}` the sizes of a network of the demo.
    """
    folders = {"demo": DEMO_MODELS, "demo_images": DEMO_IMAGES, "demo_networks": DEMO_NETWORKS}
    for resolver, folder in folders.items():
        OmegaConf.register_new_resolver(
            resolver, lambda name, folder=folder: str(folder / name), replace=True
        )
    OmegaConf.register_new_resolver("scratch", lambda: _scratch().name, replace=True)
    store = ConfigStore.instance()
    schema = OmegaConf.structured(COMMANDS[command])
    if command == "evaluate":
        schema.reward = MISSING  # chosen in conf/evaluate.yaml
        store.store(group="reward", name="trained", node=RewardFiles)
    store.store(name=f"{command}_schema", node=schema)
    for group, choices in CHOICES.items():
        for name, node in choices.items():
            store.store(group=group, name=name, node=node)


@cache
def _scratch() -> TemporaryDirectory[str]:
    """Return the folder for Hydra's own notes of a sweep, which ends with this process."""
    return TemporaryDirectory(prefix="sfumato-sweep-")


def to_settings(config: Any, prefix: str = "") -> Any:
    """Return the dataclasses of a composed configuration.

    Args:
        prefix: of the names of the settings, in messages.

    Raises:
        ValueError: if a value that the user must give is missing, a key is unknown, or a number is
            not finite.
    """
    try:
        if OmegaConf.get_type(config) is LaunchConfig:
            _leave_out_jobs(config)
        if OmegaConf.get_type(config) is PlanConfig:
            _assume_defaults(config)
        if OmegaConf.get_type(config) in (TrainConfig, PlanConfig):
            _leave_out_model(config)
        missing = sorted([*OmegaConf.missing_keys(config), *_unread(config)])
        if missing:
            names = ", ".join(f"{prefix}{name}" for name in missing)
            raise ValueError(f"missing settings: {names}; give each as KEY=VALUE")
        if added := _added_keys(config):
            known = keys_of(OmegaConf.get_type(config), prefix)
            raise ValueError(unknown_key(f"{prefix}{added[0]}", known))
        settings: Any = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(unreadable_value(f"{prefix}{error.full_key}", error)) from error
    _resolve_entries(settings, prefix)
    check_values(settings, prefix)
    return settings


def _resolve_entries(settings: Any, prefix: str) -> None:
    """Turn the entries of dictionaries into settings, each checked against its own dataclass."""
    for item in fields(settings):
        key, value = f"{prefix}{item.name}", vars(settings)[item.name]
        kind = rule_of(item).entries
        if is_dataclass(value):
            _resolve_entries(value, f"{key}.")
            continue
        weighted = isinstance(settings, WeightedRewardConfig)
        if weighted and kind is RewardConfig and not value:
            raise ValueError(f"{key} is empty; write '{key}.NAME={{kind: clip, weight: 1.0, ...}}'")
        if is_dataclass(kind):
            one = _resolve_part if weighted else _resolve_reward
            resolve = one if kind is RewardConfig else partial(_resolve, kind=kind)
            vars(settings)[item.name] = {
                name: None if entry is None else resolve(f"{key}.{name}", entry)
                for name, entry in value.items()
                if entry is not None or kind is JobConfig  # null takes a recipe's entry out
            }


def _unread(config: DictConfig) -> list[str]:
    """Return the keys of parts and data that the settings need and leave at null."""
    if OmegaConf.get_type(config) is not TrainConfig or OmegaConf.is_missing(config, "objective"):
        return []
    data, model = config.data, config.model
    parts = ("autoencoder", "text_encoder") if model.network.config is not None else ()
    missing = [f"model.{name}" for name in parts if _is_open(model, name, None)]
    objective: Any = OmegaConf.to_object(config.objective)
    prompts = objective.reads_prompts and not isinstance(objective, OwnConfig)
    if prompts and _is_open(data, "prompts", None):
        missing.append("data.prompts")
    if objective.reads_pairs and _is_open(data.pairs, "path", None, ""):
        missing.append("data.pairs.path")
    if objective.trains == "autoencoder" and _is_open(config.objective, "start", None, ""):
        missing.append("objective.start")
    rooms = (data.images, data.shards) if objective.reads_images else ()
    if rooms and all(_is_open(room, "path", None, "") and not room.sources for room in rooms):
        missing.append("data.shards.path" if data.shards.cached else "data.images.path")
    return missing


def _is_open(node: DictConfig, name: str, *empty: str | None) -> bool:
    return not OmegaConf.is_missing(node, name) and node[name] in empty


def _leave_out_model(config: DictConfig) -> None:
    """Set `model.pretrained` to null where no text-to-image model is trained, and none is read."""
    if not OmegaConf.is_missing(config, "objective"):
        objective: Any = OmegaConf.to_object(config.objective)
        if objective.trains != "model" and OmegaConf.is_missing(config.model, "pretrained"):
            config.model.pretrained = None


def _leave_out_jobs(config: DictConfig) -> None:
    """Set the jobs that are not in `stages` to null, and drop `given` entries that no job reads."""
    _refuse_unread(config)
    for name in config.jobs if config.stages else []:
        if name not in config.stages:
            config.jobs[name] = None
    read = str(OmegaConf.to_container(config.jobs, resolve=False))
    for name in list(config.given):
        if OmegaConf.is_missing(config.given, name) and f"${{given.{name}}}" not in read:
            with open_dict(config.given):
                del config.given[name]
    if missing := sorted(OmegaConf.missing_keys(config.given)):  # before jobs are looked into
        raise ValueError(f"missing settings: {', '.join(missing)}; give each as KEY=VALUE")


def _refuse_unread(config: DictConfig) -> None:
    """Refuse `given` entries that no setting reads: their names may be mistyped."""
    whole = str(OmegaConf.to_container(config, resolve=False))
    given: Any = OmegaConf.to_container(config.given, resolve=False)
    names = list(given)
    for name, inner in given.items():
        if isinstance(inner, dict) and f"${{given.{name}}}" not in whole:
            names += [f"{name}.{key}" for key in inner]
    read = [name for name in names if re.search(rf"\$\{{given\.{re.escape(name)}[.}}]", whole)]
    for name in names:
        if name not in read:
            raise ValueError(unknown_key(f"given.{name}", [f"given.{known}" for known in read]))


def _assume_defaults(config: DictConfig) -> None:
    """Replace ??? of a recipe by the default of the field, if it has one."""
    for key in OmegaConf.missing_keys(config):
        section, _, name = key.rpartition(".")
        node = OmegaConf.select(config, section) if section else config
        kind = OmegaConf.get_type(node)
        if is_dataclass(kind) and not OmegaConf.is_missing(OmegaConf.structured(kind), name):
            node[name] = OmegaConf.structured(kind)[name]


def _added_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Return the keys that `+KEY=VALUE` added to a dataclass without such a field."""
    kind = OmegaConf.get_type(config)
    if not is_dataclass(kind):
        return []
    known = {item.name for item in fields(kind)}
    added = [f"{prefix}{key}" for key in config if key not in known]
    for key in known:
        if OmegaConf.is_dict(config[key]):
            added += _added_keys(config[key], f"{prefix}{key}.")
    return added


def compose_train(overrides: Sequence[str]) -> tuple[TrainConfig, dict[str, Any]]:
    """Compose the settings of `sfumato train` from overrides; return them checked, and as data.

    Raises:
        ValueError: if they cannot be composed, or cannot work together.
    """
    settings, plain = compose_command("train", overrides)
    check_train(settings, int(os.environ.get("WORLD_SIZE", "1")))
    return settings, plain


def check_sweep(command: str, overrides: Sequence[str]) -> None:
    """Compose every job of a sweep, so that a mistake in one is told before the first begins.

    Args:
        overrides: as Hydra reads them.

    Raises:
        ValueError: naming the job, if its settings cannot be composed or cannot work together.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [
        [f"{text.partition('=')[0]}={value}" for value in each.sweep_string_iterator()]
        if each.is_sweep_override()
        else [text]
        for each, text in zip(parsed, overrides, strict=True)
    ]
    swept = [i for i, each in enumerate(parsed) if each.is_sweep_override()]
    for job in itertools.product(*values):
        try:
            settings, _ = _composed(command, job, job)
            if isinstance(settings, TrainConfig):
                check_train(settings, int(os.environ.get("WORLD_SIZE", "1")))
        except ValueError as error:
            named = " ".join(job[i] for i in swept)
            raise ValueError(f"{error} (in the sweep's job {named}; none has begun)") from error


def compose_command(command: str, overrides: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Compose the settings of any command from overrides; return them, and the same as data.

    Raises:
        ValueError: if they cannot be composed.
    """
    return _composed(command, rewritten(command, overrides), overrides)


def _composed(
    command: str, overrides: Sequence[str], typed: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    """Compose overrides as Hydra reads them; messages speak of those that were typed."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register(command)
    GlobalHydra.instance().clear()  # of a command that composes others' settings
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(command, list(overrides))
        return read_settings(config, typed)
    except COMPOSITION_ERRORS as error:
        raise ValueError(explain(error, command, typed)) from error


def read_settings(config: Any, overrides: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Return the dataclasses of a composed configuration, and the same as data.

    Args:
        overrides: as typed, KEY=VALUE.

    Raises:
        ValueError: as `to_settings`, or what was typed has no effect.
    """
    settings = to_settings(config)
    refuse_unread(settings, overrides)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return settings, plain


def is_sweep(arguments: Sequence[str]) -> bool:
    """Say whether commas in these arguments separate the values of a sweep."""
    return not {"-m", "--multirun"}.isdisjoint(arguments)


def swept_name(name: str, arguments: Sequence[str], chosen: Sequence[str]) -> str:
    """Return the run's name; in a sweep, with the swept values at its end.

    Args:
        arguments: as typed, where a sweep has comma-separated values.
        chosen: the overrides of this job.
    """
    if not is_sweep(arguments):
        return name
    typed = [argument for argument in arguments if "=" in argument and argument[0] != "-"]
    parsed = OverridesParser.create().parse_overrides(typed)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    parts = [name]
    for text in chosen:
        key, _, value = text.lstrip("+").partition("=")
        if key in swept:
            parts.append(f"{key.rpartition('.')[2]}={value.strip(QUOTES)}")
    return re.sub(r"[^\w.=+-]+", "_", "-".join(parts))


def load_settings(file: Path) -> TrainConfig:
    """Read the config.yaml of a run folder.

    Raises:
        ValueError: if it is not there, or not one that `sfumato train` wrote.
    """
    content = read_saved(file.parent, "give a folder that `sfumato train` made")
    try:
        root = OmegaConf.structured(TrainConfig)
        for group, choices in GROUPS.items():
            if not isinstance(content.get(group), dict):
                raise ValueError(f"{group} = {content.get(group)!r} holds no settings")
            kind = content[group]["kind"]
            if kind not in list(choices):  # a list has no hash
                raise ValueError(f"{group}.kind = {kind!r}; there are {', '.join(choices)}")
            root[group] = choices[kind]
        return to_settings(OmegaConf.merge(root, _literal(content)))
    except (*COMPOSITION_ERRORS, LookupError, TypeError, ValueError) as error:
        key = error.full_key if isinstance(error, OmegaConfBaseException) else None
        reason = unreadable_value(key, error) if key else str(error)
        raise ValueError(
            f"{file} is not a configuration of `sfumato train`: {first_line(reason)}; restore "
            "the file, or correct it"
        ) from error


def _literal(content: Any) -> Any:
    """Return settings in which ${ in a text is no interpolation."""
    match content:
        case dict():
            return {key: _literal(value) for key, value in content.items()}
        case list():
            return [_literal(value) for value in content]
        case str():
            return escaped(content)
        case _:
            return content


def _resolve_part(key: str, entry: Any) -> WeightedPartConfig:
    if not isinstance(entry, dict):
        raise ValueError(f"{key} = {entry!r}; write {{kind: ..., weight: ...}}")
    settings: dict[str, Any] = dict(entry)
    weight = settings.pop("weight", WeightedPartConfig.weight)
    reward = _resolve_reward(key, settings)
    if type(weight) not in (int, float) or not math.isfinite(weight):
        raise ValueError(f"{key}.weight = {weight!r} is not a finite number; give one")
    return WeightedPartConfig(reward, float(weight))


def _resolve_reward(key: str, entry: Any) -> RewardConfig:
    if not isinstance(entry, dict):
        raise ValueError(f"{key} = {entry!r}; write {{kind: ..., ...}}")
    settings: dict[str, Any] = dict(entry)
    kind = settings.pop("kind", None)
    choices = [name for name in REWARDS if name not in ("none", "weighted")]
    if kind not in choices:
        raise ValueError(f"{key}.kind = {kind!r}; choose one of {', '.join(choices)}")
    return _resolve(key, settings, REWARDS[kind])


def _resolve(key: str, entry: Any, kind: type) -> Any:
    """Return one entry of a free dictionary, checked against its dataclass."""
    if not isinstance(entry, dict):
        raise ValueError(f"{key} = {entry!r}; write {{KEY: VALUE, ...}}")
    known = [f"{key}.{item.name}" for item in fields(kind)]
    for name in entry:
        if f"{key}.{name}" not in known:
            raise ValueError(unknown_key(f"{key}.{name}", known))
    try:
        node = OmegaConf.merge(OmegaConf.structured(kind), _literal(entry))
    except OmegaConfBaseException as error:
        raise ValueError(unreadable_value(f"{key}.{error.full_key}", error)) from error
    return to_settings(node, f"{key}.")
