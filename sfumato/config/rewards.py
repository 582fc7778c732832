"""Settings of rewards: what scores images."""

# ruff: noqa: RUF009 -- the calls return fields

from dataclasses import dataclass
from typing import Any

from sfumato.config.fields import (
    DTYPES,
    FILLED,
    MISSING,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    SIDE,
    choice,
    entries,
    setting,
)

CLIP_SCORES = ("model", "model_over_26", "cosine", "cosine_100", "clipscore")
HPS_FILES = {"2.0": "HPS_v2_compressed", "2.1": "HPS_v2.1_compressed"}  # without suffix
HPS3_FILE = "HPSv3"
IMAGE_REWARD = "ImageReward"


@dataclass
class RewardConfig:
    """What is maximised; a saved file names the chosen class in `kind`."""

    kind: str = MISSING

    @property
    def file(self) -> str:
        """Name, without suffix, of what alone is read in a folder of weights; "" for all of it."""
        return ""


@dataclass
class NoRewardConfig(RewardConfig):
    """Nothing is scored: for supervised runs."""

    kind: str = "none"


@dataclass
class ClipRewardConfig(RewardConfig):
    """Match of image and prompt by a CLIP-architecture model: PickScore, CLIPScore."""

    kind: str = "clip"
    pretrained: str = MISSING  # a CLIP model: folder or hub id
    processor: str | None = None  # folder or hub id of tokenizer and preprocessing, if elsewhere
    score: str = choice(*CLIP_SCORES)  # exp(logit_scale) x cosine; docs/rewards.md has the others
    dtype: str = choice(*DTYPES)
    gradient_checkpointing: bool = False


@dataclass
class AestheticRewardConfig(RewardConfig):
    """Aesthetic score from 1 to 10: LAION's versions 1 and 2 on a CLIP, 2.5 on a SigLIP."""

    kind: str = "aesthetic"
    pretrained: str = MISSING  # the CLIP or SigLIP that the predictor reads: folder or hub id
    predictor: str = MISSING  # a file of the predictor's weights, whose names tell its version
    processor: str | None = None  # folder or hub id of tokenizer and preprocessing, if elsewhere
    resize: str = choice("published", "squash")  # squash: to a square, bicubic, without antialias
    dtype: str = choice(*DTYPES)
    gradient_checkpointing: bool = False


@dataclass
class ClipIqaRewardConfig(RewardConfig):
    """Probability of a good prompt against a bad one, by a CLIP-architecture model: CLIP-IQA."""

    kind: str = "clip_iqa"
    pretrained: str = MISSING  # a CLIP model: folder or hub id
    processor: str | None = None  # folder or hub id of tokenizer and preprocessing, if elsewhere
    good: list[str] = setting(["Good photo."], FILLED)
    bad: list[str] = setting(["Bad photo."], FILLED)  # one against each of `good`
    dtype: str = choice(*DTYPES)
    gradient_checkpointing: bool = False


@dataclass
class ClassifierRewardConfig(RewardConfig):
    """Log-probability of a label by an image classifier of transformers."""

    kind: str = "classifier"
    pretrained: str = MISSING  # an image classifier: folder or hub id
    label: str | None = None  # its text or index; null: the one that each prompt names
    sizes: list[int] = setting([], SIDE)  # pixels; their mean is the score; []: the processor's
    crop: float = setting(1.0, SHARE)  # smallest share of a side that random crops of training keep
    processor: str | None = None  # folder or hub id of the preprocessing, if elsewhere
    dtype: str = choice(*DTYPES)


@dataclass
class HpsRewardConfig(RewardConfig):
    """Cosine of image and prompt by HPSv2 or HPSv2.1."""

    kind: str = "hpsv2"
    pretrained: str = "xswu/HPSv2"  # the published file, its folder or hub id
    version: str = choice("2.1", "2.0")
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # tokenizer: folder or hub id
    preprocessing: str = choice("letterbox", "crop")  # as published, or as training codes do
    dtype: str = choice(*DTYPES)
    gradient_checkpointing: bool = False

    @property
    def file(self) -> str:
        """Name of the published file."""
        return HPS_FILES[self.version]


