"""Policy gradients of noisy sampling steps, with clipped ratios: DDPO and Flow-GRPO.

    ratio_i = exp(log p(x_(i+1) | x_i) - log p_old(x_(i+1) | x_i))      means over the elements
    loss    = mean over steps i, rows of max(-A ratio_i, -A clip(ratio_i, 1 - c, 1 + c))
              + kl_coeff * kl

p_old is the policy that sampled, and p a normal density: of DDIM's step with eta (arXiv 2305.13301)
or of the same step of a flow. Flow-GRPO's noise a (arXiv 2505.05470) is eta = a / sqrt(2), in a
form that keeps the marginals of finite steps. With a window only some steps are noisy, and the
others deterministic (MixGRPO, arXiv 2507.21802). A step of little noise has a large gradient, which
tells little; weights in proportion to the deviation even it out, and a start that a group shares
leaves only the noise of the steps to tell its images apart (TempFlow-GRPO, arXiv 2508.04324).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from sfumato.config import PolicyGradientConfig, SamplerConfig
from sfumato.diffusion.process import mean_log_density
from sfumato.diffusion.randomness import Rng
from sfumato.diffusion.sampling import Reading, sample
from sfumato.models.model import Latents, TextToImageModel
from sfumato.objectives.collected import CollectedObjective, Rows, column
from sfumato.objectives.objective import Loss, Piece
from sfumato.rewards.reward import Reward


@final
class PolicyGradient(CollectedObjective):
    """Make the noise of good images likelier; a batch is a list of rollouts."""

    config: PolicyGradientConfig
    guided = True

    def __init__(
        self, config: PolicyGradientConfig, sampler: SamplerConfig, reward: Reward
    ) -> None:
        super().__init__(config, sampler, reward)
        self._window = range(0)

    def begin(self, model: TextToImageModel, rng: Rng) -> None:
        """Draw where the window of noisy steps lies."""
        steps = self._noisy(model)
        size = min(self.config.window or len(steps), len(steps))
        first = rng.shared_integer(0, len(steps) - size)
        self._window = range(steps[first], steps[first] + size)

    def _noisy(self, model: TextToImageModel) -> list[int]:
        """Return the steps that can be noisy; a step to clean data cannot."""
        steps = enumerate(pairwise(self.times(model)))
        return [i for i, (t, s) in steps if model.process.std(t, s, self.config.eta) > 0]

    def roll_out(
        self, model: TextToImageModel, prompts: Sequence[str], rng: Rng
    ) -> tuple[Latents, Mapping[str, Tensor]]:
        times = self.times(model)
        window = self._window or range(len(self._noisy(model)))
        etas = [self.config.eta * (i in window) for i in range(len(times) - 1)]
        with model.rolling_out():
            policy = self.denoiser(model, prompts, guided=True)
            start = self.start(model, (self.config.shared_start and rng.groups) or rng)
            run = sample(policy, model.process, start, times, eta=etas, rng=rng, keep="cpu")
        states = [*(visit.x_t for visit in run.visits), run.x.to("cpu")]
        densities = []
        for i in window:
            step = (times[i], times[i + 1])
            mean, std = model.process.transition(
                run.visits[i].prediction, *step, eta=self.config.eta
            )
            densities.append(mean_log_density(states[i + 1], mean, std))
        ends = slice(window.start, window.stop + 1)
        return run.x, {
            "states": torch.stack(states[ends], 1),
            "log_densities": torch.stack(densities, 1),
            "times": torch.tensor(times[ends], dtype=torch.float64).expand(len(prompts), -1),
        }

    def row_shapes(self, model: TextToImageModel) -> dict[str, Sequence[int]]:
        noisy, shape = len(self._noisy(model)), self._latent_shape(model)
        n = min(self.config.window or noisy, noisy)
        own = {"log_densities": (n,), "times": (n + 1,), "states": (n + 1, *shape)}
        return {**super().row_shapes(model), **own}

    def pieces(self, model: TextToImageModel, batch: Rows, rng: Rng) -> Sequence[Piece]:
        noisy = batch[0].tensors["log_densities"].numel()
        count = min(self.config.trained_steps or noisy, noisy)
        chosen = torch.randperm(noisy, generator=rng.shared).tolist()[:count]
        return [partial(self._step, model, batch, i, 1 / count) for i in sorted(chosen)]

    def _step(self, model: TextToImageModel, batch: Rows, i: int, share: float) -> Loss:
        times = batch[0].tensors["times"].tolist()
        t, s = times[i : i + 2]
        x_t, x_s = (column(batch, "states", model.device, k) for k in (i, i + 1))
        said = self.denoiser(model, [row.prompt for row in batch], guided=True)(x_t, t)
        mean, std = model.process.transition(said, t, s, eta=self.config.eta)
        before = column(batch, "log_densities", model.device, i)
        change = mean_log_density(x_s, mean, std) - before
        losses, clipped = clipped_loss(
            change, column(batch, "advantage", model.device), self.config.clip_range
        )
        if self.config.step_weights == "std":
            eta = self.config.eta
            stds = [float(model.process.std(*span, eta)) for span in pairwise(times)]
            losses = losses * (stds[i] * len(stds) / sum(stds))
        metrics = {"clipped": clipped, "old_kl": 0.5 * change.square().mean()}
        return self.finished(model, batch, Reading(t, x_t, said), losses, metrics, share)


def clipped_loss(change: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return PPO's loss of each row (arXiv 1707.06347, eq. 7), and the share of clipped rows.

    Args:
        change: of the log-density since the rows were sampled.
    """
    ratio = change.exp()
    free = -advantage * ratio
    bounded = -advantage * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, bounded), (bounded > free).to(ratio).mean()
