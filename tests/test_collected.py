"""Rewards without a gradient, in float64: densities, ratios, advantages, and known limits."""

import math
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, final

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from vectors import CASES, PROMPTS, ROWS, WIDTH, Curved, DoubleRng, VectorModel

from sfumato.config import (
    AwmConfig,
    CollectedConfig,
    NftConfig,
    PolicyGradientConfig,
    SamplerConfig,
)
from sfumato.diffusion.process import RectifiedFlow
from sfumato.objectives.advantages import Judge
from sfumato.objectives.awm import AdvantageWeightedMatching
from sfumato.objectives.collected import CollectedObjective
from sfumato.objectives.nft import DiffusionNft, share_of
from sfumato.objectives.objective import Collected, Loss, Rollout
from sfumato.objectives.policy_gradient import PolicyGradient, clipped_loss
from sfumato.rewards.reward import Reward, Score
from sfumato.rewards.weighted import WeightedSum
from sfumato.training.ema import Shadow

SAMPLER = SamplerConfig(num_inference_steps=4, guidance_scale=1.0)
NOISY = [*CASES]


def model_of(case: str) -> VectorModel:
    make, prediction_type = CASES[case]
    return VectorModel(make(), prediction_type)


@final
class Alone:
    """One process."""

    def all(self, values: Sequence[Any]) -> list[Any]:
        return list(values)

    def own(self, values: Sequence[Any]) -> list[Any]:
        return list(values)


def collect(
    objective: CollectedObjective, model: VectorModel, prompts: Sequence[str] = PROMPTS
) -> Collected:
    if objective.needs_old and objective.old is None:
        objective.old = Shadow(model.trainable())
    with torch.no_grad():
        rng = DoubleRng([50 + i for i in range(len(prompts))], 7)
        return objective.collect(model, prompts, rng, Alone())


def gradient(
    objective: CollectedObjective, model: VectorModel, rows: Sequence[Rollout]
) -> tuple[Tensor, Loss]:
    model.trained.zero_grad()
    total = None
    for piece in objective.pieces(model, rows, DoubleRng([9 + i for i in range(len(rows))], 5)):
        loss = piece()
        loss.value.backward()
        total = loss if total is None else total + loss
    assert total is not None
    grads = [p.grad for p in model.trained.parameters()]
    return torch.cat([g.flatten() for g in grads if g is not None]), total


def replaced(rows: Sequence[Rollout], **columns: Sequence[float] | float) -> list[Rollout]:
    """Return rollouts with other numbers."""
    found = []
    for i, row in enumerate(rows):
        own = {
            name: torch.tensor(value[i] if isinstance(value, Sequence) else value).double()
            for name, value in columns.items()
        }
        found.append(Rollout(row.prompt, {**row.tensors, **own}))
    return found


def policy_gradient(**settings: Any) -> PolicyGradient:
    config = PolicyGradientConfig(images_per_prompt=3, **settings)
    return PolicyGradient(config, SAMPLER, Curved())


