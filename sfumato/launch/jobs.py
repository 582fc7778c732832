"""The jobs of a launch: one command each, composed and checked before the first one starts."""

import copy
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.check import check_train
from sfumato.compose import compose_command
from sfumato.config import (
    JobConfig,
    LaunchConfig,
    LocalClusterConfig,
    PrepareConfig,
    SlurmClusterConfig,
    TrainConfig,
)
from sfumato.preparation.settings import check_prepare

COMPOSED = ("prepare", "train", "evaluate", "sample")
DISTRIBUTED = ("prepare", "train")  # commands that several processes share
WEIGHTS = ("model.lora.start", "model.network.from_pretrained")
MODEL_FILES = ("model.pretrained", "model.autoencoder", "model.text_encoder", "model.tokenizer")
# Settings that name files to read; those that may also name something on the hub.
FILES = {
    "train": (
        "data.prompts",
        "data.images.path",
        "data.shards.path",
        "validation.prompts",
        "validation.images.path",
        *WEIGHTS,
        *MODEL_FILES,
    ),
    "prepare": ("pack.path", "download.table", *MODEL_FILES),
    "evaluate": ("run", "prompts"),
    "sample": ("run", "prompts"),
}
OR_HUB = ("download.table", "model.network.from_pretrained", *MODEL_FILES)
# What a job starts from, often another job's result; that it has stayed the same is checked.
STARTS = {
    "train": (*WEIGHTS, *MODEL_FILES),
    "prepare": FILES["prepare"],
    "evaluate": ("run",),
    "sample": ("run",),
}


@dataclass(frozen=True)
class Job:
    """One command with all that it was told.

    Attributes:
        arguments: what stands after `sfumato COMMAND`.
        processes: on each machine.
        nodes: machines, under Slurm.
        settings: composed; None for `demo`, whose arguments are no settings.
        made_of: a hash of the command and of its settings in full.
    """

    name: str
    command: str
    arguments: tuple[str, ...]
    processes: int
    nodes: int
    settings: Any
    made_of: str

    @property
    def out(self) -> Path | None:
        """Return the folder that the job fills, if its settings name one."""
        match self.command:
            case "train":
                return Path(self.settings.runs_dir) / self.settings.name
            case "prepare":
                return Path(self.settings.out).expanduser()
            case "sample":
                return Path(self.settings.out)
            case "demo":
                options = [text.partition("=") for text in self.arguments]
                found = [value for key, _, value in options if key in {"--rebuild", "--out"}]
                return Path(found[0]) if found else None
            case _:
                return None


def read_jobs(config: LaunchConfig) -> list[Job]:
    """Return the jobs of the chosen stages in their order, every one of them checked.

    Raises:
        ValueError: naming the job, for whatever can be known to be wrong before the first starts.
    """
    known = {name: given for name, given in config.jobs.items() if given is not None}
    if not config.jobs:
        raise ValueError(
            "there are no jobs; choose a recipe that has some (recipe=ladder/...), or write "
            "'jobs.NAME={command: train, recipe: ..., settings: [...]}'"
        )
    names = config.stages or list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"stages = {names} names {name}{_meant(name, config.jobs)}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"stages = {names} names {twice[0]} twice; each stage is one job")
    jobs: list[Job] = []
    for name in names:
        try:
            job = _read_job(name, known[name], config)
            _check(job, [earlier.out for earlier in jobs if earlier.out])
        except ValueError as error:
            raise ValueError(f"job {name}: {error}") from error
        if job.command in ("train", "prepare") and job.out:
            _refuse_shared_runs(job, jobs)
        jobs.append(job)
    return jobs


