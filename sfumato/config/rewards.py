"""Settings of rewards: what scores images."""

# ruff: noqa: RUF009 -- the calls return fields

from dataclasses import dataclass
from typing import Any

from sfumato.config.fields import (
    DTYPES,
    MISSING,
    NOT_NEGATIVE,
    POSITIVE,
    choice,
    entries,
    setting,
)


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


REWARDS: dict[str, type[RewardConfig]] = {
    "clip": ClipRewardConfig,
    "color": ColorRewardConfig,
    "brightness": BrightnessRewardConfig,
    "jpeg": JpegRewardConfig,
    "function": FunctionRewardConfig,
    "http": HttpRewardConfig,
    "weighted": WeightedRewardConfig,
    "none": NoRewardConfig,
}
