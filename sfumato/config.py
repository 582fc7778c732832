"""The settings of every command: each default lives here, once; conf/ is checked against them.

`???` marks what the user must state.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONF = Path(__file__).parent / "conf"
MISSING: Any = "???"


@dataclass
class LoraConfig:
    """Low-rank adapters: W + (alpha / rank) B A, with B = 0 at the start."""

    rank: int = 32
    alpha: float | None = None  # null means alpha = rank
    dropout: float = 0.0
    targets: list[str] | None = None  # layers of the network; null is the family's preset
    encoder_targets: list[str] | None = None  # layers of text encoders, likewise
    start: str | None = None  # a LoRA file, or its folder, that training goes on from


@dataclass
class MergeConfig:
    """A LoRA file that is merged into the base before training: W + scale x its change."""

    path: str = MISSING  # a .safetensors file, or its folder
    scale: float = 1.0


@dataclass
class NetworkConfig:
    """Where the network that predicts comes from, if not from `pretrained`."""

    config: str | None = None  # sd1 | sd2 | a diffusers config.json: built at random, to pretrain
    from_pretrained: str | None = None  # weights alone: a run, a diffusers folder, an original file
    from_NeMo: bool | None = None  # noqa: N815  whose names the file has; null looks at them
    ema: bool = True  # take averaged weights where there are both


@dataclass
class ModelConfig:
    """Which weights, and what of them is trained."""

    pretrained: str | None = MISSING  # a diffusers folder or a hub id; null with network.config
    variant: str | None = None  # file variant such as fp16
    allow_pickle: bool = False  # pickled weights can run code; safetensors cannot
    network: NetworkConfig = field(default_factory=NetworkConfig)
    autoencoder: str | None = None  # beside network.config: a diffusers folder or an original file
    text_encoder: str | None = None  # likewise: a transformers folder or an OpenCLIP file
    tokenizer: str | None = None  # likewise; null is text_encoder's own
    scheduler: str | None = None  # likewise: a diffusers folder; null is SD's own DDIM settings
    prediction_type: str = "epsilon"  # likewise: epsilon | v_prediction
    image_size: int | None = None  # likewise: pixels of a side
    family: str | None = None  # refuse a folder of another family; null takes what it is
    trainable: str = "lora"  # lora | full
    parts: list[str] = field(default_factory=lambda: ["network"])  # and text encoders, by name
    lora: LoraConfig = field(default_factory=LoraConfig)
    reference: bool = True  # under full: keep a frozen copy; runs without use for it leave it out
    dtype: str = "float32"  # of frozen weights: float32 | bfloat16 | float16
    gradient_checkpointing: bool = False  # of network and decoder
    channels_last: bool = False  # lay out convolutions' tensors as tensor cores read them
    merge: dict[str, Any] = field(default_factory=dict)  # NAME: {path: ..., scale: ...}


@dataclass
class SamplerConfig:
    """How images are made, in training, validation and inference alike."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    eta: float = 0.0
    height: int | None = None  # pixels; null means the model's own size
    width: int | None = None


@dataclass
class ObjectiveConfig:
    """What is minimised; `kind` is the choice of the group, so that a saved file tells it."""

    kind: str = MISSING


@dataclass
class DraftConfig(ObjectiveConfig):
    """DRaFT (kl_coeff 0) and DRaFT+ (kl_coeff > 0)."""

    kind: str = "draft"
    kl_coeff: float = 1.0
    truncation_steps: int = 1  # K, the last sampling steps that carry a gradient
    truncation_range: list[int] | None = None  # [low, high]: K is drawn anew for each batch
    lv_samples: int = 0  # n of DRaFT-LV, which has K = 1; 0 is off
    cfg_gradient: str = "full"  # full | detach_uncond | rescale
    clamp_images: bool = True  # clip to [0, 1]: saturated pixels then carry no gradient


@dataclass
class SupervisedConfig(ObjectiveConfig):
    """Regression of what the network predicts, from images with captions."""

    kind: str = "supervised"
    timesteps: str = "uniform"  # uniform | logit_normal | table (the family's shifted one)
    logit_mean: float = 0.0
    logit_std: float = 1.0
    weighting: str = "none"  # none | min_snr | bump (DiffSynth-Studio's)
    snr_gamma: float = 5.0
    caption_dropout: float = 0.0  # share of captions replaced by the empty prompt
    noise_offset: float = 0.0
    sample_latents: bool = True  # draw latents from the posterior; false takes its mean
    guidance_scale: float = 1.0  # told to networks with embedded guidance


