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
DEMO_MODELS = Path(__file__).parent / "demo" / "model"
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
    """Make the dataclasses known to Hydra: one root per command, one node per group choice.

    `${demo:base}` in a recipe is the folder of a shipped model.
    """
    OmegaConf.register_new_resolver("demo", lambda name: str(DEMO_MODELS / name), replace=True)
    store = ConfigStore.instance()
    for name, node in COMMANDS.items():
        store.store(name=f"{name}_schema", node=node)
    for group, choices in GROUPS.items():
        for name, node in choices.items():
            store.store(group=group, name=name, node=node)


def to_settings(config: Any, prefix: str = "") -> Any:
    """Return the dataclasses of a composed configuration.

    Args:
        prefix: of the names of the settings, in messages.

    Raises:
        ValueError: if a value that the user must give is missing, a key is unknown, or a number is
            not finite.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        names = ", ".join(f"{prefix}{name}" for name in missing)
        raise ValueError(f"missing settings: {names}; give each as KEY=VALUE")
    odd = _added_keys(config)
    if odd:
        kind = OmegaConf.get_type(config)
        assert kind is not None
        raise ValueError(unknown_key(f"{prefix}{odd[0]}", keys_of(kind, prefix)))
    settings = OmegaConf.to_object(config)
    _refuse_non_finite(settings, prefix)
    return settings


def _added_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Return what `+KEY=VALUE` has put into a dataclass that has no such field."""
    kind = OmegaConf.get_type(config)
    if not is_dataclass(kind):
        return []
    known = {item.name for item in fields(kind)}
    found = [f"{prefix}{key}" for key in config if key not in known]
    for key in known:
        if OmegaConf.is_dict(config[key]):
            found += _added_keys(config[key], f"{prefix}{key}.")
    return found


def _refuse_non_finite(settings: Any, prefix: str) -> None:
    for name, value in vars(settings).items():
        if is_dataclass(value):
            _refuse_non_finite(value, f"{prefix}{name}.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{prefix}{name} = {value} must be finite")


