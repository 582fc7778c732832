"""Upload an export to the Hugging Face hub: weights, settings of networks and a model card."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.card import CARD, HUB_ID, MARKS, hub_id, licence_of, model_card
from sfumato.compose import load_settings
from sfumato.config import TrainConfig
from sfumato.evaluation.results import Evaluation, read_evaluations
from sfumato.files import lock
from sfumato.hub import upload
from sfumato.records import Count, read_record
from sfumato.run.export import NOTE
from sfumato.training.folder import RunFolder

PUBLIC = (".safetensors", ".json", ".txt", ".model", ".jinja")  # suffixes of what is uploaded
ORIGINS = ("_name_or_path", "name_or_path", "base_model_name_or_path")  # paths of who trained


@dataclass(frozen=True)
class _Note:
    """What is read of export.json."""

    step: Count
    checkpoint: str


def push(
    run: Path,
    repo: str,
    *,
    export: str | None = None,
    public: bool = False,
    base_model: str | None = None,
) -> str:
    """Upload the LoRA or the pipeline of a run, and return the address.

    Optimiser state, checkpoints, samples, prompts and paths of this machine stay here.

    Args:
        repo: USER/NAME, which is made if it is not there.
        export: lora or pipeline; None is the LoRA if there is one.
        public: whether all may see a repository that is made; an existing one stays as it is.
        base_model: hub id; None is `model.pretrained` if that is one.

    Raises:
        ValueError: if there is nothing to upload, or the hub refuses it, saying what to do.
    """
    for key, value in {"--repo": repo, "--base-model": base_model}.items():
        if value is not None and not HUB_ID.fullmatch(value):
            raise ValueError(f"{key}={value!r} is no hub id; give USER/NAME")
    folder = RunFolder(run)
    config = load_settings(folder.config)
    busy = f"another process is training in {run}; push when it has ended"
    with lock(run, busy=busy, unmade="give a run folder that you may write to"):
        name = _chosen(folder, config, export)
        step, checkpoint = _exported(folder)
        base = base_model or hub_id(config.model.pretrained)
        files = dict(_files(folder.export / name, base))
        card = model_card(
            config,
            name,
            step,
            repo=repo,
            base=base,
            licence=licence_of(base_model or config.model.pretrained),
            figures=_figures(read_evaluations(folder), step, checkpoint),
        )
        files[CARD] = card.encode()
        return upload(repo, files, public=public, message=f"{name} of step {step}, by Sfumato")


def _chosen(folder: RunFolder, config: TrainConfig, export: str | None) -> str:
    """Return the name of the export to upload."""
    if config.objective.trains != "model":
        raise ValueError(
            f"{folder.path} has objective={config.objective.kind}, which trains no text-to-image "
            "model; push uploads the LoRA or the pipeline of one"
        )
    if not (folder.path / NOTE).is_file() or not folder.export.is_dir():
        raise ValueError(
            f"{folder.path} has no finished export: a run writes it at its last step; run the same "
            "`sfumato train` command again"
        )
    there = [name for name, mark in MARKS.items() if (folder.export / name / mark).is_file()]
    chosen = export or next(iter(there), "lora")
    if chosen not in there:
        raise ValueError(
            f"{folder.export} has no {chosen} for diffusers; it has {', '.join(there) or 'nothing'}"
        )
    return chosen


def _exported(folder: RunFolder) -> tuple[int, str]:
    """Return the step and the fingerprint of the checkpoint that was exported."""
    advice = "run the same `sfumato train` command again"
    note = read_record(folder.path / NOTE, _Note, advice)
    return note.step, note.checkpoint


def _files(folder: Path, base: str | None) -> Iterator[tuple[str, Path | bytes]]:
    """Yield what is uploaded by its path in the repository; links lead elsewhere and stay out."""
    for file in sorted(folder.rglob("*")):
        inside = [file, *file.parents][: len(file.relative_to(folder).parts)]
        if not file.is_file() or any(each.is_symlink() for each in inside):
            continue
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".json":
            yield name, _cleaned(file, base)
        elif file.suffix in PUBLIC:
            yield name, file


def _cleaned(file: Path, base: str | None) -> Path | bytes:
    """Return a JSON file, without the paths from which networks were loaded."""
    text = file.read_text(encoding="utf-8")
    if not any(f'"{key}"' in text for key in ORIGINS):
        return file

    def clean(node: Any) -> Any:
        if isinstance(node, dict):
            own = {k: v for k, v in node.items() if k not in ORIGINS or v == base}
            return {key: clean(value) for key, value in own.items()}
        return [clean(each) for each in node] if isinstance(node, list) else node

    return (json.dumps(clean(json.loads(text)), indent=2) + "\n").encode()


def _figures(evaluations: Sequence[Evaluation], step: int, checkpoint: str) -> list[list[str]]:
    """Return rows of the base model's numbers and those of the exported checkpoint, or none."""
    known = {0: None, step: checkpoint}
    found = {e.step: e for e in evaluations if known.get(e.step, "") == e.checkpoint}
    if step not in found:
        return []
    rows = [["", *("base model" if each == 0 else f"step {each}" for each in sorted(found))]]
    shown = [_numbers(found[each]) for each in sorted(found)]
    return rows + [[name, *(each.get(name, "") for each in shown)] for name in shown[-1]]


def _numbers(one: Evaluation) -> dict[str, str]:
    reward = {} if one.reward is None else {"reward": f"{one.reward:.4g} ± {one.reward_error:.2g}"}
    measured = {one.diversity_label: one.diversity, **one.held_out}
    measured |= {name: metric.value for name, metric in one.metrics.items()}
    plain = {re.sub(r"[|`\n]", " ", name): f"{value:.4g}" for name, value in measured.items()}
    return reward | plain
