"""Settings of training."""

# ruff: noqa: RUF009 -- the calls return fields

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.config.fields import (
    COUNT,
    DTYPES,
    FEW,
    FILLED,
    FOLDER,
    FRACTION,
    MISSING,
    NOT_NEGATIVE,
    POSITIVE,
    SIDE,
    UNIT,
    Rule,
    choice,
    entries,
    setting,
)
from sfumato.config.objectives import OBJECTIVES, ObjectiveConfig
from sfumato.config.rewards import REWARDS, RewardConfig

CONF = Path(__file__).parents[1] / "conf"
MAX_PIXELS = 178_956_970  # Pillow refuses more as a decompression bomb
PIXELS = Rule(least=1, most=MAX_PIXELS)
LAYERS = Rule(regex=True, filled=True)
SOLVERS = ("first_order", "dpmpp_2m")
SPACINGS = ("leading", "trailing")
# Classes of diffusers that step pictures; UniPC alone follows all settings of flow models.
_NAMES = (
    "UniPCMultistep DPMSolverMultistep DPMSolverSinglestep DEISMultistep HeunDiscrete LMSDiscrete "
    "EulerDiscrete EulerAncestralDiscrete KDPM2Discrete KDPM2AncestralDiscrete PNDM LCM DDPM DDIM"
)
SCHEDULERS = tuple(f"{name}Scheduler" for name in _NAMES.split())
FLOW_SCHEDULERS = SCHEDULERS[:1]
OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor", "muon", "prodigy", "sgd", "own")


@dataclass
class LoraConfig:
    """Low-rank adapters: W + (alpha / rank) B A, with B = 0 at the start."""

    rank: int = setting(32, Rule(least=1, most=16_384))
    alpha: float | None = setting(None, POSITIVE)  # null means alpha = rank
    dropout: float = setting(0.0, FRACTION)
    targets: list[str] | None = setting(None, LAYERS)  # of the network; null: the family's
    encoder_targets: list[str] | None = setting(None, LAYERS)  # of text encoders; null: as above
    start: str | None = None  # a LoRA file, or its folder, to continue training from
    merge_rollouts: bool = False  # merge into float32 weights where no gradient is recorded


@dataclass
class MergeConfig:
    """A LoRA file to merge into the base before training: W + scale x its change."""

    path: str = MISSING  # a .safetensors file, or its folder
    scale: float = 1.0  # not 0


@dataclass
class NetworkConfig:
    """Where the network comes from, if not from `model.pretrained`."""

    config: str | None = None  # sd1, sd2 or a diffusers config.json: random weights, to pretrain
    from_pretrained: str | None = None  # weights only: a run, a diffusers folder, an original file
    from_NeMo: bool | None = None  # noqa: N815  the file has NeMo's names; null: recognise them
    ema: bool = True  # prefer averaged weights, if the file has both


@dataclass
class ModelConfig:
    """Which weights to load, and which of them to train."""

    pretrained: str | None = MISSING  # a diffusers folder or hub id; null with model.network.config
    variant: str | None = None  # file variant such as fp16
    allow_pickle: bool = False  # pickled weights can run code; safetensors cannot
    network: NetworkConfig = field(default_factory=NetworkConfig)
    autoencoder: str | None = None  # a diffusers folder or an original file
    text_encoder: str | None = None  # a CLIP of transformers or OpenCLIP
    tokenizer: str | None = None  # null is text_encoder's own
    scheduler: str | None = None  # a diffusers folder; null is SD's DDIM
    prediction_type: str = choice("epsilon", "v_prediction")
    image_size: int | None = setting(None, SIDE)  # pixels of a side
    family: str | None = None  # refuse a folder of another family; null accepts any
    trainable: str = choice("lora", "full")  # adapters, or all weights
    parts: list[str] = setting(["network"], FILLED)  # and text encoders, by name
    lora: LoraConfig = field(default_factory=LoraConfig)
    reference: bool = True  # keep a frozen copy, if the objective needs one
    dtype: str = choice(*DTYPES)  # of frozen weights
    gradient_checkpointing: bool = False  # of network and decoder
    channels_last: bool = False  # memory layout of convolutions that tensor cores read fastest
    merge: dict[str, Any] = entries(MergeConfig)  # NAME: {path: ..., scale: ...}


