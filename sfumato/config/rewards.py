"""Settings of rewards: what scores images."""

# ruff: noqa: RUF009 -- the calls return fields

from dataclasses import dataclass
from typing import Any

from sfumato.config.fields import DTYPES, MISSING, choice, entries


@dataclass
class RewardConfig:
    """What is maximised; a saved file names the chosen class in `kind`."""

    kind: str = MISSING


@dataclass
class NoRewardConfig(RewardConfig):
    """Nothing is scored: for supervised runs."""

    kind: str = "none"


@dataclass
class ClipRewardConfig(RewardConfig):
    """exp(logit_scale) x cosine of a CLIP-architecture model: CLIPScore, PickScore."""

    kind: str = "clip"
    pretrained: str = MISSING  # a CLIP model: folder or hub id
    processor: str | None = None  # folder or hub id of tokenizer and preprocessing, if elsewhere
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
class ClassifierRewardConfig(RewardConfig):
    """Log-probability of a label by an image classifier of transformers."""

    kind: str = "classifier"
    pretrained: str = MISSING  # an image classifier: folder or hub id
    label: str = MISSING  # the text of a label, or its index
    processor: str | None = None  # folder or hub id of the preprocessing, if elsewhere
    dtype: str = choice(*DTYPES)


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
    "aesthetic": AestheticRewardConfig,
    "classifier": ClassifierRewardConfig,
    "color": ColorRewardConfig,
    "brightness": BrightnessRewardConfig,
    "jpeg": JpegRewardConfig,
    "weighted": WeightedRewardConfig,
    "none": NoRewardConfig,
}
