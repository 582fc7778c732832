"""Surrogates of a rollout: which of its steps carry a gradient, and with what weight.

    x_end = scale x_start + sum_i w_i n_i                      on each leg of the surrogate

`sum` is one leg over all steps (DRTune, FlowBP-Sparse, arXiv 2606.11075; Reward Score Matching,
arXiv 2604.17415). `leap` jumps from step k to j and on to the end (LeapAlign, arXiv 2604.15311).
`bridge` and `lagrange` (FlowBP) have two legs that meet at step j: by all their steps, or by a
quadrature of a few.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sfumato.config import DirectConfig
from sfumato.diffusion.linear import linear
from sfumato.diffusion.process import DiffusionProcess, PredictionType

LONGEST_END = 10  # steps of lagrange's second leg
LEARNED, LATER_SHARE = 2, 0.25  # supports with a gradient; share of that of the later ones
SEGMENTS = (2.0, 6.0, 2.5)  # Dirichlet's parameters, whole or half: before k, to j, after j


@dataclass(frozen=True)
class Leg:
    """A part of a surrogate, from the state at step `start` to that at step `end`.

    Attributes:
        scale: of the starting state.
        weights: of the outputs, by step, as they add up to the end.
        active: weights of the outputs that are predicted again with a gradient, by step.
    """

    start: int
    end: int
    scale: float
    weights: Mapping[int, float]
    active: Mapping[int, float]


def legs(
    config: DirectConfig,
    process: DiffusionProcess,
    form: PredictionType,
    times: Sequence[float],
    generator: torch.Generator,
) -> list[Leg]:
    """Draw the legs of a surrogate of a run along `times`.

    Raises:
        ValueError: if the solver's weights are not finite.
    """
    steps, to_x0 = len(times) - 1, config.reward_at == "x0"

    def whole(start: int, end: int, active: Sequence[int]) -> Leg:
        run = linear(process, form, times[start : end + 1], to_x0=to_x0 and end == steps)
        weights = dict(zip(range(start, end), run.weights, strict=True))
        return Leg(start, end, run.scale, weights, {i: weights[i] for i in active})

    def leap(start: int, end: int) -> Leg:
        ends = (times[start], times[end])
        run = linear(process, form, ends, to_x0=to_x0 and end == steps)
        weights = {start: run.weights[0]}
        return Leg(start, end, run.scale, weights, weights)

    count = min(config.active_steps, steps)
    match config.path:
        case "leap":
            k, j = choose(config, range(steps), 2, generator)
            return [leap(k, j), leap(j, steps)]
        case "bridge":
            j = int(torch.randint(1, steps, (1,), generator=generator))
            before = min(max(1, round(count * j / steps)), count - 1, j)
            after = min(count - before, steps - j)
            first = choose(config, range(j), before, generator)
            last = choose(config, range(j + 1, steps), after - 1, generator)
            return [whole(0, j, first), whole(j, steps, [j, *last])]
        case "lagrange":
            k, j = _segments(steps, generator)
            ends = [(k, j, False), (j, steps, to_x0)]
            return [_quadrature(config, process, form, times, *each) for each in ends]
        case _:
            active = choose(config, range(steps), count, generator)
            if config.weights == "solver":
                leg = whole(0, steps, active)
            else:
                weights = {
                    i: -_weight(config.weights, form, process, times[i]) for i in range(steps)
                }
                leg = Leg(0, steps, 1.0, weights, {i: weights[i] for i in active})
            return [_scaled(leg, config)]


def choose(config: DirectConfig, steps: range, count: int, generator: torch.Generator) -> list[int]:
    """Draw `count` distinct steps, in order; step i counts from noise."""
    match config.steps:
        case "all":
            return list(steps)
        case "listed":
            return sorted(i for i in config.listed or () if i in steps)
        case "last":
            return list(steps[len(steps) - count :])
        case "spaced":
            offset = float(torch.rand(1, generator=generator, dtype=torch.float64))
            return [steps[int((m + offset) * len(steps) / count)] for m in range(count)]
        case kind:
            # The largest of u^(1 / p) are a draw without replacement (Efraimidis, Spirakis 2006).
            bias = config.late_bias if kind == "late" else 0.0
            u = torch.rand(len(steps), generator=generator, dtype=torch.float64)
            p = torch.tensor([(i + 1) ** bias for i in steps], dtype=torch.float64)
            chosen = (u.log() / p).topk(count).indices.tolist()
            return sorted(steps[i] for i in chosen)


def _weight(kind: str, form: PredictionType, process: DiffusionProcess, t: float) -> float:
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    match kind:
        case "sigma":
            return sigma
        case "alpha":
            return alpha
        case "posterior":
            # A linear reward shifts the posterior mean of standard normal data by the posterior
            # variance sigma^2 / (alpha^2 + sigma^2); the output moves by d n / d x0 of that.
            slope = alpha / sigma if form == "epsilon" else 1 / sigma
            return slope * sigma**2 / (alpha**2 + sigma**2)
        case _:
            return 1.0


def _scaled(leg: Leg, config: DirectConfig) -> Leg:
    """Scale the gradient; `gain` makes up for the weights of the steps without one."""
    kept = sum(map(abs, leg.active.values()))  # 0 for alpha at pure noise alone
    lost = sum(map(abs, leg.weights.values())) / kept - 1 if kept else 0.0
    factor = config.weight_scale * (1 + config.gain * lost)
    active = {i: factor * weight for i, weight in leg.active.items()}
    return Leg(leg.start, leg.end, leg.scale, leg.weights, active)


# Quadrature


def _segments(steps: int, generator: torch.Generator) -> tuple[int, int]:
    """Draw k < j: the steps before k, between, and after j have Dirichlet shares."""
    draws = [_gamma(shape, generator) for shape in SEGMENTS]
    before, between, _ = (draw / sum(draws) * steps for draw in draws)
    j = max(min(round(before + between), steps - 1), steps - LONGEST_END, 1)
    return min(round(before), j - 1), j


def _gamma(shape: float, generator: torch.Generator) -> float:
    """Draw from a gamma law of a whole or half shape: exponentials, and half a squared normal."""
    u = torch.rand(int(shape), generator=generator, dtype=torch.float64)
    z = torch.randn(1, generator=generator, dtype=torch.float64)
    return float(-u.log().sum() + (z.square().sum() / 2 if shape % 1 else 0))


def _quadrature(
    config: DirectConfig,
    process: DiffusionProcess,
    form: PredictionType,
    times: Sequence[float],
    start: int,
    end: int,
    to_x0: bool,
) -> Leg:
    """Return a leg whose outputs are integrated by a polynomial through a few of them."""
    count = min(config.supports, end - start)
    supports = [start + (end - start) * m // count for m in range(count)]
    target = 0.0 if to_x0 else times[end]
    factor, scale = _frame(process, form, times[start], target)
    clock = [_clock(process, form, t) for t in (*(times[i] for i in supports), target)]
    integrals = basis_integrals(clock[:-1], clock[0], clock[-1])
    weights = {i: factor * w for i, w in zip(supports, integrals, strict=True)}
    active = {
        i: weights[i] * (1 if m == 0 else LATER_SHARE) for m, i in enumerate(supports[:LEARNED])
    }
    return Leg(start, end, scale, weights, active)


def _clock(process: DiffusionProcess, form: PredictionType, t: float) -> float:
    """Return the variable u in which a path's derivative is the output: dx / du = n."""
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    match form:
        case "flow":
            return t
        case "epsilon":  # of x / alpha
            return sigma / alpha if alpha else math.inf
        case _:
            return math.atan2(sigma, alpha)