@dataclass
class OwnConfig(ObjectiveConfig):
    """An objective of a script of one's own; `settings` are recorded with the run."""

    kind: str = "own"
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class RewardConfig:
    """What is maximised; `kind` is the choice of the group."""

    kind: str = MISSING


@dataclass
class NoRewardConfig(RewardConfig):
    """Nothing is scored: for supervised runs."""

    kind: str = "none"


@dataclass
class ClipRewardConfig(RewardConfig):
    """exp(logit_scale) x cosine of a CLIP-architecture model: CLIPScore, PickScore."""

    kind: str = "clip"
    pretrained: str = MISSING
    processor: str | None = None  # folder or hub id of tokenizer and preprocessing, if elsewhere
    dtype: str = "float32"
    gradient_checkpointing: bool = False


@dataclass
class ColorRewardConfig(RewardConfig):
    """scale x (mean of one channel - mean of the two others)."""

    kind: str = "color"
    color: str = "red"  # red | green | blue
    scale: float = 20.0


@dataclass
class BrightnessRewardConfig(RewardConfig):
    """scale x mean of all channels."""

    kind: str = "brightness"
    scale: float = 20.0


@dataclass
class JpegRewardConfig(RewardConfig):
    """Minus the kilobytes of the JPEG file; not differentiable."""

    kind: str = "jpeg"


@dataclass
class WeightedPartConfig:
    """One part of a weighted sum, checked."""

    reward: RewardConfig
    weight: float


@dataclass
class WeightedRewardConfig(RewardConfig):
    """A weighted sum: `parts: {NAME: {kind: clip, weight: 1.0, pretrained: ...}}`."""

    kind: str = "weighted"
    parts: dict[str, Any] = field(default_factory=dict)


REWARDS: dict[str, type[RewardConfig]] = {
    "clip": ClipRewardConfig,
    "color": ColorRewardConfig,
    "brightness": BrightnessRewardConfig,
    "jpeg": JpegRewardConfig,
    "weighted": WeightedRewardConfig,
    "none": NoRewardConfig,
}
OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "draft": DraftConfig,
    "supervised": SupervisedConfig,
    "own": OwnConfig,
}
GROUPS = {"objective": OBJECTIVES, "reward": REWARDS}


@dataclass
class ImageSourceConfig:
    """An image folder, a table beside images, WebDataset tars or a Hugging Face dataset."""

    path: str | None = None
    base_path: str | None = None  # where the paths in a table begin; null is its own folder
    image_column: str | None = None  # null is the first of image, file_name, path
    caption_column: str | None = None  # null is the first of caption, text, prompt
    repeats: int = 1  # times in an epoch
    weight: float | None = None  # share of the rows; null is in proportion to size x repeats


@dataclass
class ImageDataConfig(ImageSourceConfig):
    """Images with captions: one source, or several in `sources`, by names of your own."""

    sources: dict[str, Any] = field(default_factory=dict)  # NAME: {path: ..., ...}
    crop: str = "center"  # center | random
    flip: bool = False  # mirror every second image, at random
    captions: str = "first"  # first | random, where a picture has several
    buckets: bool = False  # keep aspect ratios: each image is cropped to the nearest of several
    min_size: int | None = None  # leave out what is smaller; null enlarges whatever is small
    max_pixels: int = 178_956_970  # leave out what is larger; Pillow's bound
    shuffle: bool = True
    workers: int = 4  # threads that decode; 0 decodes when asked
    prefetch: int = 2  # batches decoded ahead


@dataclass
class ShardSourceConfig:
    """A folder that `sfumato prepare` wrote."""

    path: str | None = None  # the folder that was prepared
    selection: str = "all"  # the filter whose samples are read
    repeats: int = 1  # times in an epoch
    weight: float | None = None  # share of the rows; null is in proportion to size x repeats


@dataclass
class ShardDataConfig(ShardSourceConfig):
    """Prepared images with captions: one folder, or several in `sources`, by names of your own."""

    sources: dict[str, Any] = field(default_factory=dict)  # NAME: {path: ..., ...}
    cached: bool = False  # latents and text states instead of pictures and captions
    crop: str = "center"  # center | random; of tars
    flip: bool = False  # mirror every second image, at random; of a cache that holds mirrored ones
    captions: str = "first"  # first | random, where a picture has several
    buckets: bool = False  # keep aspect ratios; of caches with moments of each size
    min_size: int | None = None  # leave out what is smaller; null enlarges whatever is small
    max_pixels: int = 178_956_970  # leave out what is larger
    shuffle: bool = True
    buffer: int = 10_000  # samples that are shuffled among each other
    workers: int = 4  # threads that read and decode; 0 reads when asked
    prefetch: int = 2  # batches read ahead


