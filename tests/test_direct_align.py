"""Direct-Align: a perfect network recovers the image, and the gradient is that of the formula."""

import pytest
import torch
from torch import Tensor
from vectors import CASES, PROMPTS, ROWS, WIDTH, Curved, DoubleRng, VectorModel, differentiate

from sfumato.config import DirectAlignConfig, SamplerConfig
from sfumato.diffusion.process import Prediction, Time
from sfumato.objectives.direct_align import DirectAlign, recovered

SAMPLER = SamplerConfig(num_inference_steps=8, guidance_scale=1.0)


def model_of(kind: str) -> VectorModel:
    make, prediction_type = CASES[kind]
    return VectorModel(make(), prediction_type)


def align(**settings: object) -> DirectAlign:
    config = DirectAlignConfig(clamp_images=False, **settings)  # type: ignore[arg-type]
    return DirectAlign(config, SAMPLER, Curved())


@pytest.mark.parametrize("kind", CASES)
def test_a_perfect_network_recovers_the_image_at_every_time(kind: str) -> None:
    model = model_of(kind)
    rng = DoubleRng(range(ROWS))
    x0, noise = rng.normal(WIDTH, 1, 1), rng.normal(WIDTH, 1, 1)

    def perfect(x_t: Tensor, t: Time) -> Prediction:
        raw = model.process.target(model.prediction_type, x0, noise, t)
        return model.process.read(model.prediction_type, raw, x_t, t)

    times = [i / 8 for i in range(1, 8)]
    for a in times:
        for b in (b for b in times if b != a):
            found = recovered(model, perfect, x0, noise, a, b)
            assert float((found - x0).abs().max()) < 1e-12


def test_the_gradient_has_the_size_of_the_formula_and_other_signs_on_both_branches() -> None:
    """Flow: d x0' / d v = -(a - b) / (1 - b) towards data, (a - b) / (1 - a) towards noise."""
    model = model_of("flow")
    rng = DoubleRng(range(ROWS))
    x0, noise = rng.normal(WIDTH, 1, 1), rng.normal(WIDTH, 1, 1)
    velocity = torch.zeros_like(x0, requires_grad=True)

    def constant(x_t: Tensor, t: Time) -> Prediction:
        return model.process.read("flow", velocity, x_t, t)

    a, b = 0.75, 0.5
    for start, end, size in ((a, b, -(a - b) / (1 - b)), (b, a, (a - b) / (1 - a))):
        found = recovered(model, constant, x0, noise, start, end)
        (gradient,) = torch.autograd.grad(found.sum(), velocity)
        assert gradient.flatten().tolist() == pytest.approx([size] * gradient.numel(), rel=1e-12)


def test_both_branches_add_up_and_the_hinge_ends_them() -> None:
    model = model_of("epsilon")
    both, loss = differentiate(align(), model)
    towards, _ = differentiate(align(inverse=0.0), model)
    half, _ = differentiate(align(inverse=0.5), model)
    torch.testing.assert_close(half - towards, (both - towards) / 2)
    assert {"reward", "reward_inverse", "loss"} <= set(loss.metrics)
    nothing, _ = differentiate(align(hinge=-1e6), model)
    assert float(nothing.norm()) == 0


def test_a_grid_without_a_fitting_time_is_refused() -> None:
    model = model_of("flow")
    with pytest.raises(ValueError, match=r"noise_levels=\[0.01, 0.02\] holds no time"):
        align(noise_levels=[0.01, 0.02]).pieces(model, PROMPTS, DoubleRng(range(ROWS)))


def test_words_make_the_reward_relative() -> None:
    model = model_of("flow")
    objective = align(positive="good", negative="bad")
    images = torch.zeros(ROWS, WIDTH, 1, 1, dtype=torch.float64)
    assert objective._score(images, PROMPTS).value.abs().max() == 0  # Curved reads no prompt
    _, loss = differentiate(objective, model)
    assert float(loss.metrics["reward"]) == 0
