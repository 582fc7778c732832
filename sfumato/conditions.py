"""Settings beside others: when each is read, which name files, and what is typed in vain."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from sfumato.catalog import CHOICES, find_slot
from sfumato.config import (
    COMMANDS,
    OwnConfig,
    SampleConfig,
    TrainConfig,
    WeightedPartConfig,
    rewards_of,
)

Row = tuple[str, str]
_IMAGES = "data.images.path|data.images.sources"
_SHARDS = "data.shards.path|data.shards.sources"
_SHARED = "crop|flip|captions|buckets|min_size|max_pixels|shuffle|workers|prefetch"
_TRAINED = "network|unet|transformer"
_IN_ORDER = "never: held-out pictures are read once, in order, from their centres"
_ENCODERS = "never: sfumato prepare runs encoders alone, in float32"
_ALONE = "never: a weight divides the draws among sources; see data.{}.sources.NAME.weight"

# Settings that name the files of a model, and what is read of them before the first step alone.
_REWARDS = ("processor", "predictor")  # of a reward alone
_MODELS = ("pretrained", "autoencoder", "text_encoder", "tokenizer", "scheduler", *_REWARDS)
OWN = ("path", "url")  # of a reward: code and scorers, which users name themselves
STARTS = ("model.lora.start", "model.network.from_pretrained")
ANY = ".*"  # suffix of a file, in a pattern

_READS_PROMPTS, _READS_IMAGES = "objective.reads_prompts", "objective.reads_images"
_READS_PAIRS = "objective.reads_pairs"
_INSTEAD = {
    _READS_PROMPTS: "objective=draft",
    _READS_IMAGES: "objective=supervised",
    _READS_PAIRS: "objective=dpo",
}

# What a command reads only under a condition, as rows of a pattern of keys and the condition. All
# rows of a key have to hold; a key without a row is always read. A pattern KEY=VALUE is of a value.
#   KEY|KEY      one of them is given: not null, empty, false or 0
#   KEY=A|B      it is one of these, or its list has one of them; KEY!=A: others
#   KEY>N        it is above N
#   never: WHY
_MODEL: Sequence[Row] = (
    (r"model\.network\.(from_NeMo|ema)", "model.network.from_pretrained"),
    (r"model\.(autoencoder|text_encoder|tokenizer|scheduler)", "model.network.config"),
    (r"model\.(prediction_type|image_size)", "model.network.config"),
)
_PLANNED: Sequence[Row] = (
    *_MODEL,
    (r"model\.lora\..+", "model.trainable=lora"),
    (r"model\.lora\.targets", f"model.parts={_TRAINED}"),
    (r"model\.lora\.encoder_targets", f"model.parts!={_TRAINED}"),
    (r"model\.reference", "model.trainable=full"),
    (r"objective\.truncation_steps", "objective.truncation_range=null"),
    (r"objective\.latent_noise", "objective.decoder_only"),
    (r"objective\.cfg_gradient", "sampler.guidance_scale>1"),
    (r"sampler\.(guidance_interval|negative_prompt)", "sampler.guidance_scale>1"),
    (r"sampler\.training_(steps|spacing)", _READS_PROMPTS),
    (r"objective\.steps", "objective.path!=lagrange"),
    (r"objective\.(active_steps|late_bias|listed)", "objective.path!=lagrange"),
    (r"objective\.(active_steps|stacked_steps)", "objective.path!=leap"),
    (r"objective\.active_steps", "objective.steps!=all|listed"),
    (r"objective\.late_bias", "objective.steps=late"),
    (r"objective\.listed", "objective.steps=listed"),
    (r"objective\.(weights|weight_scale|gain)", "objective.path=sum"),
    (r"objective\.(nested|distance_floor)", "objective.path!=sum"),
    (r"objective\.data_coeff", _READS_PROMPTS),
    (r"objective\.supports", "objective.path=lagrange"),
    (r"objective\.kl_form", "objective.kl_coeff>0"),
    (r"objective\.logit_(mean|std)", "objective.timesteps=logit_normal"),
    (r"objective\.snr_gamma", "objective.weighting=min_snr"),
    (r"reward\.(parts\..+\.)?gradient_checkpointing", "objective!=supervised|dpo"),
    (
        r"reward\.(standardise|gradients|(parts\..+\.)?crop)",
        "objective=draft|direct|adjoint_matching|direct_align",
    ),
    (
        r"validation\.rewards\.(.+\.)?(gradient_checkpointing|crop)",
        "never: validation takes no gradient",
    ),
    (r"training\.ema_(every_steps|on_cpu)", "training.ema_decay!=null"),
    (r"training\.target_reward", "reward!=none"),
    (r"training\.target_reward|guard\..+", "validation.every_steps"),
    (r"training\.shard_size", "training.strategy=hsdp"),
    (r"training\.sharded_checkpoints", "training.strategy=fsdp|hsdp"),
    (r"optimizer\.path", "optimizer.kind=own"),
    (r"optimizer\.(betas|eps)", "optimizer.kind=adamw|adamw_8bit|muon|prodigy"),
    (r"optimizer\.weight_decay", "optimizer.kind!=own"),
)
_DATA: Sequence[Row] = (
    (r"data\.(prompts|column|shuffle|buffer)", _READS_PROMPTS),
    (r"data\.(column|shuffle|buffer)", "data.prompts"),
    (r"data\.buffer", "data.shuffle"),
    (r"data\.(images|shards)\..+", _READS_IMAGES),
    (rf"data\.images\.({_SHARED}|caption_lines|cache)", _IMAGES),
    (r"data\.images\.cache", "data.images.crop=center"),
    (rf"data\.shards\.({_SHARED}|buffer|cache_dir|cache_gb)", _SHARDS),
    (r"data\.images\.(base_path|image_column|caption_column|repeats)", "data.images.path"),
    (r"data\.shards\.(selection|repeats)", "data.shards.path"),
    (r"data\.pairs\..+", _READS_PAIRS),
    (r"data\.pairs\.(?!path).+", "data.pairs.path"),
    (r"data\.pairs\.prefetch", "data.pairs.workers"),
    (r"data\.pairs\.buffer", "data.pairs.shuffle"),
    (r"data\.pairs\.cache", "data.pairs.crop=center"),
    (r"data\.images\.weight", _ALONE.format("images")),
    (r"data\.shards\.weight", _ALONE.format("shards")),
    (r"data\.images\.prefetch", "data.images.workers"),
    (r"data\.shards\.prefetch", "data.shards.workers"),
    (r"data\.shards\.buffer", "data.shards.shuffle"),
    (r"data\.verify", _SHARDS),
    (r"data\.verify", "data.shards.cached=false"),
    (r"validation\.column", "validation.prompts"),
    (r"validation\.gauges", "reward!=none"),
    (r"validation\.images\..+", "objective=supervised|autoencoder"),
    (r"validation\.pairs\..+", "objective=dpo|reward_pairs"),
    (r"validation\.loss_images", "objective=supervised|dpo|reward_pairs|autoencoder"),
    (r"validation\.pairs\.(?!path).+", "validation.pairs.path"),
    (r"validation\.pairs\.(cache|crop|flip|shuffle|buffer|workers|prefetch)", _IN_ORDER),
    (r"validation\.images\.(cache|crop|flip|captions|buckets|shuffle|workers|prefetch)", _IN_ORDER),
    (r"validation\.images\.(sources\..+\.)?(repeats|weight)", _IN_ORDER),
    (
        r"validation\.images\.(base_path|image_column|caption_column)",
        "validation.images.path",
    ),
    (
        r"validation\.images\.(caption_lines|min_size|max_pixels)",
        "validation.images.path|validation.images.sources",
    ),
    (
        r"validation\.images\.caption_lines=random",
        "never: a held-out picture has one caption, its first line",
    ),
)
# What is of text-to-image models alone: others are trained on pictures of one size and make none.
_OF_MODELS = re.compile(
    r"model\.(?!pretrained).+|model\.pretrained=(?!null$).+|sampler\.(?!height|width).+|"
    r"training\.(compile|target_reward)|validation\.(prompts|column|num_images|seed|gauges)|"
    r"data\.pairs\.cache"
)
_PREPARED: Sequence[Row] = (
    *_MODEL,
    ("ray", "engine=ray"),
    (r"download\.(?!table|columns).+", "download.table"),
    (r"pack\.(base_path|image_column)", "pack.path"),
    (r"pack\.(repeats|weight)", "never: each picture is packed once"),
    (r"model\.(trainable|parts|reference|dtype|merge\..+|lora\..+)", _ENCODERS),
    (r"model\.(gradient_checkpointing|channels_last)", _ENCODERS),
    (r"model\.network\.(from_pretrained|from_NeMo|ema)", _ENCODERS),
)
READ: Mapping[str, Sequence[Row]] = {
    "train": (*_PLANNED, *_DATA),
    "plan": _PLANNED,
    "sample": (
        (r"step|schedule|allow_changed|model\.(?!variant).+", "run"),
        ("column", "prompts"),
        (r"sampler\.solver", "sampler.scheduler=null"),
    ),
    "evaluate": (
        ("column", "prompts"),
        ("metric_features", "metrics"),
        ("metric_clip", "metrics=cmmd|clip_score"),
        ("reference", "metrics=fid|kid|cmmd|precision_recall"),
        (
            r"(reward|validation\.rewards)\.(.+\.)?(gradient_checkpointing|crop)",
            "never: evaluation takes no gradient",
        ),
    ),
    "prepare": _PREPARED,
    "launch": (),
}


def refuse_unread(settings: Any, overrides: Sequence[str]) -> None:
    """Refuse what was typed and has no effect beside the other settings.

    Args:
        overrides: as typed, KEY=VALUE. What a recipe sets in vain is not refused: see `unread`.

    Raises:
        ValueError: naming the setting, its value and the reason.
    """
    if isinstance(settings, TrainConfig):
        check_allowed(settings.allow_changed, settings)
    found, typed = unread(settings), typed_keys(overrides)
    for key in (key for key in typed if key not in CHOICES):
        for name, (value, why, advice) in found.items():
            if f"{name}.".startswith(f"{key}."):
                raise ValueError(f"{name}={shown(value)} has no effect {why}; leave it out{advice}")
    for key in (key for key, text in zip(typed, overrides, strict=True) if text.endswith("={}")):
        if find_slot(_command(settings), key).rule.entries and (
            names := _untyped_names(settings, key, typed)
        ):
            out = " ".join(f"{name}=null" for name in names)
            raise ValueError(f"{key}={{}} takes nothing out of {key}; leave out by name: {out}")


def _untyped_names(settings: Any, section: str, typed: Sequence[str]) -> list[str]:
    """Return the keys of a dictionary's entries that only a recipe names."""
    leaves = [key for key, _, _ in leaves_of(settings) if key.startswith(f"{section}.")]
    parts = section.count(".") + 2
    names = dict.fromkeys(".".join(key.split(".")[:parts]) for key in leaves)
    return [name for name in names if not any(f"{key}.".startswith(f"{name}.") for key in typed)]


