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


@dataclass
class RewardedConfig(ObjectiveConfig):
    """An objective that maximises a reward of images which it samples from prompts."""

    data_coeff: float = setting(0.0, NOT_NEGATIVE)  # weight of the supervised loss on data.images

    @property
    def reads_prompts(self) -> bool:
        return True

    @property
    def reads_images(self) -> bool:
        return self.data_coeff > 0


@dataclass
class DraftConfig(RewardedConfig):
    """DRaFT (kl_coeff 0) and DRaFT+ (kl_coeff > 0)."""

    kind: str = "draft"
    kl_coeff: float = setting(1.0, NOT_NEGATIVE)  # 0 is DRaFT, more is DRaFT+
    truncation_steps: int = setting(1, FEW)  # K, the last sampling steps that carry a gradient
    truncation_range: list[int] | None = setting(None, COUNT)  # [low, high]: draw K for each batch
    lv_samples: int = setting(0, NOT_NEGATIVE)  # n of DRaFT-LV, which has K = 1; 0 is off
    cfg_gradient: str = choice("full", "detach_uncond", "rescale")  # gradient through guidance
    clamp_images: bool = True  # clip to [0, 1]: saturated pixels then carry no gradient


@dataclass
class DirectConfig(RewardedConfig):
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
    cfg_gradient: str = choice("full", "detach_uncond", "rescale")  # gradient through guidance
    clamp_images: bool = True  # clip to [0, 1]: saturated pixels then carry no gradient
    visits_on_cpu: bool = False  # keep the rollout's states off the device


@dataclass
class AdjointMatchingConfig(RewardedConfig):
    """The drift of the law that a reward tilts: exp(reward_scale x reward) x base model."""

    kind: str = "adjoint_matching"
    reward_scale: float = setting(10.0, POSITIVE)  # lambda
    trained_steps: int = setting(10, FEW)  # half of the first 60 % of the steps, half of the rest
    clip_quantile: float | None = setting(0.9, FRACTION)  # leave out terms above it, running
    clamp_images: bool = True  # clip to [0, 1]: saturated pixels then carry no gradient


@dataclass
class DirectAlignConfig(RewardedConfig):
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
class NoisedConfig(ObjectiveConfig):
    """An objective that predicts once for each image, at a random time."""

    timesteps: str = choice("uniform", "logit_normal", "table")  # table: the family's, shifted
    logit_mean: float = 0.0
    logit_std: float = setting(1.0, POSITIVE)
    caption_dropout: float = setting(0.0, UNIT)  # share of captions replaced by the empty prompt
    noise_offset: float = setting(0.0, NOT_NEGATIVE)
    sample_latents: bool = True  # draw latents from the posterior; false takes its mean
    guidance_scale: float = 1.0  # input of networks with embedded guidance


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
    "supervised": SupervisedConfig,
    "dpo": DpoConfig,
    "own": OwnConfig,
}
