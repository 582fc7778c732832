"""What settings cannot work together, found before any weight is loaded."""

import re
from collections.abc import Mapping
from pathlib import Path

from sfumato.config import (
    DraftConfig,
    JpegRewardConfig,
    LoraConfig,
    NoRewardConfig,
    OptimizerConfig,
    RewardConfig,
    SamplerConfig,
    SupervisedConfig,
    TrainConfig,
    TrainingConfig,
    WeightedRewardConfig,
)

CHOICES = {
    "model.trainable": ("lora", "full"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "objective.cfg_gradient": ("full", "detach_uncond", "rescale"),
    "objective.timesteps": ("uniform", "logit_normal", "table"),
    "objective.weighting": ("none", "min_snr", "bump"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "training.precision": ("no", "bf16", "fp16"),
    "training.strategy": ("ddp", "fsdp", "hsdp"),
    "training.compile": ("none", "regional", "full"),
    "model.prediction_type": ("epsilon", "v_prediction"),
    "reward.dtype": ("float32", "bfloat16", "float16"),
    "reward.color": ("red", "green", "blue"),
}


def check_train(config: TrainConfig, processes: int) -> None:
    """Refuse settings that cannot work together.

    Raises:
        ValueError: naming the key, its value, and what to do.
    """
    training = config.training
    if config.name in {"", ".."} or Path(config.name).name != config.name:
        raise ValueError(
            f"name = {config.name!r} is no name of a folder; give one without slashes, and the "
            "place of all runs as runs_dir=..."
        )
    rewards = {"reward": config.reward}
    if isinstance(config.reward, WeightedRewardConfig):
        rewards |= {f"reward.parts.{n}": part.reward for n, part in config.reward.parts.items()}
    _check_choices(config, rewards)
    check_sampler(config.sampler)
    _positive(
        {
            "training.max_steps": training.max_steps,
            "training.micro_batch_size": training.micro_batch_size,
            "training.global_batch_size": training.global_batch_size,
            "training.checkpoint_every_steps": training.checkpoint_every_steps,
            "training.keep_checkpoints": training.keep_checkpoints,
            "training.ema_every_steps": training.ema_every_steps,
            "training.shard_size": training.shard_size,
            "training.peak_tflops": training.peak_tflops,
            "validation.num_images": config.validation.num_images,
            "data.buffer": config.data.buffer,
            "model.image_size": config.model.image_size,
        }
    )
    for key, value in (
        ("validation.loss_images", config.validation.loss_images),
        ("validation.every_steps", config.validation.every_steps),
    ):
        if value < 0:
            raise ValueError(f"{key} = {value} must be 0 (off) or more")
    unit = training.micro_batch_size * processes
    if training.global_batch_size % unit:
        nearest = max(unit, round(training.global_batch_size / unit) * unit)
        raise ValueError(
            f"training.global_batch_size = {training.global_batch_size} does not divide into "
            f"{processes} process(es) x micro batches of {training.micro_batch_size}; the nearest "
            f"that does is {nearest}"
        )
    _check_average(training)
    _check_sharding(config, processes)
    if training.max_time is not None:
        from sfumato.training.stop import parse_duration

        parse_duration(training.max_time)
    if not config.model.parts:
        raise ValueError("model.parts = [] trains nothing; give network, or a text encoder's name")
    _check_shards(config)
    _check_lora(config.model.lora)
    _check_lora_files(config)
    _check_optimizer(config.optimizer)
    if config.export not in {"last", "best"}:
        raise ValueError(f"export = {config.export!r}; choose one of last, best")
    measured = isinstance(config.objective, SupervisedConfig) and config.validation.loss_images
    if config.export == "best" and not measured:
        raise ValueError(
            "export = best chooses by the validation loss, which only objective=supervised with "
            "validation.loss_images above 0 has; use export=last"
        )
    match config.objective:
        case DraftConfig() as draft:
            _check_draft(draft, config.sampler, rewards)
        case SupervisedConfig() as supervised:
            _check_supervised(supervised)
        case _:
            pass


def check_sampler(sampler: SamplerConfig) -> None:
    """Refuse a number of steps or an eta that no sampling run can have.

    Raises:
        ValueError: naming the key and its value.
    """
    _positive(
        {
            "sampler.num_inference_steps": sampler.num_inference_steps,
            "sampler.height": sampler.height,
            "sampler.width": sampler.width,
        }
    )
    if sampler.eta < 0 or sampler.eta > 1:
        raise ValueError(f"sampler.eta = {sampler.eta} must lie in [0, 1]; 0 is deterministic")


def _check_average(training: TrainingConfig) -> None:
    if training.ema_decay is None:
        return
    if not 0 <= training.ema_decay < 1:
        raise ValueError(
            f"training.ema_decay = {training.ema_decay} must lie in [0, 1), or be null"
        )
    if training.ema_every_steps > training.max_steps:
        raise ValueError(
            f"training.ema_every_steps = {training.ema_every_steps} is more than "
            f"training.max_steps = {training.max_steps}, so that the average would never move; "
            "give fewer, or training.ema_decay=null"
        )


def _check_sharding(config: TrainConfig, processes: int) -> None:
    training = config.training
    if training.strategy == "ddp" or processes == 1:
        return
    if config.model.channels_last:
        raise ValueError(
            f"model.channels_last = true and training.strategy = {training.strategy}: FSDP2 splits "
            "weights that are contiguous; take one of them out"
        )
    if training.compile == "full":
        raise ValueError(
            f"training.compile = full and training.strategy = {training.strategy}: a network that "
            "is compiled as a whole cannot be gathered block by block; use compile=regional"
        )
    if training.strategy == "hsdp" and processes % (training.shard_size or 1):
        raise ValueError(
            f"training.shard_size = {training.shard_size} does not divide {processes} processes; "
            "each copy of the network lies on as many"
        )


def _check_shards(config: TrainConfig) -> None:
    from sfumato.data.prepared.open import check_shard_config

    shards, images = config.data.shards, config.data.images
    if shards.path is None:
        return
    if not isinstance(config.objective, SupervisedConfig):
        raise ValueError(
            f"data.shards.path = {shards.path!r} is for objective=supervised; an objective that "
            "maximises a reward reads data.prompts"
        )
    if images.path is not None or images.sources:
        raise ValueError(
            f"data.shards.path = {shards.path!r} is given beside data.images; take one of them out"
        )
    check_shard_config(shards)
    if shards.cached and config.model.parts not in (["network"], ["unet"], ["transformer"]):
        raise ValueError(
            f"model.parts = {config.model.parts} trains a text encoder, and a cache holds what a "
            "frozen one said; use data.shards.cached=false, or model.parts=[network]"
        )


def _check_lora(lora: LoraConfig) -> None:
    _positive({"model.lora.rank": lora.rank, "model.lora.alpha": lora.alpha})
    if not 0 <= lora.dropout < 1:
        raise ValueError(f"model.lora.dropout = {lora.dropout} must lie in [0, 1)")
    for key in ("targets", "encoder_targets"):
        targets = vars(lora)[key]
        if targets == []:
            raise ValueError(f"model.lora.{key} = [] trains nothing; leave it out for the default")
        for target in targets or []:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(
                    f"model.lora.{key} has {target!r}, which is no regular expression ({error})"
                ) from error


def _check_lora_files(config: TrainConfig) -> None:
    """Refuse a start that is not there, unless the run has checkpoints, which it was put into."""
    from sfumato.models.lora_files import find_lora
    from sfumato.training.checkpoint import list_checkpoints
    from sfumato.training.folder import RunFolder

    start, folder = config.model.lora.start, RunFolder(Path(config.runs_dir) / config.name)
    if start is not None and config.model.trainable != "lora":
        raise ValueError(
            f"model.lora.start = {start!r} is an adapter to go on training, and model.trainable = "
            f"{config.model.trainable} trains none; merge it into the base with "
            "model.merge.NAME.path=FILE"
        )
    if start is not None and not list_checkpoints(folder.checkpoints):
        find_lora(start, "model.lora.start")
    for name, merge in config.model.merge.items():
        if not merge.scale:
            raise ValueError(f"model.merge.{name}.scale = {merge.scale} must be another number")


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    _positive({"optimizer.lr": optimizer.lr, "optimizer.max_grad_norm": optimizer.max_grad_norm})
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ValueError(f"optimizer.betas = {optimizer.betas} must be two numbers in [0, 1)")
    for name in ("eps", "weight_decay", "warmup_steps"):
        if vars(optimizer)[name] < 0:
            raise ValueError(f"optimizer.{name} = {vars(optimizer)[name]} must be 0 or more")


def _check_draft(
    draft: DraftConfig, sampler: SamplerConfig, rewards: Mapping[str, RewardConfig]
) -> None:
    for place, reward in rewards.items():
        if isinstance(reward, NoRewardConfig):
            raise ValueError(
                "objective=draft maximises a reward: choose one, such as reward=clip "
                "reward.pretrained=MODEL, or reward=color"
            )
        if isinstance(reward, JpegRewardConfig):
            raise ValueError(
                f"{place} = {reward.kind} is not differentiable, and DRaFT learns from the "
                "reward's gradient; choose a differentiable one (reward=clip, reward=color)"
            )
    steps = sampler.num_inference_steps
    if not 1 <= draft.truncation_steps <= steps:
        raise ValueError(
            f"objective.truncation_steps = {draft.truncation_steps} must lie in 1..{steps}, the "
            "number of sampling steps (sampler.num_inference_steps)"
        )
    if draft.truncation_range is not None:
        bounds = draft.truncation_range
        if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= steps:
            raise ValueError(
                f"objective.truncation_range = {bounds} must be [low, high] with 1 <= low <= high "
                f"<= {steps}, the number of sampling steps"
            )
    if draft.kl_coeff < 0:
        raise ValueError(
            f"objective.kl_coeff = {draft.kl_coeff} must be 0 (DRaFT) or more (DRaFT+)"
        )
    if draft.lv_samples < 0:
        raise ValueError(f"objective.lv_samples = {draft.lv_samples} must be 0 (off) or more")
    if draft.lv_samples and (draft.truncation_steps != 1 or draft.truncation_range):
        raise ValueError(
            f"objective.lv_samples = {draft.lv_samples} is DRaFT-LV, which has "
            "objective.truncation_steps = 1 and no truncation_range"
        )


def _check_supervised(supervised: SupervisedConfig) -> None:
    if not 0 <= supervised.caption_dropout <= 1:
        raise ValueError(
            f"objective.caption_dropout = {supervised.caption_dropout} must lie in [0, 1]"
        )
    if supervised.noise_offset < 0:
        raise ValueError(f"objective.noise_offset = {supervised.noise_offset} must be 0 or more")
    _positive(
        {"objective.snr_gamma": supervised.snr_gamma, "objective.logit_std": supervised.logit_std}
    )


def _check_choices(config: TrainConfig, rewards: Mapping[str, RewardConfig]) -> None:
    for key, allowed in CHOICES.items():
        group, _, name = key.partition(".")
        nodes = rewards if group == "reward" else {group: vars(config)[group]}
        for place, node in nodes.items():
            value = vars(node).get(name)
            if value is not None and value not in allowed:
                raise ValueError(f"{place}.{name} = {value!r}; choose one of {', '.join(allowed)}")


def _positive(values: Mapping[str, int | float | None]) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} = {value} must be above 0")
