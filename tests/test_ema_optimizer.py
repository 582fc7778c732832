"""The average of the weights, the schedule of learning rates, and AdamW, against their formulas."""

import math

import pytest
import torch
from torch import nn

from sfumato.config import OptimizerConfig
from sfumato.training.ema import Ema
from sfumato.training.optimizer import build_optimizer, learning_rate


def parameters(*values: float) -> dict[str, nn.Parameter]:
    return {str(i): nn.Parameter(torch.full((3,), value)) for i, value in enumerate(values)}


def test_ema_follows_its_formula() -> None:
    """Up to n = 8 the warm-up (1 + n) / (10 + n) holds, then the decay 0.5."""
    weights = parameters(1.0, -2.0)
    ema = Ema(weights, decay=0.5)
    expected = [1.0, -2.0]
    rng = torch.Generator().manual_seed(0)
    for n in range(20):
        decay = min(0.5, (1 + n) / (10 + n))
        for i, parameter in enumerate(weights.values()):
            drawn = torch.randn((), generator=rng).item()
            nn.init.constant_(parameter, drawn)
            expected[i] = decay * expected[i] + (1 - decay) * drawn
        ema.update()
        for shadow, value in zip(ema.shadow.values(), expected, strict=True):
            torch.testing.assert_close(shadow, torch.full((3,), value), rtol=1e-5, atol=1e-6)
    assert ema.updates == 20


def test_the_first_update_is_nine_tenths_of_the_way() -> None:
    weights = parameters(0.0)
    ema = Ema(weights, decay=0.9999)
    nn.init.constant_(weights["0"], 1.0)
    ema.update()
    torch.testing.assert_close(ema.shadow["0"], torch.full((3,), 0.9))


@pytest.mark.parametrize("on_cpu", [False, True])
def test_every_n_steps_it_moves_as_far_as_n_single_moves_to_the_same_weights(on_cpu: bool) -> None:
    """And at one decay d it keeps d^N of itself."""
    once = Ema(parameters(1.0, -2.0), decay=0.5)
    weights = parameters(1.0, -2.0)
    seldom = Ema(weights, decay=0.5, every=4, on_cpu=on_cpu)
    rng = torch.Generator().manual_seed(0)
    for step in range(1, 25):
        drawn = torch.randn(2, generator=rng)
        for i, parameter in enumerate(weights.values()):
            nn.init.constant_(parameter, drawn[i].item())
        before = {name: shadow.clone() for name, shadow in seldom.snapshot().items()}
        seldom.update()
        if step % 4:
            for name, shadow in seldom.snapshot().items():
                assert torch.equal(shadow, before[name])
            continue
        for i, parameter in enumerate(once._parameters.values()):
            nn.init.constant_(parameter, drawn[i].item())
        for _ in range(4):
            once.update()
        for name, shadow in seldom.snapshot().items():
            torch.testing.assert_close(shadow, once.shadow[name], rtol=1e-5, atol=1e-6)
            if step > 12:  # past the warm-up
                kept = before[name] * 0.5**4 + weights[name].detach() * (1 - 0.5**4)
                torch.testing.assert_close(shadow, kept, rtol=1e-5, atol=1e-6)
    assert seldom.updates == once.updates == 24


@pytest.mark.parametrize("every", [1, 3])
def test_on_the_cpu_beside_training_it_is_bitwise_the_same(every: int) -> None:
    weights = parameters(1.0, -2.0, 3.0)
    here, there = (Ema(weights, 0.9, every=every, on_cpu=on_cpu) for on_cpu in (False, True))
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        there.before_change()
        for parameter in weights.values():
            nn.init.constant_(parameter, torch.randn((), generator=rng).item())
        here.update()
        there.update()
    with there.shown():
        for name, parameter in weights.items():
            assert torch.equal(parameter, here.shadow[name])
    there.settle()
    for name, shadow in here.shadow.items():
        assert torch.equal(there.shadow[name], shadow)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_after_a_resume_it_is_bitwise_the_same(stop: int, on_cpu: bool) -> None:
    """Also in the middle of the N steps between two moves."""
    values = torch.randn(12, generator=torch.Generator().manual_seed(0)).tolist()

    def follow(ema: Ema, weights: dict[str, nn.Parameter], drawn: list[float]) -> None:
        for value in drawn:
            nn.init.constant_(weights["0"], value)
            ema.update()

    weights = parameters(1.0)
    whole = Ema(weights, 0.9, every=3, on_cpu=on_cpu)
    follow(whole, weights, values)
    weights = parameters(1.0)
    first = Ema(weights, 0.9, every=3, on_cpu=on_cpu)
    follow(first, weights, values[:stop])
    second = Ema(weights, 0.9, every=3, on_cpu=on_cpu)
    second.restore(first.snapshot(), first.updates)
    follow(second, weights, values[stop:])
    assert second.updates == whole.updates
    assert torch.equal(second.snapshot()["0"], whole.snapshot()["0"])


