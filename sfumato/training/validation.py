"""Validation: pairs (tuned, base) of fixed prompts and fixed noise, each with its reward."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import TrainConfig
from sfumato.diffusion.randomness import derive
from sfumato.images import save_image
from sfumato.models.generate import generate_in_batches
from sfumato.models.model import TextToImageModel
from sfumato.rewards.reward import Reward
from sfumato.training.distribution import Distribution
from sfumato.training.folder import RunFolder, new_folder
from sfumato.training.tracking import Trackers


@dataclass(frozen=True)
class Pictures:
    """Images and their rewards, on the CPU."""

    images: Float[Tensor, "b 3 H W"]
    rewards: Float[Tensor, " b"]


@final
class Validation:
    """Makes the same images at every validation: prompt i always starts from noise i.

    Args:
        prompts: one per image.
        reward: scores them, each with its own prompt.
    """

    def __init__(
        self,
        config: TrainConfig,
        prompts: Sequence[str],
        reward: Reward,
        distribution: Distribution,
    ) -> None:
        self._config = config
        self._prompts = list(prompts)
        self._seeds = [derive(config.validation.seed, i) for i in range(len(prompts))]
        self._reward = reward
        self._distribution = distribution
        self._base: Pictures | None = None

    def run(
        self, model: TextToImageModel, step: int, folder: RunFolder, trackers: Trackers
    ) -> dict[str, float]:
        """Make and record the pairs; return the mean rewards of both sides."""
        if self._base is None:
            self._base = self._pictures(model, "base")
        tuned = self._pictures(model, "draft")
        metrics = {
            "validation/reward": tuned.rewards.mean().item(),
            "validation/reward_base": self._base.rewards.mean().item(),
        }
        if self._distribution.is_main:
            self._write(folder, step, tuned)
            pairs = torch.cat([tuned.images, self._base.images], dim=3)
            captions = [
                f"{prompt} | tuned {a:.3f} | base {b:.3f}"
                for prompt, a, b in zip(
                    self._prompts, tuned.rewards, self._base.rewards, strict=True
                )
            ]
            trackers.images(step, "validation/tuned_base", pairs, captions)
        return metrics

    @torch.no_grad()
    def _pictures(self, model: TextToImageModel, schedule: str) -> Pictures:
        """Make this process's share; all make equally many, as FSDP's exchanges need it."""
        rank, world = self._distribution.rank, self._distribution.world
        total = len(self._prompts)
        mine = [i % total for i in range(rank, -(-total // world) * world, world)]
        prompts = [self._prompts[i] for i in mine]
        seeds = [self._seeds[i] for i in mine]
        size = self._config.training.micro_batch_size
        with self._distribution.autocast():
            images = generate_in_batches(
                model, prompts, seeds, self._config.sampler, size, schedule=schedule
            )
            rewards = torch.cat(
                [
                    self._reward(images[i : i + size].to(model.device), prompts[i : i + size])
                    .float()
                    .cpu()
                    for i in range(0, len(prompts), size)
                ]
            )
        gathered = self._distribution.gather(list(zip(mine, images, rewards, strict=True)))
        rows = {index: (image, reward) for index, image, reward in gathered}
        return Pictures(
            torch.stack([rows[i][0] for i in range(total)]),
            torch.stack([rows[i][1] for i in range(total)]),
        )

    def _write(self, folder: RunFolder, step: int, tuned: Pictures) -> None:
        assert self._base is not None
        lines = []
        with new_folder(folder.samples(step)) as place:
            for i, prompt in enumerate(self._prompts):
                for name, pictures in (("tuned", tuned), ("base", self._base)):
                    save_image(pictures.images[i], place / f"{i:03d}-{name}.png")
                record = {
                    "index": i,
                    "prompt": prompt,
                    "seed": self._seeds[i],
                    "reward_tuned": tuned.rewards[i].item(),
                    "reward_base": self._base.rewards[i].item(),
                }
                lines.append(json.dumps(record) + "\n")
            (place / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
