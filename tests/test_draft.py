"""DRaFT and DRaFT+: losses and gradients equal to plain torch with diffusers' parts."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig as PeftLora
from tiny_sd import LATENT, load_tiny_sd, perturb_adapters, reference_pipeline, unet_parameters
from torch import Tensor, nn

from sfumato.config import DraftConfig, LoraConfig, ModelConfig, SamplerConfig
from sfumato.diffusion.randomness import Rng
from sfumato.models.adapters import LoraRoles
from sfumato.models.stable_diffusion import StableDiffusion
from sfumato.objectives import draft
from sfumato.objectives.draft import Draft
from sfumato.objectives.objective import Loss
from sfumato.rewards.reward import Reward, Score
from sfumato.rewards.simple import JpegCompressibility

PROMPTS = ["a red star", "a small blue ring on a yellow background"]
SEEDS = [11, 0]
RANK, STEPS, SCALE = 4, 5, 7.5
SHAPE = (4, LATENT, LATENT)


@final
class Contrast(Reward):
    """A reward with curvature, different for each prompt."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        red, rest = images[:, 0].mean((1, 2)), (images - 0.3).square().mean((1, 2, 3))
        value = torch.tensor([1.0 * len(prompt) for prompt in prompts]) * rest + 50 * red
        return Score(value, {"red": red.detach(), "rest": rest.detach()})


@dataclass(frozen=True)
class Case:
    """What a loss depends on, beside weights, prompts and seeds."""

    grad_steps: int = 1
    kl_coeff: float = 0.0
    lv_samples: int = 0
    cfg_gradient: str = "full"
    clamp: bool = True
    eta: float = 0.0

    def draft(self) -> Draft:
        config = DraftConfig(
            kl_coeff=self.kl_coeff,
            truncation_steps=self.grad_steps,
            lv_samples=self.lv_samples,
            cfg_gradient=self.cfg_gradient,
            clamp_images=self.clamp,
        )
        return Draft(config, SamplerConfig(STEPS, SCALE, self.eta), Contrast())


# --- The reference: diffusers' networks and scheduler, the whole graph kept


@dataclass(frozen=True)
class Plain:
    """Loss and gradients of DRaFT+ written out."""

    pipeline: Any  # its U-Net has the adapters
    base: Any  # a second U-Net, without

    def loss(self, case: Case, prompts: list[str], seeds: list[int]) -> tuple[Tensor, Tensor]:
        """Return the reward and the divergence."""
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(STEPS)
        text = self.pipeline.encode_prompt(prompts, torch.device("cpu"), 1, True)
        states = torch.cat([text[1], text[0]]).detach()
        x = draw(streams)
        visits, x0 = [], x
        for i, t in enumerate(scheduler.timesteps):
            if i == STEPS - case.grad_steps:
                x = x.detach()
            raw = guided(self.pipeline.unet, x, t, states, case.cfg_gradient)
            visits.append((x, t, raw))
            z = draw(streams) if case.eta else None
            step = scheduler.step(raw, t, x, eta=case.eta, variance_noise=z)
            x, x0 = step.prev_sample, step.pred_original_sample
        visits, finals = visits[-case.grad_steps :], [x0]
        for _ in range(case.lv_samples):
            t = scheduler.timesteps[-1]
            x = scheduler.add_noise(finals[0].detach(), draw(streams), t)
            raw = guided(self.pipeline.unet, x, t, states, case.cfg_gradient)
            visits.append((x, t, raw))
            finals.append(scheduler.step(raw, t, x).pred_original_sample)
        reward = torch.stack([self.reward(case, final, prompts) for final in finals]).mean()
        return reward, torch.stack([self.divergence(*visit, states) for visit in visits]).mean()

    def reward(self, case: Case, x0: Tensor, prompts: list[str]) -> Tensor:
        vae = self.pipeline.vae
        images = vae.decode(x0 / vae.config.scaling_factor).sample / 2 + 0.5
        return Contrast()(images.clamp(0, 1) if case.clamp else images, prompts).mean()

    def divergence(self, x: Tensor, t: Tensor, raw: Tensor, states: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = guided(self.base, x, t, states, "full")
        difference = raw - frozen
        if self.pipeline.scheduler.config.prediction_type == "v_prediction":
            # noise = sqrt(alphas_cumprod) v + sqrt(1 - alphas_cumprod) x at one x
            difference = difference * self.pipeline.scheduler.alphas_cumprod[t].sqrt()
        return difference.square().mean()

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        named = {n: p for n, p in self.pipeline.unet.named_parameters() if p.requires_grad}
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def draw(streams: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(SHAPE, generator=stream) for stream in streams])


