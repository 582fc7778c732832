"""`sfumato launch`: stages from a list, each one job, each after the one before."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from sfumato.config import LaunchConfig, LocalClusterConfig, SlurmClusterConfig
from sfumato.launch.children import here
from sfumato.launch.jobs import Job, read_jobs
from sfumato.launch.local import SAVE_SECONDS, run_here
from sfumato.launch.record import LaunchFolder, is_done


def launch(config: LaunchConfig) -> bool:
    """Run the chosen stages here, or submit them to Slurm; or print what would be run.

    All jobs are composed and checked before the first starts. What is done already is left out, so
    that the same call goes on where an earlier one was stopped.

    Returns:
        Whether all jobs are done; False where they were submitted, or one was stopped.

    Raises:
        ValueError: if settings cannot work, a job fails, or another launch is running here.
    """
    if config.name in {"", ".."} or Path(config.name).name != config.name:
        raise ValueError(
            f"name = {config.name!r} is no name of a folder; give one without slashes, and the "
            "place of all launches as runs_dir=..."
        )
    jobs = read_jobs(config)
    folder = LaunchFolder(Path(config.runs_dir) / config.name / "launch")
    match config.cluster:
        case LocalClusterConfig() as local if config.dry_run:
            _show(jobs, folder, local)
            return False
        case LocalClusterConfig() as local:
            return run_here(jobs, folder, local)
        case SlurmClusterConfig() as slurm:
            from sfumato.launch.slurm import show, submit

            if config.dry_run:
                show(jobs, folder, slurm)
            else:
                submit(jobs, folder, slurm)
            return False
        case other:
            raise AssertionError(other)


def _show(jobs: Sequence[Job], folder: LaunchFolder, cluster: LocalClusterConfig) -> None:
    """Print the command of each job, to be pasted into a shell."""
    for number, job in enumerate(jobs, start=1):
        state = "done" if is_done(folder, job) else "to do"
        print(f"# job {number} of {len(jobs)}, {job.name}: {state}")
        print(shlex.join(here(job, cluster.max_restarts, SAVE_SECONDS)))
