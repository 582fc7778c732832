"""Settings of objectives that cannot work, refused before any weight is loaded."""

from collections.abc import Sequence

from sfumato.config import (
    AdjointMatchingConfig,
    BrightnessRewardConfig,
    ClipRewardConfig,
    CollectedConfig,
    ColorRewardConfig,
    DirectAlignConfig,
    DirectConfig,
    DraftConfig,
    HttpRewardConfig,
    JpegRewardConfig,
    NoRewardConfig,
    PolicyGradientConfig,
    RewardConfig,
    RewardedConfig,
    SamplerConfig,
    TrainConfig,
    WeightedRewardConfig,
    rewards_of,
)


def check_objective(config: TrainConfig, objective: RewardedConfig) -> None:
    """Refuse settings of an objective that cannot work with its reward, sampler or model.

    Raises:
        ValueError: naming the key, its value, and what to do.
    """
    sampler = config.sampler
    collects = isinstance(objective, CollectedConfig)
    _check_reward(config.reward, objective.kind, differentiable=not collects)
    if not collects:
        _check_deviations(config)
    if isinstance(objective, CollectedConfig):
        _check_groups(objective, config)
    match objective:
        case PolicyGradientConfig():
            _check_policy_gradient(objective, config)
        case DraftConfig():
            _check_draft(objective, sampler)
        case DirectConfig():
            _check_direct(objective, sampler)
        case AdjointMatchingConfig():
            _check_count("objective.trained_steps", objective.trained_steps, sampler)
            if sampler.solver != "first_order":
                raise ValueError(
                    f"sampler.solver={sampler.solver} is deterministic, and "
                    "objective=adjoint_matching draws noise at each step; use first_order"
                )
        case DirectAlignConfig():
            _check_range("objective.noise_levels", objective.noise_levels, 1.0, "times")
    reward = config.reward
    equal = isinstance(reward, WeightedRewardConfig) and reward.gradients == "equalised"
    scaled = collects or (isinstance(objective, DraftConfig) and not equal)
    if not scaled and config.training.precision == "fp16":
        what = "reward.gradients=equalised" if equal else f"objective={objective.kind}"
        raise ValueError(
            f"{what} differentiates the reward before the loss is scaled, "
            "where small gradients vanish under training.precision=fp16; use bf16 or no"
        )
    match objective:
        case DraftConfig() | DirectConfig() | CollectedConfig() if coeff := objective.kl_coeff:
            compared, advice = f"objective.kl_coeff={coeff}", ", or objective.kl_coeff=0"
        case AdjointMatchingConfig():
            compared, advice = f"objective={objective.kind}", ""
        case _:
            return
    if config.model.trainable == "full" and not config.model.reference:
        raise ValueError(
            f"{compared} compares with a frozen copy; set model.reference=true{advice}"
        )


def check_dpo(config: TrainConfig) -> None:
    """Refuse DPO without its reference with a ValueError."""
    if config.model.trainable == "full" and not config.model.reference:
        raise ValueError(
            "objective=dpo compares with a frozen copy, and model.reference=false keeps none; set "
            "model.reference=true"
        )


def check_reward_pairs(config: TrainConfig) -> None:
    """Refuse to train a reward that has no weights, or weights that cannot be trained.

    Raises:
        ValueError: naming the setting.
    """
    reward = config.reward
    if not isinstance(reward, ClipRewardConfig):
        raise ValueError(
            f"objective=reward_pairs trains a CLIP, and reward={reward.kind} is none; set "
            "reward=clip reward.pretrained=MODEL, where training starts"
        )
    if reward.dtype != "float32":
        raise ValueError(
            f"reward.dtype={reward.dtype} rounds away what training changes; set "
            "reward.dtype=float32, and training.precision=bf16 to compute in half precision"
        )


def check_autoencoder(config: TrainConfig) -> None:
    """Refuse to train an autoencoder on what another one encoded.

    Raises:
        ValueError: naming the setting.
    """
    if config.data.shards.cached:
        raise ValueError(
            "data.shards.cached=true reads latents that another autoencoder made, and "
            "objective=autoencoder learns from pictures; set data.shards.cached=false"
        )
    if not isinstance(config.reward, NoRewardConfig):
        raise ValueError(
            f"reward={config.reward.kind} scores images of a text-to-image model, and "
            "objective=autoencoder trains none; set reward=none"
        )


