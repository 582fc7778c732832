"""What a Slurm job runs on each of its machines: one command, saved and requeued in time."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import NoReturn

from sfumato.config import SlurmClusterConfig
from sfumato.launch.children import Ended, on_nodes, run_child
from sfumato.launch.jobs import Job
from sfumato.launch.record import (
    JobRecord,
    LaunchError,
    LaunchFolder,
    begin,
    is_complete,
    is_done,
    now,
    read_job_record,
    what_is_missing,
    write_job_record,
)

MARGIN = 15  # seconds between torchrun's patience and the time limit


@dataclass(frozen=True)
class Worker:
    """The function that submitit calls, once on each machine.

    Slurm signals all processes of a job: before the time limit with the signal that submitit asks
    it for, on scancel with SIGTERM. The child is deaf to the first, and sent SIGTERM instead.

    Attributes:
        previous: name and `made_of` of the job before, which must be finished.
    """

    job: Job
    previous: tuple[str, str] | None
    folder: LaunchFolder
    cluster: SlurmClusterConfig

    @property
    def save_seconds(self) -> int:
        """Return the time that training has to save in."""
        return max(1, self.cluster.signal_seconds - MARGIN)

    def __call__(self) -> None:
        """Run the job; go back into the queue if it has to stop before it is complete."""
        from submitit.slurm.slurm import SlurmJobEnvironment

        place = SlurmJobEnvironment()
        first = place.node == 0
        if is_done(self.folder, self.job):
            print(f"{self.job.name}: done", flush=True)
            return
        self._check_previous()
        record = self._begin() if first else None
        command = on_nodes(
            self.job,
            place.hostnames[0],
            str(20_000 + int(place.raw_job_id) % 20_000),
            f"{place.raw_job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}",
            first,
            self.cluster.max_restarts,
            self.save_seconds,
        )
        warning = signal.Signals[f"SIG{SlurmJobEnvironment.USR_SIG}"]
        signal.signal(warning, signal.SIG_IGN)  # once the child has ended, it is no reason to fail
        ended = run_child(
            command, {warning: signal.SIGTERM, signal.SIGTERM: None}, ignored=[warning]
        )
        if record is not None:
            self._conclude(record, ended, place.raw_job_id)
        elif ended.code and not ended.asked:
            sys.exit(ended.code)

    def _check_previous(self) -> None:
        if self.previous is None:
            return
        name, made_of = self.previous
        record = read_job_record(self.folder, name)
        if record is None or record.finished is None or record.made_of != made_of:
            _fail(
                f"job {self.job.name} comes after {name}, which did not finish; launch again, and "
                f"it goes on with {name}"
            )

    def _begin(self) -> JobRecord:
        try:
            return begin(self.folder, self.job)
        except LaunchError as error:
            _fail(str(error))

    def _conclude(self, record: JobRecord, ended: Ended, number: str) -> None:
        """Note that the job is finished, or requeue it, or fail."""
        name, missing = self.job.name, what_is_missing(self.job)
        if is_complete(self.job, ended.code, bool(ended.asked)):
            write_job_record(self.folder, name, replace(record, finished=now()))
            print(f"{name}: done", flush=True)
        elif signal.SIGTERM in ended.asked:
            _fail(f"job {name} was stopped by SIGTERM ({missing or ended.in_words})")
        elif ended.code == 0 or ended.asked:
            self._requeue(record, missing or ended.in_words, number)
        else:
            _fail(f"job {name} failed: {ended.in_words}")

    def _requeue(self, record: JobRecord, missing: str, number: str) -> None:
        name, limit = self.job.name, self.cluster.max_requeues
        if record.requeues >= limit:
            _fail(
                f"job {name} was requeued {record.requeues} times (cluster.max_requeues = {limit}) "
                f"and is not complete ({missing}); launch again to go on"
            )
        write_job_record(self.folder, name, replace(record, requeues=record.requeues + 1))
        print(
            f"{name}: {missing}; back into the queue, for the {record.requeues + 1}. time",
            flush=True,
        )
        asked = subprocess.run(
            ["scontrol", "requeue", number], capture_output=True, text=True, check=False
        )
        if asked.returncode:
            _fail(f"job {name} cannot be requeued: {asked.stderr.strip()}; launch again to go on")
        sys.exit(1)  # Slurm ends this attempt; were it to succeed, the next job would begin


def _fail(message: str) -> NoReturn:
    print(f"sfumato: {message}", file=sys.stderr, flush=True)
    sys.exit(1)
