"""Saved settings of a run: config.yaml, read, flattened and compared with new settings."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sfumato.config.train import MISSING
from sfumato.files import read_bytes, write_text

# Bounds of a config.yaml, far above those of any run: it may come from a stranger.
_LARGEST = 2**22  # bytes
_SHOWN = 40  # characters of a key in messages
_DEEPEST, _MOST = 32, 50_000  # levels, and values with those that aliases repeat

# Settings that may differ in a resumed run: its weights and measures do not depend on them.
MAY_CHANGE = (
    *(
        "runs_dir",
        "export",
        "verify",
        "allow_changed",
        "guard",
        "validation.every_steps",
        "validation.gauges",
        "objective.visits_on_cpu",
        "objective.rollout_batch_size",
    ),
    *("training.max_steps", "training.max_time", "training.micro_batch_size"),
    "training.target_reward",
    *("training.checkpoint_every_steps", "training.keep_checkpoints"),
    *("training.async_checkpoints", "training.ema_on_cpu", "training.peak_tflops"),
    "training.sharded_checkpoints",
    *("training.strategy", "training.shard_size", "training.compile"),
    *("training.tensorboard", "training.wandb_project"),
    *("model.gradient_checkpointing", "reward.gradient_checkpointing", "model.channels_last"),
    *("reward.timeout", "reward.cache"),
    *("data.images.workers", "data.images.prefetch"),
    *("data.shards.workers", "data.shards.prefetch", "data.verify", "model.allow_pickle"),
    # Of prepared data the samples count, wherever they lie: a checkpoint has a hash of them.
    *("data.shards.path", "data.shards.cache_dir", "data.shards.cache_gb"),
)


class _Bounded(yaml.SafeLoader):
    """Loader that stops at texts that are deeper or, with their aliases, larger than settings."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._count = 0
        self._sizes: dict[str, int] = {}  # of what each anchor names

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node as YAML does, and count it; an alias counts as all that it repeats."""
        event: Any = self.peek_event()
        before = self._count
        alias = isinstance(event, yaml.AliasEvent)
        # An alias inside its own anchor has no end.
        self._count += self._sizes.get(event.anchor, _MOST) if alias else 1
        self._depth += 1
        if self._depth > _DEEPEST or self._count > _MOST:
            raise yaml.YAMLError(
                f"it has more than {_DEEPEST} levels, or more than {_MOST:,} values with those "
                "that aliases repeat"
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None and not alias:
            self._sizes[event.anchor] = self._count - before
        return node

    def construct_yaml_int(self, node: Any) -> int:
        """Return a whole number; refuse one that no setting can hold."""
        value = super().construct_yaml_int(node)
        if not -(2**63) <= value < 2**64:
            raise yaml.YAMLError(f"a whole number has {value.bit_length()} bits")
        return value


_Bounded.add_constructor("tag:yaml.org,2002:int", _Bounded.construct_yaml_int)


def read_saved(run: Path, advice: str) -> dict[str, Any]:
    """Return the content of a run folder's config.yaml.

    Raises:
        ValueError: if the file is missing or damaged; with the advice.
    """
    file = run / "config.yaml"
    if not file.exists():
        raise ValueError(f"{run} is no run folder: it has no {file.name}; {advice}")
    return read_yaml(file, advice)


def read_yaml(file: Path, advice: str) -> dict[str, Any]:
    """Return the mapping in a YAML file, which may come from a stranger.

    Raises:
        ValueError: if the file is missing or damaged, or holds something else; with the advice.
    """
    text = read_bytes(file, advice, most=_LARGEST)
    try:
        content = yaml.load(text.decode("utf-8"), _Bounded)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is damaged: it is not YAML ({reason}); {advice}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} is damaged: it holds {type(content).__name__}, not settings; {advice}"
        )
    return content


def write_saved(run: Path, settings: Mapping[str, Any]) -> None:
    """Write settings, as plain data, to a run folder's config.yaml."""
    write_text(run / "config.yaml", yaml.safe_dump(settings, sort_keys=False))


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted keys."""
    if prefix.count(".") > _DEEPEST:
        raise ValueError(f"settings at {prefix[:_SHOWN]}... have more than {_DEEPEST} levels")
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def differences(
    saved: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, str]:
    """Return the flat settings that forbid to resume, as `saved -> new`.

    What was not saved, or not given, has its default. `training.max_steps` may differ unless the
    learning rate falls towards it.
    """
    # Every part of a reward is saved with its kind: one without is not there.
    known = {k: v for k, v in defaults.items() if v != MISSING and not _names_a_part(k)}
    before, now = known | dict(saved), known | dict(new)
    stretched = new.get("optimizer.schedule") in ("linear", "cosine")
    return {
        key: f"{before.get(key)} -> {now.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
        and (not _may_change(key) or (stretched and key == "training.max_steps"))
    }


def _names_a_part(key: str) -> bool:
    return key.endswith(".kind") and key != "optimizer.kind"


def _may_change(key: str) -> bool:
    """Say whether a setting may differ in a resumed run; parts and held-out rewards are rewards."""
    key = re.sub(r"^guard\..+", "guard", key)
    key = re.sub(r"^data\.shards\.sources\..+\.path$", "data.shards.path", key)
    return re.sub(r"^(reward\.parts|validation\.rewards)\..+\.", "reward.", key) in MAY_CHANGE