def swept_name(name: str, arguments: Sequence[str], chosen: Sequence[str]) -> str:
    """Return the run's name; in a sweep, with the swept values at its end.

    Args:
        arguments: as typed, where a sweep has comma-separated values.
        chosen: the overrides of this job.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not {"-m", "--multirun"} & set(arguments):
        return name
    typed = [argument for argument in arguments if "=" in argument and argument[0] != "-"]
    parsed = OverridesParser.create().parse_overrides(typed)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    parts = [name]
    for text in chosen:
        key, _, value = text.lstrip("+").partition("=")
        if key in swept:
            parts.append(f"{key.rpartition('.')[2]}={value}")
    return re.sub(r"[^\w.=+-]+", "_", "-".join(parts))


def load_settings(file: Path) -> TrainConfig:
    """Read the config.yaml of a run folder.

    Raises:
        ValueError: if it is not there, or not one that `sfumato train` wrote.
    """
    if not file.exists():
        raise ValueError(f"{file.parent} is no run folder: it has no {file.name}")
    try:
        content: Any = OmegaConf.load(file)
        root = OmegaConf.structured(TrainConfig)
        for group, choices in GROUPS.items():
            kind = content[group]["kind"]
            if kind not in choices:
                raise ValueError(f"{group}.kind = {kind!r}; there are {', '.join(choices)}")
            root[group] = choices[kind]
        config = to_settings(OmegaConf.merge(root, content))
        if isinstance(config.reward, WeightedRewardConfig):
            resolve_parts(config.reward)
    except (OmegaConfBaseException, YAMLError, LookupError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"{file} is not a configuration of `sfumato train`: {str(error).splitlines()[0]}"
        ) from error
    return config


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
        config.parts[name] = _resolve_part(f"reward.parts.{name}", given)


def _resolve_part(place: str, given: Any) -> WeightedPartConfig:
    if not isinstance(given, dict):
        raise ValueError(f"{place} = {given!r}; write {{kind: ..., weight: ...}}")
    settings: dict[str, Any] = dict(given)
    kind, weight = settings.pop("kind", None), settings.pop("weight", 1.0)
    choices = [name for name in REWARDS if name != "weighted"]
    if kind not in choices:
        raise ValueError(f"{place}.kind = {kind!r}; choose one of {', '.join(choices)}")
    if not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"{place}.weight = {weight!r} must be a finite number")
    known = [item.name for item in fields(REWARDS[kind])]
    for key in settings:
        if key not in known:
            named = [f"{place}.{name}" for name in known]
            raise ValueError(unknown_key(f"{place}.{key}", named))
    try:
        node = OmegaConf.merge(OmegaConf.structured(REWARDS[kind]), settings)
    except OmegaConfBaseException as error:
        raise ValueError(f"{place}: {str(error).splitlines()[0]}") from error
    return WeightedPartConfig(to_settings(node, f"{place}."), float(weight))


def check_train(config: TrainConfig, processes: int) -> None:
    """Refuse settings that cannot work together.

    Raises:
        ValueError: naming the key, its value, and what to do.
    """
    training = config.training
    if Path(config.name).name != config.name:
        raise ValueError(
            f"name = {config.name!r} is no name of a folder; give one without slashes, and the "
            "place of all runs as runs_dir=..."
        )
    rewards = {"reward": config.reward}
    if isinstance(config.reward, WeightedRewardConfig):
        resolve_parts(config.reward)
        rewards |= {f"reward.parts.{n}": part.reward for n, part in config.reward.parts.items()}
    _check_choices(config, rewards)
    check_sampler(config.sampler)
    _positive(
        {
            "training.max_steps": training.max_steps,
            "training.micro_batch_size": training.micro_batch_size,
            "training.global_batch_size": training.global_batch_size,
            "training.checkpoint_every_steps": training.checkpoint_every_steps,
            "training.keep_checkpoints": training.keep_checkpoints,
            "validation.num_images": config.validation.num_images,
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
    if training.max_time is not None:
        from sfumato.training.stop import parse_duration

        parse_duration(training.max_time)
    _check_lora(config.model.lora)
    _check_optimizer(config.optimizer)
    if isinstance(config.objective, DraftConfig):
        _check_draft(config.objective, config.sampler, rewards)


def check_sampler(sampler: SamplerConfig) -> None:
    """Refuse a number of steps or an eta that no sampling run can have.

    Raises:
        ValueError: naming the key and its value.
    """
    _positive(
        {
            "sampler.num_inference_steps": sampler.num_inference_steps,
            "sampler.height": sampler.height,
            "sampler.width": sampler.width,
        }
    )
    if sampler.eta < 0 or sampler.eta > 1:
        raise ValueError(f"sampler.eta = {sampler.eta} must lie in [0, 1]; 0 is deterministic")


def _check_lora(lora: LoraConfig) -> None:
    _positive({"model.lora.rank": lora.rank, "model.lora.alpha": lora.alpha})
    if not 0 <= lora.dropout < 1:
        raise ValueError(f"model.lora.dropout = {lora.dropout} must lie in [0, 1)")
    if not lora.targets:
        raise ValueError("model.lora.targets = [] trains nothing; leave it out for the default")
    for target in lora.targets:
        try:
            re.compile(target)
        except re.error as error:
            raise ValueError(
                f"model.lora.targets has {target!r}, which is no regular expression ({error})"
            ) from error


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    _positive({"optimizer.lr": optimizer.lr, "optimizer.max_grad_norm": optimizer.max_grad_norm})
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ValueError(f"optimizer.betas = {optimizer.betas} must be two numbers in [0, 1)")
    for name in ("eps", "weight_decay", "warmup_steps"):
        if vars(optimizer)[name] < 0:
            raise ValueError(f"optimizer.{name} = {vars(optimizer)[name]} must be 0 or more")


def _check_draft(
    draft: DraftConfig, sampler: SamplerConfig, rewards: Mapping[str, RewardConfig]
) -> None:
    for place, reward in rewards.items():
        if isinstance(reward, JpegRewardConfig):
            raise ValueError(
                f"{place} = {reward.kind} is not differentiable, and DRaFT learns from the "
                "reward's gradient; choose a differentiable one (reward=clip, reward=color)"
            )
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


def _check_choices(config: TrainConfig, rewards: Mapping[str, RewardConfig]) -> None:
    for key, allowed in CHOICES.items():
        group, _, name = key.partition(".")
        nodes = rewards if group == "reward" else {group: vars(config)[group]}
        for place, node in nodes.items():
            value = vars(node).get(name)
            if value is not None and value not in allowed:
                raise ValueError(f"{place}.{name} = {value!r}; choose one of {', '.join(allowed)}")


def _positive(values: Mapping[str, float | None]) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} = {value} must be above 0")