@dataclass
class SamplerConfig:
    """How images are sampled: in training, validation and inference."""

    num_inference_steps: int = setting(50, FEW)
    guidance_scale: float = 7.5
    eta: float = setting(0.0, UNIT)  # 0 is deterministic
    height: int | None = setting(None, SIDE)  # pixels; null is the model's own size
    width: int | None = setting(None, SIDE)
    solver: str = choice(*SOLVERS)  # DDIM or Euler; DPM-Solver++ 2M needs fewer steps
    guidance_interval: list[float] | None = setting(None, UNIT)  # [low, high] of t; null is all t
    training_steps: int | None = setting(None, FEW)  # of rollouts; null is num_inference_steps
    training_spacing: str | None = setting(None, Rule(choices=SPACINGS))  # null is the release's
    prompt_cache: int = setting(0, NOT_NEGATIVE)  # prompts whose states are kept, encoded alone
    negative_prompt: str | None = setting(
        None, Rule(blank=True)
    )  # guidance leads away from it; null: the empty one, which caption dropout trains in any case
    scheduler: str | None = setting(
        None, Rule(choices=SCHEDULERS)
    )  # of diffusers, for pictures alone; null: solver, which training takes in any case

    @property
    def rollout_steps(self) -> int:
        """Sampling steps of an objective's rollout."""
        return self.training_steps or self.num_inference_steps


GROUPS = {"objective": OBJECTIVES, "reward": REWARDS}


@dataclass
class ImageSourceConfig:
    """An image folder, a table beside images, WebDataset tars or a Hugging Face dataset."""

    path: str | None = None  # folder, table, tars or dataset; also a glob or brace pattern
    base_path: str | None = None  # folder that a table's paths start from; null is the table's own
    image_column: str | None = None  # null is the first of image, file_name, path
    caption_column: str | None = None  # null is the first of caption, text, prompt
    repeats: int = setting(1, COUNT)  # times in an epoch
    weight: float | None = setting(None, POSITIVE)  # share of the rows; null: by size x repeats


@dataclass
class ImageDataConfig(ImageSourceConfig):
    """Images with captions: one source, or several in `sources`, by any names."""

    sources: dict[str, Any] = entries(ImageSourceConfig)  # NAME: {path: ..., ...}
    cache: str = choice("off", "auto")  # auto: encode all once, into runs_dir/NAME/cache
    crop: str = choice("center", "random")
    flip: bool = False  # mirror every second image, at random
    captions: str = choice("first", "random")  # of a picture that has several
    caption_lines: str = choice("first", "all", "random")  # of a caption that has several
    buckets: bool = False  # keep aspect ratios: each image is cropped to the nearest of several
    min_size: int | None = setting(None, COUNT)  # pixels; smaller ones are left out; null: enlarged
    max_pixels: int = setting(MAX_PIXELS, PIXELS)  # leave out larger images; Pillow's limit
    shuffle: bool = True
    workers: int = setting(4, NOT_NEGATIVE)  # threads that decode; 0 decodes when asked
    prefetch: int = setting(2, NOT_NEGATIVE)  # batches decoded ahead


@dataclass
class ShardSourceConfig:
    """A folder that `sfumato prepare` wrote."""

    path: str | None = None  # the prepared folder, or its address in a store (s3://, https://)
    selection: str = "all"  # name of the filter whose samples are read
    repeats: int = setting(1, COUNT)  # times in an epoch
    weight: float | None = setting(None, POSITIVE)  # share of the rows; null: by size x repeats


