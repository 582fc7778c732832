"""Divergence of the policy from its frozen reference, at states that the policy visited.

kl = mean over visits, batch, channels, pixels of (n_policy - n_reference)^2
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.diffusion.process import Prediction
from sfumato.diffusion.sampling import Denoiser, Reading
from sfumato.models.model import Role, TextToImageModel
from sfumato.precision import in_float32, is_rounded

KlForm: TypeAlias = Literal["noise", "output"]  # n: the noise, or the network's own output


def kl(
    model: TextToImageModel,
    visits: Sequence[Reading],
    denoiser: Callable[[Role], Denoiser],
    form: KlForm = "noise",
) -> Float[Tensor, ""]:
    """Return the mean square of the difference of what policy and reference predict.

    In half precision two near predictions differ by their rounding more than by the training. So
    the difference is taken once more in float32. The gradient is 2 difference dn, with the n that
    the policy predicted in its own precision.

    Args:
        visits: with the policy's predictions, which carry the gradient.
        denoiser: gives the denoiser of a role, for the prompts of the visits.
    """

    def read(prediction: Prediction) -> Tensor:
        return prediction.noise if form == "noise" else prediction.raw

    if not is_rounded(model.networks()["policy"]):
        reference = denoiser("reference")
        distances = [
            (read(visit.prediction) - read(reference(visit.x_t, visit.t))).square().mean()
            for visit in visits
        ]
        return torch.stack(distances).mean()
    with torch.no_grad(), in_float32(model.device):
        policy, reference = denoiser("policy"), denoiser("reference")
        differences = [read(policy(v.x_t, v.t)) - read(reference(v.x_t, v.t)) for v in visits]
    predicted = [read(visit.prediction) for visit in visits]
    distances = [
        (difference.square() + 2 * difference * (n - n.detach())).mean()
        for difference, n in zip(differences, predicted, strict=True)
    ]
    return torch.stack(distances).mean()