@dataclass
class Hpsv3RewardConfig(RewardConfig):
    """HPSv3: a Qwen2-VL of 8 billion weights, asked for a rating."""

    kind: str = "hpsv3"
    pretrained: str = "MizzenAI/HPSv3"  # the published file, its folder or hub id
    processor: str = "Qwen/Qwen2-VL-7B-Instruct"  # config.json and tokenizer: folder or hub id
    dtype: str = choice("bfloat16", "float32", "float16")
    gradient_checkpointing: bool = False

    @property
    def file(self) -> str:
        """Name of the published file."""
        return HPS3_FILE


@dataclass
class ImageRewardConfig(RewardConfig):
    """ImageReward 1.0: a BLIP trained on choices between images."""

    kind: str = "image_reward"
    pretrained: str = "THUDM/ImageReward"  # the published file, its folder or hub id
    processor: str = "google-bert/bert-base-uncased"  # tokenizer: folder or hub id
    dtype: str = choice(*DTYPES)
    gradient_checkpointing: bool = False

    @property
    def file(self) -> str:
        """Name of the published file."""
        return IMAGE_REWARD


@dataclass
class ColorRewardConfig(RewardConfig):
    """scale x (mean of one channel - mean of the two others)."""

    kind: str = "color"
    color: str = choice("red", "green", "blue")
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
class FunctionRewardConfig(RewardConfig):
    """A function of your own, score(images, prompts, metadata), or a Reward."""

    kind: str = "function"
    path: str = MISSING  # FILE.py:NAME or package.module:NAME; never taken from a run folder


@dataclass
class HttpRewardConfig(RewardConfig):
    """A scorer of your own over HTTP, which gets PNGs; not differentiable."""

    kind: str = "http"
    url: str = MISSING  # http://HOST:PORT/PATH, or https://; never taken from a run folder
    timeout: float = setting(60.0, POSITIVE)  # seconds for a batch, repeated requests included
    metadata: bool = False  # send each prompt's row of the prompt table too
    cache: int = setting(10_000, NOT_NEGATIVE)  # scores that are kept, by image and prompt


@dataclass
class WeightedPartConfig:
    """One part of a weighted sum."""

    reward: RewardConfig
    weight: float = 1.0


@dataclass
class WeightedRewardConfig(RewardConfig):
    """A weighted sum of other rewards."""

    kind: str = "weighted"
    parts: dict[str, Any] = entries(RewardConfig)  # NAME: {kind: ..., weight: ..., ...}
    standardise: bool = False  # divide each part by its running deviation
    gradients: str = choice("summed", "measured", "equalised")  # at x0: log, or equalise, norms


REWARDS: dict[str, type[RewardConfig]] = {
    "clip": ClipRewardConfig,
    "clip_iqa": ClipIqaRewardConfig,
    "hpsv2": HpsRewardConfig,
    "hpsv3": Hpsv3RewardConfig,
    "image_reward": ImageRewardConfig,
    "aesthetic": AestheticRewardConfig,
    "classifier": ClassifierRewardConfig,
    "color": ColorRewardConfig,
    "brightness": BrightnessRewardConfig,
    "jpeg": JpegRewardConfig,
    "function": FunctionRewardConfig,
    "http": HttpRewardConfig,
    "weighted": WeightedRewardConfig,
    "none": NoRewardConfig,
}


def rewards_of(reward: Any) -> dict[str, RewardConfig]:
    """Return a reward, or the parts of a weighted one, by the keys of their settings."""
    if isinstance(reward, WeightedRewardConfig):
        return {f"reward.parts.{name}": part.reward for name, part in reward.parts.items()}
    return {"reward": reward} if isinstance(reward, RewardConfig) else {}
