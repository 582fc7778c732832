"""Settings of objectives: what is minimised."""

# ruff: noqa: RUF009 -- the calls return fields

from dataclasses import dataclass, field
from typing import Any

from sfumato.config.fields import (
    COUNT,
    FEW,
    FRACTION,
    MISSING,
    NOT_NEGATIVE,
    POSITIVE,
    UNIT,
    choice,
    setting,
)


@dataclass
class ObjectiveConfig:
    """What is minimised; a saved file names the chosen class in `kind`."""

    kind: str = MISSING

    @property
    def reads_prompts(self) -> bool:
        """Whether rows of training are prompts of `data.prompts`."""
        return False

    @property
    def reads_images(self) -> bool:
        """Whether rows of training are images of `data.images` or `data.shards`."""
        return False

    @property
    def reads_pairs(self) -> bool:
        """Whether rows of training are preference pairs of `data.pairs`."""
        return False

    @property
    def has_validation_loss(self) -> bool:
        """Whether validation can measure the loss of held-out rows."""
        return False

    @property
    def trains(self) -> str:
        """What is trained: "model" (a text-to-image model), "reward" or "autoencoder"."""
        return "model"


@dataclass
class RewardedConfig(ObjectiveConfig):
    """An objective that maximises a reward of images which it samples from prompts."""

    @property
    def reads_prompts(self) -> bool:
        return True


@dataclass
class RewardGradientConfig(RewardedConfig):
    """An objective that learns from the gradient of a reward."""

    data_coeff: float = setting(0.0, NOT_NEGATIVE)  # weight of the supervised loss on data.images

    @property
    def reads_images(self) -> bool:
        return self.data_coeff > 0


@dataclass
class DraftConfig(RewardGradientConfig):
    """DRaFT (kl_coeff 0) and DRaFT+ (kl_coeff > 0)."""

    kind: str = "draft"
    kl_coeff: float = setting(1.0, NOT_NEGATIVE)  # 0 is DRaFT, more is DRaFT+
    truncation_steps: int = setting(1, FEW)  # K, the last sampling steps that carry a gradient
    truncation_range: list[int] | None = setting(None, COUNT)  # [low, high]: draw K for each batch
    lv_samples: int = setting(0, NOT_NEGATIVE)  # n of DRaFT-LV, which has K = 1; 0 is off
    cfg_gradient: str = choice("full", "detach_uncond", "rescale")  # gradient through guidance
    clamp_images: bool = True  # clip to [0, 1]: saturated pixels then carry no gradient


@dataclass
class DirectConfig(RewardGradientConfig):
    """A reward's gradient at the end of a rollout, given to single steps that run again alone."""

    kind: str = "direct"
    path: str = choice("sum", "leap", "bridge", "lagrange")  # how the end depends on the steps
    steps: str = choice("late", "uniform", "spaced", "last", "all", "listed")  # that are active
    active_steps: int = setting(4, FEW)  # how many; leap has two
    late_bias: float = setting(1.0, NOT_NEGATIVE)  # step i of noise has probability (i + 1)^bias
    listed: list[int] | None = setting(None, NOT_NEGATIVE)  # steps from noise, 0 is the first
    weights: str = choice("solver", "posterior", "sigma", "alpha", "constant")  # by step
    weight_scale: float = setting(1.0, POSITIVE)
    gain: float = setting(0.0, UNIT)  # share of the inactive steps' weights added to the active
    nested: float = setting(0.0, UNIT)  # share of the gradient through a later step's input
    supports: int = setting(3, COUNT)  # outputs that lagrange integrates on a leg
    reward_at: str = choice("x0", "sample")  # the last prediction of the data, or the end state
    early_stop: list[int] | None = setting(None, NOT_NEGATIVE)  # [low, high]: leave out last steps
    distance_floor: float | None = setting(None, POSITIVE)  # weight 1 / (errors of the legs)
    hinge: float | None = None  # rewards above it carry no gradient
    clip_quantile: float | None = setting(None, FRACTION)  # of the reward gradient's norm, running
    kl_coeff: float = setting(0.0, NOT_NEGATIVE)  # on the active steps
    kl_form: str = choice("noise", "output")  # what is compared with the reference
    stacked_steps: int = setting(1, FEW)  # active steps that one call of the network predicts
    cfg_gradient: str = choice("full", "detach_uncond", "rescale")  # gradient through guidance
    clamp_images: bool = True  # clip to [0, 1]: saturated pixels then carry no gradient
    visits_on_cpu: bool = False  # keep the rollout's states off the device


