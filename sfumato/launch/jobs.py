"""Jobs of a launch: one command each, all composed and checked before the first starts."""

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfumato.check import check_train
from sfumato.compose import compose_command
from sfumato.conditions import check_sample, leaves_of
from sfumato.config import (
    FOLDER,
    EvaluateConfig,
    JobConfig,
    LaunchConfig,
    LocalClusterConfig,
    PrepareConfig,
    SampleConfig,
    SlurmClusterConfig,
    TrainConfig,
)
from sfumato.data.store import check_addresses, is_address
from sfumato.explain import nearest
from sfumato.models.registry import find_family
from sfumato.preparation.settings import check_prepare

DISTRIBUTED = ("prepare", "train")  # commands that run in the cluster's processes
SEVERAL = (*DISTRIBUTED, "evaluate")  # commands that can run in those that their job names
SHARED = ("prepare", "evaluate")  # commands whose work tasks of an array can share
SHARED_STAGES = ("pack", "precache")  # of prepare
ARRAY = ".array"  # behind the name of a job: the array that shares its work
WEIGHTS = ("model.lora.start", "model.network.from_pretrained")
MODEL_FILES = ("model.pretrained", "model.autoencoder", "model.text_encoder", "model.tokenizer")
# Settings that name files to read; those of OR_HUB may hold an id of the hub instead.
FILES = {
    "train": (
        r"(data|validation)\.prompts|(data|validation)\.images\.(sources\..+\.)?(path|base_path)",
        r"data\.shards\.(sources\..+\.)?path|model\.(lora\.start|scheduler|merge\..+\.path)",
        r"model\.(pretrained|autoencoder|text_encoder|tokenizer|network\.(config|from_pretrained))",
        r"(reward\.(parts\..+\.)?|validation\.rewards\..+\.)(pretrained|processor|predictor)",
    ),
    "prepare": (
        r"pack\.(path|base_path)|download\.table|model\.(scheduler|network\.config)",
        r"model\.(pretrained|autoencoder|text_encoder|tokenizer)",
    ),
    "evaluate": ("run|prompts|features",),
    "sample": ("run|prompts|pretrained",),
}
OR_HUB = (
    r"(model|reward|validation\.rewards)\."
    r".*(pretrained|processor|autoencoder|text_encoder|tokenizer|network\.config)"
    r"|download\.table|pretrained|features"
)
# Settings whose files a job starts from, often another job's result. A changed file is noticed.
STARTS = {
    "train": (*WEIGHTS, *MODEL_FILES),
    "prepare": ("pack.path", "download.table", *MODEL_FILES),
    "evaluate": ("run",),
    "sample": ("run",),
}


@dataclass(frozen=True)
class Job:
    """One command with its arguments and settings.

    Attributes:
        arguments: what follows `sfumato COMMAND`.
        processes: on each machine.
        nodes: machines, under Slurm.
        made_of: a hash of the command and of its full settings.
        settings: composed from the arguments; None for `demo`, which has options instead.
        array: how many tasks of a Slurm array share the work before the job finishes it; 0 is none.
    """

    name: str
    command: str
    arguments: tuple[str, ...]
    processes: int
    nodes: int
    made_of: str
    settings: Any
    array: int = 0

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
                options = (text.partition("=") for text in self.arguments)
                folders = (value for key, _, value in options if key in {"--rebuild", "--out"})
                folder = next(folders, None)
                return None if folder is None else Path(folder)
            case _:
                return None


def with_settings(job: Job) -> Job:
    """Return a job with its settings, composed anew."""
    settings = None if job.command == "demo" else compose_command(job.command, job.arguments)[0]
    return replace(job, settings=settings)


