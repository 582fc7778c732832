"""Direct reward gradients: the reward's gradient at the end, given to single sampling steps.

    loss     = -mean(reward(x_end, prompt)) + kl_coeff * kl
    gradient = -sum_i w_i (d reward / d x_end) (d n_i / d weights) + kl_coeff * d kl / d weights

A rollout without a graph visits all states. The reward is differentiated once, at its end. Then
each active step i predicts its output n_i again and is differentiated alone, with the weight w_i
of objectives/surrogates.py. So one step's activations are in memory, or those of `stacked_steps`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, final

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import DirectConfig, SamplerConfig
from sfumato.diffusion.guidance import CfgGradient
from sfumato.diffusion.linear import FORMS, output
from sfumato.diffusion.randomness import Rng
from sfumato.diffusion.sampling import Denoiser, Reading, Trajectory, Visit, sample
from sfumato.diffusion.solvers import Solver
from sfumato.models.generate import encode_guided, guided_denoiser, image_size, rollout_times
from sfumato.models.model import Role, TextToImageModel
from sfumato.objectives.kl import KlForm, kl
from sfumato.objectives.objective import Loss, Piece
from sfumato.objectives.scoring import RewardedObjective, Scored, score_metrics
from sfumato.objectives.surrogates import Leg, legs
from sfumato.rewards.reward import Reward


@final
class Direct(RewardedObjective[Sequence[str]]):
    """Maximise a differentiable reward; a batch is a list of prompts."""

    def __init__(self, config: DirectConfig, sampler: SamplerConfig, reward: Reward) -> None:
        super().__init__(sampler, reward, config.clip_quantile)
        self.config = config
        self.needs_reference = config.kl_coeff > 0
        if config.hinge is not None:
            self.why_idle = (
                f"every reward is above objective.hinge={config.hinge:g}; raise it above the "
                "rewards of the base model, or set objective.hinge=null"
            )

    def pieces(self, model: TextToImageModel, batch: Sequence[str], rng: Rng) -> Sequence[Piece]:
        denoiser = partial(self._denoiser, model, batch, shared=self._prompts(model, batch))
        with torch.no_grad(), model.rolling_out():
            times, run = self._roll_out(model, denoiser("policy"), rng)
        end = run.x0 if self.config.reward_at == "x0" else run.x
        scored = self.reward_gradient(model, end, batch, clamp=self.config.clamp_images)
        form = FORMS[model.prediction_type]
        surrogate = legs(self.config, model.process, form, times, rng.shared)
        gradient, first = self._objective(model, scored, surrogate, run, end)
        chain = _Chain(self.config, model, denoiser, run.visits, gradient)
        return chain.pieces(surrogate, first)

    def _prompts(self, model: TextToImageModel, batch: Sequence[str]) -> Any:
        """Encode the prompts once, if no step's gradient goes through the encoders."""
        if model.trains_text:
            return None
        return encode_guided(model, batch, self.sampler)

    def _denoiser(
        self, model: TextToImageModel, batch: Sequence[str], role: Role, shared: Any, times: int = 1
    ) -> Denoiser:
        prompts = encode_guided(model, batch, self.sampler, role) if shared is None else shared
        prompts = prompts.repeat(times) if times > 1 else prompts
        gradient = cast(CfgGradient, self.config.cfg_gradient)
        return guided_denoiser(model, prompts, self.sampler, role, gradient)

    def _roll_out(
        self, model: TextToImageModel, policy: Denoiser, rng: Rng
    ) -> tuple[Sequence[float], Trajectory]:
        """Sample without a graph; an early stop jumps to the end from where it stops."""
        height, width = image_size(model, self.sampler)
        times = list(rollout_times(model, self.sampler, height, width))
        if self.config.early_stop is not None:
            left_out = rng.shared_integer(*self.config.early_stop)
            times = [*times[: len(times) - 1 - left_out], times[-1]]
        start = rng.normal(*model.latent_shape(height, width), device=model.device)
        keep = "cpu" if self.config.visits_on_cpu else model.device
        run = sample(
            policy,
            model.process,
            start,
            times,
            solver=cast(Solver, self.sampler.solver),
            eta=self.sampler.eta,
            rng=rng,
            keep=keep,
        )
        return times, run

    def _objective(
        self,
        model: TextToImageModel,
        scored: Scored,
        surrogate: Sequence[Leg],
        run: Trajectory,
        end: Tensor,
    ) -> tuple[Float[Tensor, "b *d"], Loss]:
        """Return the gradient of the mean loss at the end, and the loss with its metrics."""
        rewards, gradient = scored.score.value, scored.gradient
        norms = gradient.flatten(1).norm(dim=1)
        metrics = score_metrics([scored.score]) | {"reward_gradient": norms.mean()}
        rows, factor = self.balance.rows(scored.score), torch.ones_like(norms)
        if self.config.clip_quantile is not None:
            rows["reward_gradient"] = norms
            if self._limit is not None:
                tiny = torch.finfo(norms.dtype).tiny  # saturated images have no gradient
                factor = (self._limit / norms.clamp(min=tiny)).clamp(max=1)
        losses = -rewards
        if self.config.hinge is not None:
            losses = (self.config.hinge - rewards).relu()
            factor = factor * (losses > 0)
            metrics["below_hinge"] = (losses > 0).to(rewards).mean()
        if self.config.distance_floor is not None:
            factor = factor / self._distance(model, surrogate, run.visits, end)
        shape = (-1, *(1,) * (gradient.ndim - 1))
        gradient = gradient * (-factor / len(rewards)).to(gradient).reshape(shape)
        metrics["loss"] = losses.mean()
        return gradient, Loss(losses.mean(), metrics, rows=rows)

    def _distance(
        self,
        model: TextToImageModel,
        surrogate: Sequence[Leg],
        visits: Sequence[Visit],
        end: Tensor,
    ) -> Float[Tensor, " b"]:
        """Return how far each row's legs end from the rollout, each leg the floor at least."""
        form, total = FORMS[model.prediction_type], torch.zeros(len(end), device=end.device)
        for leg in surrogate:
            found = leg.scale * visits[leg.start].x_t
            for i, weight in leg.weights.items():
                said, t = visits[i].prediction, visits[i].t
                found = found + weight * output(model.process, model.prediction_type, form, said, t)
            true = end if leg.end == len(visits) else visits[leg.end].x_t
            distance = (found.to(end) - true.to(end)).abs().flatten(1).mean(1)
            total = total + distance.clamp(min=self.config.distance_floor)
        return total


