"""The two loops of DRaFT+ that are measured, on the same models and prompts."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.config import RewardConfig, TrainConfig
from sfumato.config.objectives import ObjectiveConfig
from sfumato.data.stream import Stream

PROMPTS = ["a zebra", "a teapot, flat style, on a yellow background", "a bagel", "sunglasses"]
SEED, LR, KL_COEFF, GUIDANCE, RANK, CLIP_NORM, EMA = 0, 1e-4, 0.5, 7.5, 32, 10.0, 0.9999


@dataclass(frozen=True)
class Step:
    """What every measured step has."""

    model: str
    device: str
    dtype: str
    full: bool
    batch: int
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Case(Step):
    """A DRaFT+ step."""

    reward: str
    num_inference_steps: int


def write_models(case: Case, folder: Path) -> None:
    from networks import SIZES, write_pipeline, write_reward

    from sfumato.compose import DEMO_MODELS

    if case.model == "demo":
        shutil.copytree(DEMO_MODELS / "base", folder / "pipeline")
        shutil.copytree(DEMO_MODELS / "text_image", folder / "reward")
    else:
        write_pipeline(folder / "pipeline", SIZES[case.model])
        write_reward(folder / "reward", SIZES[case.model])
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")


class Ours:
    """Sfumato's own loading code and `take_step`.

    Args:
        draw: gives of the model and a step's randomness what the bare loop is to be given.
    """

    def __init__(
        self, config: TrainConfig, stream: Stream[Any], draw: Callable[[Any, Any], Any]
    ) -> None:
        from sfumato.models.registry import load_model
        from sfumato.rewards.build import ready
        from sfumato.run.build import build_model, build_objective, build_scorer
        from sfumato.training.distribution import Distribution
        from sfumato.training.module import TrainingModule
        from sfumato.training.state import TrainState

        self.config, self.draw = config, draw
        self.distribution = Distribution(config.training)
        reward = build_scorer(config)
        if reward is not None:
            reward = ready(reward, self.distribution.device, dict)
        self.reward = reward
        objective = build_objective(config, reward)
        self.model = build_model(config, objective, load_model, self.distribution)
        self.module = TrainingModule(self.model, objective)
        self.state = TrainState(config, self.model, objective, stream, self.distribution)

    @property
    def optimizer(self) -> Any:
        return self.state.optimizer

    @property
    def parameters(self) -> dict[str, Any]:
        """What is trained, by its names in the network."""
        return {name.partition(".")[2]: p for name, p in self.state.parameters.items()}

    def draws(self) -> Any:
        """Return what the next step will draw."""
        from sfumato.diffusion.randomness import Rng

        rows = range(self.config.training.micro_batch_size)
        return self.draw(self.model, Rng.of_step(SEED, self.state.step, rows))

    def step(self) -> float:
        from sfumato.training.loop import take_step

        return take_step(self.config, self.module, self.state, self.distribution)["loss"]


def open_ours(
    case: Case,
    folder: Path,
    objective: ObjectiveConfig | None = None,
    draw: Callable[[Any, Any], Any] | None = None,
    reward: RewardConfig | None = None,
) -> Ours:
    """Return our step of DRaFT+, or of another objective and what it draws.

    Args:
        reward: settings of another reward than the case's.
    """
    from sfumato.config import ClipRewardConfig, ColorRewardConfig, DraftConfig, SamplerConfig
    from sfumato.data.prompts import open_prompts

    clip = ClipRewardConfig(pretrained=str(folder / "reward"), dtype=case.dtype)
    config = train_config(case, folder)
    config.sampler = SamplerConfig(
        num_inference_steps=case.num_inference_steps, guidance_scale=GUIDANCE
    )
    config.objective = objective or DraftConfig(kl_coeff=KL_COEFF)
    config.reward = reward or (clip if case.reward == "clip" else ColorRewardConfig())
    prompts = open_prompts(str(folder / "prompts.txt"), shuffle=False)
    return Ours(config, prompts, draw or starting_noise)


def starting_noise(model: Any, rng: Any) -> Any:
    return rng.normal(*model.latent_shape(*model.image_size()), device=model.device)


def train_config(case: Step, folder: Path) -> TrainConfig:
    """Return the settings of a run, but for objective and reward."""
    from sfumato.config import (
        LoraConfig,
        ModelConfig,
        OptimizerConfig,
        TrainConfig,
        TrainingConfig,
    )

    return TrainConfig(
        model=ModelConfig(
            pretrained=str(folder / "pipeline"),
            trainable="full" if case.full else "lora",
            lora=LoraConfig(rank=RANK),
            dtype=case.dtype,
            gradient_checkpointing=case.gradient_checkpointing,
        ),
        optimizer=OptimizerConfig(lr=LR, warmup_steps=0, max_grad_norm=CLIP_NORM),
        training=TrainingConfig(
            micro_batch_size=case.batch,
            global_batch_size=case.batch,
            precision="bf16" if case.dtype == "bfloat16" else "no",
            ema_decay=EMA,
            seed=SEED,
        ),
    )


class Bare:
    """The bare loop on the same prompts, in the same order.

    Args:
        kind: class of the loop, BareLoop by default.
        reward: another one than the case's.
    """

    def __init__(
        self,
        case: Case,
        folder: Path,
        kind: Callable[[Any], Any] | None = None,
        reward: Callable[[Any, list[str]], Any] | None = None,
    ) -> None:
        import torch
        from bare_loop import BareLoop, BareSettings

        self.loop = (kind or BareLoop)(
            BareSettings(
                pipeline=folder / "pipeline",
                reward=reward or (folder / "reward" if case.reward == "clip" else None),
                device=torch.device(case.device),
                dtype=torch.bfloat16 if case.dtype == "bfloat16" else torch.float32,
                full=case.full,
                rank=RANK,
                gradient_checkpointing=case.gradient_checkpointing,
                num_inference_steps=case.num_inference_steps,
                guidance_scale=GUIDANCE,
                kl_coeff=KL_COEFF,
                lr=LR,
                max_grad_norm=CLIP_NORM,
                ema_decay=EMA,
            )
        )
        self.batch, self.taken = case.batch, 0
        config = self.loop.unet.config
        self.shape = (case.batch, config.in_channels, config.sample_size, config.sample_size)

    @property
    def optimizer(self) -> Any:
        return self.loop.update.optimizer

    @property
    def parameters(self) -> dict[str, Any]:
        return {n: p for n, p in self.loop.unet.named_parameters() if p.requires_grad}

    def step(self, draws: Any = None) -> float:
        rows = range(self.taken * self.batch, (self.taken + 1) * self.batch)
        self.taken += 1
        if draws is None:
            draws = self.loop.draws(self.shape)
        return self.loop.step([PROMPTS[i % len(PROMPTS)] for i in rows], draws)
