"""Settings of the commands around training: sample, evaluate, prepare, launch, plan."""

# ruff: noqa: RUF009 -- the calls return fields

from dataclasses import dataclass, field
from typing import Any

from sfumato.config.fields import Rule, choice, count, entries, folder_name, not_negative, setting
from sfumato.config.train import (
    MAX_PIXELS,
    MISSING,
    PIXELS,
    UNIT,
    ImageSourceConfig,
    ModelConfig,
    TrainConfig,
)

JOB_COMMANDS = ("prepare", "train", "evaluate", "sample", "demo")
STAGES = ("download", "pack", "filter", "precache", "index")


@dataclass
class SamplerOverrides:
    """Settings of the sampler; null takes the run's."""

    num_inference_steps: int | None = count(None)
    guidance_scale: float | None = None
    eta: float | None = setting(None, UNIT)
    height: int | None = count(None)  # pixels
    width: int | None = count(None)


@dataclass
class SampleConfig:
    """`sfumato sample`: images of a run, or of a model."""

    run: str | None = None  # a run folder
    step: str | None = None  # number of a checkpoint, or best; null is the last
    pretrained: str | None = None  # a diffusers folder or hub id, instead of a run
    prompt: str | None = setting(None, Rule(blank=True))  # one prompt
    prompts: str | None = None  # a prompt file, instead of one prompt
    column: str | None = None  # of prompts in a table
    num_images: int = count(4)  # per prompt
    seed: int = 0
    batch_size: int = count(4)
    schedule: str = "draft"  # annealed importance guidance: base, draft, linear, power_P, step_F
    sampler: SamplerOverrides = field(default_factory=SamplerOverrides)
    out: str = "samples"  # folder of the images


@dataclass
class EvaluateConfig:
    """`sfumato evaluate`: scores and images of a run's checkpoints, in the run folder."""

    run: str = MISSING  # a run folder
    steps: list[int] | None = not_negative(None)  # null is every checkpoint, and 0, the base model
    prompts: str | None = None  # null is the run's validation prompts
    column: str | None = None  # of prompts in a table
    num_images: int = count(16)  # per prompt
    seed: int = 4321
    batch_size: int = count(8)
    features: str = "pixels"  # for diversity: pixels, lpips, a CLIP folder or hub id


@dataclass
class DownloadConfig:
    """A table of URLs and captions; img2dataset fetches the images."""

    table: str | None = None  # a table; a folder or pattern of them; a hub dataset id
    url_column: str = "url"
    caption_column: str = "caption"
    columns: list[str] = field(default_factory=list)  # others to keep: scores, more captions
    image_size: int | None = count(None)  # pixels of the smaller side; null keeps the files
    samples_per_shard: int = count(10_000)
    processes: int = count(1)
    threads: int = count(32)
    timeout: int = count(10)  # seconds
    retries: int = not_negative(0)


@dataclass
class PackConfig(ImageSourceConfig):
    """What to pack into uniform tars: the downloaded images, or images on this disk."""

    captions: list[str] = field(default_factory=list)  # columns of further captions
    columns: list[str] = field(default_factory=list)  # columns to keep, for filters
    samples_per_shard: int = count(1000)
    max_pixels: int = setting(MAX_PIXELS, PIXELS)  # leave out larger images; Pillow's limit
    workers: int = count(2)  # threads


@dataclass
class FilterConfig:
    """Which samples of the tars to keep, as a named selection; null is no bound."""

    name: str = "all"  # of the selection
    min_size: int | None = count(None)  # pixels of the smaller side
    max_size: int | None = count(None)  # pixels of the larger side
    max_aspect: float | None = setting(None, Rule(least=1))  # longer side / shorter side
    min_caption: int | None = not_negative(None)  # characters
    max_caption: int | None = count(None)
    score: str | None = None  # a column of pack.columns
    min_score: float | None = None
    max_score: float | None = None
    duplicates: str = choice("keep", "drop")  # drop all but the first file with the same bytes


