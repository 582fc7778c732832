"""Saved settings of a run: config.yaml, read, flattened and compared with new settings."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfumato.config.train import MISSING, TrainConfig
from sfumato.files import write_text

# Settings that may differ in a resumed run: they change how it runs and ends, not its results.
MAY_CHANGE = (
    "training.max_steps",
    "training.max_time",
    "training.checkpoint_every_steps",
    "training.keep_checkpoints",
    "training.micro_batch_size",
    "training.strategy",
    "training.shard_size",
    "training.compile",
    "training.async_checkpoints",
    "training.ema_on_cpu",
    "training.peak_tflops",
    "training.tensorboard",
    "training.wandb_project",
    "model.gradient_checkpointing",
    "model.channels_last",
    "reward.gradient_checkpointing",
    "verify",
    "export",
    "allow_changed",
    "runs_dir",
    "data.images.workers",
    "data.images.prefetch",
    "data.shards.workers",
    "data.shards.prefetch",
)


def read_saved(run: Path, advice: str) -> dict[str, Any]:
    """Return the content of a run folder's config.yaml.

    Raises:
        ValueError: if the file is missing or damaged; with the advice.
    """
    import yaml

    file = run / "config.yaml"
    if not file.exists():
        raise ValueError(f"{run} is no run folder: it has no {file.name}; {advice}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: it is not YAML ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} is damaged: it holds {type(content).__name__}, not settings; {advice}"
        )
    return content


def write_saved(run: Path, settings: Mapping[str, Any]) -> None:
    """Write settings, as plain data, to a run folder's config.yaml."""
    import yaml

    write_text(run / "config.yaml", yaml.safe_dump(settings, sort_keys=False))


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def differences(saved: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return the flat settings that forbid to resume, as `saved -> new`.

    What an earlier version did not save has its default. `training.max_steps` may differ unless
    the learning rate falls towards it.
    """
    defaults = {key: value for key, value in flatten(asdict(TrainConfig())).items() if key in new}
    before = {key: value for key, value in defaults.items() if value != MISSING} | dict(saved)
    stretched = new.get("optimizer.schedule") in ("linear", "cosine")
    return {
        key: f"{before.get(key)} -> {new.get(key)}"
        for key in sorted({*before, *new})
        if before.get(key) != new.get(key)
        and (key not in MAY_CHANGE or (stretched and key == "training.max_steps"))
    }
