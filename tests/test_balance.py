"""Balance of a reward's parts: closed forms in float64, finite differences, and runs of the toy."""

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import pytest
import torch
from runs import (
    assert_same_state,
    command,
    in_child,
    in_processes,
    kill,
    last_state,
    metrics,
    on_call,
    start,
)
from tiny_clip import write_tiny_clip
from torch import Tensor
from toy import use_toy
from vectors import CASES, PROMPTS, ROWS, WIDTH, Curved, DoubleRng, VectorModel, differentiate

from sfumato.compose import compose_train
from sfumato.config import (
    AdjointMatchingConfig,
    DirectAlignConfig,
    DirectConfig,
    DraftConfig,
    SamplerConfig,
)
from sfumato.diffusion.sampling import sample
from sfumato.objectives.adjoint_matching import AdjointMatching
from sfumato.objectives.balance import WINDOW, Balance
from sfumato.objectives.direct import Direct
from sfumato.objectives.direct_align import DirectAlign
from sfumato.objectives.draft import Draft
from sfumato.objectives.scoring import RewardedObjective
from sfumato.rewards.clip import ClipReward
from sfumato.rewards.reward import Reward, Score
from sfumato.rewards.simple import ColorReward
from sfumato.rewards.weighted import WeightedSum

T = 4
SAMPLER = SamplerConfig(num_inference_steps=T, guidance_scale=1.0)
KL = 0.7


@final
class Linear(Reward):
    """A scaled product with a direction; of negative scale where rows are to differ in sign."""

    def __init__(self, *direction: float, scale: float = 1.0) -> None:
        super().__init__()
        self.direction, self.scale = torch.tensor(direction, dtype=torch.float64), scale

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        return Score(self.scale * images.flatten(1) @ self.direction)


@final
class Plain(Reward):
    """The sum of two rewards, as it was before there was anything to balance."""

    def __init__(self, *parts: tuple[float, Reward]) -> None:
        super().__init__()
        self.parts = parts

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        values = [(weight, reward(images, prompts)) for weight, reward in self.parts]
        return Score(torch.stack([weight * value for weight, value in values]).sum(0))


SMALL, LARGE = Linear(0.6, 0.0, 0.8), Linear(0.0, -1.0, 0.0, scale=100.0)
MAKERS: dict[str, Callable[[Reward], RewardedObjective[Any]]] = {
    "draft": lambda reward: Draft(
        DraftConfig(kl_coeff=KL, truncation_steps=T, clamp_images=False), SAMPLER, reward
    ),
    "draft_lv": lambda reward: Draft(
        DraftConfig(kl_coeff=0.0, truncation_steps=1, lv_samples=2, clamp_images=False),
        SAMPLER,
        reward,
    ),
    "direct": lambda reward: Direct(
        DirectConfig(steps="all", kl_coeff=KL, clamp_images=False), SAMPLER, reward
    ),
    "adjoint_matching": lambda reward: AdjointMatching(
        AdjointMatchingConfig(clamp_images=False, trained_steps=2), SAMPLER, reward
    ),
    "direct_align": lambda reward: DirectAlign(
        DirectAlignConfig(clamp_images=False, negative="bad"), SAMPLER, reward
    ),
}
RELATIVE = "direct_align"  # its rewards are differences: those of linear ones without words are 0


def model() -> VectorModel:
    make, prediction_type = CASES["flow"]
    return VectorModel(make(), prediction_type)


def two(first: float = 1.0, second: float = 1.0, **settings: Any) -> WeightedSum:
    return WeightedSum({"small": (first, SMALL), "large": (second, LARGE)}, **settings)


def latents() -> Tensor:
    return DoubleRng(range(ROWS)).normal(WIDTH, 1, 1).requires_grad_()


def balanced(reward: Reward, x0: Tensor, balance: Balance | None = None) -> tuple[Score, Tensor]:
    score = (balance or Balance(reward))(reward.score(x0, PROMPTS), x0)
    (gradient,) = torch.autograd.grad(score.value.sum(), x0)
    return score, gradient


def same(found: Tensor, expected: Tensor) -> None:
    assert float(expected.norm()) > 1e-6
    assert float((found - expected).norm() / expected.norm()) < 1e-12


# --- Equal norms