@dataclass
class AdjointMatchingConfig(RewardGradientConfig):
    """The drift of the law that a reward tilts: exp(reward_scale x reward) x base model."""

    kind: str = "adjoint_matching"
    reward_scale: float = setting(10.0, POSITIVE)  # lambda
    trained_steps: int = setting(10, FEW)  # half of the first 60 % of the steps, half of the rest
    clip_quantile: float | None = setting(0.9, FRACTION)  # leave out terms above it, running
    clamp_images: bool = True  # clip to [0, 1]: saturated pixels then carry no gradient


@dataclass
class DirectAlignConfig(RewardGradientConfig):
    """Reward at an image that is recovered from one network call and known noise."""

    kind: str = "direct_align"
    source: str = choice("rollout", "images")  # of the image that noise is added to
    noise_levels: list[float] = setting([0.3, 0.9], UNIT)  # [low, high]: t where the call is made
    stride: int = setting(1, COUNT)  # sampling steps between the two times of a call
    inverse: float = setting(1.0, NOT_NEGATIVE)  # weight of the step towards noise; 0 is off
    hinge: float | None = None  # rewards above it carry no gradient
    positive: str | None = None  # words before the prompt that the image should fit
    negative: str | None = None  # words before the prompt that it should not fit
    cfg_gradient: str = choice("full", "detach_uncond", "rescale")  # gradient through guidance
    clamp_images: bool = True  # clip to [0, 1]: saturated pixels then carry no gradient

    @property
    def reads_prompts(self) -> bool:
        return self.source == "rollout"

    @property
    def reads_images(self) -> bool:
        return self.source == "images" or self.data_coeff > 0


@dataclass
class CollectedConfig(RewardedConfig):
    """An objective that learns from rewards of groups of images, which need no gradient."""

    images_per_prompt: int = setting(8, FEW)  # a group: its images lie next to each other
    batches: int = setting(1, FEW)  # global batches that are sampled at once
    inner_epochs: int = setting(1, FEW)  # times that these are trained on
    rollout_batch_size: int = setting(8, FEW)  # images per process and forward, while sampling
    statistics: str = choice("group", "prompt")  # mean and deviation of a group, or running ones
    deviation: str = choice("own", "batch")  # that a difference is divided by: batch is of all
    advantage_clip: float = setting(5.0, POSITIVE)
    kl_coeff: float = setting(0.0, NOT_NEGATIVE)  # towards the frozen reference
    kl_form: str = choice("noise", "output")  # what is compared with the reference


@dataclass
class PolicyGradientConfig(CollectedConfig):
    """Clipped importance ratios of noisy sampling steps: DDPO, Flow-GRPO."""

    kind: str = "policy_gradient"
    eta: float = setting(1.0, UNIT)  # noise of the trained steps; 1 is DDPM's
    window: int | None = setting(None, FEW)  # noisy steps next to each other; null is all
    trained_steps: int | None = setting(None, FEW)  # of the noisy ones, drawn anew; null is all
    clip_range: float = setting(1e-4, POSITIVE)  # of the ratio, whose logarithm is a mean
    step_weights: str = choice("constant", "std")  # std: of each step's noise, with mean 1
    shared_start: bool = False  # the images of a group start from the same noise


@dataclass
class NftConfig(CollectedConfig):
    """DiffusionNFT: regress images by the share of their reward, for and against."""

    kind: str = "nft"
    beta: float = setting(1.0, POSITIVE)  # how far a step beside the old policy is imagined
    trained_times: int = setting(4, FEW)  # of each image, drawn from the solver's
    old_decay: float = setting(0.5, FRACTION)  # of the old policy after each collection, at most
    old_decay_rise: float = setting(0.001, NOT_NEGATIVE)  # each collection adds this from 0