def read_jobs(config: LaunchConfig) -> list[Job]:
    """Return the jobs of the chosen stages in their order, every one of them checked.

    Raises:
        ValueError: naming the job, for whatever can be known to be wrong before the first starts.
    """
    if not config.jobs:
        raise ValueError(
            "there are no jobs; choose a recipe that has some (recipe=ladder/...), or write "
            "'jobs.NAME={command: train, recipe: ..., settings: [...]}'"
        )
    configs = {name: job for name, job in config.jobs.items() if job is not None}
    names = config.stages or list(configs)
    for name in names:
        if name not in configs:
            raise ValueError(f"stages = {names} names {name}{_advice(name, config.jobs)}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"stages = {names} names {repeated[0]} twice; each stage is one job")
    jobs: list[Job] = []
    for name in names:
        try:
            job = _read_job(name, configs[name], config)
            _check(job, [earlier.out for earlier in jobs if earlier.out])
        except ValueError as error:
            raise ValueError(f"job {name}: {error}") from error
        _refuse_shared_runs(job, jobs)
        jobs.append(job)
    return jobs


def _advice(name: str, jobs: Mapping[str, Any]) -> str:
    if name in jobs:
        return f", which jobs.{name}=null removes"
    return f", which is no job; {nearest(name, jobs)}"


def _read_job(name: str, config: JobConfig, launch: LaunchConfig) -> Job:
    FOLDER.check("name", name)
    if name.endswith(ARRAY):
        raise ValueError(f"a name that ends in {ARRAY} is that of an array; give another")
    if config.recipe and config.command == "demo":
        raise ValueError(f"recipe = {config.recipe}, but `sfumato demo` has no recipes")
    recipe = [f"recipe={config.recipe}"] if config.recipe else []
    arguments = (*recipe, *config.settings, *config.also)
    settings, content = None, arguments
    if config.command != "demo":
        settings, content = compose_command(config.command, arguments)
    text = json.dumps([config.command, content], sort_keys=True)
    made_of = hashlib.sha256(text.encode()).hexdigest()
    array = _array(config, launch, settings)
    size = _size(config, launch)
    return Job(name, config.command, arguments, *size, made_of, settings, array)


def _array(config: JobConfig, launch: LaunchConfig, settings: Any) -> int:
    """Return how many tasks of an array share a job's work."""
    array = config.array
    _refuse_part(settings)
    if array is None:
        return 0
    if isinstance(launch.cluster, LocalClusterConfig):
        raise ValueError(f"array = {array}, but cluster=local has none; use cluster=slurm")
    if config.command not in SHARED:
        raise ValueError(f"array = {array}, but {config.command} is not shared by tasks")
    if config.command == "evaluate" and (config.processes or 1) * (config.nodes or 1) > 1:
        raise ValueError(
            f"array = {array} shares checkpoints, and processes or nodes above 1 share the images "
            "of one; leave one of them out"
        )
    if config.command == "prepare":
        shared = [stage for stage in SHARED_STAGES if stage in settings.stages]
        if len(shared) != 1:
            raise ValueError(
                f"array = {array} shares one of the stages {' and '.join(SHARED_STAGES)}, and "
                f"stages = {list(settings.stages)} has {len(shared)} of them; write two jobs"
            )
        if settings.stages[0] != shared[0]:
            raise ValueError(
                f"array = {array} shares the stage {shared[0]}, and stages = "
                f"{list(settings.stages)} begins with another, which no task makes; write two jobs"
            )
        check_prepare(replace(settings, stages=shared, part=f"0/{array}"))
    return array


def _refuse_part(settings: Any) -> None:
    if isinstance(settings, PrepareConfig | EvaluateConfig) and settings.part is not None:
        raise ValueError(
            f"part={settings.part} leaves the rest of the work undone; give array=N to share a job"
        )


def helpers_of(job: Job) -> Job:
    """Return the tasks of the array that shares a job's work, as one job that runs before it."""
    arguments, processes = job.arguments, job.processes
    if isinstance(job.settings, PrepareConfig):
        (stage,) = (stage for stage in SHARED_STAGES if stage in job.settings.stages)
        arguments = (*arguments, f"stages=[{stage}]")
        if job.settings.workers is None and processes > 1:
            arguments = (*arguments, f"workers={processes}")
        if stage == "pack":
            processes = 0  # it needs no GPU
    name = f"{job.name}{ARRAY}"
    return replace(job, name=name, arguments=arguments, processes=processes, nodes=1)


def _size(config: JobConfig, launch: LaunchConfig) -> tuple[int, int]:
    """Return the processes on each machine, and the machines, of a job."""
    match launch.cluster:
        case _ if config.command not in DISTRIBUTED:
            processes, nodes = 1, 1
        case LocalClusterConfig() as local:
            processes, nodes = local.processes, 1
        case SlurmClusterConfig() as slurm:
            processes, nodes = max(1, slurm.gpus_per_node), slurm.nodes
        case other:
            raise AssertionError(other)
    processes, nodes = config.processes or processes, config.nodes or nodes
    if processes * nodes > 1 and config.command not in SEVERAL:
        raise ValueError(
            f"processes = {processes} and nodes = {nodes}, but {config.command} runs in one process"
        )
    if nodes > 1 and isinstance(launch.cluster, LocalClusterConfig):
        raise ValueError(f"nodes = {nodes}, but cluster=local is one; use cluster=slurm")
    return processes, nodes


def _check(job: Job, promised: Sequence[Path]) -> None:
    """Refuse impossible settings, and files that neither exist nor are made by an earlier job.

    Args:
        promised: the folders that earlier jobs fill.
    """
    settings, waits = copy.deepcopy(job.settings), False
    if job.command in FILES:
        check_addresses(leaves_of(job.settings))
    for key, value in _files(job):
        if any(_absolute(Path(value)).is_relative_to(_absolute(out)) for out in promised):
            waits = True
            if key in WEIGHTS:  # the checks would open it, and it does not exist yet
                section, name = _section_of(settings, key)
                section[name] = None
        elif not _exists(value, re.fullmatch(OR_HUB, key) is not None):
            raise ValueError(f"{key} = {value} does not exist, and no earlier job makes it")
    if isinstance(settings, TrainConfig):
        check_train(settings, job.processes * job.nodes)
        model = Path(settings.model.pretrained or "").expanduser()
        if not waits and (model / "model_index.json").is_file():
            find_family(settings.model, settings.sampler)
    elif isinstance(settings, PrepareConfig):
        check_prepare(settings)
    elif isinstance(settings, SampleConfig):
        check_sample(settings)


def _files(job: Job) -> Iterator[tuple[str, str]]:
    """Yield the settings of a job that name files, with their values."""
    pattern = "|".join(FILES.get(job.command, ()))
    for key, value, _ in leaves_of(job.settings) if pattern else ():
        if isinstance(value, str) and re.fullmatch(pattern, key):
            yield key, value


def _refuse_shared_runs(job: Job, earlier: Sequence[Job]) -> None:
    for other in earlier:
        if job.command == other.command == "train" and _absolute(job.out) == _absolute(other.out):
            raise ValueError(
                f"jobs {other.name} and {job.name} both train in {job.out}; give each its own "
                "name=..."
            )


def value_of(settings: Any, key: str) -> str | None:
    """Return the text of a dotted key, or None where it is not set."""
    section, name = _section_of(settings, key)
    assert section[name] is None or isinstance(section[name], str)
    return section[name]


def _exists(value: str, hub: bool) -> bool:
    """Return whether a path exists; a pattern, a hub id and an address are not looked up.

    Args:
        hub: whether the value may be a hub id.
    """
    if hub and value[:1] not in "/.~" and value.count("/") < 2:
        return True
    unknown = any(letter in value for letter in "*?[{") or is_address(value)
    return unknown or Path(value).expanduser().exists()


def _absolute(path: Path | None) -> Path:
    assert path is not None
    return path.expanduser().absolute()


def _section_of(settings: Any, key: str) -> tuple[dict[str, Any], str]:
    *sections, name = key.split(".")
    for section in sections:
        settings = vars(settings)[section]
    return vars(settings), name
