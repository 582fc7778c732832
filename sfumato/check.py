"""Combinations of training settings that cannot work, refused before any weight is loaded."""

from collections.abc import Mapping
from pathlib import Path

from sfumato.config import (
    BrightnessRewardConfig,
    ColorRewardConfig,
    DraftConfig,
    JpegRewardConfig,
    NoRewardConfig,
    RewardConfig,
    SupervisedConfig,
    TrainConfig,
    TrainingConfig,
    WeightedRewardConfig,
    check_values,
)
from sfumato.training.sharding import check_sharding
from sfumato.training.stop import parse_duration


def check_train(config: TrainConfig, processes: int) -> None:
    """Refuse single values and combinations that cannot work.

    Raises:
        ValueError: naming the key, its value, and what to do.
    """
    check_values(config)
    _check_batch(config.training, processes)
    _check_loop(config.training)
    check_sharding(config, processes)
    _check_data(config)
    _check_lora_files(config)
    if len(config.optimizer.betas) != 2:
        raise ValueError(f"optimizer.betas={config.optimizer.betas} are not two numbers; give two")
    measured = isinstance(config.objective, SupervisedConfig) and config.validation.loss_images
    if config.export == "best" and not measured:
        raise ValueError(
            "export=best chooses by the validation loss, which needs objective=supervised and "
            "validation.loss_images above 0; use export=last"
        )
    if isinstance(config.objective, DraftConfig):
        _check_differentiable(config.reward)
        _check_draft(config.objective, config.sampler.num_inference_steps)
        lacks_copy = config.model.trainable == "full" and not config.model.reference
        if lacks_copy and config.objective.kl_coeff:
            raise ValueError(
                f"objective.kl_coeff={config.objective.kl_coeff} compares with a frozen copy; set "
                "model.reference=true, or objective.kl_coeff=0"
            )


def _check_batch(training: TrainingConfig, processes: int) -> None:
    unit = training.micro_batch_size * processes
    if training.global_batch_size % unit:
        nearest = max(unit, round(training.global_batch_size / unit) * unit)
        raise ValueError(
            f"training.global_batch_size={training.global_batch_size} does not divide into "
            f"{processes} process(es) x micro batches of {training.micro_batch_size}; the nearest "
            f"that does is {nearest}"
        )


def _check_loop(training: TrainingConfig) -> None:
    if training.max_time is not None:
        parse_duration("training.max_time", training.max_time)
    if training.ema_decay is not None and training.ema_every_steps > training.max_steps:
        raise ValueError(
            f"training.ema_every_steps={training.ema_every_steps} is more than "
            f"training.max_steps={training.max_steps}, so that the average would never move; "
            "give fewer, or training.ema_decay=null"
        )


def _check_data(config: TrainConfig) -> None:
    data, shards = config.data, config.data.shards
    sources = {
        "data.shards": data.shards,
        "data.images": data.images,
        "validation.images": config.validation.images,
    }
    given = {key: each for key, each in sources.items() if each.path or each.sources}
    named = {
        key: f"{key}.path={each.path!r}" if each.path else f"{key}.sources={list(each.sources)}"
        for key, each in given.items()
    }
    prepared, images = named.get("data.shards"), named.get("data.images")
    if prepared and images:
        raise ValueError(f"{prepared} and {images} are both given; leave one of them out")
    if shards.cached and images:
        raise ValueError(
            f"data.shards.cached=true is for a prepared folder, and {images} is none; give "
            "data.shards.path instead, or data.shards.cached=false"
        )
    if given:
        from sfumato.data.settings import checked_sources

        for key, each in given.items():
            checked_sources(key, each)
    network_alone = config.model.parts in (["network"], ["unet"], ["transformer"])
    if prepared and shards.cached and not network_alone:
        raise ValueError(
            f"model.parts={config.model.parts} trains a text encoder, but a cache holds the "
            "states of the frozen one; use data.shards.cached=false, or model.parts=[network]"
        )


def _check_lora_files(config: TrainConfig) -> None:
    """Refuse a missing start, unless the run has checkpoints, which contain it."""
    from sfumato.models.lora import find_lora
    from sfumato.training.checkpoint import list_checkpoints
    from sfumato.training.folder import RunFolder

    start, folder = config.model.lora.start, RunFolder(Path(config.runs_dir) / config.name)
    if start is not None and not list_checkpoints(folder.checkpoints):
        find_lora(start, "model.lora.start")
    for name, merge in config.model.merge.items():
        if not merge.scale:
            raise ValueError(
                f"model.merge.{name}.scale={merge.scale} must not be 0; leave the file out with "
                f"model.merge.{name}=null"
            )


def _check_differentiable(reward: RewardConfig) -> None:
    rewards: Mapping[str, RewardConfig] = {"reward": reward}
    if isinstance(reward, WeightedRewardConfig):
        if not any(part.weight for part in reward.parts.values()):
            raise ValueError("each reward.parts.NAME.weight is 0: nothing is learned; give others")
        rewards = {f"reward.parts.{name}": part.reward for name, part in reward.parts.items()}
    for key, each in rewards.items():
        if isinstance(each, NoRewardConfig):
            raise ValueError(
                "objective=draft maximises a reward: choose one, such as reward=clip "
                "reward.pretrained=MODEL, or reward=color"
            )
        if isinstance(each, ColorRewardConfig | BrightnessRewardConfig) and not each.scale:
            raise ValueError(f"{key}.scale=0 makes all rewards equal; give another number")
        if isinstance(each, JpegRewardConfig):
            raise ValueError(
                f"{key}={each.kind} is not differentiable, and DRaFT learns from the reward's "
                "gradient; choose a differentiable one (reward=clip, reward=color)"
            )


def _check_draft(draft: DraftConfig, steps: int) -> None:
    bounds = draft.truncation_range
    if bounds is None and draft.truncation_steps > steps:
        raise ValueError(
            f"objective.truncation_steps={draft.truncation_steps} is more than the number of "
            f"sampling steps; give {steps} (sampler.num_inference_steps) or less"
        )
    if bounds is not None and (len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= steps):
        raise ValueError(
            f"objective.truncation_range={bounds} is no range of sampling steps; give [low, high] "
            f"with 1 <= low <= high <= {steps} (sampler.num_inference_steps)"
        )
    if draft.lv_samples and (draft.truncation_steps != 1 or bounds):
        raise ValueError(
            f"objective.lv_samples={draft.lv_samples} is DRaFT-LV; set "
            "objective.truncation_steps=1 and objective.truncation_range=null"
        )
