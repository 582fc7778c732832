"""Builder of rewards from settings."""

import torch

from sfumato.config import (
    BrightnessRewardConfig,
    ClipRewardConfig,
    ColorRewardConfig,
    FunctionRewardConfig,
    HttpRewardConfig,
    JpegRewardConfig,
    RewardConfig,
    WeightedRewardConfig,
)
from sfumato.rewards.clip import ClipReward
from sfumato.rewards.own import OwnReward
from sfumato.rewards.remote import HttpReward
from sfumato.rewards.reward import Reward
from sfumato.rewards.simple import BrightnessReward, ColorReward, JpegCompressibility
from sfumato.rewards.weighted import WeightedSum

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_reward(config: RewardConfig) -> Reward:
    """Return the reward of these settings, frozen.

    Raises:
        ValueError: if its model cannot be found or read.
    """
    match config:
        case ClipRewardConfig():
            return ClipReward.from_pretrained(
                config.pretrained,
                processor=config.processor,
                dtype=DTYPES[config.dtype],
                gradient_checkpointing=config.gradient_checkpointing,
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
                {name: (part.weight, build_reward(part.reward)) for name, part in parts}
            )
    raise AssertionError(f"no builder for {type(config).__name__}")