def unread(settings: Any) -> dict[str, tuple[Any, str, str]]:
    """Return the settings that are not as by default and are not read.

    Returns:
        Value, reason and further advice by key.
    """
    found = {}
    for key, value, default in leaves_of(settings):
        if value != default and (reason := why_unread(settings, key)) is not None:
            found[key] = (value, *reason)
    return found


def why_unread(settings: Any, key: str) -> tuple[str, str] | None:
    """Return why a setting is not read, and further advice; None if it is read.

    A script that brings objective=own may read any setting.
    """
    if isinstance(settings, TrainConfig) and isinstance(settings.objective, OwnConfig):
        return None
    command, value = _command(settings), shown(_value(settings, key))
    vain = any(_OF_MODELS.fullmatch(text) for text in (key, f"{key}={value}"))
    if vain and isinstance(settings, TrainConfig) and settings.objective.trains != "model":
        objective = settings.objective
        return f"with objective={objective.kind}, which trains no model but {objective.trains}s", ""
    conditions = [*conditions_of(command, key), *conditions_of(command, f"{key}={value}")]
    broken = (_broken(settings, condition) for condition in conditions)
    return next((reason for reason in broken if reason is not None), None)


def conditions_of(command: str, key: str) -> list[str]:
    """Return the conditions under which a command reads a setting; none for always."""
    return [condition for pattern, condition in READ[command] if re.fullmatch(pattern, key)]