@pytest.mark.parametrize("case", NOISY)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_densities_of_steps_add_up_to_the_density_of_the_path(case: str, eta: float) -> None:
    """The path's density is written anew: normal steps with DDIM's mean and deviation."""
    model, objective = model_of(case), policy_gradient(eta=eta)
    rows = collect(objective, model).rows
    process = model.process
    denoiser = model.denoiser(model.encode_prompts(PROMPTS))
    states = torch.stack([row.tensors["states"] for row in rows])
    times = rows[0].tensors["times"].tolist()
    total = torch.zeros(ROWS, dtype=torch.float64)
    for i, (t, s) in enumerate(pairwise(times)):
        with torch.no_grad():
            said = denoiser(states[:, i], t)
        (a_t, s_t), (a_s, s_s) = (
            (float(process.alpha(time)), float(process.sigma(time))) for time in (t, s)
        )
        deviation = eta * s_s * math.sqrt(1 - (a_t * s_s / (a_s * s_t)) ** 2)
        mean = a_s * said.x0 + math.sqrt(s_s**2 - deviation**2) * said.noise
        total += Normal(mean, deviation).log_prob(states[:, i + 1]).flatten(1).sum(1)
    ours = torch.stack([row.tensors["log_densities"].sum() * WIDTH for row in rows])
    assert len(times) == 4  # the step to clean data has no density
    torch.testing.assert_close(ours, total, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", NOISY)
def test_the_gradient_is_that_of_the_score_function(case: str) -> None:
    """On two steps: -mean(A grad log p(path)) over elements, by autograd through the densities."""
    sampler = SamplerConfig(num_inference_steps=3, guidance_scale=1.0)
    model = model_of(case)
    objective = PolicyGradient(PolicyGradientConfig(images_per_prompt=3), sampler, Curved())
    rows = collect(objective, model).rows
    ours, loss = gradient(objective, model, rows)
    states = torch.stack([row.tensors["states"] for row in rows])
    advantages = torch.stack([row.tensors["advantage"] for row in rows])
    times = rows[0].tensors["times"].tolist()
    assert len(times) == 3
    model.trained.zero_grad()
    denoiser = model.denoiser(model.encode_prompts(PROMPTS))
    density = torch.zeros(ROWS, dtype=torch.float64)
    for i, (t, s) in enumerate(pairwise(times)):
        mean, deviation = model.process.transition(denoiser(states[:, i], t), t, s, eta=1.0)
        density = density + Normal(mean, deviation).log_prob(states[:, i + 1]).flatten(1).mean(1)
    (-(advantages * density).mean() / 2).backward()
    brute = torch.cat([p.grad.flatten() for p in model.trained.parameters() if p.grad is not None])
    torch.testing.assert_close(ours, brute, rtol=1e-9, atol=1e-12)
    assert brute.norm() > 1e-3
    assert loss.metrics["old_kl"] == pytest.approx(0, abs=1e-20)
    assert loss.metrics["clipped"] == 0


def test_policies_that_differ_are_compared() -> None:
    """A ratio of exp(change), and a KL that is the mean square of what the networks say."""
    model = model_of("flow")
    objective = policy_gradient(kl_coeff=0.5, kl_form="output", clip_range=10.0)
    rows = collect(objective, model).rows
    _, at_start = gradient(objective, model, rows)
    same = VectorModel(RectifiedFlow(), "flow", spread=0.0)
    _, equal = gradient(objective, same, collect(objective, same).rows)
    assert equal.metrics["kl"] == 0
    assert at_start.metrics["kl"] > 0
    with torch.no_grad():
        next(iter(model.trained.parameters())).add_(0.01)
    _, later = gradient(objective, model, rows)
    assert later.metrics["old_kl"] > 0


@pytest.mark.parametrize(
    ("change", "advantage", "loss", "slope"),
    [
        (0.0, 2.0, -2.0, -2.0),
        (math.log(1.2), 2.0, -2.2, 0.0),  # likelier than the bound: no more
        (math.log(0.8), 2.0, -1.6, -1.6),  # a good image that became unlikely
        (math.log(0.8), -2.0, 1.8, 0.0),
        (math.log(1.2), -2.0, 2.4, 2.4),
        (math.log(1.1) - 1e-9, 2.0, -2.2, -2.2),
        (math.log(1.1) + 1e-9, 2.0, -2.2, 0.0),
        (math.log(0.9) + 1e-9, -2.0, 1.8, 1.8),
        (math.log(0.9) - 1e-9, -2.0, 1.8, 0.0),
    ],
)
def test_clipping_acts_where_it_should(
    change: float, advantage: float, loss: float, slope: float
) -> None:
    moved = torch.tensor([change], dtype=torch.float64, requires_grad=True)
    value, clipped = clipped_loss(moved, torch.tensor([advantage]).double(), 0.1)
    (found,) = torch.autograd.grad(value.sum(), moved)
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert found.item() == pytest.approx(slope, abs=1e-6)
    assert clipped.item() == (slope == 0)


def test_only_the_window_is_noisy() -> None:
    """The states outside are those of a deterministic run; the window's place is drawn."""
    model = model_of("flow")
    objective = policy_gradient(window=1, eta=0.7)
    rows = collect(objective, model).rows
    assert rows[0].tensors["states"].shape == (2, WIDTH, 1, 1)
    found = set()
    for shared in range(20):
        objective.begin(model, DoubleRng([1], shared))
        found.add(objective._window)
    assert found == {range(0, 1), range(1, 2), range(2, 3)}
    calls = len(model.calls)
    gradient(objective, model, rows)
    assert len(model.calls) - calls == 1


def test_trained_steps_are_drawn_alike_for_all_rows() -> None:
    model, objective = model_of("flow"), policy_gradient(trained_steps=2)
    rows = collect(objective, model).rows
    drawn = []
    for shared in range(3):
        model.calls.clear()
        for half in (rows[:3], rows[3:]):
            for piece in objective.pieces(model, half, DoubleRng([1, 2, 3], shared)):
                piece()
        times = [t for _, t, _ in model.calls]
        assert times[:2] == times[2:]
        drawn.append(tuple(times[:2]))
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("case", NOISY)
@pytest.mark.parametrize("window", [None, 2])
def test_steps_may_be_weighted_by_their_noise(case: str, window: int | None) -> None:
    """The loss of each step is multiplied by its deviation over the mean of the window's."""
    model = model_of(case)
    plain, weighted = (
        policy_gradient(window=window),
        policy_gradient(window=window, step_weights="std"),
    )
    rows = replaced(collect(plain, model).rows, advantage=1.0)
    times = rows[0].tensors["times"].tolist()
    stds = [float(model.process.std(t, s, 1.0)) for t, s in pairwise(times)]
    pieces = [objective.pieces(model, rows, DoubleRng([1])) for objective in (plain, weighted)]
    values = [[piece().value.item() for piece in each] for each in pieces]
    assert len(stds) == len(values[0]) == (window or len(stds))
    for std, one, other in zip(stds, *values, strict=True):
        assert other == pytest.approx(one * std * len(stds) / sum(stds), rel=1e-9)
    assert max(stds) / min(stds) > 1.05
    assert values[0] != values[1]


@pytest.mark.parametrize("dt", [1e-3, 1e-4])
def test_flow_grpos_step_is_ours_to_first_order(dt: float) -> None:
    """Its noise a is eta = a / sqrt(2); its mean and ours differ by O(dt^2)."""
    process, t, a = RectifiedFlow(), 0.6, 0.7
    x, v = torch.tensor([[0.3]]).double(), torch.tensor([[-0.8]]).double()
    mean, std = process.transition(process.read("flow", v, x, t), t, t - dt, eta=a / math.sqrt(2))
    level = a * math.sqrt(t / (1 - t))
    theirs = x * (1 - level**2 / (2 * t) * dt) - v * (1 + level**2 * (1 - t) / (2 * t)) * dt
    assert std == pytest.approx(level * math.sqrt(dt), rel=5 * dt)
    assert (mean - theirs).abs().max() < 5 * dt**2


# --- advantage-weighted matching and NFT


@pytest.mark.parametrize("case", NOISY)
def test_awm_at_ratio_one_is_the_weighted_supervised_gradient(case: str) -> None:
    """A times the gradient of mean((raw - target)^2), at the same noise and times."""
    config = AwmConfig(images_per_prompt=3, likelihood="mse", trained_times=3)
    model = model_of(case)
    objective = AdvantageWeightedMatching(config, SAMPLER, Curved())
    rows = collect(objective, model).rows
    ours, loss = gradient(objective, model, rows)
    model.trained.zero_grad()
    x0, t, noise, advantage = (
        torch.stack([row.tensors[name] for row in rows])
        for name in ("x0", "t", "noise", "advantage")
    )
    denoiser = model.denoiser(model.encode_prompts(PROMPTS))
    total = torch.zeros((), dtype=torch.float64)
    for k in range(3):
        x_t = model.process.add_noise(x0, noise[:, k], t[:, k])
        target = model.process.target(model.prediction_type, x0, noise[:, k], t[:, k])
        errors = (denoiser(x_t, t[:, k]).raw - target).square().flatten(1).mean(1)
        total = total + (advantage * errors).mean() / 3
    total.backward()
    weighted = torch.cat(
        [p.grad.flatten() for p in model.trained.parameters() if p.grad is not None]
    )
    torch.testing.assert_close(ours, weighted, rtol=1e-8, atol=1e-12)
    assert loss.metrics["clipped"] == 0
    assert weighted.norm() > 1e-3
    for k in range(3):  # one time in each third
        assert bool(((t[:, k] > k / 3 - 0.02) & (t[:, k] < (k + 1) / 3 + 0.02)).all())


def test_awm_weighs_errors_by_their_fourth_root() -> None:
    config = AwmConfig(images_per_prompt=3, trained_times=1)
    model = model_of("flow")
    objective = AdvantageWeightedMatching(config, SAMPLER, Curved())
    rows = collect(objective, model).rows
    for row in rows:
        t, noise, x0 = row.tensors["t"], row.tensors["noise"], row.tensors["x0"][None]
        x_t = model.process.add_noise(x0, noise, t)
        with torch.no_grad():
            said = model.denoiser(model.encode_prompts([""]))(x_t, t).raw
        error = float((said - (noise - x0)).square().mean())
        expected = -((error + 1e-10) ** 0.25 - 1e-10**0.25) * float(t) / 0.25
        assert float(row.tensors["log_likelihoods"]) == pytest.approx(expected, rel=1e-6)


def nft(**settings: Any) -> DiffusionNft:
    return DiffusionNft(NftConfig(images_per_prompt=3, **settings), SAMPLER, Curved())


@pytest.mark.parametrize("case", NOISY)
def test_nft_learns_nothing_where_images_tell_nothing(case: str) -> None:
    """p = 1/2 and the policy is the old one: the gradient is zero."""
    model, objective = model_of(case), nft()
    rows = collect(objective, model).rows
    told, _ = gradient(objective, model, rows)
    untold, loss = gradient(objective, model, replaced(rows, advantage=0.0))
    assert untold.norm() < 1e-12 * told.norm()
    assert loss.metrics["old_distance"] == 0


@pytest.mark.parametrize("case", NOISY)
def test_nft_of_good_images_alone_is_weighted_supervised_training(case: str) -> None:
    """p = 1, beta = 1: c times the gradient of (x0hat - x)^2 over its mean absolute error."""
    model, objective = model_of(case), nft(trained_times=1)
    rows = replaced(collect(objective, model).rows, advantage=5.0)
    ours, _ = gradient(objective, model, rows)
    times = [t for t in objective.times(model)[:-1] if float(model.process.alpha(t)) > 0]
    rng = DoubleRng([9 + i for i in range(ROWS)], 5)
    order = torch.stack([rng.uniform() for _ in times]).argsort(0)
    t, x0 = torch.tensor(times)[order[0]], torch.stack([row.tensors["x0"] for row in rows])
    x_t = model.process.add_noise(x0, rng.normal(WIDTH, 1, 1), t)
    model.trained.zero_grad()
    difference = model.denoiser(model.encode_prompts(PROMPTS))(x_t, t).x0 - x0
    size = difference.detach().abs().flatten(1).mean(1)
    (5 * (difference.square().flatten(1).mean(1) / size).mean()).backward()
    theirs = torch.cat([p.grad.flatten() for p in model.trained.parameters() if p.grad is not None])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_nft_makes_the_good_image_likelier_than_the_bad_one() -> None:
    """A small step of gradient descent: the supervised loss falls for p = 1, not for p = 0."""
    model, objective = model_of("flow"), nft(trained_times=4)
    rows = replaced(collect(objective, model).rows, advantage=[5.0, -5.0, 0.0] * 2)

    def losses() -> Tensor:
        denoiser, found = model.denoiser(model.encode_prompts(PROMPTS)), torch.zeros(ROWS).double()
        x0 = torch.stack([row.tensors["x0"] for row in rows])
        with torch.no_grad():
            for k in range(200):
                noise = DoubleRng([1000 * k + i for i in range(ROWS)]).normal(WIDTH, 1, 1)
                t = torch.full((ROWS,), (k % 10 + 0.5) / 10).double()
                raw = denoiser(model.process.add_noise(x0, noise, t), t).raw
                found += (raw - (noise - x0)).square().flatten(1).mean(1)
        return found / 200

    before = losses()
    gradient(objective, model, rows)
    with torch.no_grad():
        for parameter in model.trained.parameters():
            assert parameter.grad is not None
            parameter -= 1e-3 * parameter.grad
    change = losses() - before
    assert change[0] < 0 < change[1]
    assert change[3] < 0 < change[4]


def test_nft_at_beta_one_predicts_the_policy() -> None:
    """x0+ is the policy's own prediction, and p is 0, 1/2 and 1 where it should be."""
    advantages = torch.tensor([-9.0, -5.0, 0.0, 5.0, 9.0])
    assert share_of(advantages, 5.0).tolist() == [0, 0, 0.5, 1, 1]
    model = model_of("flow")
    rows = replaced(collect(nft(), model).rows, advantage=5.0)
    found = []
    for shift in (0.0, 0.3):  # with p = 1, another old policy changes nothing
        objective = nft(kl_coeff=0.0)
        objective.old = Shadow(model.trainable())
        with torch.no_grad():
            for value in objective.old.shadow.values():
                value += shift
        found.append(gradient(objective, model, rows)[0])
    assert torch.equal(*found)


def test_the_old_policy_follows_once_in_a_collection() -> None:
    model, objective = model_of("flow"), nft(old_decay=0.4, old_decay_rise=0.3)
    collect(objective, model)
    assert isinstance(objective.old, Shadow)
    name, parameter = next(iter(model.trainable().items()))
    expected = parameter.detach().clone()
    for decay in (0.3, 0.4, 0.4):
        with torch.no_grad():
            parameter += 1
        collect(objective, model)
        expected = decay * expected + (1 - decay) * parameter.detach()
        torch.testing.assert_close(objective.old.shadow[name], expected)
    again = nft(old_decay=0.4, old_decay_rise=0.3)
    again.restore(objective.state())
    assert again.state() == objective.state()


def test_the_old_policy_samples() -> None:
    model, objective = model_of("flow"), nft(old_decay=0.5, old_decay_rise=0.5)
    first = collect(objective, model).rows
    with torch.no_grad():
        for parameter in model.trained.parameters():
            parameter.mul_(1.5)

    second = collect(objective, model).rows
    assert not torch.equal(first[0].tensors["x0"], second[0].tensors["x0"])
    objective.old = None
    again = nft(old_decay=0.5, old_decay_rise=0.5)
    third = collect(again, model).rows  # its old policy is the policy of now
    assert not torch.equal(third[0].tensors["x0"], second[0].tensors["x0"])


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("moved", [0.0, 0.2])
def test_old_policy_and_policy_are_two_under_autocast(bfloat16: bool, moved: float) -> None:
    """Autocast keeps casts of weights, which have to go when other values are put in place."""
    network = torch.nn.Linear(4, 4)
    shadow = Shadow(dict(network.named_parameters()))
    with torch.no_grad():
        network.weight.add_(moved)
    x = torch.ones(1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        before = network(x) if moved else None
        with shadow.shown(), torch.no_grad():
            old = network(x)
        said = network(x)
        (4 * moved - (said - old)).abs().sum().backward()
    change = (said - old).float()
    torch.testing.assert_close(change, torch.full((1, 4), 4 * moved), atol=0.05, rtol=0)
    assert before is None or torch.equal(before, said)
    assert said.requires_grad
    assert network.weight.grad is not None


# --- advantages


def judge(rewards: Sequence[float], prompts: Sequence[str] | None = None, **settings: Any) -> Any:
    config = CollectedConfig(**{"images_per_prompt": 3, **settings})
    texts = prompts or [f"p{i // 3}" for i in range(len(rewards))]
    return Judge(config)(texts, {"reward": rewards}, {"reward": 1.0})


def test_a_group_is_compared_with_its_own_mean_and_deviation() -> None:
    found = judge([1.0, 2.0, 3.0, 10.0, 10.0, 40.0])
    root = math.sqrt(1.5)
    expected = [-root, 0, root, -math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2)]
    assert found.values.tolist() == pytest.approx(expected, rel=1e-6)
    assert found.idle == 0
    assert bool(found.kept.all())


def test_the_deviation_may_be_of_all_images() -> None:
    rewards = [1.0, 2.0, 3.0, 10.0, 10.0, 40.0]
    deviation = torch.tensor(rewards).double().std(correction=0).item()
    expected = [-1, 0, 1, -10, -10, 20]
    found = judge(rewards, deviation="batch").values
    assert found.tolist() == pytest.approx([e / deviation for e in expected], rel=1e-6)


@pytest.mark.parametrize("equal", [7.0, 0.0, -1e6])
def test_equal_rewards_tell_nothing(equal: float) -> None:
    found = judge([equal, equal * (1 + 1e-8), equal, 1.0, 2.0, 3.0])
    assert found.values[:3].tolist() == [0, 0, 0]
    assert found.idle == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_missing_rewards_are_left_out_of_the_mean(bad: float) -> None:
    found = judge([1.0, bad, 3.0, 4.0, bad, bad])
    assert found.values.tolist() == pytest.approx([-1, 0, 1, 0, 0, 0])
    assert found.kept.tolist() == [True, False, True, True, False, False]
    assert found.idle == 0.5


def test_advantages_are_bounded() -> None:
    found = judge([0.0] * 99 + [1.0], images_per_prompt=100, advantage_clip=2.0)
    assert found.values.max() == 2


def test_prompts_are_compared_with_their_own_history() -> None:
    """DDPO's tracker: the last 16 rewards of a prompt, and all images until there are as many."""
    config = CollectedConfig(images_per_prompt=2, statistics="prompt")
    judge, generator, kept = Judge(config), torch.Generator().manual_seed(0), {"a": [], "b": []}
    for _ in range(6):
        prompts = ["a", "a", "a", "a", "b", "b"]
        rewards = torch.randn(6, generator=generator, dtype=torch.float64).tolist()
        for prompt, reward in zip(prompts, rewards, strict=True):
            kept[prompt] = [*kept[prompt], reward][-16:]
        found = judge(prompts, {"reward": rewards}, {"reward": 1.0}).values
        for i, prompt in enumerate(prompts):
            values = torch.tensor(kept[prompt] if len(kept[prompt]) == 16 else rewards).double()
            z = (rewards[i] - values.mean()) / values.std(correction=0)
            assert found[i].item() == pytest.approx(float(z), rel=1e-5)


def test_several_rewards_are_standardised_before_they_are_weighted() -> None:
    config = CollectedConfig(images_per_prompt=3)
    table = {"small": [0.001, 0.002, 0.003], "large": [3e6, 1e6, 2e6], "value": [0.0, 0.0, 0.0]}
    found = Judge(config)(["p"] * 3, table, {"small": 1.0, "large": -3.0}).values
    z = torch.tensor([-1.0, 0.0, 1.0]) * math.sqrt(1.5)
    other = torch.tensor([1.0, -1.0, 0.0]) * math.sqrt(1.5)
    torch.testing.assert_close(found, (z - 3 * other) / 4)


@final
class Fragile(Reward):
    """Fails for some images."""

    differentiable = False

    def __init__(self, fault: str, every: int = 2) -> None:
        super().__init__()
        self.fault, self.every, self.calls = fault, every, 0

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        numbers = [int(prompt.split()[1]) for prompt in prompts]
        bad = [number % self.every == 0 for number in numbers]
        if self.fault == "raises" and any(bad):
            raise RuntimeError("no such picture")
        value = images.flatten(1).sum(1)
        return Score(torch.where(torch.tensor(bad), math.nan, value))


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_images_whose_reward_fails_are_left_out(fault: str) -> None:
    model = model_of("flow")
    config = PolicyGradientConfig(images_per_prompt=3, rollout_batch_size=2)
    objective = PolicyGradient(config, SAMPLER, Fragile(fault))
    found = collect(objective, model)
    assert found.metrics["left_out"] == 3
    assert [float(row.tensors["kept"]) for row in found.rows] == [0, 1, 0, 1, 0, 1]
    ours, _ = gradient(objective, model, found.rows)
    without, _ = gradient(objective, model, replaced(found.rows, advantage=[9.0, 0.0] * 3))
    alone, _ = gradient(objective, model, replaced(found.rows, advantage=[0.0, 0.0] * 3))
    assert torch.equal(without, alone)
    assert ours.isfinite().all()


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_reward_that_fails_for_all_ends_the_run(fault: str) -> None:
    objective = PolicyGradient(
        PolicyGradientConfig(images_per_prompt=3), SAMPLER, Fragile(fault, every=1)
    )
    with pytest.raises(ValueError, match="gave no number for any of 6 images"):
        collect(objective, model_of("flow"))


def test_a_composed_reward_is_judged_part_by_part() -> None:
    reward = WeightedSum({"one": (2.0, Curved()), "two": (1.0, Fragile("none", every=100))})
    objective = PolicyGradient(PolicyGradientConfig(images_per_prompt=3), SAMPLER, reward)
    found = collect(objective, model_of("flow"), [f"prompt {i + 1}" for i in range(ROWS)])
    assert found.metrics.keys() >= {"reward", "reward/one", "reward/two"}
    assert found.metrics["reward_queries"] == ROWS
    total = 2 * found.metrics["reward/one"] + found.metrics["reward/two"]
    assert found.metrics["reward"] == pytest.approx(total)


@final
class Talkative(Reward):
    """Gives parts that have no weight, and fails for some images."""

    differentiable = False

    def __init__(self, bad: Sequence[int]) -> None:
        super().__init__()
        self.bad = bad

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        if any(int(prompt.split()[1]) in self.bad for prompt in prompts):
            raise RuntimeError("no such picture")
        value = images.flatten(1).sum(1)
        return Score(value, {"part": 2 * value})


@pytest.mark.parametrize("bad", [[0], [5], [0, 1, 2]])
def test_parts_without_a_weight_are_measured_where_the_reward_fails(bad: list[int]) -> None:
    config = PolicyGradientConfig(images_per_prompt=3, rollout_batch_size=2)
    found = collect(PolicyGradient(config, SAMPLER, Talkative(bad)), model_of("flow"))
    assert found.metrics["left_out"] == len(bad)
    assert found.metrics["reward/part"] == pytest.approx(2 * found.metrics["reward"])


@final
class Misshapen(Reward):
    """Gives another shape than one number for each image."""

    differentiable = False

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def score(self, images: Tensor, prompts: Sequence[str]) -> Any:
        value = images.flatten(1).sum(1)
        shapes = {
            "scalar": value.sum(),
            "column": value[:, None],
            "fewer": value[1:],
            "more": torch.cat([value, value]),
        }
        parts = {"part": value[:, None]} if self.kind == "part" else {}
        # A Score checks shapes, but only in tests.
        return SimpleNamespace(value=shapes.get(self.kind, value), parts=parts)


@pytest.mark.parametrize("kind", ["scalar", "column", "fewer", "more", "part"])
def test_a_reward_of_another_shape_is_refused(kind: str) -> None:
    config = PolicyGradientConfig(images_per_prompt=3, rollout_batch_size=3)
    objective = PolicyGradient(config, SAMPLER, Misshapen(kind))
    with pytest.raises(ValueError, match=r"Misshapen gave no number.+has shape .+one number"):
        collect(objective, model_of("flow"))


# --- what a checkpoint brings


@pytest.mark.parametrize("kind", ["policy_gradient", "window", "nft", "awm"])
def test_rows_have_their_shapes_and_hold_no_more_than_themselves(kind: str) -> None:
    """A view of all rows would be sent to the other processes once for each row."""
    objectives = {
        "policy_gradient": policy_gradient(),
        "window": policy_gradient(window=2),
        "nft": nft(),
        "awm": AdvantageWeightedMatching(AwmConfig(images_per_prompt=3), SAMPLER, Curved()),
    }
    objective, model = objectives[kind], model_of("flow")
    row = collect(objective, model).rows[0]
    found = {name: tuple(tensor.shape) for name, tensor in row.tensors.items()}
    assert objective.row_shapes(model) == found
    for tensor in row.tensors.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"queries": "many"}, "queries"),
        ({"queries": -1}, "queries"),
        ({"collections": None}, "collections"),
        ({"history": [1]}, "history"),
        ({"history": {"a": {"reward": ["x"]}}}, "history"),
    ],
)
def test_nonsense_in_the_state_is_refused(state: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"objective in state.json is damaged: {said}.+remove"):
        nft().restore(state)