@dataclass
class PrecacheConfig:
    """How to encode the pictures and captions of a selection into a cache."""

    selection: str | None = None  # null is filter.name
    height: int | None = count(None)  # pixels; null is the model's own size
    width: int | None = count(None)
    crop: str = choice("center", "random")  # a cache holds one crop of each picture: center
    flip: bool = False  # store mirrored pictures too
    dtype: str = choice("float16", "float32", "bfloat16")  # of the stored tensors
    batch_size: int = count(16)
    workers: int = not_negative(4)  # threads that decode


@dataclass
class PrepareConfig:
    """`sfumato prepare`: turn URLs or images into tars and caches that training reads."""

    out: str = MISSING  # the folder to prepare
    stages: list[str] = setting(list(STAGES), Rule(choices=STAGES))  # to run
    download: DownloadConfig = field(default_factory=DownloadConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    precache: PrecacheConfig = field(default_factory=PrecacheConfig)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(pretrained=None))  # the encoders


@dataclass
class ClusterConfig:
    """Where jobs run; the chosen class is named in `kind`."""

    kind: str = MISSING


@dataclass
class LocalClusterConfig(ClusterConfig):
    """This machine: several processes through torchrun, one job after the other."""

    kind: str = "local"
    processes: int = count(1)
    max_restarts: int = not_negative(0)  # of a job whose process died


@dataclass
class SlurmClusterConfig(ClusterConfig):
    """Slurm: each job starts after the one before it, and is requeued at its time limit."""

    kind: str = "slurm"
    nodes: int = count(1)
    gpus_per_node: int = not_negative(8)
    cpus_per_task: int = count(64)
    time: str = "4:00:00"  # [[DD-]HH:]MM:SS
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    mem: str | None = None
    signal_seconds: int = count(300)  # before the time limit: when to save
    max_requeues: int = not_negative(100)  # of a job
    max_restarts: int = not_negative(0)  # of a job whose process died, without requeueing
    setup: list[str] = field(default_factory=list)  # shell lines before each job
    additional: dict[str, Any] = field(default_factory=dict)  # further sbatch options


CLUSTERS: dict[str, type[ClusterConfig]] = {
    "local": LocalClusterConfig,
    "slurm": SlurmClusterConfig,
}


@dataclass
class JobConfig:
    """One stage of a launch: one command in one job."""

    command: str = setting(MISSING, Rule(choices=JOB_COMMANDS))
    recipe: str | None = None
    settings: list[str] = setting([], Rule(interpolated=True))  # KEY=VALUE, as on the command line
    also: list[str] = setting([], Rule(interpolated=True))  # more KEY=VALUE, for a recipe's job
    processes: int | None = count(None)  # per machine; null: the cluster's for prepare and train
    nodes: int | None = count(None)  # Slurm machines; null: the cluster's for prepare and train


@dataclass
class LaunchConfig:
    """`sfumato launch`: run stages, each one job, one after the other."""

    name: str = folder_name("launch")  # in runs_dir
    runs_dir: str = "runs"
    stages: list[str] = field(default_factory=list)  # names of jobs; empty runs all, in order
    jobs: dict[str, Any] = entries(JobConfig)  # NAME: {command: ..., ...}
    given: dict[str, Any] = entries(str)  # NAME: a text; jobs read it as ${given.NAME}
    cluster: ClusterConfig = MISSING
    dry_run: bool = False  # only print scripts and commands


@dataclass
class PlanConfig(TrainConfig):
    """`sfumato plan`: what a training recipe will cost."""

    gpu: str = choice("h200", "a100", "h100", "b200", "cpu")
    gpus: int = count(1)
    utilisation: float = setting(0.35, Rule(above=0, most=1))  # of the peak FLOPs; see docs/plan.md
    samples: int | None = count(None)  # pairs in the data; null: as many as are seen, each once
    image_bytes: int = count(100_000)  # of one stored picture with its caption


COMMANDS = {
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "prepare": PrepareConfig,
    "launch": LaunchConfig,
    "plan": PlanConfig,
}