@dataclass
class ShardDataConfig(ShardSourceConfig):
    """Prepared images with captions, as tars or a cache: one folder, or several in `sources`."""

    sources: dict[str, Any] = entries(ShardSourceConfig)  # NAME: {path: ..., ...}
    cached: bool = False  # latents and text states instead of pictures and captions
    crop: str = choice("center", "random")  # random from tars only
    flip: bool = False  # mirror every second image, at random; a cache must hold mirrored ones
    captions: str = choice("first", "random")  # of a picture that has several
    buckets: bool = False  # keep aspect ratios; a cache must hold moments of each size
    min_size: int | None = setting(None, COUNT)  # pixels; smaller ones are left out; null: enlarged
    max_pixels: int = setting(MAX_PIXELS, PIXELS)  # leave out larger images
    shuffle: bool = True
    buffer: int = setting(10_000, COUNT)  # samples of the window in which samples are shuffled
    workers: int = setting(4, NOT_NEGATIVE)  # threads that read and decode; 0 reads when asked
    prefetch: int = setting(2, NOT_NEGATIVE)  # batches read ahead
    cache_dir: str | None = None  # of a store's shards; null is ~/.cache/sfumato/shards
    cache_gb: float = setting(20.0, POSITIVE)  # 10^9 bytes of them that are kept at most


@dataclass
class PairDataConfig:
    """Preference pairs: two images of one caption, and which of them is preferred."""

    path: str | None = None  # tables, or a folder with metadata.jsonl; also a glob or brace pattern
    base_path: str | None = None  # folder that a table's paths start from; null is the table's own
    image_columns: list[str] = setting(["jpg_0", "jpg_1"], FILLED)  # of bytes or paths
    label_columns: list[str] = setting(["label_0", "label_1"], FILLED)  # 1 and 0, or .5 and .5
    caption_column: str | None = None  # null is the first of caption, text, prompt
    ties: str = choice("drop", "keep")  # pairs of labels .5 and .5
    cache: str = choice("off", "auto")  # auto: encode all once, into runs_dir/NAME/cache
    crop: str = choice("center", "random")  # random: alike in both images
    flip: bool = False  # mirror both images of every second pair, at random
    min_size: int | None = setting(None, COUNT)  # pixels; smaller ones are left out; null: enlarged
    max_pixels: int = setting(MAX_PIXELS, PIXELS)  # leave out larger images; Pillow's limit
    shuffle: bool = True
    buffer: int = setting(1000, COUNT)  # pairs of the window in which pairs are shuffled
    workers: int = setting(4, NOT_NEGATIVE)  # threads that decode; 0 decodes when asked
    prefetch: int = setting(2, NOT_NEGATIVE)  # batches decoded ahead


@dataclass
class DataConfig:
    """Training data: prompts (DRaFT), images with captions (supervised) or pairs (DPO)."""

    prompts: str | None = None  # .txt, tables, .tar; a folder, glob or brace pattern
    column: str | None = None  # of prompts in a table
    shuffle: bool = True  # prompts
    buffer: int = setting(10_000, COUNT)  # prompts held for shuffling
    images: ImageDataConfig = field(default_factory=ImageDataConfig)
    shards: ShardDataConfig = field(default_factory=ShardDataConfig)  # instead of images
    pairs: PairDataConfig = field(default_factory=PairDataConfig)
    verify: bool = False  # tars of data.shards by SHA-256 before they are read; caches always are


@dataclass
class OptimizerConfig:
    """The optimiser, and its learning rate: a warm-up, then a schedule."""

    kind: str = choice(*OPTIMIZERS)  # docs/optimizers.md
    path: str | None = None  # of kind=own: FILE.py:CLASS or package.module:CLASS
    lr: float = setting(1e-4, POSITIVE)  # of prodigy 1: a factor of the rate that it finds
    betas: list[float] = setting([0.9, 0.999], FRACTION)
    eps: float = setting(1e-8, NOT_NEGATIVE)
    weight_decay: float = setting(0.0, NOT_NEGATIVE)
    warmup_steps: int = setting(10, NOT_NEGATIVE)
    schedule: str = choice("constant", "linear", "cosine")  # of lr, after the warm-up
    max_grad_norm: float = setting(10.0, POSITIVE)
    options: dict[str, Any] = field(default_factory=dict)  # NAME: VALUE, of the class alone