def named_files(settings: TrainConfig) -> dict[str, str]:
    """Return the paths of files whose content counts, by the keys of their settings.

    A reward that reads one file of a folder has the pattern FOLDER/NAME.* there.
    """
    named = {key: value for key, value, _ in leaves_of(settings) if is_path(key, value)}
    held_out = settings.validation.rewards.items()
    rewards = {f"validation.rewards.{name}": reward for name, reward in held_out}
    for room, reward in (rewards_of(settings.reward) | rewards).items():
        path = named.get(f"{room}.pretrained")
        if path and reward.file and not Path(path).expanduser().is_file():
            named[f"{room}.pretrained"] = f"{path}/{reward.file}{ANY}"
    return named


def is_own(key: str) -> bool:
    """Say whether a setting names code of the user's, or the scorer of a reward."""
    room, _, name = key.rpartition(".")
    rooms = ("reward.", "validation.rewards.", "optimizer.")
    return name in OWN and f"{room}.".startswith(rooms)


def is_path(key: str, value: object) -> bool:
    """Say whether a setting names files whose content counts."""
    room, _, name = key.rpartition(".")
    if not (isinstance(value, str) and value) or key.startswith("data.shards"):
        return False
    if key in (
        *STARTS,
        "model.network.config",
        "objective.start",
        "data.prompts",
        "validation.prompts",
    ):
        return True
    if is_own(key):
        return True
    if room.startswith(("model", "reward", "validation.rewards.")):
        return name in _MODELS or (room.startswith("model.merge.") and name == "path")
    rooms = ("data.images", "data.pairs", "validation.images", "validation.pairs")
    return name == "path" and room.startswith(rooms)


