"""Weights by which a deterministic first-order rollout adds up its network's outputs.

    x_end = scale x_start + sum_i h_i n_i

Each step is linear in its state and in the output n_i, so the whole run is. For noise outputs
h_i = alpha(end) (rho(s) - rho(t)) with rho = sigma / alpha; for flow h_i = s - t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.diffusion.process import DiffusionProcess, Prediction, PredictionType, Time

# The form of an output whose weights are finite, and not all in the last step.
FORMS: dict[PredictionType, PredictionType] = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "v_prediction",
    "flow": "flow",
}


@dataclass(frozen=True)
class Linear:
    """A run as a sum: the weight of its starting state, and of each step's output."""

    scale: float
    weights: tuple[float, ...]


def linear(
    process: DiffusionProcess, form: PredictionType, times: Sequence[float], *, to_x0: bool
) -> Linear:
    """Return the weights of a run from times[0] to times[-1], eta = 0, first order.

    Args:
        form: of the outputs, see `output`.
        to_x0: whether the end is the last step's prediction of the data, not its next state.

    Raises:
        ValueError: if a weight is not finite: noise outputs at pure noise.
    """
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    scale, weights = 1.0, []
    for i, (t, s) in enumerate(pairwise(times)):
        ends = []
        for x_t, n in ((one, zero), (zero, one)):
            said = process.read(form, n, x_t, t)
            last = to_x0 and i == len(times) - 2
            ends.append(float(said.x0 if last else process.step(said, t, s)))
        kept, h = ends
        weights = [kept * weight for weight in weights] + [h]
        scale *= kept
    if not all(map(math.isfinite, (scale, *weights))):
        raise ValueError(
            f"a run from t = {times[0]:g}, pure noise, is no sum of {form} outputs: the step there "
            "has no finite weight. Weight the steps by sigma, alpha or a constant instead"
        )
    return Linear(scale, tuple(weights))


def output(
    process: DiffusionProcess,
    prediction_type: PredictionType,
    form: PredictionType,
    prediction: Prediction,
    t: Time,
) -> Float[Tensor, "b *d"]:
    """Return a prediction in a form; it is the network's own output where the form is its type."""
    if form == prediction_type:
        return prediction.raw
    return process.target(form, prediction.x0, prediction.noise, t)