@dataclass
class _Link:
    """Where a leg meets the one before it: its starting state, whose gradient is nested."""

    leg: Leg
    x_t: Tensor
    probe: Tensor  # its gradient is the factor that the caller multiplied the loss by


@final
@dataclass
class _Chain:
    """Carrier of the gradient at the end of a rollout to its active steps, last leg first."""

    config: DirectConfig
    model: TextToImageModel
    denoiser: Callable[..., Denoiser]  # of a role, for the batch `times` times
    visits: Sequence[Visit]
    gradient: Float[Tensor, "b *d"]
    link: _Link | None = None

    def pieces(self, surrogate: Sequence[Leg], first: Loss) -> list[Piece]:
        """Return a call for each active step, or several; the first adds the loss of the reward."""
        count = sum(len(leg.active) for leg in surrogate)
        calls, size = list[Piece](), self.config.stacked_steps
        for leg in reversed(surrogate):
            # The state that two legs share comes last, alone: then all of its gradient is known.
            met = leg.start if leg is not surrogate[0] else None
            others = sorted(leg.active.keys() - {met}, reverse=True)
            groups = [others[k : k + size] for k in range(0, len(others), size)]
            for steps in groups if met is None else [*groups, [met]]:
                extra, share = None if calls else first, len(steps) / count
                calls.append(partial(self._step, leg, steps, share, extra, meets=met in steps))
        return calls

    def _step(
        self, leg: Leg, steps: Sequence[int], share: float, first: Loss | None, *, meets: bool
    ) -> Loss:
        model, visits = self.model, [self.visits[i] for i in steps]
        self._pass_link()
        x_t, t = torch.cat([visit.x_t.to(model.device).detach() for visit in visits]), visits[0].t
        if len(steps) > 1:
            each = torch.tensor([visit.t for visit in visits], dtype=x_t.dtype, device=x_t.device)
            t = each.repeat_interleave(len(self.gradient))
        if meets:
            x_t = x_t.requires_grad_(self.config.nested > 0)
        denoiser = partial(self.denoiser, times=len(steps))
        said = denoiser("policy")(x_t, t)
        n = output(model.process, model.prediction_type, FORMS[model.prediction_type], said, t)
        inner = (torch.cat([self.gradient * leg.active[i] for i in steps]) * n).sum()
        value, metrics = inner - inner.detach(), {}
        if self.config.kl_coeff:
            form = cast(KlForm, self.config.kl_form)
            metrics["kl"] = share * kl(model, [Reading(t, x_t, said)], denoiser, form)
            metrics["loss"] = self.config.kl_coeff * metrics["kl"]
            value = value + metrics["loss"]
        if meets:
            self.link = _Link(leg, x_t, torch.zeros_like(value, requires_grad=True))
            value = value + self.link.probe
        loss = Loss(value, {name: metric.detach() for name, metric in metrics.items()})
        return loss if first is None else loss + first

    def _pass_link(self) -> None:
        """Go on to the leg before, once the state where the two meet has its gradient."""
        if self.link is None:
            return
        leg, x_t, probe = self.link.leg, self.link.x_t, self.link.probe
        self.gradient = leg.scale * self.gradient
        if x_t.grad is not None:
            assert probe.grad is not None, "both were differentiated together"
            self.gradient = self.gradient + self.config.nested * x_t.grad / probe.grad
        self.link = None