def test_shown_swaps_and_swaps_back_whatever_happens() -> None:
    weights = parameters(1.0, 2.0)
    ema = Ema(weights, decay=0.5)
    nn.init.constant_(weights["0"], 5.0)
    with pytest.raises(RuntimeError, match="in between"), ema.shown():
        assert [parameter[0].item() for parameter in weights.values()] == [1.0, 2.0]
        assert ema.shadow["0"][0].item() == 5.0  # the weights lie there; there is no third copy
        raise RuntimeError("in between")
    assert [parameter[0].item() for parameter in weights.values()] == [5.0, 2.0]
    assert ema.shadow["0"][0].item() == 1.0


def test_without_decay_the_weights_themselves_are_shown() -> None:
    weights = parameters(1.0)
    ema = Ema(weights, decay=None)
    nn.init.constant_(weights["0"], 3.0)
    ema.update()
    with ema.shown():
        assert weights["0"][0].item() == 3.0
    assert (ema.shadow, ema.updates) == ({}, 0)


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 1e-5), (4, 5e-5), (9, 1e-4), (10, 1e-4), (99_999, 1e-4)]
)
def test_constant_after_ten_steps_of_warm_up(step: int, rate: float) -> None:
    assert learning_rate(OptimizerConfig(), step, max_steps=20) == pytest.approx(rate, rel=1e-12)


def test_no_warm_up_begins_at_the_full_rate() -> None:
    assert learning_rate(OptimizerConfig(lr=0.3, warmup_steps=0), 0, max_steps=5) == 0.3


@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        ("linear", 10, 1.0),
        ("linear", 60, 0.5),
        ("linear", 109, 0.01),
        ("linear", 110, 0.0),
        ("cosine", 10, 1.0),
        ("cosine", 35, (1 + math.sqrt(0.5)) / 2),
        ("cosine", 60, 0.5),
        ("cosine", 110, 0.0),
    ],
)
def test_schedules_fall_to_zero_at_the_last_step(schedule: str, step: int, share: float) -> None:
    config = OptimizerConfig(lr=2e-3, warmup_steps=10, schedule=schedule)
    assert learning_rate(config, step, max_steps=110) == pytest.approx(2e-3 * share, abs=1e-15)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_are_those_of_transformers_after_the_warm_up(schedule: str) -> None:
    from transformers.optimization import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=5, num_training_steps=40)
    config = OptimizerConfig(lr=1e-3, warmup_steps=5, schedule=schedule)
    for step in range(40):
        if step >= 5:
            assert learning_rate(config, step, 40) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_adamw_is_the_published_algorithm() -> None:
    """Loshchilov and Hutter (arXiv 1711.05101), algorithm 2, in float64."""
    config = OptimizerConfig(lr=0.1, betas=[0.8, 0.95], eps=1e-3, weight_decay=0.2)
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = build_optimizer([weight], config)
    theta, m, v = weight.detach().double(), torch.zeros(3).double(), torch.zeros(3).double()
    for t in range(1, 6):
        gradient = torch.tensor([0.3, -1.0, 0.01]) * t
        weight.grad = gradient.clone()
        optimizer.step()
        m = 0.8 * m + 0.2 * gradient.double()
        v = 0.95 * v + 0.05 * gradient.double() ** 2
        moved = (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-3)
        theta = theta - 0.1 * (moved + 0.2 * theta)
        torch.testing.assert_close(weight.detach().double(), theta, rtol=1e-5, atol=1e-6)
