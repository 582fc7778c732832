"""Reward objectives on a Gaussian base model with a linear reward, whose optimum is known.

Data are standard normal, so E[x0 | x_t] is linear in x_t. The law that exp(scale r) tilts, with
r = a . x, is the base shifted by scale a, with the same variance.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, final

import pytest
import torch
from nightly import nightly_but
from torch import Tensor, nn
from vectors import WIDTH, DoubleRng, VectorModel, table

from sfumato.config import (
    AdjointMatchingConfig,
    DirectConfig,
    DraftConfig,
    SamplerConfig,
)
from sfumato.diffusion.process import DiffusionProcess, PredictionType, RectifiedFlow
from sfumato.diffusion.randomness import derive
from sfumato.diffusion.sampling import sample
from sfumato.objectives.adjoint_matching import AdjointMatching
from sfumato.objectives.direct import Direct
from sfumato.objectives.draft import Draft
from sfumato.objectives.objective import Objective
from sfumato.rewards.reward import Reward, Score

T = 24
DIRECTION = torch.tensor([0.6, -0.3, 0.2], dtype=torch.float64)
SCALE = 0.8  # lambda
ROWS = 64
PROMPTS = [""] * ROWS


@final
class LinearReward(Reward):
    """r(x) = a . x."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        return Score(images.flatten(1) @ DIRECTION)