def _meant(name: str, jobs: Mapping[str, Any]) -> str:
    if name in jobs:
        return f", which jobs.{name}=null takes out"
    near = difflib.get_close_matches(name, jobs, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f", which is no job; {hint}There are {', '.join(jobs)}"


def _read_job(name: str, given: JobConfig, config: LaunchConfig) -> Job:
    if Path(name).name != name or name in {"", ".."}:
        raise ValueError("its name is to be a file's; give it one without slashes")
    if given.command not in (*COMPOSED, "demo"):
        known = ", ".join((*COMPOSED, "demo"))
        raise ValueError(f"command = {given.command!r}; choose one of {known}")
    recipe = [f"recipe={given.recipe}"] if given.recipe else []
    arguments = (*recipe, *given.settings, *given.also)
    settings, plain = None, {}
    if given.command == "demo":
        if given.recipe:
            raise ValueError(f"recipe = {given.recipe}, and `sfumato demo` has none")
    else:
        settings, plain = compose_command(given.command, arguments)
    processes, nodes = _places(given, config)
    made_of = json.dumps([given.command, arguments if settings is None else plain], sort_keys=True)
    digest = hashlib.sha256(made_of.encode()).hexdigest()
    return Job(name, given.command, arguments, processes, nodes, settings, digest)


def _places(given: JobConfig, config: LaunchConfig) -> tuple[int, int]:
    """Return the processes on each machine, and the machines, of a job."""
    match config.cluster:
        case LocalClusterConfig() as local:
            processes, nodes = local.processes, 1
        case SlurmClusterConfig() as slurm:
            processes, nodes = max(1, slurm.gpus_per_node), slurm.nodes
        case other:
            raise AssertionError(other)
    if given.command not in DISTRIBUTED:
        processes, nodes = 1, 1
    chosen = {
        "processes": processes if given.processes is None else given.processes,
        "nodes": nodes if given.nodes is None else given.nodes,
    }
    for key, value in chosen.items():
        if value < 1:
            raise ValueError(f"{key} = {value} must be 1 or more")
        if value > 1 and given.command not in DISTRIBUTED:
            raise ValueError(f"{key} = {value}, and {given.command} runs in one process")
    if chosen["nodes"] > 1 and isinstance(config.cluster, LocalClusterConfig):
        raise ValueError(f"nodes = {chosen['nodes']}, and cluster=local is one; use cluster=slurm")
    return chosen["processes"], chosen["nodes"]


def _check(job: Job, promised: Sequence[Path]) -> None:
    """Refuse settings that cannot work, and files that are not there and no earlier job makes."""
    settings = copy.deepcopy(job.settings)
    for key in FILES.get(job.command, ()):
        value = value_of(settings, key)
        if value is not None and any(is_below(value, out) for out in promised):
            if key in WEIGHTS:  # cannot be looked at yet
                _set(settings, key, None)
        elif value is not None and not _found(value, key in OR_HUB):
            raise ValueError(f"{key} = {value} is not there, and no job before makes it")
    if isinstance(settings, TrainConfig):
        check_train(settings, job.processes * job.nodes)
    elif isinstance(settings, PrepareConfig):
        check_prepare(settings)


def _refuse_shared_runs(job: Job, earlier: Sequence[Job]) -> None:
    for other in earlier:
        if job.command == other.command == "train" and _resolved(job.out) == _resolved(other.out):
            raise ValueError(
                f"jobs {other.name} and {job.name} both train in {job.out}; give each its own "
                "name=..."
            )


def value_of(settings: Any, key: str) -> str | None:
    """Return the setting of a dotted key."""
    node = settings
    for name in key.split("."):
        node = vars(node)[name]
    assert node is None or isinstance(node, str)
    return node


def is_below(value: str, folder: Path) -> bool:
    """Say whether a path is the folder's, or of something in it."""
    return _resolved(Path(value)).is_relative_to(_resolved(folder))


def makes_index(job: Job) -> bool:
    """Say whether the job ends with the index of a prepared folder."""
    return isinstance(job.settings, PrepareConfig) and "index" in job.settings.stages


def _found(value: str, hub: bool) -> bool:
    """Say whether a path is there, or is none that can be looked for.

    Args:
        hub: whether it may be the name of something on the hub instead.
    """
    if hub and value[:1] not in "/.~" and value.count("/") < 2:
        return True
    pattern = any(letter in value for letter in "*?[{")
    return pattern or Path(value).expanduser().exists()


def _resolved(path: Path | None) -> Path:
    assert path is not None
    return path.expanduser().absolute()


def _set(settings: Any, key: str, value: str | None) -> None:
    place, _, name = key.rpartition(".")
    node = settings
    for part in place.split("."):
        node = vars(node)[part]
    vars(node)[name] = value
