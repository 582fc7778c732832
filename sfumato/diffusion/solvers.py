"""Solvers of the reverse process, over readings (x0, noise) of the states x_t.

first_order   x_s = alpha(s) x0 + sigma(s) noise                     DDIM, Euler
dpmpp_2m      x_s + w (x0 - x0 of the step before)                   arXiv 2211.01095, algorithm 2
              w = alpha(s) / 2 (1 - exp(-h)) h / h_before,  h = lambda(s) - lambda(t)

lambda = log(alpha / sigma). DPM-Solver++ 2M extrapolates x0 along lambda from the step before: the
error of T steps falls as 1 / T^2 instead of 1 / T.
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

from sfumato.diffusion.process import DiffusionProcess

Solver: TypeAlias = Literal["first_order", "dpmpp_2m"]
FEW_STEPS = 15  # below it the last step is of first order: diffusers' `lower_order_final`


def extrapolation(process: DiffusionProcess, times: Sequence[float], step: int) -> float:
    """Return w of a step of DPM-Solver++ 2M, from times[step] to times[step + 1].

    It is 0, and the step of first order, where nothing came before; at the end of few steps; and
    from or to an infinite lambda: after pure noise (the limit of w) and at clean data (as
    diffusers has it).
    """
    last = len(times) - 2
    if step == 0 or (step == last and last + 1 < FEW_STEPS):
        return 0.0
    before, now, after = (_log_snr(process, t) for t in times[step - 1 : step + 2])
    h_before, h = now - before, after - now
    if not 0 < h_before < math.inf or h == math.inf:
        return 0.0
    return float(process.alpha(times[step + 1])) / 2 * -math.expm1(-h) * h / h_before


def _log_snr(process: DiffusionProcess, t: float) -> float:
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    if alpha == 0:
        return -math.inf
    return math.inf if sigma == 0 else math.log(alpha / sigma)
