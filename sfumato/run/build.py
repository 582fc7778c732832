"""Reward, objective, model and validation of a run, built from its settings."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from sfumato.config import (
    AdjointMatchingConfig,
    AutoencoderConfig,
    AwmConfig,
    ClipRewardConfig,
    DirectAlignConfig,
    DirectConfig,
    DpoConfig,
    DraftConfig,
    ModelConfig,
    NftConfig,
    NoRewardConfig,
    OwnConfig,
    PolicyGradientConfig,
    RewardedConfig,
    RewardGradientConfig,
    RewardPairsConfig,
    SupervisedConfig,
    TrainConfig,
)
from sfumato.data.stream import Stream
from sfumato.diffusion.randomness import derive
from sfumato.models.autoencoder_kl import downsampling
from sfumato.models.generate import image_size
from sfumato.models.learning_autoencoder import LearningAutoencoder, load_autoencoder
from sfumato.models.model import TextToImageModel
from sfumato.models.origins import without_start
from sfumato.models.registry import load_model
from sfumato.objectives.adjoint_matching import AdjointMatching
from sfumato.objectives.autoencoder import Autoencoder
from sfumato.objectives.awm import AdvantageWeightedMatching
from sfumato.objectives.direct import Direct
from sfumato.objectives.direct_align import DirectAlign
from sfumato.objectives.dpo import Dpo
from sfumato.objectives.draft import Draft
from sfumato.objectives.nft import DiffusionNft
from sfumato.objectives.objective import Objective, ObjectiveOf, StableLoss
from sfumato.objectives.policy_gradient import PolicyGradient
from sfumato.objectives.reward_pairs import RewardPairs
from sfumato.objectives.scoring import RewardedObjective
from sfumato.objectives.supervised import Supervised
from sfumato.objectives.with_data import WithData
from sfumato.rewards.build import build_learner, build_reward, ready
from sfumato.rewards.learning_clip import LearningClip
from sfumato.rewards.reward import Reward
from sfumato.run.open_data import Data, frame_size, prompt_rows
from sfumato.training.checkpoint import list_checkpoints
from sfumato.training.compiling import arrange, lay_channels_last
from sfumato.training.distribution import Distribution
from sfumato.training.folder import RunFolder
from sfumato.training.gauges import build_gauges
from sfumato.training.guards import check_sharpness
from sfumato.training.loop import Job
from sfumato.training.module import Trainee
from sfumato.training.validation import HeldOut, Validation

REWARDED: Mapping[type[RewardedConfig], Callable[..., Objective[Any]]] = {
    DraftConfig: Draft,
    DirectConfig: Direct,
    AdjointMatchingConfig: AdjointMatching,
    DirectAlignConfig: DirectAlign,
    PolicyGradientConfig: PolicyGradient,
    NftConfig: DiffusionNft,
    AwmConfig: AdvantageWeightedMatching,
}


@dataclass(frozen=True)
class Own:
    """Parts that a script brings to `train`, in place of those that the settings name.

    Attributes:
        load: returns the model of the given settings, for training and for the export.
        objective: is minimised.
        stream: gives the rows to train on.
        prompts: of the validation images, one image each.
    """

    load: Callable[[ModelConfig], TextToImageModel] | None = None
    objective: Objective[Any] | None = None
    stream: Stream[Any] | None = None
    prompts: Sequence[str] | None = None


def check_own(config: TrainConfig, own: Own) -> None:
    """Refuse objective=own without a script's objective, or without rows for it.

    Raises:
        ValueError: saying what to bring.
    """
    rows = own.stream is not None or config.data.prompts is not None
    if isinstance(config.objective, OwnConfig) and (own.objective is None or not rows):
        raise ValueError(
            "objective=own takes its objective from a script, and its rows from the script or "
            "data.prompts: call train(..., own=Own(objective=..., stream=...)); see "
            "docs/write_your_own.md"
        )


def build_job(
    config: TrainConfig, settings: dict[str, Any], own: Own, data: Data, distribution: Distribution
) -> Job:
    """Build what is trained, on the device of this process.

    Raises:
        ValueError: if something cannot be loaded, or does not fit the model.
    """
    brought = own.objective.reward if isinstance(own.objective, RewardedObjective) else None
    reward = brought or build_scorer(config)
    if reward is not None:
        reward = ready(reward, distribution.device, partial(prompt_rows, config))
    if brought is not None and distribution.is_main:
        print(
            f"validation scores by {type(brought).__name__}, which the script brought; `sfumato "
            f"evaluate` scores by the settings, reward={config.reward.kind}",
            flush=True,
        )
    objective: ObjectiveOf[Any, Any]
    model: Trainee
    if config.objective.trains == "reward":
        objective, model = RewardPairs(), load_learner(config)
        model.to(distribution.device)
    elif isinstance(config.objective, AutoencoderConfig):
        objective, model = Autoencoder(config.objective), build_autoencoder(config)
        model.to(distribution.device)
    else:
        objective = own.objective or build_objective(config, reward)
        model = build_model(config, objective, own.load or load_model, distribution)
    held_out = None
    if isinstance(objective, StableLoss) and data.held_out:
        held_out = HeldOut(objective, data.held_out)
    if distribution.is_main:
        cached = data.pictures is not None and data.pictures.cache is not None
        describe(config, model, reward, distribution.world, cached=cached)
        if objective.needs_old:
            print("the old policy keeps a copy of these parameters", flush=True)
    others = {
        name: ready(build_reward(each), distribution.device, partial(prompt_rows, config))
        for name, each in config.validation.rewards.items()
    }
    gauges = {}
    if reward is not None and config.validation.gauges and isinstance(model, TextToImageModel):
        gauges = build_gauges(reward, grid_period(model, config))
    if reward is not None and not reward.differentiable:
        check_sharpness(config)
    validation = Validation(config, data.prompts, reward, held_out, distribution, others, gauges)
    return Job(config, settings, model, objective, data.stream, validation)


def grid_period(model: TextToImageModel, config: TrainConfig) -> int:
    """Return the pixels of two latent pixels, which are the patch of a transformer."""
    height, width = image_size(model, config.sampler)
    return 2 * height // model.latent_shape(height, width)[1]


def build_scorer(config: TrainConfig) -> Reward | None:
    """Return what scores images, if the settings name a reward that is not trained."""
    no_scorer = isinstance(config.reward, NoRewardConfig) or config.objective.trains != "model"
    return None if no_scorer else build_reward(config.reward)


def load_learner(config: TrainConfig) -> LearningClip:
    """Load the reward that the settings train, with the weights that it starts from."""
    objective, reward = config.objective, config.reward
    assert isinstance(objective, RewardPairsConfig), "nothing else trains a reward"
    assert isinstance(reward, ClipRewardConfig), "checked with the settings"
    return build_learner(reward, start_scale=objective.start_scale)


def build_autoencoder(config: TrainConfig) -> LearningAutoencoder:
    """Load the autoencoder that the settings train, with the weights that it starts from.

    Raises:
        ValueError: if it cannot be found, or does not fit the size of the pictures.
    """
    settings = config.objective
    assert isinstance(settings, AutoencoderConfig), "nothing else trains an autoencoder"
    torch.manual_seed(derive(config.training.seed, "autoencoder"))
    vae = load_autoencoder(str(settings.start))
    factor = downsampling(vae.config)
    height, width = frame_size(config, None)
    if height % factor or width % factor:
        raise ValueError(
            f"sampler.height={height} and sampler.width={width} are not multiples of {factor}, by "
            f"which {settings.start} divides a side; give others"
        )
    if config.training.strategy == "ddp":  # shards have one order
        lay_channels_last(vae)
    return LearningAutoencoder(vae, decoder_only=settings.decoder_only)


def build_objective(config: TrainConfig, reward: Reward | None) -> Objective[Any]:
    """Return the objective that the settings name, of a text-to-image model."""
    settings = config.objective
    if isinstance(settings, SupervisedConfig):
        return Supervised(settings)
    if isinstance(settings, DpoConfig):
        return Dpo(settings)
    assert isinstance(settings, RewardedConfig), "a script brings its own, as checked before"
    assert reward is not None, "checked with the settings"
    kind = REWARDED[type(settings)]
    objective = kind(settings, config.sampler, reward)
    if not isinstance(settings, RewardGradientConfig) or not settings.reads_prompts:
        return objective
    if not settings.data_coeff:
        return objective
    return WithData(objective, Supervised(SupervisedConfig()), settings.data_coeff)


def build_model(
    config: TrainConfig,
    objective: Objective[Any],
    load: Callable[[ModelConfig], TextToImageModel],
    distribution: Distribution,
) -> TextToImageModel:
    """Load the model, on the device, laid out and compiled as configured.

    It gets a frozen copy only if the loss needs one.
    """
    needs_reference = config.model.reference and objective.needs_reference
    settings = replace(config.model, reference=needs_reference)
    if list_checkpoints(RunFolder.of(config).checkpoints) and not needs_reference:
        settings = without_start(settings)  # the weights are in the checkpoints
    torch.manual_seed(derive(config.training.seed, "adapter"))  # peft draws A from it
    model = load(settings)
    objective.check(model)
    model.to(distribution.device)
    arrange(model, config)
    return model


def describe(
    config: TrainConfig,
    model: Trainee,
    reward: Reward | None,
    processes: int,
    *,
    cached: bool,
) -> None:
    """Note in run.json what is trained, and print it."""
    folder = RunFolder.of(config)
    trained = sum(parameter.numel() for parameter in model.trainable().values())
    facts = {
        "seed": config.training.seed,
        "reward_scale": reward.scale if reward is not None else None,
        "trained_parameters": trained,
        "processes": processes,
        "image_cache": cached,
    }
    folder.describe(" ".join(sys.argv), facts)
    print(f"{folder.path}: training {trained / 1e6:.2f} M parameters", flush=True)