def guided(unet: Any, x: Tensor, t: Tensor, states: Tensor, mode: str) -> Tensor:
    without, with_prompt = unet(torch.cat([x, x]), t, states).sample.chunk(2)
    if mode == "detach_uncond":
        without = without.detach()
    return without + SCALE * (with_prompt - without)


@pytest.fixture(scope="module", params=["sd_folder", "sd2_folder"])
def both(request: pytest.FixtureRequest) -> tuple[StableDiffusion, Plain]:
    """Return one set of weights, adapters moved, as Sfumato's model and as the reference."""
    return both_of(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def sd15(sd_folder: Path) -> tuple[StableDiffusion, Plain]:
    return both_of(sd_folder)


def both_of(folder: Path) -> tuple[StableDiffusion, Plain]:
    model = fresh_model(folder)
    perturb_adapters(model)
    pipeline = reference_pipeline(folder)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    names = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    pipeline.unet.add_adapter(PeftLora(r=RANK, lora_alpha=RANK, target_modules=names))
    fit = pipeline.unet.load_state_dict(unet_parameters(model), strict=False)
    assert not fit.unexpected_keys
    assert not [key for key in fit.missing_keys if "lora_" in key]
    return model, Plain(pipeline, UNet2DConditionModel.from_pretrained(folder, subfolder="unet"))


def fresh_model(folder: Path) -> StableDiffusion:
    return load_tiny_sd(folder, ModelConfig(str(folder), lora=LoraConfig(rank=RANK)))


def gradients(model: StableDiffusion, loss: Loss) -> dict[str, Tensor]:
    named = unet_parameters(model)
    return dict(zip(named, torch.autograd.grad(loss.value, list(named.values())), strict=True))


def assert_same_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 3e-5
) -> None:
    assert found.keys() == expected.keys()
    error, norm = (
        math.sqrt(sum(float(g.double().square().sum()) for g in parts))
        for parts in ([found[n] - expected[n] for n in found], list(expected.values()))
    )
    assert norm > 1e-3
    assert error < tolerance * norm


def assert_same(
    both: tuple[StableDiffusion, Plain],
    case: Case,
    prompts: list[str] = PROMPTS,
    seeds: list[int] = SEEDS,
) -> None:
    model, plain = both
    loss = case.draft().loss(model, prompts, Rng(seeds))
    reward, kl = plain.loss(case, prompts, seeds)
    expected = -reward + case.kl_coeff * kl
    reward, kl = reward.detach(), kl.detach()
    assert float(loss.metrics["reward"]) == pytest.approx(float(reward), rel=1e-5)
    if case.kl_coeff:
        assert float(loss.metrics["kl"]) == pytest.approx(float(kl), rel=1e-4)
        assert kl > 1e-3
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_same_gradients(gradients(model, loss), plain.gradients(expected))


# --- Equal to the reference


@pytest.mark.parametrize("grad_steps", [1, 3, STEPS])
@pytest.mark.parametrize("kl_coeff", [0.0, 5.0])
def test_draft_k_and_draft_plus(
    both: tuple[StableDiffusion, Plain], grad_steps: int, kl_coeff: float
):
    assert_same(both, Case(grad_steps, kl_coeff))


@pytest.mark.parametrize("lv_samples", [1, 2])
def test_draft_lv(both: tuple[StableDiffusion, Plain], lv_samples: int):
    assert_same(both, Case(kl_coeff=5.0, lv_samples=lv_samples))


def test_stochastic_sampling(sd15: tuple[StableDiffusion, Plain]):
    assert_same(sd15, Case(grad_steps=2, kl_coeff=1.0, eta=0.8))