def check_allowed(allowed: Sequence[str], settings: TrainConfig) -> None:
    """Refuse keys in `allow_changed` that name no files in a run's settings.

    Raises:
        ValueError: naming the key, and those that name files.
    """
    named = named_files(settings)
    for key in allowed:
        if key not in named:
            raise ValueError(
                f"allow_changed has {key!r}, by which the settings of the run name no files; "
                f"choose among {', '.join(named)}"
            )


def typed_keys(overrides: Sequence[str]) -> list[str]:
    """Return the keys of overrides KEY=VALUE."""
    return [text.partition("=")[0].lstrip("+~") for text in overrides]


def shown(value: Any) -> str:
    """Return a value as it is typed."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list():
            return f"[{', '.join(map(shown, value))}]"
        case _:
            return str(value)


def check_sample(config: SampleConfig) -> None:
    """Refuse settings that name no model, no prompt or no schedule, before anything is read.

    Raises:
        ValueError: saying what to give.
    """
    from sfumato.diffusion.guidance import annealed_weights

    if (config.run is None) == (config.pretrained is None):
        raise ValueError("give either run=FOLDER or pretrained=MODEL")
    for key, (value, why, _) in unread(config).items():
        raise ValueError(f"{key}={shown(value)} has no effect {why}; leave it out")
    if config.step is not None and not re.fullmatch(r"best|\d{1,12}", config.step):
        raise ValueError(f"step={config.step} is no checkpoint; give its number, or step=best")
    if (config.prompt is None) == (config.prompts is None):
        raise ValueError('give prompt="..." or prompts=FILE, one of the two')
    annealed_weights(config.schedule, 1)


def leaves_of(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield key, value and default of all settings in a dataclass."""
    for item in fields(node):
        key, value = f"{prefix}{item.name}", vars(node)[item.name]
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if isinstance(node, WeightedPartConfig) and is_dataclass(value):
            yield from leaves_of(value, prefix)
        elif is_dataclass(value):
            yield from leaves_of(value, f"{key}.")
        elif isinstance(value, dict):
            for name, each in value.items():
                inner = f"{key}.{name}"
                yield from (
                    leaves_of(each, f"{inner}.") if is_dataclass(each) else ((inner, each, None),)
                )
        else:
            yield key, value, default


def _broken(settings: Any, condition: str) -> tuple[str, str] | None:
    """Return why a condition does not hold, and what would mend it; None if it holds."""
    if condition.startswith("never: "):
        return f"({condition.removeprefix('never: ')})", ""
    match = re.fullmatch(r"([^=!>]+)(?:(!=|=|>)(.+))?", condition)
    assert match is not None, condition
    keys, how, wanted = match[1].split("|"), match[2], str(match[3]).split("|")
    value = _value(settings, keys[0])
    now, texts = f"with {keys[0]}={shown(value)}", [shown(each) for each in _listed(value)]
    if how is None:
        if any(_value(settings, key) for key in keys):
            return None
        if instead := _INSTEAD.get(keys[0]):
            return f"with objective={settings.objective.kind}", f", or set {instead}"
        given = " or ".join(keys)
        if isinstance(value, bool | int):
            return now, f", or set {keys[0]}"
        return f"without {given}", f", or give {given}"
    if how == ">":
        return None if value > float(match[3]) else (now, f", or set {keys[0]} above {match[3]}")
    if how == "=":
        return None if {*texts} & {*wanted} else (now, f", or set {keys[0]}={wanted[0]}")
    return None if {*texts} - {*wanted} else (now, f", or give another {keys[0]}")


def _command(settings: Any) -> str:
    return next(name for name, kind in COMMANDS.items() if type(settings) is kind)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _value(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = getattr(settings, name, None) if is_dataclass(settings) else None
    return vars(settings).get("kind") if is_dataclass(settings) else settings
