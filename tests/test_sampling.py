"""Sampling: trajectories equal to diffusers' pipeline, gradients to finite differences."""

import hashlib
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sd import LATENT, load_tiny_sd, reference_pipeline
from torch import Tensor

from sfumato.config import SamplerConfig
from sfumato.diffusion.process import (
    DiffusionProcess,
    Prediction,
    RectifiedFlow,
    Time,
    VariancePreserving,
)
from sfumato.diffusion.randomness import Rng, derive
from sfumato.diffusion.sampling import Denoiser, sample
from sfumato.models.generate import generate, generate_in_batches
from sfumato.models.model import TextToImageModel

PROMPTS = ["a red star", "a small blue ring on a yellow background"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module", params=["sd_folder", "sd2_folder"])
def both(request: pytest.FixtureRequest) -> tuple[TextToImageModel, Any]:
    """Return the same weights as Sfumato's model and as diffusers' pipeline."""
    folder: Path = request.getfixturevalue(request.param)
    return load_tiny_sd(folder), reference_pipeline(folder)


def guided_denoiser(model: TextToImageModel, scale: float) -> Denoiser:
    uncond = model.encode_prompts([""]).repeat(len(PROMPTS))
    return model.denoiser(model.encode_prompts(PROMPTS), uncond=uncond, guidance_scale=scale)


# --- Whole trajectories


@pytest.mark.parametrize("steps", [10, 30, 50])
def test_trajectory_equals_diffusers_pipeline(both: tuple[TextToImageModel, Any], steps: int):
    model, pipeline = both
    noise, theirs, ours = normal(2, 4, LATENT, LATENT), [], []

    def keep(_pipeline: Any, _step: int, _t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs.append(values["latents"])
        return values

    images = pipeline(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=7.5,
        latents=noise,
        output_type="pt",
        callback_on_step_end=keep,
    ).images
    denoiser = guided_denoiser(model, 7.5)

    def watched(x_t: Tensor, t: Time) -> Prediction:
        ours.append(x_t)
        return denoiser(x_t, t)

    with torch.no_grad():
        end = sample(watched, model.process, noise, model.times(steps, 32, 32)).x
        ours = [*ours[1:], end]
        torch.testing.assert_close(model.decode(end).clamp(0, 1), images, atol=1e-4, rtol=0)
    assert len(ours) == len(theirs) == steps
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-4, rtol=0)
    assert end.std() > 0.5
    assert images.std() > 0.05


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_seeds_give_the_images_of_diffusers_generators(
    both: tuple[TextToImageModel, Any], eta: float
):
    model, pipeline = both
    images = pipeline(
        PROMPTS,
        num_inference_steps=10,
        guidance_scale=7.5,
        eta=eta,
        generator=[torch.Generator().manual_seed(seed) for seed in (17, 4)],
        output_type="pt",
    ).images
    sampler = SamplerConfig(num_inference_steps=10, guidance_scale=7.5, eta=eta)
    found = generate(model, PROMPTS, [17, 4], sampler)
    torch.testing.assert_close(found, images, atol=1e-4, rtol=0)


def test_guidance_changes_the_image(both: tuple[TextToImageModel, Any]):
    # Else the comparisons above would say nothing of guidance.
    images = [
        generate(both[0], PROMPTS, [1, 2], SamplerConfig(10, guidance_scale=scale))
        for scale in (1.0, 7.5)
    ]
    assert (images[0] - images[1]).abs().max() > 0.05


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


def exact_end(process: DiffusionProcess, x: Tensor) -> Tensor:
    """Return the end of the probability flow from t = 1, which keeps a sample's quantile."""
    alpha, sigma = process.alpha(1.0), process.sigma(1.0)
    quantile = (x - alpha * MEAN) / ((alpha * SPREAD) ** 2 + sigma**2).sqrt()
    return MEAN + SPREAD * quantile


def cosine_table() -> VariancePreserving:
    angles = torch.arange(1, 2561, dtype=torch.float64) / 2560 * math.pi / 2 * 0.999
    return VariancePreserving(angles.cos() ** 2)


@pytest.mark.parametrize("process", [RectifiedFlow(), cosine_table()], ids=["euler", "ddim"])
def test_sampling_converges_with_first_order(process: DiffusionProcess):
    x = normal(1000, 1, dtype=torch.float64)
    errors = []
    for steps in (40, 80, 160, 320):
        times = [1 - i / steps for i in range(steps + 1)]
        end = sample(gaussian_denoiser(process), process, x, times).x
        errors.append(float((end - exact_end(process, x)).abs().mean()))
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([1, 1, 1], abs=0.1)
    assert errors[-1] < 0.01


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_sampling_keeps_the_distribution(eta: float):
    process, rng = cosine_table(), Rng(range(16))
    times = [1 - i / 320 for i in range(321)]
    x = rng.normal(1000)
    end = sample(gaussian_denoiser(process), process, x, times, eta=eta, rng=rng).x
    assert float(end.mean()) == pytest.approx(MEAN, abs=4 * SPREAD / math.sqrt(x.numel()))
    assert float(end.std()) == pytest.approx(SPREAD, abs=0.01)


# --- The gradient window

TIMES = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


def flow_denoiser(weight: Tensor, seen: list[tuple[bool, bool]] | None = None) -> Denoiser:
    """Return a small nonlinear network; `seen` collects where a graph was recorded."""

    def denoiser(x_t: Tensor, t: Time) -> Prediction:
        if seen is not None:
            seen.append((torch.is_grad_enabled(), x_t.requires_grad))
        raw = torch.tanh(x_t @ weight + t) - 0.3 * x_t
        return RectifiedFlow().read("flow", raw, x_t, t)

    return denoiser


@pytest.mark.parametrize("grad_steps", [0, 1, 3, 5])
def test_only_the_last_steps_record_a_graph(grad_steps: int):
    weight, seen = normal(4, 4).requires_grad_(), []
    start = normal(2, 4, seed=1)
    denoiser = flow_denoiser(weight, seen)
    trajectory = sample(denoiser, RectifiedFlow(), start, TIMES, grad_steps=grad_steps)
    before, inside = 5 - grad_steps, max(grad_steps - 1, 0)
    first = [(True, False)] if grad_steps else []
    assert seen == [(False, False)] * before + first + [(True, True)] * inside
    assert [visit.t for visit in trajectory.window] == TIMES[before:-1]
    assert all(visit.prediction.raw.requires_grad for visit in trajectory.window)
    assert trajectory.x.requires_grad == trajectory.x0.requires_grad == (grad_steps > 0)


def test_the_window_holds_the_states_and_predictions_of_the_run():
    weight, start = normal(4, 4).requires_grad_(), normal(2, 4, seed=1)
    trajectory = sample(flow_denoiser(weight), RectifiedFlow(), start, TIMES, grad_steps=5)
    assert torch.equal(trajectory.window[0].x_t, start)
    for visit, following in pairwise(trajectory.window):
        expected = visit.x_t + (following.t - visit.t) * visit.prediction.raw
        torch.testing.assert_close(following.x_t, expected)
    assert torch.equal(trajectory.x0, trajectory.window[-1].prediction.x0)
    # At t = 0 the state is the last prediction of the data.
    torch.testing.assert_close(trajectory.x, trajectory.x0)


def objective(x: Tensor) -> Tensor:
    return (x**2).sum() + x[:, 0].prod()


@pytest.mark.parametrize("grad_steps", [1, 2, 5])
def test_gradient_of_the_last_steps_equals_finite_differences(grad_steps: int):
    weight = normal(4, 4, dtype=torch.float64).requires_grad_()
    start = normal(3, 4, seed=1, dtype=torch.float64)
    run = sample(flow_denoiser(weight), RectifiedFlow(), start, TIMES, grad_steps=grad_steps)
    (gradient,) = torch.autograd.grad(objective(run.x), weight)

    state, tail = run.window[0].x_t.detach(), TIMES[-grad_steps - 1 :]
    differences = finite_differences(
        lambda w: objective(sample(flow_denoiser(w), RectifiedFlow(), state, tail).x), weight
    )
    torch.testing.assert_close(gradient, differences, atol=1e-7, rtol=1e-6)


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at, step = at.detach(), 1e-5
    result = torch.empty_like(at)
    for index in range(at.numel()):
        bump = torch.zeros(at.numel(), dtype=at.dtype)
        bump[index] = step
        bump = bump.view_as(at)
        result.view(-1)[index] = (function(at + bump) - function(at - bump)) / (2 * step)
    return result


def test_all_steps_give_full_backpropagation():
    weight = normal(4, 4, dtype=torch.float64).requires_grad_()
    start = normal(3, 4, seed=1, dtype=torch.float64)
    run = sample(flow_denoiser(weight), RectifiedFlow(), start, TIMES, grad_steps=5)
    x = start
    for t, s in pairwise(TIMES):
        x = x + (s - t) * (torch.tanh(x @ weight + t) - 0.3 * x)
    torch.testing.assert_close(run.x, x)
    found, expected = (torch.autograd.grad(objective(end), weight)[0] for end in (run.x, x))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("grad_steps", [-1, 6])
def test_grad_steps_lie_between_zero_and_the_steps_taken(grad_steps: int):
    denoiser = flow_denoiser(normal(4, 4))
    with pytest.raises(ValueError, match=f"grad_steps = {grad_steps} .* the 5 steps taken"):
        sample(denoiser, RectifiedFlow(), normal(1, 4), TIMES, grad_steps=grad_steps)


def test_eta_asks_for_rng():
    with pytest.raises(ValueError, match=r"eta = 0\.1 .* pass rng"):
        sample(flow_denoiser(normal(4, 4)), RectifiedFlow(), normal(1, 4), TIMES, eta=0.1)


# --- Randomness


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_image_17_is_the_same_at_any_batch_size(sd_folder: Path, eta: float):
    model, sampler = load_tiny_sd(sd_folder), SamplerConfig(4, eta=eta)
    prompts, seeds = [f"a star {i}" for i in range(19)], [derive(1, i) for i in range(19)]
    alone = generate(model, prompts[17:18], seeds[17:18], sampler)
    for batch_size in (4, 19):
        images = generate_in_batches(model, prompts, seeds, sampler, batch_size)
        torch.testing.assert_close(images[17:18], alone, atol=1e-4, rtol=0)
        assert (images[16] - images[17]).abs().max() > 0.05


def test_rows_draw_from_their_own_seeds():
    rng = Rng([5, 0])
    draws = rng.normal(3, 2), rng.normal(4), rng.uniform()
    for row, seed in enumerate([5, 0]):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(draws[0][row], torch.randn(3, 2, generator=generator))
        assert torch.equal(draws[1][row], torch.randn(4, generator=generator))
        assert torch.equal(draws[2][row], torch.rand((), generator=generator))


def test_micro_batches_draw_the_rows_of_the_whole_batch():
    whole = Rng.of_step(3, 100, range(8))
    parts = [Rng.of_step(3, 100, range(start, start + 2)) for start in range(0, 8, 2)]
    for shape in ((4, 2), (3,)):
        assert torch.equal(whole.normal(*shape), torch.cat([p.normal(*shape) for p in parts]))
    assert torch.equal(whole.uniform(), torch.cat([p.uniform() for p in parts]))
    for _ in range(5):
        assert {part.shared_integer(1, 1000) for part in parts} == {whole.shared_integer(1, 1000)}


def test_steps_seeds_and_rows_differ():
    draws = {
        float(Rng.of_step(seed, step, range(row, row + 1)).normal(1))
        for seed in (0, 1)
        for step in (0, 1)
        for row in (0, 1)
    }
    assert len(draws) == 8


def test_derived_seeds_are_the_same_everywhere():
    assert derive(3, 100, 17) == 5947521773122639795
    digest = hashlib.sha256(b"3/100/shared").digest()
    assert derive(3, 100, "shared") == int.from_bytes(digest[:8], "little") // 2
    assert derive(1, 23) != derive(12, 3)
