"""Settings of the commands around training: sample, evaluate, prepare, launch, plan."""

# ruff: noqa: RUF009 -- the calls return fields

from dataclasses import dataclass, field
from typing import Any

from sfumato.config.fields import (
    COUNT,
    FEW,
    FOLDER,
    NOT_NEGATIVE,
    SHARE,
    SIDE,
    UNIT,
    Rule,
    choice,
    entries,
    setting,
)
from sfumato.config.rewards import RewardConfig
from sfumato.config.train import (
    MAX_PIXELS,
    MISSING,
    PIXELS,
    SCHEDULERS,
    SOLVERS,
    ImageSourceConfig,
    ModelConfig,
    TrainConfig,
)

JOB_COMMANDS = ("prepare", "train", "evaluate", "sample", "demo")
STAGES = ("download", "pack", "filter", "precache", "index")
METRICS = ("fid", "kid", "cmmd", "precision_recall", "vendi", "clip_score")
LAYOUTS = ("geneval", "geneval2", "t2i_compbench", "dpg")


@dataclass
class SamplerOverrides:
    """Settings of the sampler; null takes the run's."""

    num_inference_steps: int | None = setting(None, FEW)
    guidance_scale: float | None = None
    negative_prompt: str | None = setting(None, Rule(blank=True))  # an empty text is none
    eta: float | None = setting(None, UNIT)
    height: int | None = setting(None, SIDE)  # pixels
    width: int | None = setting(None, SIDE)
    solver: str | None = setting(None, Rule(choices=SOLVERS))  # instead of the run's scheduler too
    scheduler: str | None = setting(None, Rule(choices=SCHEDULERS))  # of diffusers
    guidance_interval: list[float] | None = setting(None, UNIT)  # [low, high] of t
    prompt_cache: int | None = setting(None, NOT_NEGATIVE)


@dataclass
class MergedFile:
    """Where a LoRA file that a run merged lies now."""

    path: str | None = None


@dataclass
class ModelFiles:
    """Where the model of a run lies now; null is where the run had it."""

    pretrained: str | None = None  # a diffusers folder or hub id
    variant: str | None = None  # file variant such as fp16; also of pretrained=
    autoencoder: str | None = None  # beside a network that began at random
    text_encoder: str | None = None  # beside a network that began at random
    tokenizer: str | None = None  # beside a network that began at random
    scheduler: str | None = None  # beside a network that began at random
    merge: dict[str, Any] = entries(MergedFile)  # NAME: {path: ...}


@dataclass
class PartFiles:
    """Where the model of one part of a reward lies now."""

    pretrained: str | None = None
    processor: str | None = None
    predictor: str | None = None
    path: str | None = None
    url: str | None = None


@dataclass
class RewardFiles(RewardConfig):
    """The run's own reward: where its model lies now; null is where the run had it."""

    kind: str = field(default="trained", kw_only=True)
    pretrained: str | None = None  # a folder or hub id
    processor: str | None = None
    predictor: str | None = None  # a file
    path: str | None = None  # the function of a run with reward=function, which must be named again
    url: str | None = None  # the scorer of a run with reward=http, which must be named again
    parts: dict[str, Any] = entries(PartFiles)  # NAME: {pretrained: ...}


@dataclass
class ValidationFiles:
    """Where the models of a run's held-out rewards lie now."""

    rewards: dict[str, Any] = entries(PartFiles)  # NAME: {pretrained: ...}


@dataclass
class SampleConfig:
    """`sfumato sample`: images of a run, or of a model."""

    run: str | None = None  # a run folder
    step: str | None = None  # number of a checkpoint, or best; null is the last
    pretrained: str | None = None  # a diffusers folder or hub id, instead of a run
    allow_pickle: bool = False  # pickled weights can run code; a run's own setting is not believed
    prompt: str | None = setting(None, Rule(blank=True))  # one prompt
    prompts: str | None = None  # a prompt file, instead of one prompt
    column: str | None = None  # of prompts in a table
    num_images: int = setting(4, FEW)  # per prompt
    seed: int = 0
    batch_size: int = setting(4, FEW)
    schedule: str = "draft"  # annealed importance guidance: base, draft, linear, power_P, step_F
    sampler: SamplerOverrides = field(default_factory=SamplerOverrides)
    model: ModelFiles = field(default_factory=ModelFiles)  # of a run that has moved
    allow_changed: list[str] = field(default_factory=list)  # settings whose files may be others
    out: str = "samples"  # folder of the images


@dataclass
class EvaluateConfig:
    """`sfumato evaluate`: scores and images of a run's checkpoints, in the run folder."""

    run: str = MISSING  # a run folder
    steps: list[int] | None = setting(
        None, Rule(least=0, filled=True)
    )  # null is every checkpoint, and 0, the base model
    # Variants: each schedule with each scale, beside the images of the trained model alone.
    schedules: list[str] = setting(["draft"], Rule(filled=True))  # annealed importance guidance
    lora_scales: list[float] = setting([1.0], Rule(filled=True, above=0, most=100))  # of adapters
    guidance_scales: list[float] | None = setting(
        None, Rule(filled=True, least=0)
    )  # of classifier-free guidance; null is the run's own
    prompts: str | None = None  # null is the run's validation prompts
    column: str | None = None  # of prompts in a table
    num_images: int = setting(16, Rule(least=2, most=1_000_000))  # per prompt; 2 have a diversity
    seed: int = 4321
    batch_size: int = setting(8, FEW)
    part: str | None = None  # I/N: every N-th step and variant from I, beside others
    features: str = "pixels"  # for diversity: pixels, lpips, or a network's folder or hub id
    metrics: list[str] = setting([], Rule(choices=METRICS))  # of sets of images; docs/evaluate.md
    metric_features: str | None = None  # inception; DIR of a DINOv2, CLIP, SigLIP or classifier
    metric_clip: str | None = None  # CLIP of cmmd and clip_score; null is metric_features
    reference: str | None = None  # a folder of pictures, or one that sfumato prepare made
    layouts: list[str] = setting([], Rule(choices=LAYOUTS))  # folders that benchmarks read
    model: ModelFiles = field(default_factory=ModelFiles)  # of a run that has moved
    reward: RewardConfig = field(default_factory=RewardFiles)  # the run's own, or any other
    validation: ValidationFiles = field(default_factory=ValidationFiles)
    allow_changed: list[str] = field(default_factory=list)  # settings whose files may be others
    allow_pickle: bool = False  # pickled weights can run code; a run's own setting is not believed


