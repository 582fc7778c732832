"""Rewards without a gradient: sample groups of images, score and compare them, then train on them.

An objective says how images are sampled and what of them is kept. All images of a collection are
sampled, without a gradient, before the first step that trains on one of them.
"""

import abc
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import CollectedConfig, SamplerConfig
from sfumato.diffusion.randomness import Rng
from sfumato.diffusion.sampling import Denoiser, Reading, sample
from sfumato.diffusion.solvers import Solver
from sfumato.models.generate import encode_guided, guided_denoiser, image_size, rollout_times
from sfumato.models.model import Latents, Role, TextToImageModel
from sfumato.objectives.advantages import Judge
from sfumato.objectives.kl import KlForm, kl
from sfumato.objectives.objective import Collected, Collecting, Loss, Peers, Rollout
from sfumato.objectives.scoring import RewardedObjective
from sfumato.records import Count, Finite, convert
from sfumato.rewards.reward import Reward, score_rows

Rows = Sequence[Rollout]


@dataclass(frozen=True)
class _Learned:
    queries: Count = 0
    collections: Count = 0
    history: dict[str, dict[str, list[Finite]]] = field(default_factory=dict)


class CollectedObjective(RewardedObjective[Rows]):
    """An objective that learns from the rewards of groups of images; they need no gradient.

    Attributes:
        guided: whether training predicts with guidance, as sampling does.
    """

    needs_gradient = False
    guided: bool = False
    why_idle = (
        "the images of each group have the same reward (no_signal is 1); give other prompts, more "
        "objective.images_per_prompt, or a reward that tells these images apart"
    )

    def __init__(self, config: CollectedConfig, sampler: SamplerConfig, reward: Reward) -> None:
        super().__init__(sampler, reward)
        self.config = config
        self.needs_reference = config.kl_coeff > 0
        group = config.images_per_prompt
        self.collecting = Collecting(config.batches, config.inner_epochs, group)
        self._weights = {n: w for n, w in reward.weights.items() if w} or {"reward": 1.0}
        self._judge = Judge(config)
        self._queries = self._done = 0
        self._faults: list[Exception] = []

    @abc.abstractmethod
    def roll_out(
        self, model: TextToImageModel, prompts: Sequence[str], rng: Rng
    ) -> tuple[Latents, Mapping[str, Tensor]]:
        """Sample images without a gradient.

        Returns:
            Their latents; and what training needs, with one row an image.
        """

    def begin(self, model: TextToImageModel, rng: Rng) -> None:
        """Prepare a collection; `rng.shared` is the same for all of its rows."""

    def collect(
        self, model: TextToImageModel, items: Sequence[Any], rng: Rng, peers: Peers
    ) -> Collected:
        """Sample an image of each prompt, and score and judge all of them.

        Raises:
            ValueError: if no image has a reward.
        """
        self._faults.clear()
        self.begin(model, rng)
        tensors: list[Mapping[str, Tensor]] = []
        scores: list[dict[str, float]] = []
        size = self.config.rollout_batch_size
        training = model.trained.training
        model.trained.eval()
        for start in range(0, len(items), size):
            prompts, own = items[start : start + size], rng.rows(start, start + size)
            made, images = self.rehearse(model, prompts, own)
            tensors += [
                {name: value[i].to("cpu", copy=True) for name, value in made.items()}
                for i in range(len(prompts))
            ]
            scores += score_rows(self.reward, images, prompts, self._faults)
        model.trained.train(training)
        table = peers.all(list(zip(items, scores, strict=True)))
        return self._judged(items, tensors, table, peers)

    @torch.no_grad()
    def rehearse(
        self, model: TextToImageModel, prompts: Sequence[str], rng: Rng
    ) -> tuple[Mapping[str, Tensor], Float[Tensor, "b 3 H W"]]:
        """Return what training needs of new images, and the images."""
        latents, made = self.roll_out(model, prompts, rng)
        return made, model.decode(latents).clamp(0, 1)

    def _judged(
        self,
        items: Sequence[str],
        tensors: Sequence[Mapping[str, Tensor]],
        table: Sequence[tuple[str, Mapping[str, float]]],
        peers: Peers,
    ) -> Collected:
        """Add advantages to the rows of this process; measure all rows."""
        prompts, scores = zip(*table, strict=True)
        names = dict.fromkeys(["reward", *self._weights, *(name for row in scores for name in row)])
        rewards = {name: [row.get(name, math.nan) for row in scores] for name in names}
        used = {name: rewards[name] for name in self._weights}
        if not any(map(math.isfinite, map(sum, zip(*used.values(), strict=True)))):
            raise ValueError(
                f"the reward {self.reward.title or type(self.reward).__name__} gave no number for "
                f"any of {len(prompts)} images "
                f"({[*self._faults, 'all are NaN or infinite'][0]}); correct it"
            )
        judged = self._judge(prompts, used, self._weights)
        self._queries += len(prompts)
        self._done += 1
        kept = judged.kept.tolist()
        metrics = {
            name if name == "reward" else f"reward/{name}": math.fsum(
                value for value, there in zip(values, kept, strict=True) if there
            )
            / sum(kept)
            for name, values in rewards.items()
        }
        metrics |= {"no_signal": judged.idle, "left_out": float(len(kept) - sum(kept))}
        metrics["reward_queries"] = float(self._queries)
        own = peers.own(list(zip(judged.values.tolist(), kept, strict=True)))
        rows = [
            Rollout(prompt, {**made, "advantage": torch.tensor(a), "kept": torch.tensor(float(k))})
            for prompt, made, (a, k) in zip(items, tensors, own, strict=True)
        ]
        return Collected(rows, metrics)

    def blank(self, model: TextToImageModel, items: Sequence[Any], rng: Rng) -> Rows:
        """Return rows without advantages, for a plan; they are made as those of training are."""
        made, images = self.rehearse(model, items, rng)
        if self.reward.differentiable:  # others read values, and a plan has none
            self.reward.score(images, items)
        zero = torch.zeros(len(items), device=model.device)
        made = {**made, "advantage": zero, "kept": zero}
        return [Rollout(p, {k: v[i] for k, v in made.items()}) for i, p in enumerate(items)]

    def state(self) -> dict[str, Any]:
        return {"queries": self._queries, "collections": self._done, "history": self._judge.history}

    def restore(self, state: Mapping[str, Any]) -> None:
        learned = convert(state, _Learned, "objective in state.json", "remove the checkpoint")
        self._queries, self._done = learned.queries, learned.collections
        self._judge.history = OrderedDict(learned.history)

    def row_shapes(self, model: TextToImageModel) -> dict[str, Sequence[int]]:
        return {"advantage": (), "kept": ()}

    def _latent_shape(self, model: TextToImageModel) -> tuple[int, int, int]:
        return model.latent_shape(*image_size(model, self.sampler))

    def times(self, model: TextToImageModel) -> Sequence[float]:
        """Return the times of a rollout."""
        return rollout_times(model, self.sampler, *image_size(model, self.sampler))

    def start(self, model: TextToImageModel, rng: Rng) -> Latents:
        """Return the noise that images start from."""
        return rng.normal(*self._latent_shape(model), device=model.device)

    def sampled(self, model: TextToImageModel, prompts: Sequence[str], rng: Rng) -> Latents:
        """Return latents of new images, sampled as the settings of the sampler say."""
        with model.rolling_out():
            policy, start = self.denoiser(model, prompts, guided=True), self.start(model, rng)
            solver, eta = cast(Solver, self.sampler.solver), self.sampler.eta
            times = self.times(model)
            return sample(policy, model.process, start, times, solver=solver, eta=eta, rng=rng).x

    def denoiser(
        self,
        model: TextToImageModel,
        prompts: Sequence[str],
        role: Role = "policy",
        *,
        guided: bool,
    ) -> Denoiser:
        """Return a denoiser of prompts; networks with embedded guidance get it in any case."""
        sampler = self.sampler
        found = encode_guided(model, prompts, sampler, role, guided=guided)
        if guided:
            return guided_denoiser(model, found, sampler, role)
        return model.denoiser(found.cond, guidance_scale=sampler.guidance_scale, role=role)

    def finished(
        self,
        model: TextToImageModel,
        batch: Rows,
        reading: Reading,
        losses: Float[Tensor, " b"],
        metrics: Mapping[str, Tensor],
        share: float,
    ) -> Loss:
        """Return a piece: its share of the mean loss of the rows that are kept, and of the KL."""
        kept = column(batch, "kept", losses.device)
        value = share * (losses * kept).mean()
        found = {name: share * metric for name, metric in metrics.items()}
        if self.config.kl_coeff:
            role = partial(self._role, model, [row.prompt for row in batch])
            distance = kl(model, [reading], role, cast(KlForm, self.config.kl_form))
            found["kl"] = share * distance
            value = value + self.config.kl_coeff * found["kl"]
        found["loss"] = value
        return Loss(value, {name: metric.detach() for name, metric in found.items()})

    def _role(self, model: TextToImageModel, prompts: Sequence[str], role: Role) -> Denoiser:
        return self.denoiser(model, prompts, role, guided=self.guided)


def column(
    batch: Rows, name: str, device: torch.device, index: int | None = None
) -> Float[Tensor, "b *d"]:
    """Return a tensor of all rows on a device; or of each only the entry at an index."""
    values = [row.tensors[name] for row in batch]
    return torch.stack(values if index is None else [value[index] for value in values]).to(device)
