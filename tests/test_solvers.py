"""DPM-Solver++ 2M: diffusers' steps, the error of second order, gradients through the window."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from tiny_sd import LATENT, load_tiny_sd, reference_pipeline
from torch import Tensor
from trajectories import PROMPTS, our_run, their_run

from sfumato.config import SamplerConfig
from sfumato.diffusion.process import (
    DiffusionProcess,
    Prediction,
    PredictionType,
    RectifiedFlow,
    Time,
    VariancePreserving,
)
from sfumato.diffusion.randomness import Rng
from sfumato.diffusion.sampling import Denoiser, Trajectory, sample
from sfumato.diffusion.solvers import Solver, extrapolation
from sfumato.models.generate import generate

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SOLVERS: tuple[Solver, Solver] = ("first_order", "dpmpp_2m")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(process: DiffusionProcess, kind: PredictionType, weight: Tensor) -> Denoiser:
    def denoiser(x_t: Tensor, t: Time) -> Prediction:
        return process.read(kind, torch.tanh(x_t @ weight + t) - 0.3 * x_t, x_t, t)

    return denoiser


def visited(denoiser: Denoiser, states: list[Tensor]) -> Denoiser:
    def watched(x_t: Tensor, t: Time) -> Prediction:
        states.append(x_t)
        return denoiser(x_t, t)

    return watched


# --- diffusers' scheduler, step by step


class Double(Tensor):
    """A tensor that diffusers' scheduler does not round to float32."""

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self


def theirs(
    scheduler: Any, denoiser: Denoiser, x: Tensor, times: Sequence[float], sigmas: list[float]
) -> list[Tensor]:
    """Return the state after each step of diffusers' scheduler, all in float64."""
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    scheduler.set_begin_index(0)
    states = []
    for t in times[:-1]:
        raw = denoiser(x, t).raw
        x = scheduler.step(raw, 0, x.as_subclass(Double)).prev_sample.as_subclass(Tensor)
        states.append(x)
    return states


def ours(process: DiffusionProcess, denoiser: Denoiser, x: Tensor, times: Sequence[float]):
    states: list[Tensor] = []
    end = sample(visited(denoiser, states), process, x, times, solver="dpmpp_2m").x
    return [*states[1:], end]


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 25])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_steps_of_a_table_are_those_of_diffusers(kind: PredictionType, steps: int, end: str):
    scheduler: Any = DPMSolverMultistepScheduler(
        **BETAS, prediction_type=kind, final_sigmas_type=end, timestep_spacing="leading"
    )
    scheduler.set_timesteps(steps)
    process = VariancePreserving(scheduler.alphas_cumprod)
    times = [process.time(int(i)) for i in scheduler.timesteps]
    times.append(0.0 if end == "zero" else process.time(0))
    sigmas = [float(process.sigma(t) / process.alpha(t)) for t in times]
    denoiser, x = network(process, kind, normal(4, 4)), normal(3, 4, seed=1)
    found, expected = (
        ours(process, denoiser, x, times),
        theirs(scheduler, denoiser, x, times, sigmas),
    )
    assert len(found) == steps
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-9, rtol=1e-9)
    # The last step of 15 and more is of second order, unless it ends at clean data.
    assert (extrapolation(process, times, steps - 1) > 0) == (end == "sigma_min" and steps >= 15)


@pytest.mark.parametrize("start", [1.0, 0.97])
@pytest.mark.parametrize("steps", [1, 2, 5, 14, 15, 25])
def test_steps_of_a_flow_are_those_of_diffusers(steps: int, start: float):
    scheduler: Any = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    even = [start * (1 - i / steps) for i in range(steps + 1)]
    times = [3 * t / (1 + 2 * t) for t in even]
    denoiser, x = network(RectifiedFlow(), "flow", normal(4, 4)), normal(3, 4, seed=1)
    found = ours(RectifiedFlow(), denoiser, x, times)
    expected = theirs(scheduler, denoiser, x, times, times)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-9, rtol=1e-9)
    if steps > 2:
        euler = sample(denoiser, RectifiedFlow(), x, times).x
        assert (found[-1] - euler).abs().max() > 1e-4


