"""Records of a launch: what each job began with and whether it finished, and the launch's lock.

runs/NAME/launch/job-JOB.json        JobRecord
runs/NAME/launch/submitted.json      the jobs that Slurm has
runs/NAME/launch/slurm/JOB/          sbatch script, task.json for its worker, logs
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from sfumato.files import lock, write_text
from sfumato.launch.inputs import starts_from
from sfumato.launch.jobs import Job
from sfumato.launch.results import what_is_missing
from sfumato.records import read_record
from sfumato.training.checkpoint import list_checkpoints
from sfumato.training.folder import RunFolder


@dataclass(frozen=True)
class JobRecord:
    """What a job began with, and whether it finished.

    Attributes:
        made_of: of the job's command and settings; see `Job`.
        after: the state of the files that it starts from; see `starts_from`.
        finished: when, in UTC; None until then.
        requeues: how often the job put itself back into Slurm's queue.
    """

    made_of: str
    after: Mapping[str, str] = field(default_factory=dict)
    finished: str | None = None
    requeues: int = 0


@dataclass(frozen=True)
class LaunchFolder:
    """The files of runs/NAME/launch."""

    path: Path

    @property
    def submitted(self) -> Path:
        return self.path / "submitted.json"

    def slurm(self, job: str) -> Path:
        return self.path / "slurm" / job

    def record(self, job: str) -> Path:
        return self.path / f"job-{job}.json"


def read_job_record(folder: LaunchFolder, name: str) -> JobRecord | None:
    """Return a job's record, or None if the job never began.

    Raises:
        ValueError: if the record is damaged.
    """
    path = folder.record(name)
    if not path.exists():
        return None
    return read_record(path, JobRecord, "remove it; the job is then checked anew")


def write_job_record(folder: LaunchFolder, name: str, record: JobRecord) -> None:
    """Write a job's record; a kill leaves the old one or the new one."""
    text = json.dumps(asdict(record), indent=2) + "\n"
    write_text(folder.record(name), text)


def begin(folder: LaunchFolder, job: Job) -> JobRecord:
    """Record that a job begins, or goes on, and from which files.

    Raises:
        ValueError: if those files have changed since the job began.
    """
    after, before = starts_from(job), read_job_record(folder, job.name)
    if before is not None and job.command == "train" and before.after != after:
        assert job.out
        if list_checkpoints(RunFolder(job.out).checkpoints):
            changed = sorted({*before.after.items()} ^ {*after.items()})[0][0]
            raise ValueError(
                f"job {job.name} began from {changed}, which has changed since; remove {job.out} "
                "to train it anew, or launch under another name (name=...)"
            )
    requeues = before.requeues if before and before.made_of == job.made_of else 0
    record = JobRecord(job.made_of, after, None, requeues)
    write_job_record(folder, job.name, record)
    return record


def finish(folder: LaunchFolder, job: Job, record: JobRecord) -> None:
    """Record that a job is finished."""
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    write_job_record(folder, job.name, replace(record, finished=finished))


def is_done(folder: LaunchFolder, job: Job) -> bool:
    """Return whether a job finished with these settings, and its inputs and results still stand."""
    record = read_job_record(folder, job.name)
    return (
        record is not None
        and record.finished is not None
        and record.made_of == job.made_of
        and record.after == starts_from(job)
        and what_is_missing(job) is None
    )


def hold(folder: LaunchFolder) -> IO[str]:
    """Hold a launch's folder until the returned file is closed, here and in all children.

    Raises:
        ValueError: if another launch holds the folder, or it cannot be made.
    """
    return lock(
        folder.path,
        busy=f"another launch, or a job of one, is running in {folder.path}; wait for it, or "
        "choose another name (name=...)",
        unmade="set runs_dir=...",
    )
