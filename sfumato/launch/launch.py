"""Entry of `sfumato launch`: reads the jobs, and runs, submits or shows them."""

from pathlib import Path

from sfumato.config import LaunchConfig, LocalClusterConfig, SlurmClusterConfig
from sfumato.launch.jobs import read_jobs
from sfumato.launch.local import run_here, show_here
from sfumato.launch.record import LaunchFolder
from sfumato.launch.slurm import show, submit


def launch(config: LaunchConfig) -> bool:
    """Run the chosen stages here, submit them to Slurm, or print what would run.

    All jobs are composed and checked before the first starts. Jobs that are done are left out: the
    same call goes on where an earlier one stopped.

    Returns:
        Whether all jobs are done; False if they were submitted or one was stopped.

    Raises:
        ValueError: if settings cannot work, a job fails, or another launch holds the folder.
    """
    jobs = read_jobs(config)
    folder = LaunchFolder((Path(config.runs_dir) / config.name / "launch").absolute())
    match config.cluster:
        case LocalClusterConfig() as local if config.dry_run:
            show_here(jobs, folder, local)
        case LocalClusterConfig() as local:
            return run_here(jobs, folder, local)
        case SlurmClusterConfig() as slurm if config.dry_run:
            show(jobs, folder, slurm)
        case SlurmClusterConfig() as slurm:
            submit(jobs, folder, slurm)
        case other:
            raise AssertionError(other)
    return False
