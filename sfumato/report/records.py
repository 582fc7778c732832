"""Run records: settings, starts, metrics and evaluations of run folders that can be compared."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sfumato.config.saved import read_saved
from sfumato.data.entries import is_utf8
from sfumato.evaluation.manifest import check_alike, difference
from sfumato.evaluation.results import (
    SCORES,
    SUMMARY,
    Evaluation,
    Variant,
    read_evaluations,
    read_variants,
)
from sfumato.files import parse_object, read_bytes
from sfumato.records import Count, Finite, convert, read_record, read_rows
from sfumato.training.checkpoint import list_checkpoints
from sfumato.training.folder import RunFolder

_RESTORE = "restore the file that the run wrote"
_GUIDANCE = "sampler.guidance_scale"
_LARGEST, _SHOWN = 1e100, 80  # of a metric; characters of a value in messages
NAMES = {
    "own": "Custom objective",
    "direct": "Direct gradients",
    "adjoint_matching": "Adjoint Matching",
    "direct_align": "Direct-Align",
    "policy_gradient": "Policy gradient",
    "nft": "DiffusionNFT",
    "awm": "Advantage-weighted matching",
}


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        settings: config.yaml.
        starts: from run.json, oldest first.
        metrics: rows of metrics.jsonl.
        lost: numbers of the lines of metrics.jsonl that are no such row.
        evaluations: in the order of steps; all have the same settings.
        variants: checkpoints sampled in other ways; guidance apart, settings are those too.
        unlike: names of variants with other settings; they are left out.
    """

    name: str
    folder: RunFolder
    settings: Mapping[str, Any]
    starts: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, int | float]]
    lost: Sequence[int]
    evaluations: Sequence[Evaluation]
    variants: Sequence[Evaluation] = ()
    unlike: Sequence[str] = ()

    def setting(self, *keys: str) -> Any:
        """Return a setting by its path of keys, or None without it."""
        value: Any = self.settings
        for key in keys:
            value = (value or {}).get(key)
        return value

    @property
    def kl_coeff(self) -> float | None:
        return self.setting("objective", "kl_coeff")

    @property
    def supervised(self) -> bool:
        return self.setting("objective", "kind") == "supervised"

    @property
    def scored(self) -> bool:
        """Say whether the run has a reward, to train on or to measure."""
        return self.setting("reward", "kind") != "none"

    @property
    def objective(self) -> str:
        """Name the objective as papers do."""
        if self.supervised:
            lora = f"LoRA rank {self.setting('model', 'lora', 'rank')}"
            trained = {"lora": lora, "full": "all weights"}.get(self.setting("model", "trainable"))
            return f"Supervised, {trained}" if trained else "Supervised"
        kind = self.setting("objective", "kind")
        if kind == "dpo":
            return f"Diffusion-DPO, beta {self.setting('objective', 'beta'):g}"
        if kind in NAMES:
            name = NAMES[kind]
            return f"{name}, kl_coeff {self.kl_coeff:g}" if self.kl_coeff else name
        if self.kl_coeff is None:
            return "unknown"
        return f"DRaFT+, kl_coeff {self.kl_coeff:g}" if self.kl_coeff else "DRaFT"

    @property
    def steps(self) -> int:
        """Return the last step that the files of the run show."""
        logged = int(self.metrics[-1]["step"]) if self.metrics else 0
        return max([logged, *(one.step for one in self.evaluations)])

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
    """One row of scores.jsonl, or one side of a validation pair; `image` is a path."""

    prompt: str
    prompt_index: Count
    index: Count
    image: str
    reward: Finite | None = None
    held_out: dict[str, Finite] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pair:
    """One row of pairs.jsonl."""

    prompt: str
    index: Count
    reward_tuned: Finite | None = None
    reward_base: Finite | None = None


@dataclass(frozen=True)
class _Logged:
    """One row of metrics.jsonl, whose other keys are metrics."""

    step: Count


@dataclass(frozen=True)
class _Starts:
    """run.json."""

    starts: list[dict[str, Any]]


@dataclass(frozen=True)
class _Sampler:
    num_inference_steps: Count
    guidance_scale: Finite
    solver: Literal["first_order", "dpmpp_2m"] = "first_order"
    guidance_interval: list[Finite] | None = None
    negative_prompt: str | None = None
    scheduler: str | None = None


@dataclass(frozen=True)
class _Method:
    """Settings of an evaluation that the page shows."""

    sampler: _Sampler
    num_images: Count
    prompts: list[str]
    seed: int
    features: str


