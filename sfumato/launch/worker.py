"""Worker of a Slurm job: `python -m sfumato.launch.worker TASK.json`, once on each machine.

The worker runs the job's command, and requeues the job if it stops before it is complete.
"""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from sfumato.launch.children import Ended, command_line, part_command, rendezvous, run_child
from sfumato.launch.jobs import Job, with_settings
from sfumato.launch.record import (
    JobRecord,
    LaunchFolder,
    begin,
    finish,
    is_done,
    read_job_record,
    write_job_record,
)
from sfumato.launch.results import is_complete, what_is_missing
from sfumato.records import read_record

# Slurm sends it to all processes of a job before the time limit, and SIGTERM on scancel.
WARNING = signal.SIGUSR2
# Slurm warns the child too; the child ignores that and gets one SIGTERM from its parent.
_PASSED_ON = {WARNING: signal.SIGTERM, signal.SIGTERM: None}


@dataclass(frozen=True)
class Task:
    """A job, and how its workers run it.

    Attributes:
        job: without its settings, which the worker composes anew.
        previous: name and `made_of` of the job before, which must be finished.
        folder: of the launch's records.
        save_seconds: see `command_line`, as for `max_restarts`.
        max_requeues: how often the job may put itself back into the queue.
        parts: tasks of the array that shares the job's work; 0 is the job itself.
    """

    job: Job
    previous: tuple[str, str] | None
    folder: str
    save_seconds: int
    max_restarts: int
    max_requeues: int
    parts: int = 0


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs; return its exit code and output."""
    return subprocess.run(command, capture_output=True, text=True, check=False)


def work(task: Task) -> None:
    """Run a task on this machine; requeue its job if it stops before it is complete.

    Raises:
        ValueError: the job failed, was cancelled or cannot be requeued.
    """
    folder, first = LaunchFolder(Path(task.folder)), os.environ["SLURM_NODEID"] == "0"
    if task.parts:
        _check_previous(task, folder)
        _work_on_part(task)
        return
    job = with_settings(task.job)
    if is_done(folder, job):
        print(f"{job.name}: done", flush=True)
        return
    _check_previous(task, folder)
    record = begin(folder, job) if first else None
    meeting = _meeting(job, first) if job.nodes > 1 else ("--standalone",)
    command = command_line(job, task.max_restarts, task.save_seconds, meeting)
    ended = run_child(command, _PASSED_ON, ignored=[WARNING])
    if record is not None:
        _conclude(task, job, folder, record, ended)
    elif ended.code and not ended.asked:
        sys.exit(ended.code)


def _work_on_part(task: Task) -> None:
    """Make one part of a job's work; what is missing in the end is made by the job."""
    number = os.environ["SLURM_ARRAY_TASK_ID"]
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    part, name = f"{number}/{task.parts}", task.job.name
    command = part_command(task.job, part)
    ended = run_child(command, _PASSED_ON, ignored=[WARNING])
    if ended.code == 0:
        print(f"{name}, part {part}: done", flush=True)
    elif set(ended.asked) == {WARNING} and restarts < task.max_requeues:
        print(f"{name}, part {part}: back into the queue", flush=True)
        _requeue_now(f"{os.environ['SLURM_ARRAY_JOB_ID']}_{number}", name)
    else:
        raise ValueError(f"part {part} of {name} failed: {ended.in_words}")


def _check_previous(task: Task, folder: LaunchFolder) -> None:
    if task.previous is None:
        return
    name, made_of = task.previous
    record = read_job_record(folder, name)
    if record is None or record.finished is None or record.made_of != made_of:
        raise ValueError(
            f"job {task.job.name} comes after {name}, which did not finish; launch again to go on "
            f"with {name}"
        )


def _meeting(job: Job, first: bool) -> list[str]:
    number = os.environ["SLURM_JOB_ID"]
    answer = ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"])
    if answer.returncode:
        raise ValueError(f"scontrol does not name the machines of job {number}: {answer.stderr}")
    attempt = f"{number}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    port = 20_000 + int(number) % 20_000
    return rendezvous(job.nodes, answer.stdout.split()[0], str(port), attempt, first)


def _conclude(task: Task, job: Job, folder: LaunchFolder, record: JobRecord, ended: Ended) -> None:
    missing = what_is_missing(job) or ended.in_words
    if is_complete(job, ended.code, bool(ended.asked)):
        finish(folder, job, record)
        print(f"{job.name}: done", flush=True)
    elif signal.SIGTERM in ended.asked:
        raise ValueError(f"job {job.name} was stopped by SIGTERM ({missing})")
    elif ended.code and not ended.asked:
        raise ValueError(f"job {job.name} failed: {ended.in_words}")
    else:
        _requeue(task, folder, record, missing)


def _requeue(task: Task, folder: LaunchFolder, record: JobRecord, missing: str) -> None:
    name, limit, count = task.job.name, task.max_requeues, record.requeues + 1
    if count > limit:
        raise ValueError(
            f"job {name} was requeued {record.requeues} times (cluster.max_requeues = {limit}) and "
            f"is not complete ({missing}); launch again to go on"
        )
    write_job_record(folder, name, replace(record, requeues=count))
    print(f"{name}: {missing}; back into the queue, requeue {count} of {limit}", flush=True)
    _requeue_now(os.environ["SLURM_JOB_ID"], name)


def _requeue_now(number: str, name: str) -> None:
    answer = ask("scontrol", "requeue", number)
    if answer.returncode:
        reason = answer.stderr.strip()
        raise ValueError(f"job {name} cannot be requeued: {reason}; launch again to go on")
    sys.exit(1)  # Slurm ends this attempt; if it succeeded, the next job would begin


def main() -> None:
    """Work on the task that the command line names."""
    signal.signal(WARNING, signal.SIG_IGN)  # outside of `run_child` it would end this process
    try:
        work(read_record(Path(sys.argv[1]), Task, "launch again, which writes it anew"))
    except ValueError as error:
        print(f"sfumato: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
