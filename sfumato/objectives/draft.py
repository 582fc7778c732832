"""DRaFT and DRaFT+: gradients of a reward through the last K sampling steps.

    loss = -mean(reward(x0, prompt)) + kl_coeff * kl
    kl   = mean over the K steps, batch, channels, pixels of (noise_policy - noise_reference)^2

DRaFT (arXiv 2309.17400) is kl_coeff = 0. Both noises are guided, and predicted at the same x_t.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast, final

from jaxtyping import Float
from torch import Tensor

from sfumato.config import DraftConfig, SamplerConfig
from sfumato.diffusion.guidance import CfgGradient
from sfumato.diffusion.randomness import Rng
from sfumato.diffusion.sampling import Denoiser, Visit, sample
from sfumato.diffusion.solvers import Solver
from sfumato.models.generate import (
    Guided,
    encode_guided,
    guided_denoiser,
    image_size,
    rollout_times,
)
from sfumato.models.model import Role, TextToImageModel
from sfumato.objectives.kl import kl
from sfumato.objectives.objective import Loss
from sfumato.objectives.scoring import RewardedObjective, score_metrics
from sfumato.rewards.reward import Reward


@final
class Draft(RewardedObjective[Sequence[str]]):
    """Maximise a differentiable reward; a batch is a list of prompts."""

    def __init__(self, config: DraftConfig, sampler: SamplerConfig, reward: Reward) -> None:
        super().__init__(sampler, reward)
        self.config = config
        self.needs_reference = config.kl_coeff > 0

    def loss(self, model: TextToImageModel, batch: Sequence[str], rng: Rng) -> Loss:
        height, width = image_size(model, self.sampler)
        times = rollout_times(model, self.sampler, height, width)
        prompts = encode_guided(model, batch, self.sampler)
        policy = self._denoiser(model, prompts, "policy")
        trajectory = sample(
            policy,
            model.process,
            rng.normal(*model.latent_shape(height, width), device=model.device),
            times,
            grad_steps=self._truncation(rng),
            eta=self.sampler.eta,
            rng=rng,
            solver=cast(Solver, self.sampler.solver),
            without_graph=model.rolling_out(),
        )
        finals, visits = [trajectory.x0], list(trajectory.window)
        for _ in range(self.config.lv_samples):
            visits.append(self._variant(model, policy, trajectory.x0, times[-2], rng))
            finals.append(visits[-1].prediction.x0)

        clamp = self.config.clamp_images
        scores = [self.scored(model, x0, batch, clamp=clamp) for x0 in finals]
        metrics = score_metrics(scores)
        loss = -metrics["reward"]
        if self.config.kl_coeff:
            denoiser = partial(self._role, model, batch, prompts)
            metrics["kl"] = distance = kl(model, visits, denoiser)
            loss = loss + self.config.kl_coeff * distance
        metrics["loss"] = loss
        metrics = {name: value.detach() for name, value in metrics.items()}
        return Loss(loss, metrics, rows=self.balance.rows(scores[0]))

    def _denoiser(self, model: TextToImageModel, prompts: Guided, role: Role) -> Denoiser:
        gradient = cast(CfgGradient, self.config.cfg_gradient)
        return guided_denoiser(model, prompts, self.sampler, role, gradient)

    def _role(
        self, model: TextToImageModel, batch: Sequence[str], prompts: Guided, role: Role
    ) -> Denoiser:
        """Return the denoiser of a role; each encodes its own prompts if text is trained."""
        own = encode_guided(model, batch, self.sampler, role) if model.trains_text else prompts
        return self._denoiser(model, own, role)

    def _truncation(self, rng: Rng) -> int:
        """Return K: fixed, or drawn once for the batch (AlignProp, arXiv 2310.03739)."""
        if self.config.truncation_range is None:
            return self.config.truncation_steps
        return rng.shared_integer(*self.config.truncation_range)

    def _variant(
        self,
        model: TextToImageModel,
        policy: Denoiser,
        x0: Float[Tensor, "b c h w"],
        t: float,
        rng: Rng,
    ) -> Visit:
        """Noise the finished x0 afresh to the last time and denoise once more: DRaFT-LV."""
        noise = rng.normal(*x0.shape[1:], device=x0.device)
        x_t = model.process.add_noise(x0.detach(), noise, t)
        return Visit(t, x_t, policy(x_t, t))