@dataclass
class DataConfig:
    """What is trained on: prompts (DRaFT) or images with captions (supervised).

    Prompts are .txt, .csv, .jsonl or WebDataset .tar; a file, folder, glob or brace pattern.
    """

    prompts: str | None = None
    column: str | None = None  # of .csv and .jsonl
    shuffle: bool = True  # of prompts
    buffer: int = 10_000  # prompts held for shuffling
    images: ImageDataConfig = field(default_factory=ImageDataConfig)
    shards: ShardDataConfig = field(default_factory=ShardDataConfig)  # instead of images


@dataclass
class OptimizerConfig:
    """AdamW with warm-up."""

    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 10
    schedule: str = "constant"  # constant | linear | cosine
    max_grad_norm: float = 10.0


@dataclass
class ValidationConfig:
    """Pairs (tuned, base) of fixed prompts and fixed noise, and the loss of held-out images."""

    prompts: str | None = None  # null means the first prompts, or captions, of the data
    column: str | None = None  # of .csv and .jsonl given as validation.prompts
    num_images: int = 8
    every_steps: int = 100
    seed: int = 1234
    images: ImageDataConfig = field(default_factory=ImageDataConfig)  # held out; supervised only
    loss_images: int = 64  # of them, for the validation loss; 0 is off


@dataclass
class TrainingConfig:
    """The loop."""

    max_steps: int = 1000
    micro_batch_size: int = 1  # images per process and forward
    global_batch_size: int = 4  # images per optimiser step, over all processes
    precision: str = "no"  # autocast: no | bf16 | fp16
    strategy: str = "ddp"  # ddp | fsdp | hsdp, with more than one process
    shard_size: int | None = None  # processes that share one copy under hsdp; null is one machine's
    compile: str = "none"  # none | regional (repeated blocks of the network) | full
    ema_decay: float | None = 0.9999  # null is off; the decay warms up as (1 + n) / (10 + n)
    ema_every_steps: int = 1  # the average moves every N steps, as far as N single moves
    ema_on_cpu: bool = False  # keep the average off the device
    async_checkpoints: bool = True  # write while the next steps are taken
    peak_tflops: float | None = None  # of one device, for model FLOPs utilisation; null is by name
    checkpoint_every_steps: int = 100
    keep_checkpoints: int | None = 3  # null keeps all
    max_time: str | None = None  # wall clock [[DD:]HH:]MM:SS; then save and stop
    seed: int = 0
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclass
class TrainConfig:
    """`sfumato train`."""

    name: str = "run"
    runs_dir: str = "runs"
    export: str = "last"  # last | best, by validation loss
    verify: bool = True  # load each export elsewhere and compare an image
    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    objective: ObjectiveConfig = MISSING
    reward: RewardConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


@dataclass
class SamplerOverrides:
    """Settings of the sampler that differ from the run's own; null leaves them."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    eta: float | None = None
    height: int | None = None
    width: int | None = None


@dataclass
class SampleConfig:
    """`sfumato sample`: images of a run, or of a model that was never trained here."""

    run: str | None = None  # a run folder
    step: str | None = None  # of its checkpoint, or best; null means the last
    pretrained: str | None = None  # a diffusers folder or hub id, instead of a run
    prompt: str | None = None
    prompts: str | None = None  # a prompt file, instead of one prompt
    column: str | None = None  # of a .csv or .jsonl
    num_images: int = 4  # per prompt
    seed: int = 0
    batch_size: int = 4
    schedule: str = (
        "draft"  # annealed importance guidance: base | draft | linear | power_P | step_F
    )
    sampler: SamplerOverrides = field(default_factory=SamplerOverrides)
    out: str = "samples"


@dataclass
class EvaluateConfig:
    """`sfumato evaluate`: scores and images of a run's checkpoints into the run folder."""

    run: str = MISSING
    steps: list[int] | None = None  # null means every checkpoint, and 0 for the base model
    prompts: str | None = None  # null means the run's validation prompts
    column: str | None = None  # of a .csv or .jsonl
    num_images: int = 16  # per prompt
    seed: int = 4321
    batch_size: int = 8
    features: str = "pixels"  # pixels | lpips | a CLIP folder or hub id
