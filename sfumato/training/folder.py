"""The run folder: the only interface between training, evaluation and report."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import sfumato

LIBRARIES = ("torch", "diffusers", "transformers", "peft")

# What may differ when a run is taken up again: it changes when a run ends and what is kept of it.
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
    "runs_dir",
    "data.images.workers",
    "data.images.prefetch",
    "data.shards.workers",
    "data.shards.prefetch",
)


@dataclass(frozen=True)
class RunFolder:
    """The places inside runs/NAME."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def samples(self, step: int) -> Path:
        return self.path / "samples" / step_name(step)

    def evaluation(self, step: int) -> Path:
        return self.path / "evaluation" / step_name(step)

    def describe(self, command: str, facts: dict[str, Any]) -> None:
        """Append to run.json what ran, with which versions, on what."""
        file = self.path / "run.json"
        starts = read_note(file).get("starts", []) if file.exists() else []
        if not isinstance(starts, list):
            raise ValueError(f"{file} is damaged; remove it and run the same command again")
        starts.append(
            {
                "command": command,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "sfumato": sfumato.__version__,
                "commit": _commit(),
                "python": platform.python_version(),
                **{name: version(name) for name in LIBRARIES},
                "platform": platform.platform(),
                "device": _device_name(),
                **facts,
            }
        )
        replace_text(file, json.dumps({"starts": starts}, indent=2) + "\n")


def replace_text(file: Path, text: str) -> None:
    """Write a file so that a kill or a full disk leaves the old content or the new."""
    beside = file.with_name(f".{file.name}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """Give a folder to fill, which then takes `place`; whoever fails leaves `place` as it was."""
    for stale in place.parent.glob(f".{place.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    beside, old = (place.with_name(f".{place.name}.tmp-{os.getpid()}{end}") for end in ("", "-old"))
    try:
        beside.mkdir(parents=True)
        yield beside
        if place.exists():
            place.rename(old)
        beside.rename(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def read_note(file: Path) -> dict[str, Any]:
    """Return one of the run folder's JSON notes.

    Raises:
        ValueError: naming the file, if it holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged; remove it and run the same command again")
    return content


def step_name(step: int) -> str:
    """Return the folder name of a step."""
    return f"step-{step:06d}"


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the keys whose values differ, as `old -> new`, leaving out those that may."""
    found: dict[str, str] = {}
    for key in sorted({*old, *new}):
        name = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= differences(before, after, f"{name}.")
        elif before != after and name not in MAY_CHANGE:
            found[name] = f"{before} -> {after}"
    return found


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def _commit() -> str | None:
    here = Path(sys.modules[__name__].__file__ or ".").parent
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return result.stdout.strip() or None
