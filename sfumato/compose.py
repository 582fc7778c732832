"""From recipes and command-line overrides to checked settings, before any weight is loaded."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sfumato.config import (
    OBJECTIVES,
    REWARDS,
    DraftConfig,
    EvaluateConfig,
    SampleConfig,
    SamplerConfig,
    TrainConfig,
    WeightedPartConfig,
    WeightedRewardConfig,
)

CONF = Path(__file__).parent / "conf"
COMMANDS = {"train": TrainConfig, "sample": SampleConfig, "evaluate": EvaluateConfig}
CHOICES = {
    "model.trainable": ("lora", "full"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "objective.cfg_gradient": ("full", "detach_uncond", "rescale"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "training.precision": ("no", "bf16", "fp16"),
    "training.strategy": ("ddp", "fsdp"),
    "reward.dtype": ("float32", "bfloat16", "float16"),
    "reward.color": ("red", "green", "blue"),
}


def register() -> None:
    """Make the dataclasses known to Hydra: one root per command, one node per group choice."""
    store = ConfigStore.instance()
    for name, node in COMMANDS.items():
        store.store(name=f"{name}_schema", node=node)
    for group, choices in (("objective", OBJECTIVES), ("reward", REWARDS)):
        for name, node in choices.items():
            store.store(group=group, name=name, node=node)


def to_settings(config: Any) -> Any:
    """Return the dataclasses of a composed configuration.

    Raises:
        ValueError: if a value that the user must give is missing.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(
            f"missing settings: {', '.join(missing)}; give each as KEY=VALUE, for example "
            f"{missing[0]}=..."
        )
    return OmegaConf.to_object(config)