@dataclass
class ValidationConfig:
    """Pairs (tuned, base) of fixed prompts and fixed noise, and the loss of held-out data."""

    prompts: str | None = None  # null: the first of data.prompts, or captions of the data
    column: str | None = None  # of validation.prompts in a table
    num_images: int = setting(8, FEW)
    every_steps: int = setting(100, NOT_NEGATIVE)  # 0 is off
    seed: int = 1234
    images: ImageDataConfig = field(default_factory=ImageDataConfig)  # held out
    pairs: PairDataConfig = field(default_factory=PairDataConfig)  # held out
    loss_images: int = setting(64, Rule(least=0, most=10**6))  # for its loss, or pairs; 0 is off
    rewards: dict[str, Any] = entries(RewardConfig)  # NAME: {kind: ..., ...}; never trained on
    gauges: bool = True  # of reward hacking: docs/reward_hacking.md


@dataclass
class GuardConfig:
    """A limit of what validation measures, and what happens beyond it."""

    metric: str | None = None  # null is the guard's NAME
    limit: float | None = None  # null: limit and `relative` of the default guard NAME
    relative: str = choice("off", "ratio", "difference")  # to the base model's own value
    direction: str | None = setting(None, Rule(choices=("above", "below")))  # null: the bad side
    action: str = choice("warn", "stop", "rollback")  # rollback: the best step is the result
    patience: int = setting(1, COUNT)  # validations in a row beyond the limit


@dataclass
class TrainingConfig:
    """The loop."""

    max_steps: int = setting(1000, Rule(least=1, most=10**12))
    target_reward: float | None = None  # end when the reward of validation images reaches it
    micro_batch_size: int = setting(1, FEW)  # images per process and forward
    global_batch_size: int = setting(4, FEW)  # images per optimiser step, over all processes
    precision: str = choice("no", "bf16", "fp16")  # of autocast
    strategy: str = choice("ddp", "fsdp", "hsdp")  # with more than one process
    shard_size: int | None = setting(None, COUNT)  # processes per copy; null is one machine's
    compile: str = choice("none", "regional", "full")  # regional: the repeated blocks only
    ema_decay: float | None = setting(0.9999, FRACTION)  # null: off; warm-up (1 + n) / (10 + n)
    ema_every_steps: int = setting(1, FEW)  # update the average every N steps, with decay^N
    ema_on_cpu: bool = False  # keep the average off the device
    async_checkpoints: bool = True  # write while training goes on
    sharded_checkpoints: bool | None = None  # a file of each process; null: above 32 GB of state
    peak_tflops: float | None = setting(None, POSITIVE)  # of one device; null looks its name up
    checkpoint_every_steps: int = setting(100, COUNT)
    keep_checkpoints: int | None = setting(3, COUNT)  # null keeps all
    max_time: str | None = None  # save and stop after [[DD:]HH:]MM:SS of wall clock
    seed: int = 0
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclass
class TrainConfig:
    """`sfumato train`: fine-tune, align or pretrain a text-to-image model."""

    name: str = setting("run", FOLDER)  # in runs_dir
    runs_dir: str = "runs"  # folder of all runs
    export: str = choice("last", "best")  # best has the lowest validation loss
    verify: bool = True  # load each export with diffusers and compare an image
    allow_changed: list[str] = field(default_factory=list)  # settings whose files may be others now
    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    objective: ObjectiveConfig = MISSING
    reward: RewardConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    guard: dict[str, Any] = entries(GuardConfig)  # NAME: {limit: ..., action: ...}
