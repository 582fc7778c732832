"""Jobs on Slurm: each submitted with submitit, to begin when the one before it has succeeded."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.config import SlurmClusterConfig
from sfumato.files import read_object, write_text
from sfumato.launch.children import on_nodes
from sfumato.launch.jobs import Job
from sfumato.launch.record import (
    LaunchError,
    LaunchFolder,
    hold,
    is_done,
    now,
    read_job_record,
    write_job_record,
)
from sfumato.launch.worker import Worker


def submit(jobs: Sequence[Job], folder: LaunchFolder, cluster: SlurmClusterConfig) -> None:
    """Submit all jobs from the first one on that is not done; each begins after the one before.

    Raises:
        ValueError: if submitit or Slurm is not there, or the jobs of an earlier launch still are,
            or a job is refused: then none stays in the queue.
    """
    _check(cluster)
    for program in ("sbatch", "srun", "squeue", "scancel"):
        if shutil.which(program) is None:
            raise LaunchError(
                f"cluster=slurm needs Slurm, and {program} is not on the PATH; run this on a login "
                "node, look at it with --dry-run, or use cluster=local"
            )
    with hold(folder):
        refuse_queued(folder)
        first = next((i for i, job in enumerate(jobs) if not is_done(folder, job)), len(jobs))
        for job in jobs[:first]:
            print(f"{job.name}: done")
        sent: dict[str, str] = {}
        for number in range(first, len(jobs)):
            job, before = jobs[number], jobs[number - 1] if number else None
            dependency = f"afterok:{sent[before.name]}" if before and number > first else None
            _note(folder, sent, sending=job.name)
            try:
                sent[job.name] = _send(job, before, folder, cluster, dependency)
            except LaunchError:
                _cancel(sent)
                _note(folder, sent)
                raise
            _note(folder, sent)
            after = f", after {before.name}" if dependency and before else ""
            print(f"{job.name}: submitted as job {sent[job.name]}{after}", flush=True)
    if sent:
        queue = f"squeue -j {','.join(sent.values())}"
        print(f"logs are in {folder.path / 'slurm'}; the queue is: {queue}")


def show(jobs: Sequence[Job], folder: LaunchFolder, cluster: SlurmClusterConfig) -> None:
    """Print each job's sbatch script, and the command that it runs on each of its machines."""
    _check(cluster)
    slurm = _submitit()
    first = next((i for i, job in enumerate(jobs) if not is_done(folder, job)), len(jobs))
    for number, job in enumerate(jobs):
        if number < first:
            print(f"# job {number + 1} of {len(jobs)}, {job.name}: done\n")
            continue
        place = folder.slurm(job.name).absolute()
        before = f"afterok:JOB_OF_{jobs[number - 1].name}" if number > first else None
        command = shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(place)])
        print(f"# job {number + 1} of {len(jobs)}, {job.name}: to do")
        print(
            slurm._make_sbatch_string(
                command=command, folder=place, **_parameters(job, cluster, before)
            )
        )
        worker = Worker(job, None, folder, cluster)
        run = on_nodes(job, "HOST", "PORT", "JOB", True, cluster.max_restarts, worker.save_seconds)
        print(f"# which runs, on {'each machine' if job.nodes > 1 else 'its machine'}:")
        print(f"# {shlex.join(run)}\n")


def _submitit() -> Any:
    try:
        from submitit.slurm import slurm
    except ImportError as error:
        raise LaunchError(
            "cluster=slurm needs submitit, which is not installed: pip install 'sfumato[slurm]'"
        ) from error
    return slurm


def _check(cluster: SlurmClusterConfig) -> None:
    for name in ("nodes", "cpus_per_task", "signal_seconds"):
        if vars(cluster)[name] < 1:
            raise LaunchError(f"cluster.{name} = {vars(cluster)[name]} must be 1 or more")
    for name in ("gpus_per_node", "max_requeues", "max_restarts"):
        if vars(cluster)[name] < 0:
            raise LaunchError(f"cluster.{name} = {vars(cluster)[name]} must be 0 or more")
    if cluster.signal_seconds >= _seconds(cluster.time):
        raise LaunchError(
            f"cluster.signal_seconds = {cluster.signal_seconds} leaves nothing of cluster.time = "
            f"{cluster.time}; a job is to run before it is told to save"
        )