@pytest.mark.parametrize(("first", "second"), [(1.0, 1.0), (0.5, -2.0), (3.0, 0.0)])
def test_equalised_parts_add_their_weights_times_the_mean_norm(first: float, second: float) -> None:
    """Norms 1 and 100: the gradient is m (w_1 e_1 + w_2 e_2), m the weighted mean of the norms."""
    reward, x0 = two(first, second, gradients="equalised"), latents()
    score, found = balanced(reward, x0)
    mean = (abs(first) * 1 + abs(second) * 100) / (abs(first) + abs(second))
    one = mean * (first * SMALL.direction + second * LARGE.direction)
    same(found.flatten(1), one.expand(ROWS, WIDTH))
    assert torch.equal(score.value, two(first, second)(x0, PROMPTS))
    shown = {name: float(value) for name, value in score.measures.items()}
    expected = {"reward_gradient/small": 1.0, "reward_gradient/large": 100.0}
    assert shown == pytest.approx({**expected, "reward_cosine/small/large": 0.0}, abs=1e-12)


def test_equalising_is_by_image() -> None:
    """Of a curved reward each image has another norm."""
    reward, x0 = WeightedSum({"a": (2.0, Curved()), "b": (1.0, LARGE)}), latents()
    own = [torch.autograd.grad(part(x0, PROMPTS).sum(), x0)[0] for part in (Curved(), LARGE)]
    norms = [each.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for each in own]
    mean = (2 * norms[0] + norms[1]) / 3
    expected = mean * (2 * own[0] / norms[0] + own[1] / norms[1])
    reward.gradients = "equalised"
    score, found = balanced(reward, x0)
    same(found, expected)
    cosine = torch.cosine_similarity(own[0].flatten(1), own[1].flatten(1)).mean()
    assert float(score.measures["reward_cosine/a/b"]) == pytest.approx(float(cosine), rel=1e-12)


@pytest.mark.parametrize(
    "parts",
    [
        {"alone": (0.3, Curved())},
        {"a": (0.3, SMALL), "b": (2.0, Linear(0.0, 0.0, 1.0)), "c": (-1.0, Linear(0.0, 1.0, 0.0))},
        {"a": (0.3, LARGE), "idle": (0.0, LARGE)},
    ],
)
def test_equalising_equal_norms_changes_nothing(parts: dict[str, tuple[float, Reward]]) -> None:
    x0 = latents()
    _, found = balanced(WeightedSum(parts, gradients="equalised"), x0)
    _, expected = balanced(WeightedSum(parts), x0)
    same(found, expected)


@pytest.mark.parametrize("how", ["measured", "equalised"])
@pytest.mark.parametrize("constant", ["without a graph", "with one"])
def test_a_constant_part_has_no_say(how: str, constant: str) -> None:
    @final
    class Constant(Reward):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
            seven = images.flatten(1).sum(1) * 0 + 7
            return Score(seven.detach() if constant == "without a graph" else seven)

    x0 = latents()
    reward = WeightedSum({"a": (1.0, SMALL), "still": (1.0, Constant())}, gradients=how)
    score, found = balanced(reward, x0)
    share = 0.5 if how == "equalised" else 1.0  # the mean of the norms 1 and 0
    same(found.flatten(1), share * SMALL.direction.expand(ROWS, WIDTH))
    assert float(score.measures["reward_gradient/still"]) == 0
    assert float(score.measures["reward_cosine/a/still"]) == 0


def test_weights_of_zero_alone_have_no_gradient() -> None:
    _, found = balanced(two(0.0, 0.0, gradients="equalised"), latents())
    assert float(found.norm()) == 0


@pytest.mark.parametrize("name", [name for name in MAKERS if name != RELATIVE])
def test_every_objective_learns_from_the_equalised_gradient(name: str) -> None:
    """Of linear rewards it is that of one linear reward, known beforehand."""
    mean = (0.5 + 2 * 100) / 2.5
    direction = mean * (0.5 * SMALL.direction + 2 * LARGE.direction)
    found, loss = differentiate(MAKERS[name](two(0.5, 2.0, gradients="equalised")), model())
    expected, _ = differentiate(MAKERS[name](Linear(*direction.tolist())), model())
    same(found, expected)
    assert float(loss.metrics["reward_gradient/large"]) == pytest.approx(100)
    plain, before = differentiate(MAKERS[name](two(0.5, 2.0)), model())
    assert float((plain - found).norm() / found.norm()) > 1e-2
    assert float(loss.metrics["reward"]) == pytest.approx(float(before.metrics["reward"]))


