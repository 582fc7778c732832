"""Launch on this machine: jobs one after another, each in its own process."""

import shlex
import signal
from collections.abc import Sequence

from sfumato.config import LocalClusterConfig
from sfumato.launch.children import Ended, command_line, run_child
from sfumato.launch.jobs import Job
from sfumato.launch.record import LaunchFolder, begin, finish, hold, is_done
from sfumato.launch.results import is_complete, what_is_missing
from sfumato.launch.slurm import refuse_queued

SAVE_SECONDS = 600  # for training to save in, before torchrun kills it


def show_here(jobs: Sequence[Job], folder: LaunchFolder, cluster: LocalClusterConfig) -> None:
    """Print the command of each job, ready for a shell."""
    for number, job in enumerate(jobs, start=1):
        state = "done" if is_done(folder, job) else "to do"
        print(f"# job {number} of {len(jobs)}, {job.name}: {state}")
        print(shlex.join(command_line(job, cluster.max_restarts, SAVE_SECONDS)))


def run_here(jobs: Sequence[Job], folder: LaunchFolder, cluster: LocalClusterConfig) -> bool:
    """Run the jobs that are not done; return whether all are done in the end.

    Returns:
        False if a signal or its own limit stopped a job before it was complete.

    Raises:
        ValueError: if a job fails, or another launch holds the folder.
    """
    with hold(folder) as held:
        refuse_queued(folder)
        for number, job in enumerate(jobs, start=1):
            title = f"job {number} of {len(jobs)}, {job.name}"
            if is_done(folder, job):
                print(f"{title}: done", flush=True)
                continue
            command = shlex.join(["sfumato", job.command, *job.arguments])
            print(f"{title}: {command}", flush=True)
            record = begin(folder, job)
            child = command_line(job, cluster.max_restarts, SAVE_SECONDS)
            ended = run_child(child, _passed_on(), held=[held.fileno()])
            complete = is_complete(job, ended.code, bool(ended.asked))
            if complete:
                finish(folder, job, record)
                print(f"{title}: done", flush=True)
            if ended.asked or not complete:
                return _stop(title, job, ended, [j.name for j in jobs if not is_done(folder, j)])
    return True


def _passed_on() -> dict[signal.Signals, signal.Signals]:
    """Return the signal that a job gets for each that arrives; all of them let it save."""
    signals = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signals[signal.SIGHUP] = signal.SIGTERM  # the terminal was closed
    return signals


def _stop(title: str, job: Job, ended: Ended, left: Sequence[str]) -> bool:
    """Print why the launch stops and which jobs are left; return whether none is.

    Raises:
        ValueError: the job failed.
    """
    advice = "nothing is left to do"
    if left:
        advice = f"left to do: {', '.join(left)}. To go on, run the same command again"
    if ended.code and not ended.asked:
        raise ValueError(f"{title} failed: {ended.in_words}; {advice}")
    reason = f"stopped by {ended.asked[0].name}" if ended.asked else "stopped"
    if job.name in left:
        reason = f"{title} was {reason} ({what_is_missing(job) or ended.in_words})"
    print(f"{reason}; {advice}", flush=True)
    return not left
