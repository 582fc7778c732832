"""Adjoint Matching: the drift that tilts the base model's law by a reward (arXiv 2409.08861).

    target law   p(x) ~ base(x) exp(reward_scale * reward(x))
    adjoint      a_T = -reward_scale * d reward / d x_T,   a_i = a_(i+1) d step_ref(x_i) / d x_i
    loss         mean over steps, batch of |(step_policy - step_ref) / std_i + std_i a_(i+1)|^2

Rollouts are stochastic (eta = 1, the memoryless schedule) and guided. step is the mean of the next
state; it has no guidance in adjoint and loss. The adjoint costs one product a step of a vector with
the frozen reference's Jacobian, and no gradient of weights.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import AdjointMatchingConfig, SamplerConfig
from sfumato.diffusion.randomness import Rng
from sfumato.diffusion.sampling import Visit, sample
from sfumato.models.generate import encode_guided, guided_denoiser, image_size, rollout_times
from sfumato.models.model import Conditioning, TextToImageModel
from sfumato.objectives.objective import Loss, Piece
from sfumato.objectives.scoring import RewardedObjective, score_metrics
from sfumato.rewards.reward import Reward

EARLY = 0.6  # share of the first steps, of which half are drawn


@final
class AdjointMatching(RewardedObjective[Sequence[str]]):
    """Match the policy's drift to the reward's adjoint; a batch is a list of prompts."""

    def __init__(
        self, config: AdjointMatchingConfig, sampler: SamplerConfig, reward: Reward
    ) -> None:
        super().__init__(sampler, reward, config.clip_quantile)
        self.config = config

    def pieces(self, model: TextToImageModel, batch: Sequence[str], rng: Rng) -> Sequence[Piece]:
        height, width = image_size(model, self.sampler)
        times = rollout_times(model, self.sampler, height, width)
        with torch.no_grad(), model.rolling_out():
            guided = encode_guided(model, batch, self.sampler)
            policy = guided_denoiser(model, guided, self.sampler)
            start = rng.normal(*model.latent_shape(height, width), device=model.device)
            run = sample(policy, model.process, start, times, eta=1.0, rng=rng, keep=model.device)
        clamp = self.config.clamp_images
        scored = self.reward_gradient(model, run.x, batch, clamp=clamp)
        chosen = self._choose(model, times, rng.shared)
        prompts = guided.cond
        if model.trains_text:
            prompts = model.encode_prompts(batch, role="reference")
        adjoint = -self.config.reward_scale * scored.gradient
        targets = self._targets(model, prompts, run.visits, times, adjoint, chosen)
        metrics = score_metrics([scored.score])
        calls: list[Piece] = []
        for i in chosen:
            zero = torch.zeros((), device=model.device)
            first = None if calls else Loss(zero, metrics, rows=self.balance.rows(scored.score))
            step = (run.visits[i], times[i + 1], *targets[i])
            shared = None if model.trains_text else prompts
            calls.append(partial(self._match, model, batch, shared, *step, len(chosen), first))
        return calls

    def _choose(
        self, model: TextToImageModel, times: Sequence[float], generator: torch.Generator
    ) -> list[int]:
        """Draw steps that add noise: half of the first 60 %, half of the rest."""
        steps = [i for i, ends in enumerate(pairwise(times)) if model.process.std(*ends, 1.0) > 0]
        count = min(self.config.trained_steps, len(steps))
        border = round(EARLY * len(steps))
        early, late = steps[:border], steps[border:]
        from_late = min(count // 2, len(late))
        drawn: list[int] = []
        for part, wanted in ((early, min(count - from_late, len(early))), (late, from_late)):
            order = torch.randperm(len(part), generator=generator).tolist()
            drawn += [part[k] for k in order[:wanted]]
        return sorted(drawn)

    def _targets(
        self,
        model: TextToImageModel,
        prompts: Conditioning,
        visits: Sequence[Visit],
        times: Sequence[float],
        adjoint: Float[Tensor, "b *d"],
        chosen: Sequence[int],
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Carry the adjoint back to the first chosen step; return step_ref and a_(i+1) of each."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for i in range(len(visits) - 1, chosen[0] - 1, -1):
            t, s, after = times[i], times[i + 1], adjoint
            with model.playing("reference"), torch.enable_grad():
                x_t = visits[i].x_t.detach().requires_grad_()
                reference = model.denoiser(prompts, role="reference")
                mean, _ = model.process.transition(reference(x_t, t), t, s, eta=1.0)
                (adjoint,) = torch.autograd.grad(mean, x_t, after)
            if i in chosen:
                found[i] = (mean.detach(), after)
        return found

    def _match(
        self,
        model: TextToImageModel,
        batch: Sequence[str],
        prompts: Conditioning | None,
        visit: Visit,
        s: float,
        reference: Float[Tensor, "b *d"],
        adjoint: Float[Tensor, "b *d"],
        count: int,
        first: Loss | None,
    ) -> Loss:
        policy = model.denoiser(model.encode_prompts(batch) if prompts is None else prompts)
        said = policy(visit.x_t, visit.t)
        mean, std = model.process.transition(said, visit.t, s, eta=1.0)
        terms = ((mean - reference) / std + std * adjoint).square().flatten(1).sum(1)
        roots, rows = terms.detach().sqrt(), {}
        if self.config.clip_quantile is not None:
            rows[f"drift/{visit.t:.6f}"] = roots
            if self._limit is not None:
                terms = terms * (roots <= self._limit)
        value = terms.mean() / count
        loss = Loss(value, {"loss": value.detach()}, rows=rows)
        return loss if first is None else loss + first
