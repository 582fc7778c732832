"""What is known of a launch's jobs: a file for each in runs/NAME/launch/, and the lock.

runs/NAME/launch/job-JOB.json  JobRecord
runs/NAME/launch/slurm/JOB/    submitit's folder: scripts, logs
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from sfumato.config import ShardSourceConfig, TrainConfig
from sfumato.data.prepared.format import CACHE, INDEX, read_index
from sfumato.data.prompts import expand_pattern
from sfumato.files import lock, read_object, write_text
from sfumato.launch.jobs import STARTS, Job, makes_index, value_of
from sfumato.training.checkpoint import fingerprint, list_checkpoints, step_of
from sfumato.training.folder import RunFolder


class LaunchError(ValueError):
    """A launch that cannot go on; the message says which job, and what to do."""


@dataclass(frozen=True)
class JobRecord:
    """What a job was begun with, and whether it was finished.

    Attributes:
        made_of: of the job's command and settings; see `Job`.
        after: what it starts from; see `starts_from`.
        finished: when, in UTC; None until then.
        requeues: how often the job put itself back into Slurm's queue.
    """

    made_of: str
    after: Mapping[str, str] = field(default_factory=dict)
    finished: str | None = None
    requeues: int = 0


@dataclass(frozen=True)
class LaunchFolder:
    """The places inside runs/NAME/launch."""

    path: Path

    @property
    def submitted(self) -> Path:
        return self.path / "submitted.json"

    def slurm(self, job: str) -> Path:
        return self.path / "slurm" / job

    def record(self, job: str) -> Path:
        return self.path / f"job-{job}.json"


def read_job_record(folder: LaunchFolder, name: str) -> JobRecord | None:
    """Return a job's record, or None if it never began.

    Raises:
        LaunchError: if it is damaged.
    """
    place = folder.record(name)
    if not place.exists():
        return None
    try:
        return JobRecord(**read_object(place, "remove it and run the same command again"))
    except (TypeError, ValueError) as error:
        raise LaunchError(
            f"{place} is damaged; remove it, and the job is looked at anew"
        ) from error


def write_job_record(folder: LaunchFolder, name: str, record: JobRecord) -> None:
    """Write a job's record; a kill leaves the old one or the new one."""
    folder.path.mkdir(parents=True, exist_ok=True)
    write_text(folder.record(name), json.dumps(asdict(record), indent=2) + "\n")


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def starts_from(job: Job) -> dict[str, str]:
    """Return what a job starts from, where it is there.

    Runs are known by their last checkpoint, what is prepared by its samples, and other files by
    their sizes and times.
    """
    found = {}
    if job.command == "train":
        shards = job.settings.data.shards
        for source in (shards, *shards.sources.values()):
            found |= _samples_of(source) if source.path else {}
    for key in STARTS.get(job.command, ()):
        place = value_of(job.settings, key)
        if place is not None and (state := _state_of(place)) is not None:
            found[place] = state
    return found