@dataclass
class DownloadConfig:
    """A table of URLs and captions; img2dataset fetches the images."""

    table: str | None = None  # a table; a folder or pattern of them; a hub dataset id
    url_column: str = "url"
    caption_column: str = "caption"
    columns: list[str] = field(default_factory=list)  # others to keep: scores, more captions
    image_size: int | None = setting(
        None, COUNT
    )  # pixels of the smaller side; null keeps the files
    samples_per_shard: int = setting(10_000, COUNT)
    processes: int = setting(1, COUNT)
    threads: int = setting(32, COUNT)
    timeout: int = setting(10, COUNT)  # seconds
    retries: int = setting(0, NOT_NEGATIVE)


@dataclass
class PackConfig(ImageSourceConfig):
    """What to pack into uniform tars: the downloaded images, or images on this disk."""

    captions: list[str] = field(default_factory=list)  # columns of further captions
    columns: list[str] = field(default_factory=list)  # columns to keep, for filters
    caption_lines: str = choice("first", "all", "random")  # random: each line is a caption
    samples_per_shard: int = setting(1000, COUNT)
    max_pixels: int = setting(MAX_PIXELS, PIXELS)  # leave out larger images; Pillow's limit
    workers: int = setting(2, COUNT)  # threads


@dataclass
class FilterConfig:
    """Which samples of the tars to keep, as a named selection; null is no bound."""

    name: str = "all"  # of the selection
    min_size: int | None = setting(None, COUNT)  # pixels of the smaller side
    max_size: int | None = setting(None, COUNT)  # pixels of the larger side
    max_aspect: float | None = setting(None, Rule(least=1))  # longer side / shorter side
    min_caption: int | None = setting(None, NOT_NEGATIVE)  # characters
    max_caption: int | None = setting(None, COUNT)
    score: str | None = None  # a column of pack.columns
    min_score: float | None = None
    max_score: float | None = None
    duplicates: str = choice("keep", "drop")  # drop all but the first file with the same bytes


@dataclass
class PrecacheConfig:
    """How to encode the pictures and captions of a selection into a cache."""

    selection: str | None = None  # null is filter.name
    height: int | None = setting(None, SIDE)  # pixels; null is the model's own size
    width: int | None = setting(None, SIDE)
    crop: str = choice("center", "random")  # a cache holds one crop of each picture: center
    flip: bool = False  # store mirrored pictures too
    dtype: str = choice("float16", "float32", "bfloat16")  # of the stored tensors
    batch_size: int = setting(16, FEW)
    workers: int = setting(4, NOT_NEGATIVE)  # threads that decode


@dataclass
class PrepareConfig:
    """`sfumato prepare`: turn URLs or images into tars and caches that training reads."""

    out: str = MISSING  # the folder to prepare
    stages: list[str] = setting(list(STAGES), Rule(choices=STAGES, filled=True))  # to run
    engine: str = choice("local", "ray")  # ray: the workers of a Ray cluster
    workers: int | None = setting(None, FEW)  # processes; null: one here, or all of the cluster's
    ray: str | None = None  # HOST:PORT of a Ray cluster, or auto; null starts one here
    part: str | None = None  # I/N: every N-th tar from I, beside others; without it one finishes
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
    processes: int = setting(1, COUNT)
    max_restarts: int = setting(0, NOT_NEGATIVE)  # of a job whose process died


@dataclass
class SlurmClusterConfig(ClusterConfig):
    """Slurm: each job starts after the one before it, and is requeued at its time limit."""

    kind: str = "slurm"
    nodes: int = setting(1, COUNT)
    gpus_per_node: int = setting(8, NOT_NEGATIVE)
    cpus_per_task: int = setting(64, COUNT)
    time: str = "4:00:00"  # [[DD-]HH:]MM:SS
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    mem: str | None = None
    signal_seconds: int = setting(300, COUNT)  # before the time limit: when to save
    max_requeues: int = setting(100, NOT_NEGATIVE)  # of a job
    max_restarts: int = setting(0, NOT_NEGATIVE)  # of a job whose process died, without requeueing
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
    processes: int | None = setting(
        None, COUNT
    )  # per machine; null: the cluster's for prepare and train
    nodes: int | None = setting(
        None, COUNT
    )  # Slurm machines; null: the cluster's for prepare and train
    array: int | None = setting(None, COUNT)  # Slurm tasks that share a prepare or evaluate first


@dataclass
class LaunchConfig:
    """`sfumato launch`: run stages, each one job, one after the other."""

    name: str = setting("launch", FOLDER)  # in runs_dir
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
    gpus: int = setting(1, COUNT)
    utilisation: float = setting(0.35, SHARE)  # of the peak FLOPs; see docs/plan.md
    samples: int | None = setting(
        None, COUNT
    )  # pairs in the data; null: as many as are seen, each once
    image_bytes: int = setting(100_000, COUNT)  # of one stored picture with its caption


COMMANDS = {
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "prepare": PrepareConfig,
    "launch": LaunchConfig,
    "plan": PlanConfig,
}
