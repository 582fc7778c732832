"""Reward, objective and model settings of a run, built from its configuration."""

from dataclasses import replace
from typing import Any

from sfumato.config import (
    DraftConfig,
    ModelConfig,
    NoRewardConfig,
    OwnConfig,
    SupervisedConfig,
    TrainConfig,
)
from sfumato.objectives.draft import Draft
from sfumato.objectives.objective import Objective
from sfumato.objectives.supervised import Supervised
from sfumato.rewards.build import build_reward
from sfumato.rewards.reward import Reward

OWN_IS_A_SCRIPTS = (
    "objective = own is brought by a script of one's own, as train(..., own=Own(objective=...)); "
    "see docs/write_your_own.md"
)


def build_scorer(config: TrainConfig) -> Reward | None:
    """Return what scores images, if the settings name anything."""
    return None if isinstance(config.reward, NoRewardConfig) else build_reward(config.reward)


def build_objective(config: TrainConfig, reward: Reward | None) -> Objective[Any]:
    """Return what is minimised.

    Raises:
        ValueError: if it needs a reward that it has not, or only a script can bring it.
    """
    match config.objective:
        case DraftConfig() as draft:
            assert reward is not None, "checked with the settings"
            return Draft(draft, config.sampler, reward)
        case SupervisedConfig() as supervised:
            return Supervised(supervised)
        case OwnConfig():
            raise ValueError(OWN_IS_A_SCRIPTS)
    raise AssertionError(config.objective)


def trained_model(config: TrainConfig, objective: Objective[Any]) -> ModelConfig:
    """Return the model's settings, with a frozen copy only where the loss asks for it."""
    needed = config.model.reference and objective.needs_reference
    return replace(config.model, reference=needed)