@pytest.mark.parametrize("steps", [10, 20])
def test_a_pipelines_images_are_those_of_diffusers(sd_folder: Path, steps: int):
    model, pipeline = load_tiny_sd(sd_folder), reference_pipeline(sd_folder)
    settings = pipeline.scheduler.config
    scheduler: Any = DPMSolverMultistepScheduler.from_config(
        settings, final_sigmas_type="sigma_min"
    )
    pipeline.scheduler = scheduler
    noise = Rng([1, 2]).normal(4, LATENT, LATENT)
    indices = [model.process.index(t) for t in model.times(steps, 32, 32)[:-1]]  # pyright: ignore
    states, images = their_run(model, pipeline, noise, steps, 7.5, timesteps=indices)
    found_states, found = our_run(model, noise, steps, 7.5, solver="dpmpp_2m")
    torch.testing.assert_close(torch.stack(found_states), torch.stack(states), atol=1e-4, rtol=0)
    torch.testing.assert_close(found, images, atol=1e-4, rtol=0)
    sampler = SamplerConfig(steps, 7.5, solver="dpmpp_2m")
    torch.testing.assert_close(generate(model, PROMPTS, [1, 2], sampler), images, atol=1e-4, rtol=0)
    _, plain = our_run(model, noise, steps, 7.5)
    assert (plain - images).abs().max() > 1e-2


# --- Order of convergence, with the exact denoiser of Gaussian data

MEAN, SPREAD = 0.7, 0.4


def gaussian_denoiser(process: DiffusionProcess) -> Denoiser:
    def denoiser(x_t: Tensor, t: Time) -> Prediction:
        alpha, sigma = process.alpha(t), process.sigma(t)
        gain = alpha * SPREAD**2 / ((alpha * SPREAD) ** 2 + sigma**2)
        x0 = MEAN + gain * (x_t - alpha * MEAN)
        noise = (x_t - alpha * x0) / sigma
        return Prediction(x0, noise, noise)

    return denoiser


def exact(process: DiffusionProcess, x: Tensor, t: float, s: float) -> Tensor:
    """Return the probability flow from t to s, which keeps a sample's quantile."""

    def moments(at: float) -> tuple[Tensor, Tensor]:
        alpha, sigma = process.alpha(at), process.sigma(at)
        return alpha * MEAN, ((alpha * SPREAD) ** 2 + sigma**2).sqrt()

    (mean_t, std_t), (mean_s, std_s) = moments(t), moments(s)
    return mean_s + std_s * (x - mean_t) / std_t


def cosine_table(end: float = 0.999) -> VariancePreserving:
    angles = torch.arange(1, 2561, dtype=torch.float64) / 2560 * math.pi / 2 * end
    return VariancePreserving(angles.cos() ** 2)


def errors(process: DiffusionProcess, solver: Solver, start: float, end: float) -> list[float]:
    found = []
    for steps in (32, 64, 128, 256):
        times = [start + (end - start) * i / steps for i in range(steps + 1)]
        x = normal(1000, 1)
        last = sample(gaussian_denoiser(process), process, x, times, solver=solver).x
        found.append(float((last - exact(process, x, start, end)).abs().mean()))
    return found


@pytest.mark.parametrize("process", [RectifiedFlow(), cosine_table()], ids=["flow", "table"])
@pytest.mark.parametrize(("solver", "order"), [("first_order", 1), ("dpmpp_2m", 2)])
def test_the_error_falls_with_the_order(process: DiffusionProcess, solver: Solver, order: int):
    found = errors(process, solver, 0.9, 0.1)
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(found)]
    assert orders == pytest.approx([order] * 3, abs=0.15)