@dataclass
class AwmConfig(CollectedConfig):
    """Advantage-weighted matching: a policy gradient with the supervised loss as likelihood."""

    kind: str = "awm"
    trained_times: int = setting(6, FEW)  # of each image, one in each part of [0, 1]
    likelihood: str = choice("ghuber", "mse")  # ghuber: errors to the power of 1/4, weighted by t
    clip_range: float = setting(1.0, POSITIVE)  # of the ratio


@dataclass
class NoisedConfig(ObjectiveConfig):
    """An objective that predicts once for each image, at a random time."""

    timesteps: str = choice("uniform", "logit_normal", "table")  # table: the family's, shifted
    logit_mean: float = 0.0
    logit_std: float = setting(1.0, POSITIVE)
    caption_dropout: float = setting(0.0, UNIT)  # share of captions replaced by the empty prompt
    noise_offset: float = setting(0.0, NOT_NEGATIVE)
    sample_latents: bool = True  # draw latents from the posterior; false takes its mean
    guidance_scale: float = 1.0  # input of networks with embedded guidance

    @property
    def has_validation_loss(self) -> bool:
        return True


@dataclass
class SupervisedConfig(NoisedConfig):
    """Regression of the network's prediction, on images with captions."""

    kind: str = "supervised"
    weighting: str = choice("none", "min_snr", "bump")  # bump is DiffSynth-Studio's
    snr_gamma: float = setting(5.0, POSITIVE)

    @property
    def reads_images(self) -> bool:
        return True


@dataclass
class DpoConfig(NoisedConfig):
    """Diffusion-DPO: of two images, the preferred one gains more likelihood than the other."""

    kind: str = "dpo"
    beta: float = setting(5000.0, POSITIVE)  # more stays nearer to the reference

    @property
    def reads_pairs(self) -> bool:
        return True


@dataclass
class RewardPairsConfig(ObjectiveConfig):
    """Training of a reward: of two images, it learns to score the preferred one higher."""

    kind: str = "reward_pairs"
    start_scale: float | None = setting(None, POSITIVE)  # exp(logit_scale); null: reward.pretrained

    @property
    def reads_pairs(self) -> bool:
        return True

    @property
    def has_validation_loss(self) -> bool:
        return True

    @property
    def trains(self) -> str:
        return "reward"


@dataclass
class AutoencoderConfig(ObjectiveConfig):
    """Training of an AutoencoderKL: pictures come back from their latents."""

    kind: str = "autoencoder"
    start: str | None = None  # a config.json, to begin at random; or a folder or hub id of weights
    decoder_only: bool = False  # latents stay, and with them the models that were trained on them
    square_coeff: float = setting(2.0, NOT_NEGATIVE)  # weight of the squared error
    edge_coeff: float = setting(0.5, NOT_NEGATIVE)  # weight of the error of neighbours' differences
    kl_coeff: float = setting(1e-6, NOT_NEGATIVE)  # weight of KL(posterior || normal) per latent
    latent_noise: float = setting(0.0, NOT_NEGATIVE)  # most that decoder_only bears, of deviation 1

    @property
    def reads_images(self) -> bool:
        return True

    @property
    def has_validation_loss(self) -> bool:
        return True

    @property
    def trains(self) -> str:
        return "autoencoder"


@dataclass
class OwnConfig(ObjectiveConfig):
    """An objective that a script defines; `settings` are recorded with the run."""

    kind: str = "own"
    settings: dict[str, Any] = field(default_factory=dict)  # NAME: a value of any type

    @property
    def reads_prompts(self) -> bool:
        return True


OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "draft": DraftConfig,
    "direct": DirectConfig,
    "adjoint_matching": AdjointMatchingConfig,
    "direct_align": DirectAlignConfig,
    "policy_gradient": PolicyGradientConfig,
    "nft": NftConfig,
    "awm": AwmConfig,
    "supervised": SupervisedConfig,
    "dpo": DpoConfig,
    "reward_pairs": RewardPairsConfig,
    "autoencoder": AutoencoderConfig,
    "own": OwnConfig,
}
