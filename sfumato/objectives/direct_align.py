"""Direct-Align: the reward at an image recovered from one network call and known noise.

    x_a  = alpha_a x0 + sigma_a noise
    x_b' = step(n(x_a), a -> b)
    x0'  = (x_b' - sigma_b noise) / alpha_b                    arXiv 2509.06942

A perfect network recovers x0 exactly at every a, b. The step towards data (a > b) maximises the
reward of x0', and the step towards noise (b -> a) minimises it. With words before the prompt the
reward is relative: the positive ones' minus the negative ones' (SRPO).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast, final

import torch
from torch import Tensor

from sfumato.config import DirectAlignConfig, SamplerConfig
from sfumato.data.sample import Sample
from sfumato.diffusion.guidance import CfgGradient
from sfumato.diffusion.randomness import Rng
from sfumato.diffusion.sampling import Denoiser, sample
from sfumato.diffusion.solvers import Solver
from sfumato.models.generate import encode_guided, guided_denoiser, image_size, rollout_times
from sfumato.models.model import Latents, TextToImageModel
from sfumato.objectives.noised import latents_of
from sfumato.objectives.objective import Loss, Piece
from sfumato.objectives.scoring import RewardedObjective, decoded, score_metrics
from sfumato.rewards.reward import Reward, Score


@final
class DirectAlign(RewardedObjective[Sequence[Any]]):
    """Maximise a reward one call deep; a batch is a list of prompts, or of samples."""

    needs_reference = False

    def __init__(self, config: DirectAlignConfig, sampler: SamplerConfig, reward: Reward) -> None:
        super().__init__(sampler, reward)
        self.config = config

    def pieces(self, model: TextToImageModel, batch: Sequence[Any], rng: Rng) -> Sequence[Piece]:
        prompts = [row.caption if isinstance(row, Sample) else row for row in batch]
        height, width = image_size(model, self.sampler)
        times = rollout_times(model, self.sampler, height, width)
        noise = rng.normal(*model.latent_shape(height, width), device=model.device)
        with torch.no_grad(), model.rolling_out():
            if self.config.source == "images":
                x0 = latents_of(model, batch, None)
            else:  # the rollout's own starting noise is added again
                policy = self._denoiser(model, prompts)
                solver, eta = cast(Solver, self.sampler.solver), self.sampler.eta
                run = sample(policy, model.process, noise, times, solver=solver, eta=eta, rng=rng)
                x0 = run.x
        a, b = self._ends(times, rng)
        towards_data = partial(self._branch, model, prompts, x0, noise, a, b, 1.0, "reward")
        weight = self.config.inverse
        towards_noise = partial(
            self._branch, model, prompts, x0, noise, b, a, -weight, "reward_inverse"
        )
        return [towards_data, towards_noise] if weight else [towards_data]

    def _ends(self, times: Sequence[float], rng: Rng) -> tuple[float, float]:
        """Draw two times of the sampling grid, `stride` steps apart, the first between the bounds.

        Raises:
            ValueError: if the grid has no such time.
        """
        low, high = self.config.noise_levels
        last = len(times) - 1 - self.config.stride
        fitting = [i for i, t in enumerate(times) if low <= t <= high and i <= last]
        if not fitting:
            raise ValueError(
                f"objective.noise_levels={self.config.noise_levels} holds no time of the sampling "
                f"grid that has {self.config.stride} (objective.stride) more steps after it; widen "
                "it, or raise sampler.num_inference_steps"
            )
        i = fitting[rng.shared_integer(0, len(fitting) - 1)]
        return times[i], times[i + self.config.stride]

    def _denoiser(self, model: TextToImageModel, prompts: Sequence[str]) -> Denoiser:
        sampler = self.sampler
        guided = encode_guided(model, prompts, sampler)
        gradient = cast(CfgGradient, self.config.cfg_gradient)
        return guided_denoiser(model, guided, sampler, cfg_gradient=gradient)

    def _branch(
        self,
        model: TextToImageModel,
        prompts: Sequence[str],
        x0: Latents,
        noise: Latents,
        start: float,
        end: float,
        sign: float,
        name: str,
    ) -> Loss:
        found = recovered(model, self._denoiser(model, prompts), x0, noise, start, end)
        images = decoded(model, found, clamp=self.config.clamp_images)
        score = self.balance(self._score(images, prompts), found)
        rewards = score.value
        learned = rewards if self.config.hinge is None else rewards.clamp(max=self.config.hinge)
        value = -sign * learned.mean()
        metrics = score_metrics([score]) if sign > 0 else {name: rewards.mean()}
        metrics["loss"] = value
        metrics = {key: metric.detach() for key, metric in metrics.items()}
        return Loss(value, metrics, rows=self.balance.rows(score) if sign > 0 else {})

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """Score images; relative to the negative words, if there are any."""
        positive, negative = self.config.positive, self.config.negative
        liked = [f"{positive} {prompt}" if positive else prompt for prompt in prompts]
        drawn = torch.get_rng_state()
        score = self.reward.score(images, liked)
        if not negative:
            return score
        torch.set_rng_state(drawn)  # the same random crop
        disliked = self.reward.score(images, [f"{negative} {prompt}" for prompt in prompts])
        parts, terms = (
            {name: ours[name] - theirs[name] for name in ours}
            for ours, theirs in ((score.parts, disliked.parts), (score.terms, disliked.terms))
        )
        return Score(score.value - disliked.value, parts, terms)


def recovered(
    model: TextToImageModel, denoiser: Denoiser, x0: Latents, noise: Latents, a: float, b: float
) -> Latents:
    """Noise x0 to time a, step to b, and solve for x0 with the same noise.

    Raises:
        ValueError: if nothing of x0 is left at b.
    """
    process = model.process
    alpha, sigma = float(process.alpha(b)), float(process.sigma(b))
    if not alpha:
        raise ValueError(f"nothing of the image is left at t = {b:g}; lower objective.noise_levels")
    x_a = process.add_noise(x0, noise, a)
    return (process.step(denoiser(x_a, a), a, b) - sigma * noise) / alpha
