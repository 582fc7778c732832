"""Balance of a reward's parts: by their running deviations, and by their gradients at x0.

    standardised   gradient = sum_k w_k f_k g_k,           f_k = 1 / deviation_k, else f_k = 1
    equalised      gradient = m sum_k w_k g_k / |g_k|,     m = sum_k |w_k| f_k |g_k| / sum_k |w_k|

g_k is the gradient of part k of one image at its latents. Where all |f_k g_k| are equal, or there
is one part, equalising changes nothing. The reported reward is the plain sum in any case.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.models.model import Latents
from sfumato.objectives.advantages import ROUNDING
from sfumato.rewards.reward import Reward, Score

WINDOW = 100  # steps that a deviation is a mean of
PART = "reward/"  # begins the names of rows


@final
class Balance:
    """Gives a reward the gradient that its `standardise` and `gradients` ask for."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self._steps = 0
        self._known: dict[str, tuple[float, float]] = {}  # running mean and variance

    @property
    def is_blind(self) -> bool:
        """Whether no deviation is known yet, so that nothing is learned."""
        return self._reward.standardise and not self._steps

    def __call__(self, score: Score, x0: Latents) -> Score:
        """Return the same values with the balanced gradient at x0, and measures of the parts."""
        how, terms = self._reward.gradients, score.terms
        if not terms:
            return score
        weights = [self._reward.weights[name] for name in terms]
        factors = [self._factor(name) for name in terms]
        gradients = None if how == "summed" else _gradients(list(terms.values()), x0)
        measures = {} if gradients is None else _measures(list(terms), gradients)
        if gradients is not None and how == "equalised":
            direction = _equalised(gradients, weights, factors).to(x0)
            learned = (direction * (x0 - x0.detach())).flatten(1).sum(1)
        elif self._reward.standardise:
            pairs = zip(weights, factors, terms.values(), strict=True)
            used = [w * f * term for w, f, term in pairs if w]  # NaN x 0 is NaN
            learned = torch.stack(used or [torch.zeros_like(score.value)]).sum(0)
        else:
            return replace(score, terms={}, measures=measures)
        value = score.value.detach() + (learned - learned.detach())
        return replace(score, value=value, terms={}, measures=measures)

    def rows(self, score: Score) -> dict[str, Tensor]:
        """Return what `observe` needs of each image."""
        parts = score.parts if self._reward.standardise else {}
        return {f"{PART}{name}": values for name, values in parts.items()}

    def observe(self, rows: Mapping[str, Sequence[float]]) -> None:
        """Learn means and deviations from the parts of all images of a step."""
        if not rows:
            return
        self._steps += 1
        share = 1 / min(self._steps, WINDOW)
        for row, values in rows.items():
            own = torch.tensor(values, dtype=torch.float64)
            found = (own.mean().item(), own.var().item() if len(values) > 1 else 0.0)
            name = row.removeprefix(PART)
            mean, variance = self._known.get(name, found)
            self._known[name] = (
                (1 - share) * mean + share * found[0],
                (1 - share) * variance + share * found[1],
            )

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps, "parts": self._known} if self._steps else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._steps = state.get("steps", 0)
        self._known = {name: (mean, var) for name, (mean, var) in state.get("parts", {}).items()}

    def _factor(self, name: str) -> float:
        """Return 1 / deviation of a part; 0 where it is not known, or the part is constant."""
        if not self._reward.standardise:
            return 1.0
        mean, variance = self._known.get(name, (0.0, 0.0))
        deviation, least = math.sqrt(variance), torch.finfo(torch.float32).tiny ** 0.5
        return 1 / deviation if deviation > max(ROUNDING * abs(mean), least) else 0.0


def _gradients(terms: Sequence[Tensor], x0: Latents) -> Float[Tensor, "k b *d"]:
    """Differentiate each part by the latents; a part without a graph has gradient 0."""
    return torch.stack(
        [
            torch.autograd.grad(term.sum(), x0, retain_graph=True, materialize_grads=True)[0]
            if term.requires_grad
            else torch.zeros_like(x0)
            for term in terms
        ]
    ).detach()


def _norms(gradients: Float[Tensor, "k b *d"]) -> Float[Tensor, "k b"]:
    dtype = torch.promote_types(gradients.dtype, torch.float32)
    return torch.linalg.vector_norm(gradients.flatten(2), dim=2, dtype=dtype)


def _units(gradients: Float[Tensor, "k b *d"]) -> Float[Tensor, "k b *d"]:
    """Return gradients of norm 1, or 0 where there is none."""
    norms = _norms(gradients)
    least = torch.finfo(norms.dtype).tiny
    return gradients / norms.clamp(min=least).reshape(*norms.shape, *(1,) * (gradients.ndim - 2))


def _equalised(
    gradients: Float[Tensor, "k b *d"], weights: Sequence[float], factors: Sequence[float]
) -> Float[Tensor, "b *d"]:
    """Return the gradient to which each part adds its weight, times the parts' mean norm."""
    ones = (1,) * (gradients.ndim - 1)
    used = torch.tensor(weights, device=gradients.device) != 0  # NaN x 0 is NaN
    scaled = (gradients * gradients.new_tensor(factors).reshape(-1, *ones))[used]
    units, norms = _units(scaled), _norms(scaled)
    weight = units.new_tensor(weights)[used]
    total = sum(map(abs, weights)) or 1.0
    length = (weight.abs()[:, None] * norms).sum(0) / total
    return length.reshape(-1, *ones[1:]) * (weight.reshape(-1, *ones) * units).sum(0)


def _measures(names: Sequence[str], gradients: Float[Tensor, "k b *d"]) -> dict[str, Tensor]:
    """Return the mean norm of each part's gradient, and the mean cosine of each two."""
    norms, units = _norms(gradients).mean(1), _units(gradients).flatten(2)
    found = {f"reward_gradient/{name}": norms[i] for i, name in enumerate(names)}
    for (i, one), (j, other) in combinations(enumerate(names), 2):
        found[f"reward_cosine/{one}/{other}"] = (units[i] * units[j]).sum(1).mean()
    return found