def test_gradient_without_the_unconditional_branch(sd15: tuple[StableDiffusion, Plain]):
    case = Case(grad_steps=2, kl_coeff=1.0, cfg_gradient="detach_uncond")
    assert_same(sd15, case)
    model, _ = sd15
    full, detached = (
        gradients(model, c.draft().loss(model, PROMPTS, Rng(SEEDS)))
        for c in (replace(case, cfg_gradient="full"), case)
    )
    assert any((full[n] - detached[n]).norm() > 0.1 * full[n].norm() for n in full)


def test_rescaled_gradient_is_the_full_one_over_the_norm_of_both_branches(
    sd15: tuple[StableDiffusion, Plain],
):
    model, _ = sd15
    losses = [
        Case(kl_coeff=1.0, cfg_gradient=mode).draft().loss(model, PROMPTS, Rng(SEEDS))
        for mode in ("full", "rescale")
    ]
    assert torch.equal(losses[0].value, losses[1].value)
    full, rescaled = (gradients(model, loss) for loss in losses)
    norm = math.sqrt(SCALE**2 + (SCALE - 1) ** 2)
    assert_same_gradients(rescaled, {name: g / norm for name, g in full.items()})


def test_clamping_stops_the_gradient_of_saturated_pixels(sd_folder: Path):
    model, plain = both_of(sd_folder)
    with torch.no_grad():  # about half of the pixels saturate
        for vae in (model.pipeline.vae, plain.pipeline.vae):
            vae.decoder.conv_out.bias += 1
    rewards = []
    for clamp in (True, False):
        assert_same((model, plain), Case(clamp=clamp))
        rewards.append(float(plain.loss(Case(clamp=clamp), PROMPTS, SEEDS)[0].detach()))
    assert abs(rewards[0] - rewards[1]) > 1


# --- The divergence


def test_divergence_is_zero_at_the_start_and_pulls_nowhere(sd_folder: Path):
    model = fresh_model(sd_folder)
    pure, plus = (
        Case(grad_steps=2, kl_coeff=kl_coeff).draft().loss(model, PROMPTS, Rng(SEEDS))
        for kl_coeff in (0.0, 1000.0)
    )
    assert float(plus.metrics["kl"]) == 0.0
    assert torch.equal(pure.value, plus.value)
    for found, expected in zip(
        gradients(model, plus).values(), gradients(model, pure).values(), strict=True
    ):
        assert torch.equal(found, expected)
    perturb_adapters(model, 0.01)
    again = Case(grad_steps=2, kl_coeff=1.0).draft().loss(model, PROMPTS, Rng(SEEDS))
    assert float(again.metrics["kl"]) > 0


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_divergence_is_zero_at_the_start_in_bfloat16(
    sd_folder: Path, trainable: str, autocast: bool
):
    config = ModelConfig(str(sd_folder), trainable=trainable, dtype="bfloat16")
    model = load_tiny_sd(sd_folder, config)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = Case(grad_steps=2, kl_coeff=1.0).draft().loss(model, PROMPTS, Rng(SEEDS))
    assert float(loss.metrics["kl"]) == 0.0


@pytest.mark.parametrize(
    ("case", "policy", "reference"),
    [
        (Case(grad_steps=3), STEPS, 0),
        (Case(grad_steps=3, kl_coeff=0.1), STEPS, 3),
        (Case(kl_coeff=0.1, lv_samples=2), STEPS + 2, 3),
        (Case(lv_samples=2), STEPS + 2, 0),
    ],
)
def test_each_network_runs_as_often_as_it_must(
    sd15: tuple[StableDiffusion, Plain], case: Case, policy: int, reference: int
):
    model, _ = sd15
    roles = model.roles
    assert isinstance(roles, LoraRoles)
    calls: Counter[tuple[str, bool]] = Counter()

    def count(network: nn.Module, _inputs: Any) -> None:
        role = "reference" if roles.layers[0].disable_adapters else "policy"
        calls[role, torch.is_grad_enabled()] += 1

    hook = model.network.register_forward_pre_hook(count)
    loss = case.draft().loss(model, PROMPTS, Rng(SEEDS))
    hook.remove()
    window = case.grad_steps + case.lv_samples
    expected = {("policy", False): policy - window, ("policy", True): window}
    assert calls == expected | ({("reference", False): reference} if reference else {})
    assert ("kl" in loss.metrics) == (reference > 0)