def _seconds(time: str) -> int:
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", time)
    if match is None:
        raise LaunchError(f"cluster.time = {time!r} is no time limit; write [[DD-]HH:]MM:SS")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _parameters(job: Job, cluster: SlurmClusterConfig, dependency: str | None) -> dict[str, Any]:
    """Return what submitit writes into the script, under its own names."""
    gpus = min(job.processes, cluster.gpus_per_node)
    chosen = {
        "job_name": job.name,
        "nodes": job.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": gpus or None,
        "time": math.ceil(_seconds(cluster.time) / 60),
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "mem": cluster.mem,
        "signal_delay_s": cluster.signal_seconds,
        "setup": cluster.setup or None,
        "dependency": dependency,
        # srun does not take this from sbatch since Slurm 22.05.
        "srun_args": [f"--cpus-per-task={cluster.cpus_per_task}"],
        "additional_parameters": {
            "time": cluster.time,
            "requeue": True,
            "kill-on-invalid-dep": "yes",
            **cluster.additional,
        },
    }
    return {key: value for key, value in chosen.items() if value is not None}


def _send(
    job: Job,
    before: Job | None,
    folder: LaunchFolder,
    cluster: SlurmClusterConfig,
    dependency: str | None,
) -> str:
    """Submit one job; return its id."""
    slurm = _submitit()
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    record = read_job_record(folder, job.name)
    if record is not None:
        write_job_record(folder, job.name, replace(record, requeues=0))
    previous = (before.name, before.made_of) if before else None
    try:
        executor = slurm.SlurmExecutor(folder=folder.slurm(job.name))
        executor.update_parameters(**_parameters(job, cluster, dependency))
        return executor.submit(Worker(job, previous, _absolute(folder), cluster)).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        said = [line.strip() for line in str(error).splitlines() if "error" in line.lower()]
        raise LaunchError(
            f"Slurm refused job {job.name}: {said[-1] if said else error}; nothing of this launch "
            "is in the queue"
        ) from error


def _absolute(folder: LaunchFolder) -> LaunchFolder:
    return LaunchFolder(Path(folder.path).absolute())


def _note(folder: LaunchFolder, sent: Mapping[str, str], sending: str | None = None) -> None:
    """Note what Slurm has, and which job it is given now: a kill may leave it there unnoted."""
    note = {"time": now(), "jobs": sent, "sending": sending}
    write_text(folder.submitted, json.dumps(note, indent=2) + "\n")


def refuse_queued(folder: LaunchFolder) -> None:
    """Refuse a launch while Slurm has jobs of an earlier one in the same folder.

    Raises:
        LaunchError: naming them.
    """
    if not folder.submitted.exists():
        return
    note = read_object(folder.submitted, "remove it and run the same command again")
    sent, sending = note.get("jobs"), note.get("sending")
    if not isinstance(sent, dict) or not all(isinstance(number, str) for number in sent.values()):
        raise LaunchError(
            f"{folder.submitted} is damaged; look for jobs of this launch with squeue --me, and "
            "remove it"
        )
    if sending is not None:
        raise LaunchError(
            f"a launch in {folder.path} was killed while it submitted job {sending}; look for it "
            f"with squeue --me, end it with scancel, and remove {folder.submitted}"
        )
    if queued := _still_queued(sent):
        raise LaunchError(
            f"jobs of an earlier launch in {folder.path} are still queued or running "
            f"({', '.join(f'{name}: {number}' for name, number in queued.items())}); wait for "
            f"them, or end them with: scancel {' '.join(queued.values())}"
        )


def _still_queued(sent: Mapping[str, str]) -> dict[str, str]:
    """Return the jobs that Slurm has not ended yet, by name."""
    if not sent or shutil.which("squeue") is None:
        return {}
    asked = ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(sent.values())}"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    if answer.returncode and "Invalid job id" not in answer.stderr:  # Slurm forgets ended jobs
        raise LaunchError(
            f"squeue does not say whether the jobs of an earlier launch are queued: "
            f"{answer.stderr.strip()}"
        )
    alive = set(answer.stdout.split())
    return {name: number for name, number in sent.items() if number in alive}


def _cancel(sent: Mapping[str, str]) -> None:
    if sent:
        subprocess.run(["scancel", *sent.values()], check=False)
