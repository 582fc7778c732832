"""The process: its inverse, and every step equal to diffusers' schedulers."""

from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_sd import SETTINGS
from torch import Tensor

from sfumato.diffusion.process import (
    DiffusionProcess,
    PredictionType,
    RectifiedFlow,
    VariancePreserving,
)

SHAPE = (3, 4, 8, 8)
TIMES = [0.001, 0.082, 0.5, 0.951, 0.999]
# diffusers has no flow prediction on a variance-preserving path.
DDIM_TYPES = ("epsilon", "v_prediction", "sample")


def ddim(prediction_type: str = "epsilon", steps: int = 10) -> Any:
    scheduler: Any = DDIMScheduler.from_config({**SETTINGS, "prediction_type": prediction_type})
    scheduler.set_timesteps(steps)
    # In float32, diffusers' 1 - alphas_cumprod[t] / alphas_cumprod[s] keeps three digits.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def variance_preserving() -> VariancePreserving:
    return VariancePreserving(ddim().alphas_cumprod)


def normal(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


PROCESSES = [variance_preserving(), RectifiedFlow()]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
each_type = pytest.mark.parametrize("kind", get_args(PredictionType))


# --- Forward process and reading


@each_process
@each_type
@pytest.mark.parametrize("t", TIMES)
def test_read_is_the_inverse_of_target(process: DiffusionProcess, kind: PredictionType, t: float):
    x0, noise = normal(0), normal(1)
    x_t = process.add_noise(x0, noise, t)
    raw = process.target(kind, x0, noise, t)
    read = process.read(kind, raw, x_t, t)
    torch.testing.assert_close(read.x0, x0, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(read.noise, noise, atol=1e-11, rtol=1e-11)
    assert read.raw is raw


@each_process
@each_type
def test_one_time_per_row_equals_one_for_the_batch(process: DiffusionProcess, kind: PredictionType):
    x0, noise, t = normal(0), normal(1), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x_t = process.add_noise(x0, noise, t)
    target = process.target(kind, x0, noise, t)
    read = process.read(kind, normal(2), x_t, t)
    for row in range(len(t)):
        at, one = float(t[row]), slice(row, row + 1)
        assert torch.equal(x_t[one], process.add_noise(x0[one], noise[one], at))
        assert torch.equal(target[one], process.target(kind, x0[one], noise[one], at))
        alone = process.read(kind, normal(2)[one], x_t[one], at)
        assert torch.equal(read.x0[one], alone.x0)
        assert torch.equal(read.noise[one], alone.noise)


def test_table_is_on_the_unit_circle_and_starts_at_clean_data():
    process, published = variance_preserving(), ddim().alphas_cumprod
    times = torch.arange(1001, dtype=torch.float64) / 1000
    alpha, sigma = process.alpha(times), process.sigma(times)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(times), atol=1e-15, rtol=0)
    torch.testing.assert_close(alpha[1:] ** 2, published, atol=1e-15, rtol=0)
    assert (float(alpha[0]), float(sigma[0])) == (1.0, 0.0)


def test_every_training_step_has_its_time():
    process = variance_preserving()
    times = [process.time(index) for index in range(-1, 1000)]
    assert (times[0], times[-1]) == (0.0, 1.0)
    assert [process.index(t) for t in times] == list(range(-1, 1000))
    # Times travel as float32 tensors too.
    assert process.index(torch.tensor(times)).tolist() == list(range(-1, 1000))  # type: ignore


def test_variance_preserving_adds_noise_as_diffusers():
    process, scheduler = variance_preserving(), ddim()
    x0, noise = normal(0), normal(1)
    indices = torch.tensor([0, 480, 999])
    x_t = process.add_noise(x0, noise, (indices + 1).double() / 1000)
    expected: Tensor = scheduler.add_noise(x0, noise, indices)
    torch.testing.assert_close(x_t, expected, atol=1e-6, rtol=1e-6)
    target = process.target("v_prediction", x0, noise, (indices + 1).double() / 1000)
    torch.testing.assert_close(
        target, scheduler.get_velocity(x0, noise, indices), atol=1e-6, rtol=1e-6
    )


def test_rectified_flow_adds_noise_as_diffusers():
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x0, noise = normal(0, torch.float32), normal(1, torch.float32)
    chosen = [1, 5, 9]
    x_t = RectifiedFlow().add_noise(x0, noise, scheduler.sigmas[chosen])
    expected = scheduler.scale_noise(x0, scheduler.timesteps[chosen], noise)
    torch.testing.assert_close(x_t, expected, atol=1e-6, rtol=1e-6)


# --- Steps


@pytest.mark.parametrize("kind", DDIM_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [10, 30])
def test_every_step_equals_ddim(kind: PredictionType, eta: float, steps: int):
    process, scheduler = variance_preserving(), ddim(kind, steps)
    times = [process.time(int(index)) for index in scheduler.timesteps] + [process.time(0)]
    for i, (t, s) in enumerate(pairwise(times)):
        x0, noise, miss, z = (normal(4 * i + part) for part in range(4))
        x_t = scheduler.add_noise(x0, noise, scheduler.timesteps[i : i + 1])
        # A wrong but possible opinion about x_t: another pair that adds up to it.
        opinion = x0 + process.sigma(t) * miss, noise - process.alpha(t) * miss
        raw = process.target(kind, *opinion, t)
        prediction = process.read(kind, raw, x_t, t)
        ours = process.step(prediction, t, s, eta=eta, z=z)
        theirs = scheduler.step(raw, int(scheduler.timesteps[i]), x_t, eta=eta, variance_noise=z)
        torch.testing.assert_close(ours, theirs.prev_sample, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(prediction.x0, theirs.pred_original_sample, atol=1e-9, rtol=1e-9)


def test_every_step_equals_flow_match_euler():
    process = RectifiedFlow()
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    times = [float(sigma) for sigma in scheduler.sigmas]
    for i, (t, s) in enumerate(pairwise(times)):
        x_t, raw = normal(2 * i, torch.float32), normal(2 * i + 1, torch.float32)
        ours = process.step(process.read("flow", raw, x_t, t), t, s)
        theirs = scheduler.step(raw, scheduler.timesteps[i], x_t).prev_sample
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@each_process
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_step_keeps_the_marginal_of_the_process(process: DiffusionProcess, eta: float):
    x0, noise = normal(0), normal(1)
    prediction = process.read("sample", x0, process.add_noise(x0, noise, 0.8), 0.8)
    mean, std = process.transition(prediction, 0.8, 0.3, eta=eta)
    left = (mean - process.alpha(0.3) * x0) / noise  # the scale of the noise that is kept
    expected = torch.full_like(left, float(process.sigma(0.3)) ** 2)
    torch.testing.assert_close(left**2 + std**2, expected, atol=1e-8, rtol=1e-8)
    assert (std > 0) == (eta > 0)


def test_stochastic_step_asks_for_noise():
    process = variance_preserving()
    prediction = process.read("epsilon", normal(0), normal(1), 0.5)
    with pytest.raises(ValueError, match=r"eta = 0\.5 .* pass z"):
        process.step(prediction, 0.5, 0.4, eta=0.5)