def _check_reward(reward: RewardConfig, objective: str, *, differentiable: bool) -> None:
    if isinstance(reward, WeightedRewardConfig):
        if not any(part.weight for part in reward.parts.values()):
            raise ValueError("each reward.parts.NAME.weight is 0: nothing is learned; give others")
        if "reward" in reward.parts:
            raise ValueError("reward.parts: a part is named 'reward', as the sum is; rename it")
    for key, each in rewards_of(reward).items():
        if isinstance(each, NoRewardConfig):
            raise ValueError(
                f"objective={objective} maximises a reward: choose one, such as reward=clip "
                "reward.pretrained=MODEL, or reward=color"
            )
        if isinstance(each, ColorRewardConfig | BrightnessRewardConfig) and not each.scale:
            raise ValueError(f"{key}.scale=0 makes all rewards equal; give another number")
        if isinstance(each, JpegRewardConfig | HttpRewardConfig) and differentiable:
            raise ValueError(
                f"{key}={each.kind} is not differentiable, and objective={objective} learns from "
                "the reward's gradient; choose a differentiable one (reward=clip, reward=color), "
                "or an objective that needs no gradient (objective=policy_gradient, nft or awm)"
            )


def _check_deviations(config: TrainConfig) -> None:
    alone = config.training.global_batch_size == 1
    if alone and isinstance(config.reward, WeightedRewardConfig) and config.reward.standardise:
        raise ValueError(
            "training.global_batch_size=1 has no deviation between its images, by which "
            "reward.standardise=true divides; give 2 or more, or reward.standardise=false"
        )


def _check_groups(objective: CollectedConfig, config: TrainConfig) -> None:
    """Refuse groups that tell nothing or do not fit, and images that teach nothing."""
    group, size = objective.images_per_prompt, config.training.global_batch_size
    if group == 1 and objective.statistics == "group":
        raise ValueError(
            "objective.images_per_prompt=1 compares an image with itself; give 2 or more, or "
            "objective.statistics=prompt, which compares with earlier images of the prompt"
        )
    if size % group:
        raise ValueError(
            f"training.global_batch_size={size} does not divide into groups of "
            f"objective.images_per_prompt={group}; the nearest that does is "
            f"{max(group, round(size / group) * group)}"
        )
    if config.sampler.rollout_steps < 2 and objective.kind != "awm":
        raise ValueError(
            f"{_steps_key(config.sampler)}=1 is too few for objective={objective.kind}, which "
            "learns from the steps between noise and image; give 2 or more"
        )
    if config.model.trainable == "lora" and config.model.lora.dropout:
        raise ValueError(
            f"model.lora.dropout={config.model.lora.dropout:g} changes the policy between sampling "
            f"and training, and objective={objective.kind} compares the two; use 0"
        )


def _check_policy_gradient(objective: PolicyGradientConfig, config: TrainConfig) -> None:
    sampler = config.sampler
    if not objective.eta:
        raise ValueError(
            "objective.eta=0 makes the steps deterministic, and objective=policy_gradient learns "
            "from their noise; give more than 0, up to 1"
        )
    if sampler.solver != "first_order":
        raise ValueError(
            f"sampler.solver={sampler.solver} is deterministic, and objective=policy_gradient "
            "draws noise at each step; use first_order"
        )
    for name in ("window", "trained_steps"):
        if (count := vars(objective)[name]) is not None:
            _check_count(f"objective.{name}", count, sampler)


def _check_count(key: str, count: int, sampler: SamplerConfig) -> None:
    if count > sampler.rollout_steps:
        raise ValueError(
            f"{key}={count} is more than the number of sampling steps; give "
            f"{sampler.rollout_steps} ({_steps_key(sampler)}) or less"
        )


def _steps_key(sampler: SamplerConfig) -> str:
    return "sampler.training_steps" if sampler.training_steps else "sampler.num_inference_steps"


