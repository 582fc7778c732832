"""Combinations of training settings that cannot work, refused before any weight is loaded."""

from pathlib import Path

from sfumato.check_objective import (
    check_autoencoder,
    check_dpo,
    check_objective,
    check_reward_pairs,
)
from sfumato.conditions import is_own, leaves_of, named_files
from sfumato.config import (
    AutoencoderConfig,
    DpoConfig,
    RewardedConfig,
    RewardPairsConfig,
    SamplerConfig,
    TrainConfig,
    TrainingConfig,
    check_values,
)
from sfumato.data.store import check_addresses
from sfumato.rewards.code import find_code, read_address
from sfumato.training.guards import check_guards
from sfumato.training.sharding import check_sharding
from sfumato.training.stop import parse_duration

LONGEST = 10_000  # characters of a prompt
LEAST_OF_PRODIGY = 0.01  # a rate of AdamW is below


def check_train(config: TrainConfig, processes: int) -> None:
    """Refuse single values and combinations that cannot work.

    Raises:
        ValueError: naming the key, its value, and what to do.
    """
    check_values(config)
    _check_batch(config.training, processes)
    _check_loop(config.training)
    check_sharding(config, processes)
    check_sampler(config.sampler)
    if kept := config.sampler.prompt_cache:
        _check_frozen(
            config,
            f"sampler.prompt_cache={kept} keeps the states of a frozen one; use "
            "sampler.prompt_cache=0, or model.parts=[network]",
        )
    _check_merging(config, processes)
    _check_data(config)
    _check_lora_files(config)
    _check_optimizer(config)
    with_loss = config.objective.has_validation_loss
    if config.export == "best" and not (with_loss and config.validation.loss_images):
        raise ValueError(
            "export=best chooses by the validation loss, which needs objective=supervised, dpo, "
            "reward_pairs or autoencoder, and validation.loss_images above 0; use export=last"
        )
    check_addresses(leaves_of(config))
    for key, value in named_files(config).items():
        if is_own(key):  # before the run folder has it
            read_address(value, key) if key.endswith(".url") else find_code(value)
    check_guards(config)
    if isinstance(config.objective, DpoConfig):
        check_dpo(config)
    if isinstance(config.objective, RewardPairsConfig):
        check_reward_pairs(config)
    if isinstance(config.objective, AutoencoderConfig):
        check_autoencoder(config)
    if isinstance(config.objective, RewardedConfig):
        check_objective(config, config.objective)


def _check_optimizer(config: TrainConfig) -> None:
    """Refuse what an optimiser cannot do; the user's own code is not run."""
    optimizer = config.optimizer
    if len(optimizer.betas) != 2:
        raise ValueError(f"optimizer.betas={optimizer.betas} are not two numbers; give two")
    if optimizer.kind == "own" and not optimizer.path:
        raise ValueError("optimizer.kind=own needs optimizer.path=FILE.py:CLASS")
    if optimizer.kind == "prodigy" and optimizer.lr < LEAST_OF_PRODIGY:
        raise ValueError(
            f"optimizer.lr={optimizer.lr} multiplies the rate that Prodigy finds; set "
            "optimizer.lr=1, and steer by optimizer.options.d_coef"
        )
    if optimizer.kind == "adamw_8bit" and config.model.channels_last:
        raise ValueError(
            "optimizer.kind=adamw_8bit reads weights in their plain layout; set "
            "model.channels_last=false, or optimizer.kind=adamw"
        )
    if optimizer.options and optimizer.kind in ("adamw", "adafactor", "muon", "sgd"):
        from sfumato.training.optimizer import try_optimizer

        try_optimizer(optimizer)


def check_sampler(sampler: SamplerConfig) -> None:
    """Refuse combinations of a sampler's settings that no model can do.

    Raises:
        ValueError: naming the key, its value, and what to do.
    """
    if sampler.eta and sampler.solver != "first_order":
        raise ValueError(
            f"sampler.eta={sampler.eta} adds noise at each step, and "
            f"sampler.solver={sampler.solver} is deterministic; set sampler.eta=0, or "
            "sampler.solver=first_order"
        )
    if sampler.eta and sampler.scheduler is not None:
        raise ValueError(
            f"sampler.eta={sampler.eta} is of sampler.solver=first_order, and pictures are stepped "
            f"by sampler.scheduler={sampler.scheduler}; set sampler.eta=0, or leave it out"
        )
    negative = sampler.negative_prompt or ""
    readable = negative.replace("\0", "").encode(errors="ignore").decode()
    if len(negative) > LONGEST or readable != negative:
        raise ValueError(
            f"sampler.negative_prompt={negative[:40]!r} is not UTF-8, or has more than "
            f"{LONGEST:,} characters; give another"
        )
    bounds = sampler.guidance_interval
    if bounds is not None and (len(bounds) != 2 or bounds[0] > bounds[1]):
        raise ValueError(
            f"sampler.guidance_interval={bounds} is no interval of t; give [low, high] with "
            "0 <= low <= high <= 1, where 1 is noise"
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
    paired = {"data.pairs": data.pairs, "validation.pairs": config.validation.pairs}
    if any(each.path for each in paired.values()):
        from sfumato.data.settings import check_pairs

        for key, pairs in paired.items():
            if pairs.path:
                check_pairs(key, pairs)
    if prepared and shards.cached:
        _check_frozen(
            config,
            "a cache holds the states of the frozen one; use data.shards.cached=false, "
            "or model.parts=[network]",
        )


def _check_merging(config: TrainConfig, processes: int) -> None:
    """Refuse rollouts on merged adapters where those would not predict what the policy does."""
    training, lora = config.training, config.model.lora
    if not lora.merge_rollouts:
        return
    for wrong, why in (
        (training.precision != "no", f"training.precision={training.precision} rounds them away"),
        (config.model.dtype != "float32", f"model.dtype={config.model.dtype} rounds them away"),
        (lora.dropout > 0, f"model.lora.dropout={lora.dropout:g} drops parts of them"),
        (
            training.strategy != "ddp" and processes > 1,
            f"training.strategy={training.strategy} keeps the weights in shards",
        ),
    ):
        if wrong:
            raise ValueError(
                "model.lora.merge_rollouts=true adds the adapters to the weights, and "
                f"{why}; leave it out"
            )


def _check_frozen(config: TrainConfig, why: str) -> None:
    """Refuse to train a text encoder whose states are taken to stay the same."""
    if config.model.parts not in (["network"], ["unet"], ["transformer"]):
        raise ValueError(f"model.parts={config.model.parts} trains a text encoder, but {why}")


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