@pytest.mark.parametrize("process", [RectifiedFlow(), cosine_table()], ids=["flow", "table"])
def test_from_noise_to_data_it_needs_a_fraction_of_the_steps(process: DiffusionProcess):
    first, second = (errors(process, solver, 1.0, 0.0) for solver in SOLVERS)
    assert second[0] < first[2]  # 32 steps beside 128
    # The first steps, the last one, and the unbounded lambda at the ends cost a logarithm.
    assert math.log2(second[-2] / second[-1]) > 1.5


# --- Ends of the grid


@pytest.mark.parametrize("steps", [4, 16])
def test_after_pure_noise_the_step_is_the_limit(steps: int):
    times = [1 - i / steps for i in range(steps + 1)]
    tables = [cosine_table(1 - gap) for gap in (1e-3, 1e-6, 1e-9, 0.0)]
    pure = VariancePreserving(torch.cat([tables[-1]._alpha[1:-1] ** 2, torch.zeros(1)]))
    weights = [[extrapolation(table, times, i) for i in range(steps)] for table in tables[:3]]
    limit = [extrapolation(pure, times, i) for i in range(steps)]
    assert limit[:2] == [0, 0]
    assert all(weight > 0 for weight in limit[2:-1])
    gaps = [abs(each[1]) for each in weights]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert weights[2][2:] == pytest.approx(limit[2:], rel=1e-5)
    end = sample(
        network(pure, "v_prediction", normal(4, 4)), pure, normal(3, 4), times, solver="dpmpp_2m"
    )
    assert end.x.isfinite().all()
    assert torch.equal(end.x, end.x0)


@pytest.mark.parametrize("times", [[1.0, 1.0, 0.5, 0.2, 0.0], [0.9, 0.5, 0.5, 0.2, 0.2]])
def test_equal_times_are_steps_of_no_length(times: list[float]):
    for process in (RectifiedFlow(), cosine_table()):
        for i in range(len(times) - 1):
            weight = extrapolation(process, times, i)
            assert math.isfinite(weight)
            assert not weight or times[i - 1] > times[i] > times[i + 1]


# --- Gradients


@pytest.mark.parametrize("grad_steps", [1, 2, 5, 6])
def test_the_window_differentiates_what_it_uses(grad_steps: int):
    """The x0 of the step before the window is a constant, as its state is."""
    weight, x = normal(4, 4).requires_grad_(), normal(3, 4, seed=1)
    times = [0.95, 0.8, 0.6, 0.4, 0.25, 0.1, 0.02]
    denoiser, process = network(RectifiedFlow(), "flow", weight), RectifiedFlow()
    run = sample(denoiser, process, x, times, grad_steps=grad_steps, solver="dpmpp_2m")

    before, logs = x, [math.log((1 - t) / t) for t in times]
    for i, (t, s) in enumerate(pairwise(times)):
        if i == 6 - grad_steps:
            x, before = x.detach(), before.detach()
        x0 = denoiser(x, t).x0
        h = logs[i + 1] - logs[i]
        slope = (x0 - before) * h / (logs[i] - logs[i - 1]) if 0 < i < 5 else 0 * x0
        x = s / t * x - (1 - s) * (math.exp(-h) - 1) * (x0 + slope / 2)
        before = x0
    torch.testing.assert_close(run.x, x, atol=1e-12, rtol=1e-12)
    found, expected = (
        torch.autograd.grad((end**2).sum() + end[:, 0].prod(), weight)[0] for end in (run.x, x)
    )
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
    assert len(run.window) == grad_steps


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_noise_at_each_step_is_refused(eta: float):
    denoiser = network(RectifiedFlow(), "flow", normal(4, 4))

    def run(solver: Solver) -> Trajectory:
        x, rng = Rng([1]).normal(4), Rng([1])
        times = [1.0, 0.5, 0.0]
        return sample(denoiser, RectifiedFlow(), x.double(), times, eta=eta, rng=rng, solver=solver)

    assert run("first_order").x.isfinite().all()
    with pytest.raises(ValueError, match=rf"eta = {eta} .* deterministic; set eta to 0, or use"):
        run("dpmpp_2m")
