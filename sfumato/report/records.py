"""A run folder as the report sees it: read once, checked, with what is missing said in words."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sfumato.evaluation.results import SCORES, Evaluation, read_evaluations, read_summary
from sfumato.training.folder import RunFolder
from sfumato.training.tracking import read_metrics


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        settings: config.yaml.
        starts: from run.json, oldest first.
        metrics: rows of metrics.jsonl.
        evaluated_with: the settings that all its evaluations share; None without any.
    """

    name: str
    folder: RunFolder
    settings: Mapping[str, Any]
    starts: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, int | float]]
    evaluations: Sequence[Evaluation]
    evaluated_with: Mapping[str, Any] | None

    def setting(self, *keys: str) -> Any:
        """Return one of the settings, by the keys that lead to it; None without it."""
        found: Any = self.settings
        for key in keys:
            found = (found or {}).get(key)
        return found

    @property
    def kl_coeff(self) -> float | None:
        return self.setting("objective", "kl_coeff")

    @property
    def seed(self) -> int | None:
        return self.setting("training", "seed")

    @property
    def supervised(self) -> bool:
        return self.setting("objective", "kind") == "supervised"

    @property
    def scored(self) -> bool:
        """Say whether a reward belongs to the run, to train on or to measure by."""
        return self.setting("reward", "kind") != "none"

    @property
    def objective(self) -> str:
        """Name the objective as papers do."""
        if self.supervised:
            lora = f"LoRA rank {self.setting('model', 'lora', 'rank')}"
            trained = {"lora": lora, "full": "all weights"}.get(self.setting("model", "trainable"))
            return f"Supervised, {trained}" if trained else "Supervised"
        if self.setting("objective", "kind") == "own":
            return "An objective of one's own"
        if self.kl_coeff is None:
            return "unknown"
        return f"DRaFT+, kl_coeff {self.kl_coeff:g}" if self.kl_coeff else "DRaFT"

    @property
    def steps(self) -> int:
        """Return how far it was trained, as far as its files show."""
        logged = int(self.metrics[-1]["step"]) if self.metrics else 0
        return max([logged, *(one.step for one in self.evaluations)])

    @property
    def images_seen(self) -> int | None:
        """Return how many images supervised training took in, repeats counted."""
        batch = self.setting("training", "global_batch_size")
        return self.steps * batch if self.supervised and batch else None

    @property
    def base(self) -> Evaluation | None:
        return next((one for one in self.evaluations if one.step == 0), None)

    @property
    def final(self) -> Evaluation | None:
        """Return the last evaluation of trained weights."""
        return self.evaluations[-1] if self.evaluations and self.evaluations[-1].step else None

    def series(self, key: str) -> tuple[list[int | float], list[int | float]]:
        """Return the steps that logged a metric, and its values."""
        rows = [row for row in self.metrics if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]


@dataclass(frozen=True)
class ShownImage:
    """One row of scores.jsonl, or one side of a validation pair."""

    prompt: str
    prompt_index: int
    index: int
    reward: float | None
    file: Path


def read_runs(runs: Sequence[RunFolder]) -> list[RunRecord]:
    """Read run folders that are to be compared.

    Raises:
        ValueError: if there is none, one cannot be read, or two were evaluated differently.
    """
    if not runs:
        raise ValueError("there are no runs to report; name at least one run folder")
    records = [_read_run(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    evaluated = [record for record in records if record.evaluated_with is not None]
    for first, second in itertools.combinations(evaluated, 2):
        _compare(first, second)
    return records


def read_scores(record: RunRecord, step: int) -> list[ShownImage]:
    """Return the images of one evaluated step.

    Raises:
        ValueError: if scores.jsonl is missing or damaged.
    """
    place = record.folder.evaluation(step)
    try:
        return [
            ShownImage(
                row["prompt"],
                row["prompt_index"],
                row["index"],
                row.get("reward"),
                place / row["image"],
            )
            for row in _rows(place / SCORES)
        ]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{place / SCORES} cannot be read ({error}); remove {place} and evaluate again"
        ) from error


def differing(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in every run, with each run's value."""
    flat = [dict(_flatten(record.settings)) for record in records]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    found = {key: [settings.get(key, "–") for settings in flat] for key in keys}
    return {
        key: values
        for key, values in found.items()
        if key not in ("name", "runs_dir") and any(value != values[0] for value in values)
    }


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """Return the folders' names, with their parents' where two would be the same."""
    paths = [run.path.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise ValueError("a run folder is named twice; name each once")
    if len({path.name for path in paths}) < len(paths):
        return [f"{path.parent.name}/{path.name}" for path in paths]
    return [path.name for path in paths]


def _read_run(run: RunFolder, name: str) -> RunRecord:
    evaluations = read_evaluations(run)
    with_settings = [
        (step.step, read_summary(run.evaluation(step.step))["settings"]) for step in evaluations
    ]
    for step, settings in with_settings[1:]:
        first, expected = with_settings[0]
        _refuse(f"step {first} of {name}", f"step {step}", expected, settings)
    return RunRecord(
        name=name,
        folder=run,
        settings=_read_config(run),
        starts=_read_starts(run),
        metrics=read_metrics(run) if run.metrics.exists() else [],
        evaluations=evaluations,
        evaluated_with=with_settings[0][1] if with_settings else None,
    )


def _read_config(run: RunFolder) -> dict[str, Any]:
    if not run.path.is_dir():
        raise ValueError(f"there is no run folder {run.path}; check its name")
    if not run.config.exists():
        raise ValueError(f"{run.path} is no run folder: it has no {run.config.name}")
    try:
        settings = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{run.config} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{run.config} holds {type(settings).__name__}, not settings")
    return settings


def _read_starts(run: RunFolder) -> list[dict[str, Any]]:
    file = run.path / "run.json"
    if not file.exists():
        return []
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))["starts"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); remove it or mend it") from error


def _compare(first: RunRecord, second: RunRecord) -> None:
    assert first.evaluated_with is not None and second.evaluated_with is not None
    settings = [dict(first.evaluated_with), dict(second.evaluated_with)]
    if any(one.get("reward") is None for one in settings):
        for one in settings:  # where only one of two has rewards, there are none to be mixed up
            one.pop("reward", None)
    _refuse(first.name, second.name, *settings)


def _refuse(first: str, second: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raise ValueError where two evaluations are not of the same prompts, noise and measures."""
    left, right = dict(_flatten(a)), dict(_flatten(b))
    odd = [key for key in {**left, **right} if left.get(key) != right.get(key)]
    if odd:
        shown = f"{odd[0]}: {left.get(odd[0])} and {right.get(odd[0])}"
        raise ValueError(
            f"{first} and {second} were evaluated differently ({shown}), so that their numbers "
            "cannot be compared; evaluate both with the same settings, or report them apart"
        )


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