def _check_direct(direct: DirectConfig, sampler: SamplerConfig) -> None:
    _check_steps(direct, sampler)
    linear = direct.path != "sum" or direct.weights == "solver"
    noisy = f"sampler.eta={sampler.eta:g} adds noise between the steps" if sampler.eta else ""
    second = f"sampler.solver={sampler.solver} is of second order"
    if linear and (noisy or sampler.solver != "first_order"):
        raise ValueError(
            f"{noisy or second}, and objective.path={direct.path} with objective.weights="
            f"{direct.weights} needs a rollout that is a sum of its outputs; set "
            f"{'sampler.eta=0' if noisy else 'sampler.solver=first_order'}, or objective.path=sum "
            "with objective.weights=sigma, alpha, posterior or constant"
        )
    if direct.stacked_steps > 1 and sampler.guidance_interval is not None:
        raise ValueError(
            f"objective.stacked_steps={direct.stacked_steps} predicts steps at once that "
            f"sampler.guidance_interval={sampler.guidance_interval} treats apart; leave one out"
        )
    if direct.path == "bridge" and direct.steps not in ("late", "uniform"):
        raise ValueError(
            f"objective.steps={direct.steps} chooses no steps around a bridge; use late or uniform"
        )
    if direct.early_stop is not None:
        least = 1 if direct.path == "sum" else 2
        most = sampler.rollout_steps - least
        _check_range("objective.early_stop", direct.early_stop, most, "numbers of steps")


def _check_steps(direct: DirectConfig, sampler: SamplerConfig) -> None:
    """Refuse active steps that a run does not have."""
    chosen, steps = direct.listed, sampler.rollout_steps
    stopped = direct.early_stop[-1] if direct.early_stop else 0
    last = steps - 1 - stopped
    if direct.path == "lagrange":
        return
    if direct.steps == "listed":
        wrong = [i for i in chosen or () if i > last]
        if not chosen or wrong or len(set(chosen)) != len(chosen):
            raise ValueError(
                f"objective.listed={chosen} are no steps of a run; give different numbers of 0 "
                f"(the first, at noise) to {last} ({_steps_key(sampler)} - 1"
                f"{', less objective.early_stop' if stopped else ''})"
            )
        if direct.path == "leap" and len(chosen) != 2:
            raise ValueError(f"objective.listed={chosen} are not two steps, as a leap has")
    elif direct.steps != "all" and direct.path != "leap":
        _check_count("objective.active_steps", direct.active_steps, sampler)
    if direct.path == "leap" and direct.steps == "all":
        raise ValueError("objective.steps=all is no leap, which has two steps; use uniform or late")
    if direct.path == "bridge" and direct.active_steps < 2:
        raise ValueError(
            f"objective.active_steps={direct.active_steps} is too few for a bridge, which has a "
            "step on each side; give 2 or more"
        )
    if direct.path != "sum" and steps < 2:
        raise ValueError(f"objective.path={direct.path} needs {_steps_key(sampler)} of 2 or more")


def _check_range(key: str, bounds: Sequence[int | float], most: int | float, what: str) -> None:
    if len(bounds) != 2 or not bounds[0] <= bounds[1] <= most:
        raise ValueError(
            f"{key}={bounds} is no range of {what}; give [low, high] with low <= high <= {most:g}"
        )


def _check_draft(draft: DraftConfig, sampler: SamplerConfig) -> None:
    bounds, steps = draft.truncation_range, sampler.rollout_steps
    if bounds is None:
        _check_count("objective.truncation_steps", draft.truncation_steps, sampler)
    if bounds is not None and (len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= steps):
        raise ValueError(
            f"objective.truncation_range={bounds} is no range of sampling steps; give [low, high] "
            f"with 1 <= low <= high <= {steps} ({_steps_key(sampler)})"
        )
    if draft.lv_samples and (draft.truncation_steps != 1 or bounds):
        raise ValueError(
            f"objective.lv_samples={draft.lv_samples} is DRaFT-LV; set "
            "objective.truncation_steps=1 and objective.truncation_range=null"
        )
