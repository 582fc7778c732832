"""Completeness of a job: whether it has left all results that it promises."""

from pathlib import Path

from sfumato.config import PrepareConfig, TrainConfig
from sfumato.data.prepared.folder import CACHE, INDEX, PreparedFolder
from sfumato.files import read_object
from sfumato.launch.jobs import Job
from sfumato.training.checkpoint import (
    CheckpointError,
    fingerprint,
    guards_of,
    list_checkpoints,
    step_of,
)
from sfumato.training.folder import RunFolder
from sfumato.training.guards import Guards


def is_complete(job: Job, code: int, asked: bool) -> bool:
    """Return whether a job that has ended is complete.

    Args:
        code: its exit code.
        asked: whether a signal asked it to stop. torchrun then exits with 1 even if training had
            just exported; only the results tell.
    """
    trusted = code == 0 or (asked and job.command == "train")
    return trusted and what_is_missing(job) is None


def what_is_missing(job: Job) -> str | None:
    """Name a result that a job has not made yet; None if it has made all."""
    match job.settings:
        case TrainConfig() as config:
            return _missing_of_run(config)
        case PrepareConfig(stages=stages) if "index" in stages:
            assert job.out
            return _missing_of_index(job.out)
        case _:
            return f"{job.out} does not exist" if job.out and not job.out.exists() else None


def _ended_by(config: TrainConfig, checkpoint: Path) -> str | None:
    """Return the action of the guard that ended a run; training itself says what is damaged."""
    guards = Guards(config)
    try:
        guards.restore(guards_of(checkpoint))
    except CheckpointError:
        return None
    return guards.verdict.action if guards.verdict else None


def _missing_of_run(config: TrainConfig) -> str | None:
    """A run is complete with the checkpoint of its last step and an export made after it.

    A guard that goes back, or a reward that was to be reached, makes an earlier step the last.
    """
    folder = RunFolder(Path(config.runs_dir) / config.name)
    checkpoints = list_checkpoints(folder.checkpoints)
    step, last = step_of(checkpoints[-1]) if checkpoints else 0, config.training.max_steps
    action = _ended_by(config, checkpoints[-1]) if checkpoints else None
    if step < last and action not in ("rollback", "reach"):
        return f"{folder.path} is at step {step} of {last}"
    note = folder.path / "export.json"
    if not note.exists() or not folder.export.exists():
        return f"{folder.path} is not exported"
    source = read_object(note, "remove it and run the same command again").get("checkpoint")
    alone = config.export == "last" and action != "rollback"
    sources = checkpoints[-1:] if alone else checkpoints
    if source not in map(fingerprint, sources):
        return f"{folder.path} is exported from another checkpoint"
    return None


def _missing_of_index(folder: Path) -> str | None:
    if not (folder / INDEX).exists():
        return f"{folder} has no {INDEX}"
    caches = PreparedFolder(folder).index().caches
    name = next((name for name in caches if not (folder / CACHE / name).exists()), None)
    return None if name is None else f"{folder} lost its cache {name}"