def swept_name(name: str, arguments: Sequence[str], chosen: Sequence[str]) -> str:
    """Return the run's name; in a sweep, with the swept values at its end.

    Args:
        arguments: as typed, where a sweep has comma-separated values.
        chosen: the overrides of this job.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not {"-m", "--multirun"} & set(arguments):
        return name
    typed = [argument for argument in arguments if not argument.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(typed)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    parts = [text for text in chosen if text.split("=")[0] in swept]
    return "-".join([name, *(part.rpartition(".")[2] for part in parts)])


def load_settings(file: Path) -> TrainConfig:
    """Read the config.yaml of a run folder.

    Raises:
        ValueError: if it is not there, or not one that `sfumato train` wrote.
    """
    if not file.exists():
        raise ValueError(f"{file.parent} is no run folder: it has no {file.name}")
    try:
        content = OmegaConf.load(file)
        root = OmegaConf.structured(TrainConfig)
        root.objective = OBJECTIVES[content.objective.kind]
        root.reward = REWARDS[content.reward.kind]
        config = to_settings(OmegaConf.merge(root, content))
    except (OmegaConfBaseException, YAMLError, KeyError) as error:
        raise ValueError(
            f"{file} is not a configuration of `sfumato train`: {str(error).splitlines()[0]}"
        ) from error
    if isinstance(config.reward, WeightedRewardConfig):
        resolve_parts(config.reward)
    return config


def explain(message: str, known: Sequence[str]) -> str:
    """Return Hydra's message in one line, with the nearest known key if it names an unknown one."""
    first = next((line for line in message.splitlines() if line.strip()), message)
    match = re.search(r"Could not override '([^']+)'", message)
    if match is None:
        group = re.search(r"Could not find '([^']+)'", message)
        if group:
            return f"{first.strip()} {_available(group.group(1))}"
        detail = [line.strip() for line in message.splitlines() if line.strip()]
        return " ".join(detail[:2])
    return unknown_key(match.group(1), known)


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Say that a key is unknown, and which known ones are near."""
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
        groups = {"objective": OBJECTIVES, "reward": REWARDS}.get(item.name, {})
        inner = [*groups.values()] if groups else [item.type] if is_dataclass(item.type) else []
        for kind in inner:
            assert isinstance(kind, type)
            names += keys_of(kind, f"{name}.")
    return sorted(set(names))


def _available(choice: str) -> str:
    group = choice.partition("/")[0]
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    names += sorted({"objective": OBJECTIVES, "reward": REWARDS}.get(group, {}))
    return f"There are: {', '.join(names)}." if names else ""


def resolve_parts(config: WeightedRewardConfig) -> None:
    """Turn the parts of a weighted sum into settings, each checked against its own dataclass.

    Raises:
        ValueError: if a part names no reward, an unknown one, or an unknown key.
    """
    if not config.parts:
        raise ValueError(
            "reward.parts is empty; write '+reward.parts.NAME={kind: clip, weight: 1.0, ...}'"
        )
    for name, given in config.parts.items():
        if not isinstance(given, dict):
            raise ValueError(f"reward.parts.{name} = {given!r}; write {{kind: ..., weight: ...}}")
        settings = dict(given)
        kind = settings.pop("kind", None)
        weight = settings.pop("weight", 1.0)
        if kind not in REWARDS or kind == "weighted":
            choices = ", ".join(k for k in REWARDS if k != "weighted")
            raise ValueError(f"reward.parts.{name}.kind = {kind!r}; choose one of {choices}")
        known = [f"reward.parts.{name}.{item.name}" for item in fields(REWARDS[kind])]
        for key in settings:
            if f"reward.parts.{name}.{key}" not in known:
                raise ValueError(unknown_key(f"reward.parts.{name}.{key}", known))
        try:
            node = OmegaConf.merge(OmegaConf.structured(REWARDS[kind]), settings)
            config.parts[name] = WeightedPartConfig(to_settings(node), float(weight))
        except (OmegaConfBaseException, ValueError) as error:
            raise ValueError(f"reward.parts.{name}: {str(error).splitlines()[0]}") from error


def check_train(config: TrainConfig, processes: int) -> None:
    """Refuse settings that cannot work together.

    Raises:
        ValueError: naming the key, its value, and what to do.
    """
    _check_choices(config)
    training, sampler = config.training, config.sampler
    check_sampler(sampler)
    _positive(
        {
            "training.max_steps": training.max_steps,
            "training.micro_batch_size": training.micro_batch_size,
            "training.global_batch_size": training.global_batch_size,
            "training.checkpoint_every_steps": training.checkpoint_every_steps,
            "validation.num_images": config.validation.num_images,
            "model.lora.rank": config.model.lora.rank,
            "optimizer.lr": config.optimizer.lr,
            "optimizer.max_grad_norm": config.optimizer.max_grad_norm,
            "data.buffer": config.data.buffer,
        }
    )
    unit = training.micro_batch_size * processes
    if training.global_batch_size % unit:
        nearest = max(unit, round(training.global_batch_size / unit) * unit)
        raise ValueError(
            f"training.global_batch_size = {training.global_batch_size} does not divide into "
            f"{processes} process(es) x micro batches of {training.micro_batch_size}; the nearest "
            f"that does is {nearest}"
        )
    if training.ema_decay is not None and not 0 <= training.ema_decay < 1:
        raise ValueError(
            f"training.ema_decay = {training.ema_decay} must lie in [0, 1), or be null"
        )
    if len(config.optimizer.betas) != 2:
        raise ValueError(f"optimizer.betas = {config.optimizer.betas} must be two numbers")
    if training.max_time is not None:
        from sfumato.training.stop import parse_duration

        parse_duration(training.max_time)
    if isinstance(config.objective, DraftConfig):
        _check_draft(config.objective, sampler)
    if isinstance(config.reward, WeightedRewardConfig):
        resolve_parts(config.reward)


def check_sampler(sampler: SamplerConfig) -> None:
    """Refuse a number of steps or an eta that no sampling run can have.

    Raises:
        ValueError: naming the key and its value.
    """
    _positive({"sampler.num_inference_steps": sampler.num_inference_steps})
    if sampler.eta < 0 or sampler.eta > 1:
        raise ValueError(f"sampler.eta = {sampler.eta} must lie in [0, 1]; 0 is deterministic")


def _check_draft(draft: DraftConfig, sampler: SamplerConfig) -> None:
    steps = sampler.num_inference_steps
    if not 1 <= draft.truncation_steps <= steps:
        raise ValueError(
            f"objective.truncation_steps = {draft.truncation_steps} must lie in 1..{steps}, the "
            "number of sampling steps (sampler.num_inference_steps)"
        )
    if draft.truncation_range is not None:
        bounds = draft.truncation_range
        if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= steps:
            raise ValueError(
                f"objective.truncation_range = {bounds} must be [low, high] with 1 <= low <= high "
                f"<= {steps}, the number of sampling steps"
            )
    if draft.kl_coeff < 0:
        raise ValueError(
            f"objective.kl_coeff = {draft.kl_coeff} must be 0 (DRaFT) or more (DRaFT+)"
        )
    if draft.lv_samples < 0:
        raise ValueError(f"objective.lv_samples = {draft.lv_samples} must be 0 (off) or more")
    if draft.lv_samples and (draft.truncation_steps != 1 or draft.truncation_range):
        raise ValueError(
            f"objective.lv_samples = {draft.lv_samples} is DRaFT-LV, which has "
            "objective.truncation_steps = 1 and no truncation_range"
        )


def _check_choices(config: TrainConfig) -> None:
    for key, allowed in CHOICES.items():
        group, _, name = key.partition(".")
        node = vars(config)[group]
        value = vars(node).get(name)
        if value is not None and value not in allowed:
            raise ValueError(f"{key} = {value!r}; choose one of {', '.join(allowed)}")


def _positive(values: dict[str, float]) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} = {value} must be above 0")