def test_the_gradient_through_the_rollout_is_a_finite_difference() -> None:
    """DRaFT with all steps: of <h, x0>, where h is the equalised gradient at the rollout's end."""
    parts: dict[str, tuple[float, Reward]] = {"a": (1.0, Curved()), "b": (0.5, LARGE)}
    toy, reward = model(), WeightedSum(parts, gradients="equalised")
    config = DraftConfig(kl_coeff=0.0, truncation_steps=T, clamp_images=False)
    found, _ = differentiate(Draft(config, SAMPLER, reward), toy)

    def end() -> Tensor:
        with torch.no_grad():
            start = DoubleRng([3 + i for i in range(ROWS)], 3).normal(*toy.latent_shape(1, 1))
            policy = toy.denoiser(toy.encode_prompts(PROMPTS))
            return sample(policy, toy.process, start, list(toy.times(T, 1, 1))).x0

    _, direction = balanced(reward, end().requires_grad_())
    step, values = 1e-5, []
    weights = list(toy.trained.parameters())
    along = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        for sign in (1, -1):
            moves = along.split([weight.numel() for weight in weights])
            for weight, move in zip(weights, moves, strict=True):
                weight += sign * step * move.reshape(weight.shape)
            values.append(float(-(direction * end()).flatten(1).sum(1).mean()))
            for weight, move in zip(weights, moves, strict=True):
                weight -= sign * step * move.reshape(weight.shape)
    slope = (values[0] - values[1]) / (2 * step)
    assert float(found @ along) == pytest.approx(slope, rel=1e-6)


def test_layers_that_are_computed_again_give_each_part_the_same_gradient(tmp_path: Path) -> None:
    """The graph of a CLIP with gradient checkpointing is differentiated once for each part."""
    write_tiny_clip(tmp_path)
    images = DoubleRng(range(2)).normal(3, 32, 32).float().requires_grad_()
    found = []
    for again in (False, True):
        clip = ClipReward.from_pretrained(str(tmp_path), gradient_checkpointing=again)
        parts: dict[str, tuple[float, Reward]] = {
            "clip": (1.0, clip),
            "red": (0.5, ColorReward("red")),
        }
        reward = WeightedSum(parts, gradients="equalised")
        score = Balance(reward)(reward.score(images, ["a star", "a ring"]), images)
        found.append(torch.autograd.grad(score.value.sum(), images)[0])
        own = torch.autograd.grad(clip(images, ["a star", "a ring"]).sum(), images)[0]
        norms = own.flatten(1).norm(dim=1)
        assert float(score.measures["reward_gradient/clip"]) == pytest.approx(float(norms.mean()))
    torch.testing.assert_close(found[1], found[0])


# --- Off


@pytest.mark.parametrize("name", MAKERS)
def test_without_a_balance_the_gradient_is_bitwise_that_of_the_plain_sum(name: str) -> None:
    pairs = ((0.5, Curved()), (2.0, LARGE))
    expected, before = differentiate(MAKERS[name](Plain(*pairs)), model())
    for how in ("summed", "measured"):
        reward = WeightedSum(dict(zip("ab", pairs, strict=True)), gradients=how)
        found, loss = differentiate(MAKERS[name](reward), model())
        assert torch.equal(found, expected)
        assert torch.equal(loss.value, before.value)
        assert not any(key.startswith("reward/") for key in loss.rows)
        measured = [key for key in loss.metrics if key.startswith(("reward_g", "reward_c"))]
        assert ({*measured} >= {"reward_gradient/a", "reward_cosine/a/b"}) == (how == "measured")


# --- Running deviations


def test_parts_are_divided_by_the_root_of_their_mean_variance() -> None:
    reward, x0 = two(0.5, 2.0, standardise=True), latents()
    balance = Balance(reward)
    steps = ([1.0, 3.0], [2.0, 8.0]), ([0.0, 0.0, 6.0, 6.0], [1.0, 1.0, 1.0, 1.0])
    for small, large in steps:
        balance.observe({"reward/small": small, "reward/large": large})
    deviations = ((2 + 12) / 2) ** 0.5, ((18 + 0) / 2) ** 0.5
    score, found = balanced(reward, x0, balance)
    expected = 0.5 / deviations[0] * SMALL.direction + 2 * 100 / deviations[1] * LARGE.direction
    same(found.flatten(1), expected.expand(ROWS, WIDTH))
    assert torch.equal(score.value, two(0.5, 2.0)(x0, PROMPTS))


