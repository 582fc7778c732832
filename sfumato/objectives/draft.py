"""DRaFT and DRaFT+: gradients of a reward through the last K sampling steps.

    loss = -mean(reward(x0, prompt)) + kl_coeff * kl
    kl   = mean over the K steps, batch, channels, pixels of (noise_policy - noise_reference)^2

DRaFT (arXiv 2309.17400) is kl_coeff = 0. Both noises are guided, and predicted at the same x_t.
"""

from collections.abc import Sequence
from typing import cast, final

import torch
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
from sfumato.objectives.objective import Loss, Objective
from sfumato.precision import in_float32, is_rounded
from sfumato.rewards.reward import Reward


@final
class Draft(Objective[Sequence[str]]):
    """Maximise a differentiable reward; a batch is a list of prompts.

    Args:
        reward: frozen; its gradient with respect to the images is what is learned from.

    Raises:
        ValueError: if the reward is not differentiable.
    """

    def __init__(self, config: DraftConfig, sampler: SamplerConfig, reward: Reward) -> None:
        if not reward.differentiable:
            raise ValueError(
                f"the reward {type(reward).__name__} is not differentiable, and DRaFT learns from "
                "its gradient; choose a differentiable one (reward=clip, reward=color)"
            )
        self.config = config
        self.needs_reference = config.kl_coeff > 0
        self.sampler = sampler
        self.reward = reward

    def loss(self, model: TextToImageModel, batch: Sequence[str], rng: Rng) -> Loss:
        height, width = image_size(model, self.sampler)
        times = rollout_times(model, self.sampler, height, width)
        keep = self.sampler.prompt_cache
        prompts = encode_guided(model, batch, self.sampler.guidance_scale, keep=keep)
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
        )
        finals, visits = [trajectory.x0], list(trajectory.window)
        for _ in range(self.config.lv_samples):
            visits.append(self._variant(model, policy, trajectory.x0, times[-2], rng))
            finals.append(visits[-1].prediction.x0)

        scores = [self.reward.score(self._images(model, x0), batch) for x0 in finals]
        reward = torch.stack([score.value for score in scores]).mean()
        metrics = {"reward": reward} | {
            f"reward/{name}": torch.stack([score.parts[name] for score in scores]).mean()
            for name in scores[0].parts
        }
        loss = -reward
        if self.config.kl_coeff:
            metrics["kl"] = kl = self._kl(model, batch, prompts, visits)
            loss = loss + self.config.kl_coeff * kl
        metrics["loss"] = loss
        return Loss(loss, {name: value.detach() for name, value in metrics.items()})

    def _denoiser(self, model: TextToImageModel, prompts: Guided, role: Role) -> Denoiser:
        gradient = cast(CfgGradient, self.config.cfg_gradient)
        return guided_denoiser(model, prompts, self.sampler, role, gradient)

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

    def _images(
        self, model: TextToImageModel, x0: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b 3 H W"]:
        images = model.decode(x0)
        return images.clamp(0, 1) if self.config.clamp_images else images

    def _kl(
        self,
        model: TextToImageModel,
        batch: Sequence[str],
        prompts: Guided,
        visits: Sequence[Visit],
    ) -> Float[Tensor, ""]:
        """Return the mean square of the difference of policy's and reference's noise.

        In half precision two near noises differ by their rounding more than by the training. So
        the difference is taken once more in float32. The gradient is 2 difference d(noise), with
        the noise that the policy predicted in its own precision.
        """

        def denoiser(role: Role) -> Denoiser:
            scale = self.sampler.guidance_scale
            own = encode_guided(model, batch, scale, role) if model.trains_text else prompts
            return self._denoiser(model, own, role)

        if not is_rounded(model.networks()["policy"]):
            reference = denoiser("reference")
            distances = [
                (visit.prediction.noise - reference(visit.x_t, visit.t).noise).square().mean()
                for visit in visits
            ]
            return torch.stack(distances).mean()
        with torch.no_grad(), in_float32(model.device):
            policy, reference = denoiser("policy"), denoiser("reference")
            differences = [policy(v.x_t, v.t).noise - reference(v.x_t, v.t).noise for v in visits]
        noises = [visit.prediction.noise for visit in visits]
        distances = [
            (difference.square() + 2 * difference * (noise - noise.detach())).mean()
            for difference, noise in zip(differences, noises, strict=True)
        ]
        return torch.stack(distances).mean()
