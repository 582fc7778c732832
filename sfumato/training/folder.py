"""Run folder: the only interface between training, evaluation and report."""

import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import sfumato
from sfumato.config import TrainConfig
from sfumato.files import parse_object, read_object, write_text

LIBRARIES = ("torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside runs/NAME."""

    path: Path

    @classmethod
    def of(cls, config: TrainConfig) -> "RunFolder":
        """Return the folder of a run with these settings."""
        return cls(Path(config.runs_dir) / config.name)

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

    def evaluation(self, step: int, variant: str = "") -> Path:
        return self.path / "evaluation" / variant / step_name(step)

    def describe(self, command: str, facts: dict[str, Any]) -> None:
        """Append to run.json the command, the versions, the device and other facts of a start."""
        file = self.path / "run.json"
        advice = "remove it and run the same command again"
        starts = read_object(file, advice).get("starts", []) if file.exists() else []
        if not isinstance(starts, list):
            raise ValueError(f"{file} is damaged: starts is no list; {advice}")
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
        write_text(file, json.dumps({"starts": starts}, indent=2) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file, without damaged lines (a kill may cut the last)."""
    rows = map(parse_object, path.read_bytes().splitlines())
    return [row for row in rows if row is not None]


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the text of a JSON Lines file."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def step_name(step: int) -> str:
    """Return the folder name of a step."""
    return f"step-{step:06d}"


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