def test_deviations_forget_what_is_older_than_the_window() -> None:
    balance = Balance(two(standardise=True))
    for _ in range(WINDOW):
        balance.observe({"reward/small": [-1.0, 1.0]})
    balance.observe({"reward/small": [-2.0, 2.0]})
    (_, variance) = balance.state()["parts"]["small"]
    assert variance == pytest.approx(2 + (8 - 2) / WINDOW, rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 7.0, 0.1, -1e6])
@pytest.mark.parametrize("how", ["summed", "equalised"])
def test_a_part_of_no_deviation_is_left_out(value: float, how: str) -> None:
    """Also where means of equal numbers differ by rounding."""
    reward, x0 = two(0.5, 2.0, standardise=True, gradients=how), latents()
    balance = Balance(reward)
    for _ in range(3):
        balance.observe({"reward/small": [0.0, 8.0**0.5], "reward/large": [value] * 3})
    _, found = balanced(reward, x0, balance)
    size = 0.5 / 2 * (0.5 / 2.5 if how == "equalised" else 1)
    same(found.flatten(1), size * SMALL.direction.expand(ROWS, WIDTH))


@pytest.mark.parametrize("name", [name for name in MAKERS if name != RELATIVE])
@pytest.mark.parametrize("how", ["summed", "equalised"])
def test_the_first_step_measures_and_the_next_is_standardised(name: str, how: str) -> None:
    reward = WeightedSum(
        {"small": (0.5, SMALL), "large": (2.0, LARGE)}, standardise=True, gradients=how
    )
    objective, toy = MAKERS[name](reward), model()
    found, loss = differentiate(objective, toy)
    still, _ = differentiate(MAKERS[name](Linear(0.0, 0.0, 0.0)), model())
    torch.testing.assert_close(found, still, rtol=1e-12, atol=1e-12)
    rows = {key: loss.rows[key] for key in ("reward/small", "reward/large")}
    assert "deviations" in objective.why_idle
    objective.observe({key: values.tolist() for key, values in rows.items()})
    sizes = [float(values.std()) for values in rows.values()]
    factors = [0.5 / sizes[0], 2 * 100 / sizes[1]]
    mean = (abs(factors[0]) + abs(factors[1])) / 2.5
    factors = [0.5 * mean, 2 * mean] if how == "equalised" else factors
    direction = factors[0] * SMALL.direction + factors[1] * LARGE.direction
    found, _ = differentiate(objective, toy)
    expected, _ = differentiate(MAKERS[name](Linear(*direction.tolist())), model())
    same(found, expected)


def test_negative_words_are_balanced_by_their_differences() -> None:
    @final
    class Wordy(Reward):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
            factors = torch.tensor([float(len(prompt)) for prompt in prompts]).double()
            return Score(self.scale * factors * images.flatten(1).sum(1))

    one = MAKERS[RELATIVE](Wordy(1.0))
    parts: dict[str, tuple[float, Reward]] = {"a": (1.0, Wordy(1.0)), "b": (1.0, Wordy(99.0))}
    both = MAKERS[RELATIVE](WeightedSum(parts, gradients="equalised"))
    found, loss = differentiate(both, model())
    expected, _ = differentiate(one, model())
    same(found, 100 * expected)  # twice the mean of 1 and 99
    assert float(loss.metrics["reward_cosine/a/b"]) == pytest.approx(1)


def test_the_limit_of_a_quantile_begins_after_the_first_step() -> None:
    reward = two(standardise=True)
    config = DirectConfig(steps="all", clamp_images=False, clip_quantile=0.5)
    objective = Direct(config, SAMPLER, reward)
    _, loss = differentiate(objective, model())
    objective.observe({key: values.tolist() for key, values in loss.rows.items()})
    assert "limit" not in objective.state()
    _, loss = differentiate(objective, model())
    norms = loss.rows["reward_gradient"]
    objective.observe({key: values.tolist() for key, values in loss.rows.items()})
    assert objective.state()["limit"] == pytest.approx(float(norms.quantile(0.5)))
    again = Direct(config, SAMPLER, reward)
    again.restore(json.loads(json.dumps(objective.state())))
    assert torch.equal(differentiate(again, model())[0], differentiate(objective, model())[0])


# --- Whole runs

SUM = (
    "reward=weighted",
    "reward.parts.red.kind=color",
    "reward.parts.light={kind: brightness, scale: 500.0, weight: 0.5}",
)
BALANCED = (*SUM, "reward.standardise=true", "reward.gradients=equalised", "optimizer.eps=1e-4")


