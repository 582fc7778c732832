"""Builder of rewards from settings."""

from typing import Any

import torch

from sfumato.clip import load_hps
from sfumato.config import (
    AestheticRewardConfig,
    BrightnessRewardConfig,
    ClassifierRewardConfig,
    ClipIqaRewardConfig,
    ClipRewardConfig,
    ColorRewardConfig,
    FunctionRewardConfig,
    HpsRewardConfig,
    Hpsv3RewardConfig,
    HttpRewardConfig,
    ImageRewardConfig,
    JpegRewardConfig,
    RewardConfig,
    WeightedRewardConfig,
)
from sfumato.rewards.aesthetic import AestheticReward
from sfumato.rewards.classifier import ClassifierReward
from sfumato.rewards.clip import ClipReward
from sfumato.rewards.clip_iqa import ClipIqaReward, check_pairs
from sfumato.rewards.hpsv3 import Hpsv3Reward
from sfumato.rewards.image_reward import ImageReward
from sfumato.rewards.learning_clip import LearningClip
from sfumato.rewards.own import OwnReward
from sfumato.rewards.remote import HttpReward
from sfumato.rewards.reward import PromptRows, Reward
from sfumato.rewards.simple import BrightnessReward, ColorReward, JpegCompressibility
from sfumato.rewards.weighted import WeightedSum

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def ready(reward: Reward, device: torch.device, rows: PromptRows) -> Reward:
    """Return a reward that can score on a device; `rows` as `Reward.prepare` takes it."""
    reward = reward.to(device)
    reward.prepare(rows)
    return reward


def build_learner(config: ClipRewardConfig, *, start_scale: float | None) -> LearningClip:
    """Return the reward of these settings, to be trained.

    Args:
        start_scale: as `LearningClip` takes it.

    Raises:
        ValueError: if its model cannot be found or read.
    """
    reward = build_reward(config)
    assert isinstance(reward, ClipReward), "made of a CLIP's settings"
    return LearningClip(reward, start_scale=start_scale)


def build_reward(config: RewardConfig) -> Reward:
    """Return the reward of these settings, frozen.

    Raises:
        ValueError: if its model cannot be found or read.
    """
    match config:
        case ClipRewardConfig():
            return ClipReward.from_pretrained(
                config.pretrained, score=config.score, **_loading(config)
            )
        case ClipIqaRewardConfig():
            check_pairs(config.good, config.bad)
            clip = ClipReward.from_pretrained(config.pretrained, **_loading(config))
            return ClipIqaReward(clip, config.good, config.bad)
        case HpsRewardConfig():
            parts = load_hps(
                config.pretrained,
                version=config.version,
                processor=config.processor,
                preprocessing=config.preprocessing,
            )
            checkpointing = config.gradient_checkpointing
            reward = ClipReward(parts, score="cosine", gradient_checkpointing=checkpointing)
            return reward.to(DTYPES[config.dtype])
        case Hpsv3RewardConfig():
            return Hpsv3Reward.from_pretrained(config.pretrained, **_loading(config))
        case ImageRewardConfig():
            return ImageReward.from_pretrained(config.pretrained, **_loading(config))
        case AestheticRewardConfig():
            return AestheticReward.from_pretrained(
                config.pretrained,
                config.predictor,
                squash=config.resize == "squash",
                **_loading(config),
            )
        case ClassifierRewardConfig():
            return ClassifierReward.from_pretrained(
                config.pretrained,
                config.label,
                sizes=config.sizes,
                crop=config.crop,
                processor=config.processor,
                dtype=DTYPES[config.dtype],
            )
        case ColorRewardConfig():
            return ColorReward(config.color, scale=config.scale)
        case BrightnessRewardConfig():
            return BrightnessReward(scale=config.scale)
        case JpegRewardConfig():
            return JpegCompressibility()
        case FunctionRewardConfig():
            return OwnReward(config.path)
        case HttpRewardConfig():
            return HttpReward(
                config.url,
                timeout=config.timeout,
                with_rows=config.metadata,
                cache=config.cache,
            )
        case WeightedRewardConfig():
            parts = config.parts.items()
            return WeightedSum(
                {name: (part.weight, build_reward(part.reward)) for name, part in parts},
                standardise=config.standardise,
                gradients=config.gradients,
            )
    raise AssertionError(f"no builder for {type(config).__name__}")


def _loading(
    config: ClipRewardConfig
    | ClipIqaRewardConfig
    | Hpsv3RewardConfig
    | ImageRewardConfig
    | AestheticRewardConfig,
) -> dict[str, Any]:
    """Return what the loaders of transformers' models have in common."""
    return {
        "processor": config.processor,
        "dtype": DTYPES[config.dtype],
        "gradient_checkpointing": config.gradient_checkpointing,
    }
