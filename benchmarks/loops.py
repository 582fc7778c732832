"""The two loops that are measured, on the same models and prompts, and how far they are apart."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = ["a red star", "a small blue ring on a yellow background", "a cat", "two green squares"]
SEED, LR, KL_COEFF, GUIDANCE, RANK, CLIP_NORM, EMA = 0, 1e-4, 0.5, 7.5, 32, 10.0, 0.9999


@dataclass(frozen=True)
class Case:
    """What is measured."""

    model: str
    device: str
    dtype: str
    full: bool
    reward: str
    batch: int
    gradient_checkpointing: bool
    num_inference_steps: int


@dataclass(frozen=True)
class Parity:
    """How far the two loops are apart: the loss absolutely, tensors relative to the bare norm."""

    loss: float
    gradient: float
    update: float


def write_models(case: Case, folder: Path) -> None:
    from networks import SIZES, write_pipeline, write_reward

    from sfumato.compose import DEMO_MODELS

    if case.model == "demo":
        shutil.copytree(DEMO_MODELS / "base", folder / "pipeline")
        shutil.copytree(DEMO_MODELS / "reward", folder / "reward")
    else:
        write_pipeline(folder / "pipeline", SIZES[case.model])
        write_reward(folder / "reward", SIZES[case.model])
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")


class Ours:
    """Sfumato's own loading code and `take_step`."""

    def __init__(self, case: Case, folder: Path) -> None:
        from sfumato.config import (
            ClipRewardConfig,
            ColorRewardConfig,
            DataConfig,
            DraftConfig,
            LoraConfig,
            ModelConfig,
            OptimizerConfig,
            SamplerConfig,
            TrainConfig,
            TrainingConfig,
        )
        from sfumato.data.prompts import open_prompts
        from sfumato.models.registry import load_model
        from sfumato.objectives.draft import Draft
        from sfumato.rewards.build import build_reward
        from sfumato.training.distribution import Distribution
        from sfumato.training.module import TrainingModule
        from sfumato.training.state import TrainState

        clip = ClipRewardConfig(pretrained=str(folder / "reward"), dtype=case.dtype)
        self.objective = DraftConfig(kl_coeff=KL_COEFF)
        self.config = TrainConfig(
            model=ModelConfig(
                pretrained=str(folder / "pipeline"),
                trainable="full" if case.full else "lora",
                lora=LoraConfig(rank=RANK),
                dtype=case.dtype,
                gradient_checkpointing=case.gradient_checkpointing,
            ),
            sampler=SamplerConfig(
                num_inference_steps=case.num_inference_steps, guidance_scale=GUIDANCE
            ),
            objective=self.objective,
            reward=clip if case.reward == "clip" else ColorRewardConfig(),
            data=DataConfig(prompts=str(folder / "prompts.txt"), shuffle=False),
            optimizer=OptimizerConfig(lr=LR, warmup_steps=0, max_grad_norm=CLIP_NORM),
            training=TrainingConfig(
                micro_batch_size=case.batch,
                global_batch_size=case.batch,
                precision="bf16" if case.dtype == "bfloat16" else "no",
                ema_decay=EMA,
                seed=SEED,
            ),
        )
        self.distribution = Distribution(self.config.training)
        device = self.distribution.device
        reward = build_reward(self.config.reward).to(device)
        self.model = load_model(self.config.model)
        self.model.to(device)
        self.module = TrainingModule(self.model, Draft(self.objective, self.config.sampler, reward))
        stream = open_prompts(self.config.data.prompts, shuffle=False)
        self.state = TrainState(self.config, self.model, stream, self.distribution)

    @property
    def optimizer(self) -> Any:
        return self.state.optimizer

    def noise(self) -> Any:
        """Return the noise that the next step will start from."""
        from sfumato.diffusion.randomness import Rng

        height, width = self.model.image_size()
        rng = Rng.of_step(SEED, self.state.step, range(self.config.training.micro_batch_size))
        shape = self.model.latent_shape(height, width)
        return rng.normal(*shape, device=self.model.device)

    def step(self) -> float:
        from sfumato.training.loop import take_step

        return take_step(self.config, self.module, self.state, self.distribution)["loss"]


class Bare:
    """The bare loop on the same prompts, in the same order."""

    def __init__(self, case: Case, folder: Path) -> None:
        import torch
        from bare_loop import BareLoop, BareSettings

        self.loop = BareLoop(
            BareSettings(
                pipeline=folder / "pipeline",
                reward=folder / "reward" if case.reward == "clip" else None,
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
        return self.loop.optimizer

    def step(self, noise: Any = None) -> float:
        import torch

        rows = range(self.taken * self.batch, (self.taken + 1) * self.batch)
        self.taken += 1
        if noise is None:
            noise = torch.randn(self.shape).to(self.loop.settings.device)
        return self.loop.step([PROMPTS[i % len(PROMPTS)] for i in rows], noise)


def compare(ours: Ours, bare: Bare) -> Parity:
    """Take two steps of each from the same weights and noise; return the largest differences.

    The first gradient is compared; B of LoRA is set off from 0, so that A has a gradient and the
    KL term a value. Updates are compared after both steps.
    """
    import torch

    parameters = ours.state.parameters
    copied = dict(bare.loop.unet.named_parameters())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn_like(parameter))
            copied[name].copy_(parameter)
    before = [parameter.detach().clone() for parameter in parameters.values()]
    pairs = [(parameter, copied[name]) for name, parameter in parameters.items()]
    assert len(pairs) == len(bare.loop.trained), "the loops train other parameters"
    found: list[list[Any]] = [[], []]
    hooks = [
        loop.optimizer.register_step_pre_hook(
            lambda *_, side=side: found[side].extend(gradients(pairs, side))
        )
        for side, loop in enumerate((ours, bare))
    ]
    losses = []
    for _ in range(2):
        noise = ours.noise()
        losses.append((ours.step(), bare.step(noise)))
    for hook in hooks:
        hook.remove()
    moved = [
        [pair[side].detach() - old for pair, old in zip(pairs, before, strict=True)]
        for side in (0, 1)
    ]
    first = [kept[: len(pairs)] for kept in found]
    return Parity(
        loss=max(abs(a - b) for a, b in losses),
        gradient=distance(*first),
        update=distance(*moved),
    )


def gradients(pairs: Sequence[tuple[Any, Any]], side: int) -> list[Any]:
    """Return copies of the gradients of one side's parameters."""
    return [pair[side].grad.clone() for pair in pairs]


def distance(left: Sequence[Any], right: Sequence[Any]) -> float:
    """Return ||left - right|| / ||right|| over lists of tensors."""
    import torch

    apart = torch.stack([(a - b).norm() for a, b in zip(left, right, strict=True)]).norm()
    return (apart / torch.stack([b.norm() for b in right]).norm()).item()
