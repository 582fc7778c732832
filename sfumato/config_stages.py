"""The settings of `sfumato prepare`, `launch` and `plan`: what comes before a run and around it."""

from dataclasses import dataclass, field
from typing import Any

from sfumato.config import (
    MISSING,
    EvaluateConfig,
    ImageSourceConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
)


@dataclass
class DownloadConfig:
    """A table of URLs and captions, whose images img2dataset fetches."""

    table: str | None = None  # parquet, csv or jsonl; a folder of them; a hub dataset id
    url_column: str = "url"
    caption_column: str = "caption"
    columns: list[str] = field(default_factory=list)  # others to keep: scores, more captions
    image_size: int | None = None  # pixels of the smaller side; null keeps the files as they are
    samples_per_shard: int = 10_000
    processes: int = 1
    threads: int = 32
    timeout: int = 10  # seconds
    retries: int = 0


@dataclass
class PackConfig(ImageSourceConfig):
    """What is packed into uniform tars: what was downloaded, or images that lie here."""

    captions: list[str] = field(default_factory=list)  # columns of further captions
    columns: list[str] = field(default_factory=list)  # columns to keep, for filters
    samples_per_shard: int = 1000
    max_pixels: int = 178_956_970  # leave out what is larger; Pillow's bound
    workers: int = 2  # threads


@dataclass
class FilterConfig:
    """Which samples of the tars are kept, under a name of its own; null is no bound."""

    name: str = "all"
    min_size: int | None = None  # pixels of the smaller side
    max_size: int | None = None  # pixels of the larger side
    max_aspect: float | None = None  # longer side / shorter side
    min_caption: int | None = None  # characters
    max_caption: int | None = None
    score: str | None = None  # a column kept by pack
    min_score: float | None = None
    max_score: float | None = None
    duplicates: str = "keep"  # keep | drop: all but the first with the same bytes


@dataclass
class PrecacheConfig:
    """How pictures and captions of a selection are encoded, once for all steps."""

    selection: str | None = None  # null is filter.name
    height: int | None = None  # pixels; null is the model's own size
    width: int | None = None
    crop: str = "center"
    flip: bool = False  # store mirrored pictures too
    dtype: str = "float16"  # of what is stored: float32 | bfloat16 | float16
    batch_size: int = 16
    workers: int = 4  # threads that decode


@dataclass
class PrepareConfig:
    """`sfumato prepare`: from URLs or images to what training reads."""

    out: str = MISSING  # the folder that is prepared
    stages: list[str] = field(
        default_factory=lambda: ["download", "pack", "filter", "precache", "index"]
    )
    download: DownloadConfig = field(default_factory=DownloadConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    precache: PrecacheConfig = field(default_factory=PrecacheConfig)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(pretrained=None))  # encodes


@dataclass
class ClusterConfig:
    """Where jobs run; `kind` is the choice of the group."""

    kind: str = MISSING


@dataclass
class LocalClusterConfig(ClusterConfig):
    """This machine: several processes through torchrun, one job after the other."""

    kind: str = "local"
    processes: int = 1
    max_restarts: int = 0  # of a job whose process died


@dataclass
class SlurmClusterConfig(ClusterConfig):
    """Slurm: each job after the one before it, requeued at its time limit."""

    kind: str = "slurm"
    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_task: int = 64
    time: str = "4:00:00"  # [[DD-]HH:]MM:SS
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    mem: str | None = None
    signal_seconds: int = 300  # before the time limit, to save in
    max_requeues: int = 100  # of a job
    max_restarts: int = 0  # of a job whose process died, without a new place in the queue
    setup: list[str] = field(default_factory=list)  # shell lines before each job
    additional: dict[str, Any] = field(default_factory=dict)  # further sbatch options


CLUSTERS: dict[str, type[ClusterConfig]] = {
    "local": LocalClusterConfig,
    "slurm": SlurmClusterConfig,
}


@dataclass
class JobConfig:
    """One stage: one command, and one job."""

    command: str = MISSING  # prepare | train | evaluate | sample | demo
    recipe: str | None = None
    settings: list[str] = field(default_factory=list)  # KEY=VALUE, as on the command line
    also: list[str] = field(default_factory=list)  # further ones, after those of a recipe
    processes: int | None = None  # on each machine; null is the cluster's, of prepare and train
    nodes: int | None = None  # machines, under Slurm; null likewise


@dataclass
class LaunchConfig:
    """`sfumato launch`: stages, each one job, one after the other."""

    name: str = "launch"
    runs_dir: str = "runs"
    stages: list[str] = field(default_factory=list)  # of `jobs`; empty is all, in their order
    jobs: dict[str, Any] = field(default_factory=dict)  # NAME: {command: ..., ...}
    given: dict[str, Any] = field(default_factory=dict)  # NAME: what jobs read as ${given.NAME}
    cluster: ClusterConfig = MISSING
    dry_run: bool = False  # print scripts and commands, and do nothing


@dataclass
class PlanConfig(TrainConfig):
    """`sfumato plan`: what a training recipe costs, before it is paid for."""

    gpu: str = "h200"  # a100 | h100 | h200 | b200 | cpu
    gpus: int = 1
    utilisation: float = 0.35  # of the peak FLOPs; docs/plan.md says what others reached
    samples: int | None = None  # pairs in the data; null is what is seen once
    image_bytes: int = 100_000  # of one stored picture with its caption


COMMANDS = {
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "prepare": PrepareConfig,
    "launch": LaunchConfig,
    "plan": PlanConfig,
}
