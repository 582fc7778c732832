"""Combinations of training settings that cannot work, refused before any weight is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sfumato.config import (
    AdjointMatchingConfig,
    BrightnessRewardConfig,
    ColorRewardConfig,
    DirectAlignConfig,
    DirectConfig,
    DraftConfig,
    JpegRewardConfig,
    NoRewardConfig,
    RewardConfig,
    RewardedConfig,
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
    if isinstance(config.objective, RewardedConfig):
        _check_differentiable(config.reward, config.objective.kind)
        _check_rewarded(config, config.objective)


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
    for key, on in (("data.shards.cached", shards.cached), ("data.verify", data.verify)):
        if on and images:
            advice = f"give data.shards.path instead, or {key}=false"
            raise ValueError(f"{key}=true is for a prepared folder, and {images} is none; {advice}")
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


def _check_rewarded(config: TrainConfig, objective: RewardedConfig) -> None:
    steps = config.sampler.num_inference_steps
    match objective:
        case DraftConfig():
            _check_draft(objective, steps)
        case DirectConfig():
            _check_direct(objective, steps, config.sampler.eta)
        case AdjointMatchingConfig():
            if objective.trained_steps > steps:
                raise ValueError(
                    f"objective.trained_steps={objective.trained_steps} is more than the number of "
                    f"sampling steps; give {steps} (sampler.num_inference_steps) or less"
                )
        case DirectAlignConfig():
            _check_range("objective.noise_levels", objective.noise_levels, 1.0, "times")
    if not isinstance(objective, DraftConfig) and config.training.precision == "fp16":
        raise ValueError(
            f"objective={objective.kind} differentiates the reward before the loss is scaled, "
            "where small gradients vanish under training.precision=fp16; use bf16 or no"
        )
    match objective:
        case DraftConfig(kl_coeff=coeff) | DirectConfig(kl_coeff=coeff) if coeff:
            compared, advice = f"objective.kl_coeff={coeff}", ", or objective.kl_coeff=0"
        case AdjointMatchingConfig():
            compared, advice = f"objective={objective.kind}", ""
        case _:
            return
    if config.model.trainable == "full" and not config.model.reference:
        raise ValueError(
            f"{compared} compares with a frozen copy; set model.reference=true{advice}"
        )


def _check_differentiable(reward: RewardConfig, objective: str) -> None:
    rewards: Mapping[str, RewardConfig] = {"reward": reward}
    if isinstance(reward, WeightedRewardConfig):
        if not any(part.weight for part in reward.parts.values()):
            raise ValueError("each reward.parts.NAME.weight is 0: nothing is learned; give others")
        rewards = {f"reward.parts.{name}": part.reward for name, part in reward.parts.items()}
    for key, each in rewards.items():
        if isinstance(each, NoRewardConfig):
            raise ValueError(
                f"objective={objective} maximises a reward: choose one, such as reward=clip "
                "reward.pretrained=MODEL, or reward=color"
            )
        if isinstance(each, ColorRewardConfig | BrightnessRewardConfig) and not each.scale:
            raise ValueError(f"{key}.scale=0 makes all rewards equal; give another number")
        if isinstance(each, JpegRewardConfig):
            raise ValueError(
                f"{key}={each.kind} is not differentiable, and objective={objective} learns from "
                "the reward's gradient; choose a differentiable one (reward=clip, reward=color), "
                "or bring an objective that needs no gradient (objective=own)"
            )


def _check_direct(direct: DirectConfig, steps: int, eta: float) -> None:
    _check_steps(direct, steps)
    linear = direct.path != "sum" or direct.weights == "solver"
    if linear and eta > 0:
        raise ValueError(
            f"sampler.eta={eta:g} adds noise between the steps, and objective.weights=solver needs "
            "a rollout that is a sum of its outputs; set sampler.eta=0, or objective.path=sum "
            "with objective.weights=sigma, alpha, posterior or constant"
        )
    if direct.path == "bridge" and direct.steps not in ("late", "uniform"):
        raise ValueError(
            f"objective.steps={direct.steps} chooses no steps around a bridge; use late or uniform"
        )
    if direct.early_stop is not None:
        least = 1 if direct.path == "sum" else 2
        _check_range("objective.early_stop", direct.early_stop, steps - least, "numbers of steps")


def _check_steps(direct: DirectConfig, steps: int) -> None:
    """Refuse active steps that a run does not have."""
    chosen, last = direct.listed, steps - 1
    if direct.path == "lagrange":
        return
    if direct.steps == "listed":
        wrong = [i for i in chosen or () if i > last]
        if not chosen or wrong or len(set(chosen)) != len(chosen):
            raise ValueError(
                f"objective.listed={chosen} are no steps of a run; give different numbers of 0 "
                f"(the first, at noise) to {last} (sampler.num_inference_steps - 1)"
            )
        if direct.path == "leap" and len(chosen) != 2:
            raise ValueError(f"objective.listed={chosen} are not two steps, as a leap has")
    elif direct.steps != "all" and direct.path != "leap" and direct.active_steps > steps:
        raise ValueError(
            f"objective.active_steps={direct.active_steps} is more than the number of sampling "
            f"steps; give {steps} (sampler.num_inference_steps) or less"
        )
    if direct.path == "leap" and direct.steps == "all":
        raise ValueError("objective.steps=all is no leap, which has two steps; use uniform or late")
    if direct.path == "bridge" and direct.active_steps < 2:
        raise ValueError(
            f"objective.active_steps={direct.active_steps} is too few for a bridge, which has a "
            "step on each side; give 2 or more"
        )
    if direct.path != "sum" and steps < 2:
        raise ValueError(f"objective.path={direct.path} needs sampler.num_inference_steps of 2")


def _check_range(key: str, bounds: Sequence[int | float], most: int | float, what: str) -> None:
    if len(bounds) != 2 or not bounds[0] <= bounds[1] <= most:
        raise ValueError(
            f"{key}={bounds} is no range of {what}; give [low, high] with low <= high <= {most:g}"
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
