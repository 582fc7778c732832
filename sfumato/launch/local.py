"""Jobs here: one after the other, each in a process of its own."""

import signal
from collections.abc import Sequence
from dataclasses import replace

from sfumato.config import LocalClusterConfig
from sfumato.launch.children import here, one_line, run_child
from sfumato.launch.jobs import Job
from sfumato.launch.record import (
    LaunchError,
    LaunchFolder,
    begin,
    hold,
    is_complete,
    is_done,
    now,
    what_is_missing,
    write_job_record,
)
from sfumato.launch.slurm import refuse_queued

SAVE_SECONDS = 600  # that torchrun leaves its processes, once told to stop


def passed_on() -> dict[signal.Signals, signal.Signals]:
    """Return what a job is sent when a signal comes: it saves, also when its terminal is closed."""
    found = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
        found[signal.SIGHUP] = signal.SIGTERM
    return found


def run_here(jobs: Sequence[Job], folder: LaunchFolder, cluster: LocalClusterConfig) -> bool:
    """Run the jobs that are not done yet; return whether all are done in the end.

    Returns:
        False if one was stopped, by a signal or a limit of its own, before it was complete.

    Raises:
        LaunchError: if a job fails, or another launch is running here.
    """
    with hold(folder) as held:
        refuse_queued(folder)
        for number, job in enumerate(jobs, start=1):
            title = f"job {number} of {len(jobs)}, {job.name}"
            if is_done(folder, job):
                print(f"{title}: done", flush=True)
                continue
            print(f"{title}: {one_line(job)}", flush=True)
            record = begin(folder, job)
            ended = run_child(
                here(job, cluster.max_restarts, SAVE_SECONDS), passed_on(), held=[held.fileno()]
            )
            why = f"stopped by {ended.asked[0].name}" if ended.asked else "stopped"
            if is_complete(job, ended.code, bool(ended.asked)):
                write_job_record(folder, job.name, replace(record, finished=now()))
                print(f"{title}: done", flush=True)
                if not ended.asked:
                    continue
            elif ended.code == 0 or ended.asked:  # a run's own limit ends it with 0 too
                why = f"{title} was {why} ({what_is_missing(job) or ended.in_words})"
            else:
                raise LaunchError(
                    f"{title} failed: {ended.in_words}; {_what_is_left(jobs, folder)}"
                )
            print(f"{why}; {_what_is_left(jobs, folder)}", flush=True)
            return all(is_done(folder, job) for job in jobs)
    return True


def _what_is_left(jobs: Sequence[Job], folder: LaunchFolder) -> str:
    left = [job.name for job in jobs if not is_done(folder, job)]
    if not left:
        return "nothing is left to do"
    return f"left to do: {', '.join(left)}. To go on, run the same command again"