@dataclass(frozen=True)
class _Images:
    sources: dict[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class _Lora:
    rank: Count | None = None


@dataclass(frozen=True)
class _Section:
    """A section of config.yaml, with the settings that the page computes with."""

    kind: str | None = None
    kl_coeff: Finite | None = None
    trainable: str | None = None
    lora: _Lora | None = None
    global_batch_size: Count | None = None
    images: _Images | None = None


@dataclass(frozen=True)
class Guard:
    """A limit of a metric, as the settings name it."""

    metric: str | None = None
    limit: Finite | None = None
    relative: str = "off"


@dataclass(frozen=True)
class _Settings:
    """config.yaml; older versions wrote fewer settings."""

    objective: _Section | None = None
    reward: _Section | None = None
    model: _Section | None = None
    training: _Section | None = None
    data: _Section | None = None
    validation: _Section | None = None
    sampler: dict[str, Any] | None = None
    guard: dict[str, Guard | None] | None = None


def read_runs(runs: Sequence[RunFolder]) -> list[RunRecord]:
    """Read the run folders of a comparison.

    Raises:
        ValueError: if there is none, one cannot be read, or two were evaluated differently.
    """
    if not runs:
        raise ValueError("there are no runs to report; name at least one run folder")
    records = [_read_run(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    evaluated = [record for record in records if record.evaluations or record.variants]
    for first, second in itertools.combinations(evaluated, 2):
        a, b = ([*r.evaluations, *r.variants][0].settings for r in (first, second))
        if a.get("reward") is None or b.get("reward") is None:
            # The rewards of one run cannot be mixed up with those of the other.
            a, b = _without_reward(a), _without_reward(b)
        whole = first.evaluations and second.evaluations
        check_alike(first.name, second.name, a, b, but=() if whole else (_GUIDANCE,))
    return records


def _without_reward(settings: Mapping[str, Any]) -> dict[str, Any]:
    contents = settings.get("contents") or {}
    others = {key: value for key, value in contents.items() if not key.startswith("reward.")}
    return {**settings, "reward": None, "contents": others}


def read_scores(record: RunRecord, step: int) -> list[ShownImage]:
    """Return the images of one evaluated step.

    Raises:
        ValueError: if scores.jsonl is missing or damaged.
    """
    folder = record.folder.evaluation(step)
    rows = read_rows(folder / SCORES, ShownImage, f"remove {folder} and evaluate again")
    return [replace(row, image=str(folder / row.image)) for row in rows]


def read_pairs(folder: Path, side: Literal["tuned", "base"]) -> list[ShownImage]:
    """Return the tuned or the base images of a validation.

    Raises:
        ValueError: if pairs.jsonl is missing or damaged.
    """
    images = []
    for pair in read_rows(folder / "pairs.jsonl", _Pair, f"remove {folder}"):
        path = folder / f"{pair.index:03d}-{side}.png"
        reward = pair.reward_tuned if side == "tuned" else pair.reward_base
        images.append(ShownImage(pair.prompt, pair.index, 0, str(path), reward))
    return images


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """Return the folders' names, with their parents' names where two names are the same."""
    paths = [run.path.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise ValueError("a run folder is named twice; name each folder once")
    if len({path.name for path in paths}) < len(paths):
        return [f"{path.parent.name}/{path.name}" for path in paths]
    return [path.name for path in paths]


def _read_run(run: RunFolder, name: str) -> RunRecord:
    if not run.path.is_dir():
        raise ValueError(f"there is no run folder {run.path}; check its name")
    _refuse_links(run)
    settings = read_saved(run.path, _RESTORE)
    convert(settings, _Settings, str(run.config), _RESTORE)
    evaluations = read_evaluations(run)
    variants = [one for each in read_variants(run) for one in each if one.variant != Variant()]
    like = [one for one in variants if _is_like(one, [*evaluations, *variants][0])]
    for one in [*evaluations, *like]:
        folder = run.evaluation(one.step, one.variant.name)
        again = f"remove {folder} and evaluate again"
        convert(one.settings, _Method, f"{folder / SUMMARY} settings", again)
    for other in evaluations[1:]:
        first = evaluations[0]
        names = f"step {first.step} of {name}", f"step {other.step}"
        check_alike(*names, first.settings, other.settings)
    metrics, lost = _read_metrics(run.metrics) if run.metrics.exists() else ([], [])
    path = run.path / "run.json"
    starts = read_record(path, _Starts, "remove or correct it").starts if path.exists() else []
    unlike = [f"{one.variant.name}/step-{one.step:06d}" for one in variants if one not in like]
    return RunRecord(name, run, settings, starts, metrics, lost, evaluations, like, unlike)


def _is_like(variant: Evaluation, own: Evaluation) -> bool:
    """Say whether a variant's settings are another evaluation's, its guidance scale apart."""
    other = difference(variant.settings, own.settings, but=(_GUIDANCE,))
    return other is None and variant.diversity_label == own.diversity_label


def _refuse_links(run: RunFolder) -> None:
    """Refuse a run whose records are links to files elsewhere: a page would show those files."""
    folders = [*list_checkpoints(run.path / "samples"), *list_checkpoints(run.path / "evaluation")]
    for variant in (run.path / "evaluation").glob("[!.]*"):
        folders += list_checkpoints(variant)
    files = [file for folder in folders for file in folder.glob("*.json*")]
    for path in (run.config, run.metrics, run.path / "run.json", *files):
        if not is_inside(path, run.path):
            raise ValueError(
                f"{path} is a link that leaves the run folder; remove it, or copy the file there"
            )


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the rows of metrics.jsonl, and the numbers of the lines that are none.

    A kill may cut a line. Values that are not finite are left out, as training leaves them out.

    Raises:
        ValueError: a value is no number, or too large for one; naming file, line and key.
    """
    rows: list[dict[str, Any]] = []
    lost: list[int] = []
    for number, line in enumerate(read_bytes(path, _RESTORE).splitlines(), 1):
        row = parse_object(line)
        if row is None or "step" not in row:
            lost.append(number)
            continue
        name = f"{path} line {number}"
        if odd := [key for key in row if not is_utf8(key)]:
            raise ValueError(
                f"{name} is damaged: the key {odd[0]!r} is not UTF-8; remove the line, or "
                f"{_RESTORE}"
            )
        convert(row, _Logged, name, f"remove the line, or {_RESTORE}")
        for key, value in row.items():
            if type(value) not in (int, float) or _LARGEST < abs(value) < math.inf:
                raise ValueError(
                    f"{name} is damaged: {key} = {str(value)[:_SHOWN]!r} is no number up to "
                    f"{_LARGEST:g}; remove the line, or {_RESTORE}"
                )
        rows.append({key: value for key, value in row.items() if math.isfinite(value)})
    return rows, lost


def is_inside(path: Path, folder: Path) -> bool:
    """Say whether a path lies in a folder once all links are followed."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a link to itself; a NUL
        return False
