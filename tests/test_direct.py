"""Direct reward gradients: identities in float64, on a process of each kind."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from vectors import (
    CASES,
    PROMPTS,
    ROWS,
    WIDTH,
    Curved,
    DoubleRng,
    VectorModel,
    differentiate,
    table,
    vector,
)

from sfumato.config import DirectConfig, DraftConfig, SamplerConfig
from sfumato.diffusion.linear import FORMS, linear, output
from sfumato.diffusion.process import RectifiedFlow
from sfumato.diffusion.sampling import Trajectory, sample
from sfumato.objectives.direct import Direct
from sfumato.objectives.draft import Draft
from sfumato.objectives.surrogates import SEGMENTS, _gamma, basis_integrals, legs

T = 8
SAMPLER = SamplerConfig(num_inference_steps=T, guidance_scale=1.0)
NOTHING: dict[str, Any] = {"clamp_images": False}


def model_of(kind: str) -> VectorModel:
    make, prediction_type = CASES[kind]
    return VectorModel(make(), prediction_type)


def direct(**settings: Any) -> Direct:
    return Direct(DirectConfig(**{**NOTHING, **settings}), SAMPLER, Curved())


def listed(*steps: int, **settings: Any) -> Direct:
    return direct(steps="listed", listed=list(steps), **settings)


def draft(steps: int, kl_coeff: float = 0.0) -> Draft:
    config = DraftConfig(kl_coeff=kl_coeff, truncation_steps=steps, clamp_images=False)
    return Draft(config, SAMPLER, Curved())


def same(found: Tensor, expected: Tensor) -> None:
    assert float(expected.norm()) > 1e-6
    assert float((found - expected).norm() / expected.norm()) < 1e-12


def rollout(model: VectorModel, steps: int = T) -> tuple[list[float], Trajectory]:
    times = list(model.times(steps, 1, 1))
    x = DoubleRng([3 + i for i in range(ROWS)], 3).normal(*model.latent_shape(1, 1))
    policy = model.denoiser(model.encode_prompts(PROMPTS))
    with torch.no_grad():
        return times, sample(policy, model.process, x, times, keep="cpu")


@pytest.mark.parametrize("to_x0", [True, False])
@pytest.mark.parametrize("kind", CASES)
def test_a_rollout_is_the_weighted_sum_of_its_outputs(kind: str, to_x0: bool) -> None:
    model = model_of(kind)
    times, run = rollout(model)
    form = FORMS[model.prediction_type]
    found = linear(model.process, form, times, to_x0=to_x0)
    outputs = [
        output(model.process, model.prediction_type, form, visit.prediction, visit.t)
        for visit in run.visits
    ]
    end = found.scale * run.visits[0].x_t
    end = end + sum(h * n for h, n in zip(found.weights, outputs, strict=True))
    expected = run.x0 if to_x0 else run.x
    assert float((end - expected).abs().max()) < 1e-12


def test_weights_are_those_of_the_formulas() -> None:
    """h = s - t for flow; alpha(end) (rho(s) - rho(t)) for noise, with rho = 0 at the data."""
    times = [1 - i / T for i in range(T + 1)]
    flow = linear(RectifiedFlow(), "flow", times, to_x0=False)
    assert flow.weights == pytest.approx([-1 / T] * T, abs=1e-15)
    process = table()
    noise = linear(process, "epsilon", times, to_x0=True)
    rho = [float(process.sigma(t) / process.alpha(t)) for t in times[:-1]] + [0.0]
    assert noise.weights == pytest.approx([rho[i + 1] - rho[i] for i in range(T)], rel=1e-12)


def test_noise_outputs_have_no_weight_at_pure_noise_and_velocities_have() -> None:
    times = [1 - i / T for i in range(T + 1)]
    with pytest.raises(ValueError, match="no finite weight"):
        linear(table(noisy=True), "epsilon", times, to_x0=True)
    finite = linear(table(noisy=True), "v_prediction", times, to_x0=True)
    assert all(weight < 0 for weight in finite.weights)


@pytest.mark.parametrize("kind", CASES)
def test_the_last_step_alone_is_draft_1(kind: str) -> None:
    model = model_of(kind)
    found, loss = differentiate(listed(T - 1), model)
    expected, same_loss = differentiate(draft(1), model)
    same(found, expected)
    assert float(loss.metrics["reward"]) == float(same_loss.metrics["reward"])


@pytest.mark.parametrize("kl_coeff", [0.0, 3.0])
@pytest.mark.parametrize("kind", CASES)
def test_a_leap_over_the_last_steps_is_draft_2(kind: str, kl_coeff: float) -> None:
    model = model_of(kind)
    leap = listed(T - 2, T - 1, path="leap", nested=1.0, kl_coeff=kl_coeff)
    found, loss = differentiate(leap, model)
    expected, same_loss = differentiate(draft(2, kl_coeff), model)
    same(found, expected)
    assert float(loss.metrics["loss"]) == pytest.approx(float(same_loss.metrics["loss"]), rel=1e-12)


@pytest.mark.parametrize("kind", CASES)
def test_a_leap_without_nested_gradient_is_the_sum_over_its_steps(kind: str) -> None:
    model = model_of(kind)
    found, _ = differentiate(listed(T - 2, T - 1, path="leap"), model)
    expected, _ = differentiate(listed(T - 2, T - 1), model)
    same(found, expected)


@pytest.mark.parametrize("kind", CASES)
def test_all_steps_are_drtune_with_all_steps(kind: str) -> None:
    """DRTune (arXiv 2406.07294): the chain is kept, and each input of the network is detached."""
    model = model_of(kind)
    found, _ = differentiate(direct(steps="all"), model)
    times, run = rollout(model)
    model.trained.zero_grad()
    denoiser, x = model.denoiser(model.encode_prompts(PROMPTS)), run.visits[0].x_t
    x0 = x
    for t, s in pairwise(times):
        raw = denoiser(x.detach(), t).raw
        said = model.process.read(model.prediction_type, raw, x, t)
        if model.prediction_type == "sample":  # linear in velocities: those are held
            n = model.process.target("v_prediction", *_read_at(model, raw, x, t), t)
            said = model.process.read("v_prediction", n, x, t)
        x, x0 = model.process.step(said, t, s), said.x0
    (-Curved()(x0, PROMPTS).mean()).backward()

    same(found, vector(model))


def _read_at(model: VectorModel, raw: Tensor, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    said = model.process.read(model.prediction_type, raw, x.detach(), t)
    return said.x0, said.noise


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v"])
def test_reward_score_matching_is_sparse_steps_with_kl(kind: str) -> None:
    """sum C |n - n_ref - h g / 2C|^2 = -<g, sum h n> + sum C |n - n_ref|^2 + const."""
    model, active, c = model_of(kind), [1, 4, 6], 0.37
    elements = ROWS * WIDTH
    coeff = c * len(active) * elements  # kl is a mean over steps and elements
    found, _ = differentiate(listed(*active, kl_coeff=coeff, kl_form="output"), model)
    times, run = rollout(model)
    x0 = run.x0.requires_grad_()
    (g,) = torch.autograd.grad(Curved()(x0, PROMPTS).mean(), x0)
    h = linear(model.process, model.prediction_type, times, to_x0=True).weights
    model.trained.zero_grad()
    states = model.encode_prompts(PROMPTS)
    policy, reference = model.denoiser(states), model.denoiser(states, role="reference")
    for i in active:
        x_t, t = run.visits[i].x_t, times[i]
        target = reference(x_t, t).raw + h[i] / (2 * c) * g
        (c * (policy(x_t, t).raw - target).square().sum()).backward()

    same(found, vector(model))


@pytest.mark.parametrize("kind", CASES)
def test_inactive_steps_have_no_gradient_and_the_reward_sees_the_rollout(kind: str) -> None:
    model = model_of(kind)
    times, run = rollout(model)
    model.calls.clear()
    _, loss = differentiate(listed(2, 5), model)
    with_gradient = [t for role, t, grad in model.calls if role == "policy" and grad]
    assert with_gradient == [times[5], times[2]]
    assert len(model.calls) == T + 2
    assert float(loss.metrics["reward"]) == float(Curved()(run.x0, PROMPTS).mean())


STACKED: list[tuple[dict[str, Any], tuple[int, ...]]] = [  # with the steps that may be one call
    ({"active_steps": 5}, (5,)),
    ({"active_steps": 5, "kl_coeff": 3.0}, (5,)),
    (
        {
            **{"active_steps": 4, "weights": "sigma", "gain": 0.5},
            **{"kl_coeff": 3.0, "kl_form": "output", "hinge": 2.0},
        },
        (4,),
    ),
    # The state where two legs meet is alone, as its gradient is complete only then.
    ({"path": "bridge", "active_steps": 6, "nested": 0.5, "kl_coeff": 2.0}, (1, 1, 4)),
    ({"path": "lagrange", "nested": 0.3, "kl_coeff": 2.0, "distance_floor": 0.1}, (1, 1, 2)),
]


@pytest.mark.parametrize("size", [2, 3, 9])
@pytest.mark.parametrize(("settings", "groups"), STACKED)
@pytest.mark.parametrize("kind", CASES)
def test_steps_in_one_call_are_steps_one_by_one(
    kind: str, settings: dict[str, Any], groups: tuple[int, ...], size: int
) -> None:
    model = model_of(kind)
    expected, same_loss = differentiate(direct(**settings), model)
    alone = model.asked[T:]
    model = model_of(kind)
    found, loss = differentiate(direct(**settings, stacked_steps=size), model)
    same(found, expected)
    assert loss.metrics.keys() == same_loss.metrics.keys()
    for name, metric in same_loss.metrics.items():
        assert float(loss.metrics[name]) == pytest.approx(float(metric), rel=1e-12)
    counts = [min(size, n - start) for n in groups for start in range(0, n, size)]
    for role in ("policy", "reference") if "kl_coeff" in settings else ("policy",):
        calls = [times_of(t) for whose, t in model.asked[T:] if whose == role]
        assert [len(each) for each in calls] == counts
        assert [t for each in calls for t in each] == [t for whose, t in alone if whose == role]
    assert all(grad for role, _, grad in model.calls[T:] if role == "policy")
    assert len(model.calls) == T + len(counts) * (2 if "kl_coeff" in settings else 1)


def times_of(t: Any) -> list[float]:
    """Return the times of a call, each of which has all rows of the batch."""
    if isinstance(t, float):
        return [t]
    blocks = t.reshape(-1, ROWS)
    assert (blocks == blocks[:, :1]).all()
    return blocks[:, 0].tolist()


def test_one_step_at_a_time_is_the_same_bitwise() -> None:
    model, settings = model_of("epsilon"), {"active_steps": 5, "kl_coeff": 3.0}
    found, _ = differentiate(direct(**settings, stacked_steps=1), model)
    assert all(isinstance(t, float) for _, t in model.asked)
    expected, _ = differentiate(direct(**settings), model)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v"])
def test_all_steps_point_where_full_backpropagation_does(kind: str) -> None:
    model = model_of(kind)
    full, _ = differentiate(draft(T), model)
    sparse, _ = differentiate(direct(steps="all"), model)
    last, _ = differentiate(draft(1), model)

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    assert cosine(sparse, full) > 0.97 > cosine(last, full)


def test_the_gain_is_one_when_all_steps_are_active() -> None:
    model = model_of("flow")
    plain, _ = differentiate(direct(steps="all"), model)
    gained, _ = differentiate(direct(steps="all", gain=0.5), model)
    same(gained, plain)
    few, _ = differentiate(listed(0, 3), model)
    more, _ = differentiate(listed(0, 3, gain=0.5), model)
    same(more, few * (1 + 0.5 * (T / 2 - 1)))


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_the_quadrature_is_exact_below_its_order(degree: int) -> None:
    points = [0.9, 0.7, 0.4]
    weights = basis_integrals(points, 0.9, 0.2)
    assert sum(weights) == pytest.approx(0.2 - 0.9, rel=1e-13)
    found = sum(w * p**degree for w, p in zip(weights, points, strict=True))
    assert found == pytest.approx((0.2 ** (degree + 1) - 0.9 ** (degree + 1)) / (degree + 1))


@pytest.mark.parametrize("path", ["sum", "leap", "bridge", "lagrange"])
@pytest.mark.parametrize("kind", CASES)
def test_drawn_surrogates_lie_in_the_run(kind: str, path: str) -> None:
    model = model_of(kind)
    times, form = list(model.times(20, 1, 1)), FORMS[model.prediction_type]
    config = DirectConfig(path=path, steps="late", active_steps=5)
    for seed in range(50):
        found = legs(config, model.process, form, times, torch.Generator().manual_seed(seed))
        assert found[-1].end == 20
        assert all(a.end == b.start for a, b in pairwise(found))
        for leg in found:
            assert leg.active
            assert set(leg.active) <= set(leg.weights) <= set(range(leg.start, leg.end))
            assert leg is found[0] or leg.start in leg.active


def test_late_steps_are_drawn_in_proportion_to_their_number() -> None:
    model, config = model_of("flow"), DirectConfig(steps="late", active_steps=1, late_bias=1.0)
    times, generator = list(model.times(4, 1, 1)), torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(800):
        (leg,) = legs(config, model.process, "flow", times, generator)
        counts[next(iter(leg.active))] += 1
    assert counts.tolist() == pytest.approx([80, 160, 240, 320], abs=40)


def test_rewards_above_the_hinge_carry_no_gradient() -> None:
    model = model_of("flow")
    rewards = Curved()(rollout(model)[1].x0, PROMPTS).sort().values
    between = float(rewards[2:4].mean())
    found, loss = differentiate(direct(steps="all", hinge=between), model)
    assert float(loss.metrics["below_hinge"]) == 0.5
    plain, _ = differentiate(direct(steps="all"), model)
    assert 0 < float(found.norm()) != float(plain.norm())
    nothing, _ = differentiate(direct(steps="all", hinge=float(rewards[0]) - 1), model)
    assert float(nothing.norm()) == 0


def test_the_gradient_is_clipped_at_a_running_quantile() -> None:
    model, objective = model_of("flow"), direct(steps="all", clip_quantile=0.5)
    first, loss = differentiate(objective, model)
    norms = loss.rows["reward_gradient"]
    objective.observe({"reward_gradient": norms.tolist()})
    limit = objective.state()["limit"]
    assert limit == pytest.approx(float(norms.quantile(0.5)))
    clipped, _ = differentiate(objective, model)
    assert float(clipped.norm()) < float(first.norm())
    objective.observe({"reward_gradient": (2 * norms).tolist()})
    assert objective.state()["limit"] == pytest.approx(0.9 * limit + 0.1 * 2 * limit)
    again = direct(clip_quantile=0.5)
    again.restore(objective.state())
    assert again.state() == objective.state()


def test_an_early_stop_shows_the_posterior_mean() -> None:
    """ReFL: the rollout ends some steps early, and its last prediction is scored."""
    model = model_of("epsilon")
    objective = direct(steps="last", active_steps=1, early_stop=[3, 3])
    model.calls.clear()
    _, loss = differentiate(objective, model)
    _, run = rollout(model)
    stopped = run.visits[T - 4].prediction.x0
    assert float(loss.metrics["reward"]) == float(Curved()(stopped, PROMPTS).mean())
    assert len([call for call in model.calls if call[2]]) == 1


def test_errors_of_the_legs_weigh_the_rows() -> None:
    """LeapAlign: 1 / (max(d_j, floor) + max(d_0, floor)), d the mean distance from the rollout."""
    model = model_of("flow")
    plain, _ = differentiate(listed(2, 5, path="leap"), model)
    far, _ = differentiate(listed(2, 5, path="leap", distance_floor=1e6), model)
    same(far * 2e6, plain)
    near, _ = differentiate(listed(2, 5, path="leap", distance_floor=1e-6), model)
    assert float(near.norm()) > 0


def test_the_legs_of_lagrange_have_dirichlet_shares() -> None:
    """Of 2, 6 and 2.5: means .190, .571, .238 of the steps; variances m (1 - m) / 11.5."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([[_gamma(a, generator) for a in SEGMENTS] for _ in range(4000)])
    shares = draws / draws.sum(1, keepdim=True)
    means = torch.tensor(SEGMENTS) / sum(SEGMENTS)
    assert shares.mean(0).tolist() == pytest.approx(means.tolist(), abs=0.01)
    variances = means * (1 - means) / (sum(SEGMENTS) + 1)
    assert shares.var(0).tolist() == pytest.approx(variances.tolist(), rel=0.1)


def test_a_step_of_weight_zero_has_no_gradient() -> None:
    """alpha is 0 at pure noise, where one drawn step may lie."""
    found, loss = differentiate(listed(0, weights="alpha", gain=0.5), model_of("flow"))
    assert float(found.norm()) == 0
    assert loss.value.isfinite()


def test_a_limit_of_zero_leaves_finite_gradients() -> None:
    objective, model = direct(steps="all", clip_quantile=0.5), model_of("flow")
    objective.observe({"reward_gradient": [0.0] * ROWS})
    found, _ = differentiate(objective, model)
    assert float(found.norm()) == 0
    assert objective._limit == 0