def _state_of(place: str) -> str | None:
    """Return what tells the files of a path, or of a pattern, from others of the same names."""
    path = Path(place).expanduser().absolute()
    for folder in (path, *path.parents):
        if checkpoints := list_checkpoints(RunFolder(folder).checkpoints):
            of = (each for each in checkpoints if path.is_relative_to(each))
            return fingerprint(next(of, checkpoints[-1])) or ""
    tops = [path] if path.exists() else _matches(str(path))
    digest = hashlib.sha256()
    for file in sorted(file for top in tops for file in _files(top)):
        about = file.stat()
        digest.update(f"{file}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
    return digest.hexdigest() if tops else None


def _matches(pattern: str) -> list[Path]:
    try:
        return list(expand_pattern(pattern))
    except ValueError:  # whoever reads it says so
        return []


def _files(top: Path) -> Iterator[Path]:
    if not top.is_dir():
        yield top
    for folder, _, names in os.walk(top, followlinks=True):
        yield from (Path(folder, name) for name in names)


def _samples_of(shards: ShardSourceConfig) -> dict[str, str]:
    """Return the prepared folder that a job reads, with a hash of the samples that it reads."""
    folder = Path(str(shards.path)).expanduser()
    if not (folder / INDEX).exists():
        return {}
    index = read_index(folder)
    read = [index.kept.get(shards.selection), [tar.sha256 for tar in index.tars]]
    return {str(shards.path): hashlib.sha256(json.dumps(read).encode()).hexdigest()}


def what_is_missing(job: Job) -> str | None:
    """Say what a job has not made yet of that by which it is known to be complete, or None.

    A run is complete with the checkpoint of its last step, and an export that was noted after it.
    """
    match job.settings:
        case TrainConfig() as config:
            folder = RunFolder(Path(config.runs_dir) / config.name)
            found = list_checkpoints(folder.checkpoints)
            step, last = (step_of(found[-1]) if found else 0), config.training.max_steps
            if step < last:
                return f"{folder.path} is at step {step} of {last}"
            note = folder.path / "export.json"
            if not note.exists() or not folder.export.exists():
                return f"{folder.path} is not exported"
            exported = read_object(note, "remove it and run the same command again")
            of = exported.get("checkpoint")
            if of not in [fingerprint(place) for place in found] or (
                config.export == "last" and of != fingerprint(found[-1])
            ):
                return f"{folder.path} is exported from another checkpoint"
        case _ if makes_index(job):
            assert job.out
            if not (job.out / INDEX).exists():
                return f"{job.out} has no {INDEX}"
            for cache in read_index(job.out).caches:
                if not (job.out / CACHE / cache).exists():
                    return f"{job.out} lost its cache {cache}"
        case _ if job.out is not None and not job.out.exists():
            return f"{job.out} is not there"
        case _:
            pass
    return None


def is_complete(job: Job, code: int, asked: bool) -> bool:
    """Say whether a job that has ended is complete.

    Args:
        code: its exit code.
        asked: whether it was asked to stop. torchrun then ends with 1 even where training had just
            exported, so that only what a run has made tells.
    """
    trusted = code == 0 or (asked and job.command == "train")
    return trusted and what_is_missing(job) is None


def is_done(folder: LaunchFolder, job: Job) -> bool:
    """Say whether a job was finished as it is now told, and what it made is still there."""
    record = read_job_record(folder, job.name)
    return (
        record is not None
        and record.finished is not None
        and record.made_of == job.made_of
        and record.after == starts_from(job)
        and what_is_missing(job) is None
    )


def begin(folder: LaunchFolder, job: Job) -> JobRecord:
    """Note that a job begins, or goes on, and from what.

    Raises:
        LaunchError: if it would go on from another start than it had.
    """
    after, before = starts_from(job), read_job_record(folder, job.name)
    if before is not None and job.command == "train" and before.after != after:
        assert job.out
        if list_checkpoints(RunFolder(job.out).checkpoints):
            changed = sorted({*before.after.items()} ^ {*after.items()})[0][0]
            raise LaunchError(
                f"job {job.name} was begun from another state of {changed} than there is now; "
                f"remove {job.out} to train it anew, or launch under another name (name=...)"
            )
    requeues = before.requeues if before and before.made_of == job.made_of else 0
    record = JobRecord(job.made_of, after, None, requeues)
    write_job_record(folder, job.name, record)
    return record


def hold(folder: LaunchFolder) -> IO[str]:
    """Hold a launch's folder, until what is returned and all that inherited it are closed.

    Raises:
        LaunchError: if another launch holds it, or it cannot be made.
    """
    busy = f"another launch, or a job of one, is running in {folder.path}; wait for it, or choose "
    return lock(
        folder.path,
        busy=busy + "another name (name=...)",
        unmade="set runs_dir=...",
        failure=LaunchError,
    )
