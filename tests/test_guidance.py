"""Guidance: values and gradients by hand, schedules by hand, one network where one suffices."""

import math
from collections import Counter
from typing import get_args

import pytest
import torch
from torch import Tensor

from sfumato.diffusion.guidance import (
    CfgGradient,
    annealed_importance,
    annealed_weights,
    classifier_free,
)
from sfumato.diffusion.process import (
    DiffusionProcess,
    Prediction,
    PredictionType,
    RectifiedFlow,
    Time,
    VariancePreserving,
)
from sfumato.diffusion.sampling import Denoiser, sample

SCALE = 7.5
MODES: tuple[CfgGradient, ...] = get_args(CfgGradient)
TABLE = VariancePreserving(torch.linspace(0.999, 0.01, 10, dtype=torch.float64))
TIMES = [1.0, 0.75, 0.5, 0.25, 0.0]


def normal(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, generator=generator, dtype=torch.float64)


# --- Classifier-free


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, 7.5])
def test_value_is_the_formula_in_every_gradient_mode(mode: CfgGradient, scale: float):
    cond, uncond = normal(0), normal(1)
    guided = classifier_free(cond, uncond, scale, mode)
    torch.testing.assert_close(guided, scale * cond + (1 - scale) * uncond)
    assert torch.equal(guided, classifier_free(cond, uncond, scale))


@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        ("full", (SCALE, 1 - SCALE)),
        ("detach_uncond", (SCALE, 0.0)),
        ("rescale", (SCALE / math.hypot(7.5, 6.5), (1 - SCALE) / math.hypot(7.5, 6.5))),
    ],
)
def test_gradient_of_each_mode(mode: CfgGradient, weights: tuple[float, float]):
    cond, uncond, factor = normal(0).requires_grad_(), normal(1).requires_grad_(), normal(2)
    guided = classifier_free(cond, uncond, SCALE, mode)
    found = torch.autograd.grad((guided * factor).sum(), (cond, uncond), allow_unused=True)
    for gradient, weight in zip(found, weights, strict=True):
        gradient = torch.zeros_like(factor) if gradient is None else gradient
        torch.testing.assert_close(gradient, weight * factor, atol=1e-14, rtol=1e-14)


def test_rescaled_branches_have_the_norm_of_one_unguided_prediction():
    branches = normal(0).requires_grad_(), normal(1).requires_grad_()
    found = torch.autograd.grad(classifier_free(*branches, SCALE, "rescale").sum(), branches)
    assert float(sum(g[0, 0] ** 2 for g in found)) == pytest.approx(1.0)


# --- Annealed importance

SCHEDULES = [
    ("base", [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    ("draft", [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ("linear", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
    ("power_2", [0, 0.01, 0.04, 0.09, 0.16, 0.25, 0.36, 0.49, 0.64, 0.81]),
    ("power_0.5", [math.sqrt(i / 10) for i in range(10)]),
    ("step_0.3", [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]),
    ("step_0", [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ("step_1", [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
]


@pytest.mark.parametrize(("schedule", "weights"), SCHEDULES, ids=[name for name, _ in SCHEDULES])
def test_weights_of_each_schedule(schedule: str, weights: list[float]):
    assert annealed_weights(schedule, 10) == pytest.approx(weights, abs=1e-15)


POWERS = ["power", "power_", "power_0", "power_-1", "power_nan", "power_inf", "power_x"]
STEPS = ["step", "step_1.5", "step_-0.1", "step_nan", "step_x"]
OTHERS = ["", "cosine", "Draft", "base_", "base_0", "linear_2", "power_2_3"]


@pytest.mark.parametrize("schedule", [*POWERS, *STEPS, *OTHERS])
def test_unknown_schedule_is_refused_by_name(schedule: str):
    with pytest.raises(ValueError) as caught:
        annealed_weights(schedule, 10)
    assert repr(schedule) in str(caught.value)
    assert "use base, draft, linear, power_P" in str(caught.value)


def linear_denoiser(
    process: DiffusionProcess, kind: PredictionType, slope: float, calls: Counter[float]
) -> Denoiser:
    def denoiser(x_t: Tensor, t: Time) -> Prediction:
        assert isinstance(t, float)
        calls[t] += 1
        return process.read(kind, slope * x_t + slope**2, x_t, t)

    return denoiser


@pytest.mark.parametrize(
    ("schedule", "policy_steps", "reference_steps"),
    [
        ("base", [], [0, 1, 2, 3]),
        ("draft", [0, 1, 2, 3], []),
        ("step_0.5", [2, 3], [0, 1]),
        ("linear", [1, 2, 3], [0, 1, 2, 3]),
    ],
)
def test_one_network_runs_where_one_suffices(
    schedule: str, policy_steps: list[int], reference_steps: list[int]
):
    ran: tuple[Counter[float], Counter[float]] = Counter(), Counter()
    policy, reference = (
        linear_denoiser(RectifiedFlow(), "flow", slope, calls)
        for slope, calls in zip((0.5, 0.2), ran, strict=True)
    )
    denoiser = annealed_importance(policy, reference, schedule, TIMES)
    sample(denoiser, RectifiedFlow(), normal(0), TIMES)
    assert ran == ({TIMES[i]: 1 for i in policy_steps}, {TIMES[i]: 1 for i in reference_steps})


def test_sampling_between_two_networks_by_hand():
    x = start = normal(0)
    for i, weight in enumerate([0, 1 / 4, 1 / 2, 3 / 4]):
        policy, reference = 0.5 * x + 0.25, 0.2 * x + 0.04
        x = x + (TIMES[i + 1] - TIMES[i]) * ((1 - weight) * reference + weight * policy)
    both = [linear_denoiser(RectifiedFlow(), "flow", slope, Counter()) for slope in (0.5, 0.2)]
    denoiser = annealed_importance(both[0], both[1], "linear", TIMES)
    found = sample(denoiser, RectifiedFlow(), start, TIMES).x
    torch.testing.assert_close(found, x, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("process", [TABLE, RectifiedFlow()], ids=["table", "flow"])
@pytest.mark.parametrize("kind", get_args(PredictionType))
def test_annealing_commutes_with_classifier_free_guidance(
    process: DiffusionProcess, kind: PredictionType
):
    x_t, t = normal(0), 0.5  # weight 1/2 of `linear`
    policy, reference = (normal(1), normal(2)), (normal(3), normal(4))  # with, without the prompt

    def guided(raws: tuple[Tensor, Tensor]) -> Denoiser:
        return lambda x, t: process.read(kind, classifier_free(*raws, SCALE), x, t)

    guided_first = annealed_importance(guided(policy), guided(reference), "linear", TIMES)(x_t, t)
    with_prompt, without = (
        0.5 * trained + 0.5 * frozen for trained, frozen in zip(policy, reference, strict=True)
    )
    annealed_first = guided((with_prompt, without))(x_t, t)
    for one, other in zip(vars(guided_first).values(), vars(annealed_first).values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