def test_a_run_goes_on_with_its_deviations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_toy(monkeypatch)
    start(command(tmp_path, "whole", *BALANCED))

    def die() -> None:
        on_call(4, kill, "Balance.observe")
        start(command(tmp_path, "run", *BALANCED))

    assert in_child(die) == -signal.SIGKILL
    assert in_child(lambda: start(command(tmp_path, "run", *BALANCED))) == 0
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    learned = last_state(tmp_path / "run").state["objective"]
    assert learned["steps"] == 6
    assert list(learned["parts"]) == ["red", "light"]
    rows = [row for row in metrics(tmp_path / "run") if "reward" in row]
    assert all(
        {"reward/red", "reward_gradient/light", "reward_cosine/red/light"} <= row.keys()
        for row in rows
    )


def test_two_processes_have_the_deviations_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_toy(monkeypatch)
    given = [*BALANCED, "training.max_steps=3", "training.micro_batch_size=1"]
    start(command(tmp_path, "one", *given))
    in_processes(2, lambda _: start(command(tmp_path, "two", *given)) and None)
    one, both = (last_state(tmp_path / name) for name in ("one", "two"))
    assert one.state["objective"]["steps"] == both.state["objective"]["steps"] == 3
    for name, known in one.state["objective"]["parts"].items():
        assert both.state["objective"]["parts"][name] == pytest.approx(known, rel=1e-5)
    for name, weight in one.weights.items():
        torch.testing.assert_close(both.weights[name], weight, rtol=1e-4, atol=1e-6)


GIVEN = ("objective=draft", "model.pretrained=M", "data.prompts=P", *SUM)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=nft", "reward.standardise=true"], "standardise=true has no effect with obj"),
        (["objective=awm", "reward.gradients=equalised"], "equalised has no effect with obj"),
        (["objective=supervised", "reward.gradients=measured"], "measured has no effect with obj"),
        (["reward.gradients=equal"], "reward.gradients='equal' is unknown"),
        (["reward.standardise=true", "training.global_batch_size=1"], "has no deviation"),
        (["reward.gradients=equalised", "training.precision=fp16"], "gradients=equalised diff"),
        (["reward.parts.reward.kind=color"], "a part is named 'reward'"),
        (["reward.parts.red.weight=nan"], "reward.parts.red.weight = nan is not a finite"),
        (["reward.parts.red.weight=0", "reward.parts.light.weight=0"], "weight is 0"),
    ],
)
def test_what_cannot_be_balanced_is_refused(overrides: list[str], message: str) -> None:
    typed = [text.split("=")[0] for text in overrides]
    given = [text for text in GIVEN if text.split("=")[0] not in typed]
    if "objective=supervised" in overrides:
        given = [text for text in given if not text.startswith("data")] + ["data.images.path=P"]
    with pytest.raises(ValueError, match=message):
        compose_train([*given, *overrides])


def test_one_weight_may_be_zero() -> None:
    more = ["reward.parts.red.weight=0", "reward.gradients=equalised", "reward.standardise=true"]
    assert compose_train([*GIVEN, *more])[0]
    nothing = two(0.0, 1.0, gradients="equalised")
    _, found = balanced(nothing, latents())
    same(found.flatten(1), 100 * LARGE.direction.expand(ROWS, WIDTH))


@final
class Nothing(Reward):
    """No number for any image, with a graph."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        return Score(images.flatten(1).sum(1) * torch.nan)


@pytest.mark.parametrize("how", ["summed", "measured", "equalised"])
@pytest.mark.parametrize("standardise", [False, True])
def test_a_part_of_weight_zero_that_gives_no_number_does_no_harm(
    how: str, standardise: bool
) -> None:
    def reward(parts: dict[str, tuple[float, Reward]]) -> WeightedSum:
        return WeightedSum(parts, standardise=standardise, gradients=how)

    rows = {"reward/large": [1.0, 3.0], "reward/none": [torch.nan, torch.nan]}
    x0, learned = latents(), []
    for one in (
        reward({"large": (2.0, LARGE), "none": (0.0, Nothing())}),
        reward({"large": (2.0, LARGE)}),
    ):
        balance = Balance(one)
        balance.observe({name: rows[name] for name in [f"reward/{n}" for n in one.weights]})
        learned.append(balanced(one, x0, balance))
    (score, found), (alone, expected) = learned
    same(found, expected)
    assert torch.equal(score.value, alone.value) and bool(score.parts["none"].isnan().all())
