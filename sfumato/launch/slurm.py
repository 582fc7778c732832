"""Launch on Slurm: an sbatch script for each job, submitted to begin after the job before it.

An array of tasks may share a job's work. The job begins when they have ended, and makes what is
missing.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sfumato.config import SlurmClusterConfig
from sfumato.files import write_text
from sfumato.launch.children import command_line, part_command, rendezvous
from sfumato.launch.jobs import Job, helpers_of
from sfumato.launch.record import (
    LaunchFolder,
    hold,
    is_done,
    read_job_record,
    write_job_record,
)
from sfumato.launch.worker import WARNING, Task, ask
from sfumato.records import read_record
from sfumato.training.stop import parse_duration

_MARGIN = 15  # seconds between torchrun's patience and the time limit


@dataclass(frozen=True)
class Submitted:
    """The jobs that Slurm has, by name, and the one that was being sent."""

    jobs: Mapping[str, str]
    sending: str | None = None


@dataclass(frozen=True)
class _Submission:
    """What one sbatch sends: a job, or the array of tasks that share its work.

    Attributes:
        previous: the job before, which must be finished.
        after: names of submissions that it begins after, with Slurm's kind of dependency.
        parts: how many tasks the array has; 0 is a job.
    """

    job: Job
    previous: Job | None
    after: Mapping[str, str]
    parts: int = 0


def submit(jobs: Sequence[Job], folder: LaunchFolder, cluster: SlurmClusterConfig) -> None:
    """Submit all jobs from the first that is not done; each begins after the one before.

    Raises:
        ValueError: if Slurm is missing, still has jobs of an earlier launch, or refuses a job;
            then none stays in the queue.
    """
    _check(cluster)
    for program in ("sbatch", "srun", "squeue", "scancel"):
        if shutil.which(program) is None:
            raise ValueError(
                f"cluster=slurm needs Slurm, and {program} is not on the PATH; run this on a login "
                "node, look at it with --dry-run, or use cluster=local"
            )
    with hold(folder):
        refuse_queued(folder)
        first = _first_open(jobs, folder)
        for job in jobs[:first]:
            print(f"{job.name}: done")
        sent: dict[str, str] = {}
        for each in _submissions(jobs, first):
            name = each.job.name
            # A kill between sbatch and the second note leaves `sending`.
            _note(folder, Submitted(sent, name))
            try:
                sent[name] = _send(each, sent, folder, cluster)
            except ValueError:
                if sent:
                    ask("scancel", *sent.values())
                _note(folder, Submitted(sent))
                raise
            _note(folder, Submitted(sent))
            order = f", after {' and '.join(each.after)}" if each.after else ""
            print(f"{name}: submitted as job {sent[name]}{order}", flush=True)
    if sent:
        queue = f"squeue -j {','.join(sent.values())}"
        print(f"logs are in {folder.path / 'slurm'}; the queue is: {queue}")


def show(jobs: Sequence[Job], folder: LaunchFolder, cluster: SlurmClusterConfig) -> None:
    """Print how each job is submitted, its script, and what runs on each of its machines."""
    _check(cluster)
    first = _first_open(jobs, folder)
    every = list(_submissions(jobs, first))
    names = {each.job.name: f"JOB_OF_{each.job.name}" for each in every}
    for job in jobs[:first]:
        print(f"# {job.name}: done")
    for each in every:
        job = each.job
        print(f"# {job.name}: to do")
        print(f"# submitted by: {shlex.join(_sbatch(each, names, folder))}")
        print(_script(each, folder, cluster))
        meeting = rendezvous(job.nodes, "HOST", "PORT", "JOB", True)
        run = command_line(job, cluster.max_restarts, _save_seconds(cluster), meeting)
        if each.parts:
            run = part_command(job, f"TASK/{each.parts}")
        print(f"# which runs, on {'each machine' if job.nodes > 1 else 'its machine'}:")
        print(f"# {shlex.join(run)}\n")


def refuse_queued(folder: LaunchFolder) -> None:
    """Refuse a launch while Slurm has jobs of an earlier one in the same folder.

    Raises:
        ValueError: naming them.
    """
    path = folder.submitted
    if not path.exists():
        return
    advice = "look for jobs of this launch with squeue --me, and remove the file"
    note = read_record(path, Submitted, advice)
    if note.sending is not None:
        raise ValueError(
            f"a launch in {folder.path} was killed while it submitted job {note.sending}; look for "
            f"it with squeue --me, end it with scancel, and remove {path}"
        )
    if queued := _still_queued(note.jobs):
        raise ValueError(
            f"jobs of an earlier launch in {folder.path} are still queued or running "
            f"({', '.join(f'{name}: {number}' for name, number in queued.items())}); wait for "
            f"them, or end them with: scancel {' '.join(queued.values())}"
        )


def _first_open(jobs: Sequence[Job], folder: LaunchFolder) -> int:
    """Return the position of the first job that is not done."""
    return next((i for i, job in enumerate(jobs) if not is_done(folder, job)), len(jobs))


def _submissions(jobs: Sequence[Job], first: int) -> Iterator[_Submission]:
    """Yield what is sent for the jobs from `first` on, in its order."""
    for number, job in enumerate(jobs[first:], start=first):
        previous = jobs[number - 1] if number else None
        after = {previous.name: "afterok"} if previous and number > first else {}
        if job.array:
            helpers = helpers_of(job)
            yield _Submission(helpers, previous, after, job.array)
            after = {**after, helpers.name: "afterany"}
        yield _Submission(job, previous, after)


def _check(cluster: SlurmClusterConfig) -> None:
    if cluster.signal_seconds >= parse_duration("cluster.time", cluster.time, "-"):
        raise ValueError(
            f"cluster.signal_seconds = {cluster.signal_seconds} must be below cluster.time = "
            f"{cluster.time}; a job must run before Slurm warns it to save"
        )


def _save_seconds(cluster: SlurmClusterConfig) -> int:
    return max(1, cluster.signal_seconds - _MARGIN)


def _script(each: _Submission, folder: LaunchFolder, cluster: SlurmClusterConfig) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    job = each.job
    named = {key: vars(cluster)[key] for key in ("partition", "account", "qos", "mem")}
    return environment.get_template("job.sh.jinja").render(
        job=job,
        parts=each.parts,
        cluster=cluster,
        gpus=min(job.processes, cluster.gpus_per_node),
        warning=WARNING.name.removeprefix("SIG"),
        options={**named, **cluster.additional},
        folder=folder.slurm(job.name),
        python=sys.executable,
    )


def _sbatch(each: _Submission, sent: Mapping[str, str], folder: LaunchFolder) -> list[str]:
    """Return the command that submits a job; `sent` has the numbers of those before it."""
    conditions = ",".join(f"{kind}:{sent[name]}" for name, kind in each.after.items())
    order = [f"--dependency={conditions}"] if conditions else []
    return ["sbatch", "--parsable", *order, str(folder.slurm(each.job.name) / "job.sh")]


def _send(
    each: _Submission, sent: Mapping[str, str], folder: LaunchFolder, cluster: SlurmClusterConfig
) -> str:
    job, previous = each.job, each.previous
    record = read_job_record(folder, job.name)
    if record is not None:
        write_job_record(folder, job.name, replace(record, requeues=0))
    task = Task(
        replace(job, settings=None),
        previous=(previous.name, previous.made_of) if previous else None,
        folder=str(folder.path),
        save_seconds=_save_seconds(cluster),
        max_restarts=cluster.max_restarts,
        max_requeues=cluster.max_requeues,
        parts=each.parts,
    )
    files = folder.slurm(job.name)
    write_text(files / "task.json", json.dumps(asdict(task), indent=2) + "\n")
    write_text(files / "job.sh", _script(each, folder, cluster))
    answer = ask(*_sbatch(each, sent, folder))
    if answer.returncode:
        lines = [line for line in answer.stderr.splitlines() if "error" in line.lower()]
        reason = lines[-1] if lines else f"sbatch ended with exit code {answer.returncode}"
        raise ValueError(
            f"Slurm refused job {job.name}: {reason}; nothing of this launch is in the queue"
        )
    return answer.stdout.strip().partition(";")[0]  # the name of the cluster may follow


def _note(folder: LaunchFolder, submitted: Submitted) -> None:
    write_text(folder.submitted, json.dumps(asdict(submitted), indent=2) + "\n")


def _still_queued(sent: Mapping[str, str]) -> dict[str, str]:
    """Return the jobs that Slurm has not ended yet, by name."""
    if not sent or shutil.which("squeue") is None:
        return {}
    answer = ask("squeue", "--noheader", "--format=%i", f"--jobs={','.join(sent.values())}")
    if answer.returncode and "Invalid job id" not in answer.stderr:  # Slurm forgets ended jobs
        raise ValueError(
            f"squeue does not say whether the jobs of an earlier launch are queued: "
            f"{answer.stderr.strip()}"
        )
    alive = {number.partition("_")[0] for number in answer.stdout.split()}  # of arrays: 7_[2-5]
    return {name: number for name, number in sent.items() if number in alive}