def test_metrics_are_means_over_the_batch_and_carry_no_graph(
    sd15: tuple[StableDiffusion, Plain],
):
    model, _ = sd15
    case = Case(kl_coeff=0.5)
    loss = case.draft().loss(model, PROMPTS, Rng(SEEDS))
    assert list(loss.metrics) == ["reward", "reward/red", "reward/rest", "kl", "loss"]
    assert loss.value.requires_grad
    assert not any(value.requires_grad for value in loss.metrics.values())
    metrics = {name: float(value) for name, value in loss.metrics.items()}
    assert metrics["loss"] == pytest.approx(-metrics["reward"] + 0.5 * metrics["kl"])
    alone = [case.draft().loss(model, [p], Rng([s])) for p, s in zip(PROMPTS, SEEDS, strict=True)]
    for name, value in metrics.items():
        mean = sum(float(one.metrics[name]) for one in alone) / 2
        assert value == pytest.approx(mean, rel=1e-4, abs=1e-5)


# --- Truncation, micro-batches, refusals


class StopHereError(Exception):
    """Ends a loss once the number of steps is known."""


def test_truncation_is_drawn_once_for_the_whole_batch(
    sd15: tuple[StableDiffusion, Plain], monkeypatch: pytest.MonkeyPatch
):
    config = DraftConfig(kl_coeff=0.0, truncation_range=[2, 4])
    objective = Draft(config, SamplerConfig(STEPS), Contrast())
    drawn: list[int] = []
    seen: set[int] = set()

    def note(*_: Any, grad_steps: int, **others: Any) -> None:
        drawn.append(grad_steps)
        raise StopHereError

    monkeypatch.setattr(draft, "sample", note)
    for step in range(30):
        drawn.clear()
        for rows in (range(0, 8), range(0, 4), range(4, 8), range(5, 6)):
            prompts = ["a star"] * len(rows)
            with pytest.raises(StopHereError):
                objective.loss(sd15[0], prompts, Rng.of_step(7, step, rows))
        assert len(set(drawn)) == 1, f"step {step} has several truncations: {drawn}"
        seen.add(drawn[0])
    assert seen == {2, 3, 4}


def test_random_truncation_runs_the_steps_drawn(sd15: tuple[StableDiffusion, Plain]):
    model, _ = sd15
    config = DraftConfig(kl_coeff=0.0, truncation_range=[3, 3])
    objective = Draft(config, SamplerConfig(STEPS, SCALE), Contrast())
    found = gradients(model, objective.loss(model, PROMPTS, Rng(SEEDS)))
    expected = Case(grad_steps=3).draft().loss(model, PROMPTS, Rng(SEEDS))
    assert_same_gradients(found, gradients(model, expected))


def test_micro_batches_give_the_same_gradient(sd15: tuple[StableDiffusion, Plain]):
    model, _ = sd15
    prompts = [f"a {color} star" + "!" * i for i, color in enumerate(["red", "blue"] * 4)]
    objective = Case(grad_steps=2, kl_coeff=5.0).draft()

    def accumulated(size: int) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for start in range(0, 8, size):
            rows = range(start, start + size)
            batch = [prompts[row] for row in rows]
            loss = objective.loss(model, batch, Rng.of_step(3, 5, rows))
            for name, gradient in gradients(model, loss).items():
                total[name] = total.get(name, 0) + gradient * (size / 8)
        return total

    whole = accumulated(8)
    for size in (1, 4):
        assert_same_gradients(accumulated(size), whole)


def test_a_reward_without_gradient_is_refused():
    with pytest.raises(ValueError, match="reward JpegCompressibility is not differentiable"):
        Draft(DraftConfig(), SamplerConfig(), JpegCompressibility())