def _frame(
    process: DiffusionProcess, form: PredictionType, t: float, s: float
) -> tuple[float, float]:
    """Return the scales of the integral and of the starting state."""
    if form != "epsilon":
        return 1.0, 1.0
    alpha_t, alpha_s = float(process.alpha(t)), float(process.alpha(s))
    if not alpha_t:
        raise ValueError(
            f"objective.path=lagrange starts from pure noise at t = {t:g}, where noise outputs "
            "have no finite weight; use objective.path=sum and objective.weights=sigma"
        )
    return alpha_s, alpha_s / alpha_t


def basis_integrals(points: Sequence[float], low: float, high: float) -> list[float]:
    """Return the integrals from low to high of the Lagrange basis through the points."""
    integrals = []
    for j, own in enumerate(points):
        polynomial, scale = [1.0], 1.0  # coefficients, lowest power first
        for other in (p for i, p in enumerate(points) if i != j):
            shifted = [0.0, *polynomial]
            polynomial = [a - other * b for a, b in zip(shifted, [*polynomial, 0.0], strict=True)]
            scale *= own - other
        powers = [c / (n + 1) for n, c in enumerate(polynomial)]
        value = sum(c * (high ** (n + 1) - low ** (n + 1)) for n, c in enumerate(powers))
        integrals.append(value / scale)
    return integrals