@final
class LinearNetwork(nn.Module):
    """The exact output for standard normal data, plus W_i x + b_i with weights of each step."""

    def __init__(self, process: DiffusionProcess, kind: PredictionType, steps: int) -> None:
        super().__init__()
        self.process, self.steps = process, steps
        self.kind: PredictionType = kind
        self.matrices = nn.Parameter(torch.zeros(steps, WIDTH, WIDTH, dtype=torch.float64))
        self.shifts = nn.Parameter(torch.zeros(steps, WIDTH, dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        x, t = rows[:, :-1], float(rows[0, -1].detach())
        alpha, sigma = float(self.process.alpha(t)), float(self.process.sigma(t))
        x0 = alpha / (alpha**2 + sigma**2) * x
        noise = sigma / (alpha**2 + sigma**2) * x
        exact = self.process.target(self.kind, x0, noise, t)
        i = min(round((1 - t) * self.steps), self.steps - 1)
        return exact + x @ self.matrices[i] + self.shifts[i]


def gaussian(process: DiffusionProcess, kind: PredictionType, steps: int = T) -> VectorModel:
    return VectorModel(process, kind, lambda: LinearNetwork(process, kind, steps), spread=0.0)


def train(objective: Objective[Any], model: VectorModel, steps: int, lr: float) -> None:
    """Train by Adam, whose rate falls to zero."""
    optimizer = torch.optim.Adam(model.trained.parameters(), lr=lr, betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        rng = DoubleRng([derive(step, row) for row in range(ROWS)], step)
        for piece in objective.pieces(model, PROMPTS, rng):
            piece().value.backward()
        optimizer.step()
        optimizer.zero_grad()


def law(model: VectorModel, eta: float, steps: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shift of the mean, the ratio of variances, and the reference's variance."""
    found = []
    for role in ("policy", "reference"):
        rng = DoubleRng([1], 1)
        start = torch.randn(20_000, WIDTH, 1, 1, generator=rng.shared, dtype=torch.float64)

        class Wide(DoubleRng):
            def normal(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
                return torch.randn(20_000, *shape, generator=self.shared, dtype=torch.float64)

        states = model.encode_prompts([""])
        with torch.no_grad():
            denoiser = model.denoiser(states, role=role)
            times = model.times(steps, 1, 1)
            wide = Wide([1], 2)
            end = sample(denoiser, model.process, start, times, eta=eta, rng=wide).x.flatten(1)
        found.append((end.mean(0), end.var(0)))
    (mean, variance), (base, base_variance) = found
    return mean - base, variance / base_variance, base_variance


def sampler(eta: float = 0.0, steps: int = T) -> SamplerConfig:
    return SamplerConfig(num_inference_steps=steps, guidance_scale=1.0, eta=eta)


PROCESSES: dict[str, tuple[Callable[[], DiffusionProcess], PredictionType]] = {
    "flow": (RectifiedFlow, "flow"),
    "v": (partial(table, noisy=True), "v_prediction"),
}


@pytest.mark.parametrize("kind", nightly_but(["flow"], PROCESSES))
def test_reward_score_matching_reaches_the_tilted_law(kind: str) -> None:
    """All steps, the posterior's weights, KL of the outputs: shift scale a, same variance."""
    make, prediction_type = PROCESSES[kind]
    model = gaussian(make(), prediction_type)
    config = DirectConfig(
        steps="all",
        weights="posterior",
        reward_at="sample",
        weight_scale=2 * SCALE / (T * WIDTH),  # kl is a mean over steps and elements
        kl_coeff=1.0,
        kl_form="output",
        clamp_images=False,
    )
    train(Direct(config, sampler(), LinearReward()), model, 60, 0.1)
    shift, variance, _ = law(model, 0.0)
    assert shift.tolist() == pytest.approx((SCALE * DIRECTION).tolist(), rel=0.02, abs=0.005)
    assert variance.tolist() == pytest.approx([1.0] * WIDTH, rel=0.02)


@pytest.mark.parametrize("kind", nightly_but(["flow"], PROCESSES))
def test_adjoint_matching_reaches_the_tilted_law(kind: str) -> None:
    make, prediction_type = PROCESSES[kind]
    model = gaussian(make(), prediction_type, 12)
    config = AdjointMatchingConfig(
        reward_scale=SCALE, trained_steps=12, clip_quantile=None, clamp_images=False
    )
    train(AdjointMatching(config, sampler(steps=12), LinearReward()), model, 100, 0.1)
    shift, variance, base = law(model, 1.0, 12)
    # Of a chain of 12 steps, whose variance is below that of the data.
    assert shift.tolist() == pytest.approx((SCALE * base * DIRECTION).tolist(), rel=0.02, abs=0.004)
    assert variance.tolist() == pytest.approx([1.0] * WIDTH, rel=0.02)


def test_draft_plus_reaches_its_fixed_point_and_draft_has_none() -> None:
    """One step, flow: n = n_ref - t a / 2 c' there. Without KL the mean runs away."""
    model = gaussian(RectifiedFlow(), "flow")
    kl_coeff, t = 0.5, 1 / T
    config = DraftConfig(kl_coeff=kl_coeff, truncation_steps=1, clamp_images=False)
    train(Draft(config, sampler(), LinearReward()), model, 200, 0.05)
    # kl compares noises: (1 - t)^2 |n - n_ref|^2 / WIDTH; d reward / d n = -t a.
    expected = t * t * DIRECTION * WIDTH / (2 * kl_coeff * (1 - t) ** 2)
    shift, variance, _ = law(model, 0.0)
    assert shift.tolist() == pytest.approx(expected.tolist(), rel=0.02, abs=1e-4)
    assert variance.tolist() == pytest.approx([1.0] * WIDTH, rel=0.02)

    reached = []
    for steps in (100, 200):
        alone = gaussian(RectifiedFlow(), "flow")
        draft = DraftConfig(kl_coeff=0.0, truncation_steps=1, clamp_images=False)
        train(Draft(draft, sampler(), LinearReward()), alone, steps, 0.05)
        reached.append(float(law(alone, 0.0)[0] @ DIRECTION))
    assert reached[1] > 1.8 * reached[0] > 0


def test_the_adjoint_is_autograd_through_the_reference_chain() -> None:
    """With the realised noises held: a_i = -scale d r(x_T) / d x_i, exactly."""
    from vectors import CASES, Curved

    for make, prediction_type in CASES.values():
        model = VectorModel(make(), prediction_type)
        times = model.times(8, 1, 1)
        start = DoubleRng([1, 2], 0).normal(WIDTH, 1, 1)
        states = model.encode_prompts(["", ""])
        with torch.no_grad():
            policy = model.denoiser(states)
            run = sample(
                policy, model.process, start, times, eta=1.0, rng=DoubleRng([5, 6]), keep="cpu"
            )
        objective = AdjointMatching(
            AdjointMatchingConfig(clamp_images=False), sampler(steps=8), Curved()
        )
        x_t = run.x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(Curved()(x_t, ["", ""]).sum(), x_t)
        targets = objective._targets(model, states, run.visits, times, -gradient, list(range(8)))
        # The chain through the reference, each state plus what the realised noise added to it.
        with model.playing("reference"):
            reference = model.denoiser(states, role="reference")
            ends = [*(visit.x_t for visit in run.visits[1:]), run.x]
            for i in range(7):
                x = run.visits[i + 1].x_t.detach().requires_grad_()
                end = x
                for k in range(i + 1, 8):
                    mean, _ = model.process.transition(
                        reference(end, times[k]), times[k], times[k + 1], eta=1.0
                    )
                    end = mean + (ends[k] - mean).detach()
                (expected,) = torch.autograd.grad(-Curved()(end, ["", ""]).sum(), x)
                assert float((targets[i][1] - expected).abs().max()) < 1e-12
